"""bn_act_join: two BatchNorm layers, their sum's activation and both layers' moments in one pass, in C++, against float64."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dwa_fast import ops
from dwa_fast.ops.activation import ACTIVATIONS, Activation
from dwa_fast.reference import ops as reference
from tests.ops.conftest import LEVELS
from tests.ops.layers import DTYPES, LAYOUTS, SHAPES, SMALL, Inputs, assert_as_good_as_pytorch, error, make_join, run

LAYERS = "y", "mean", "var", "weight", "bias", "eps", "skip", "skip_mean", "skip_var", "skip_weight", "skip_bias", "skip_eps"


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set_matches_float64(
    level: str, dtype: torch.dtype, activation: Activation, use_level: Callable[[str], None]
) -> None:
    """The large shapes without an activation and with a ReLU: the others differ by element alone."""
    use_level(level)
    layouts = itertools.cycle(LAYOUTS)
    for shape in SHAPES if activation in ("none", "relu") else SMALL:
        inputs = make_join(shape, dtype, next(layouts), activation=activation)
        assert_as_good_as_pytorch(inputs, operator="bn_act_join")
        assert_as_good_as_pytorch(inputs, moments=False, operator="bn_act_join")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_matches_float64_on_any_device(activation: Activation, dtype: torch.dtype, device: torch.device) -> None:
    for shape, layout in zip(SMALL, itertools.cycle(LAYOUTS)):
        assert_as_good_as_pytorch(make_join(shape, dtype, layout, activation=activation, device=device), operator="bn_act_join")


@pytest.mark.parametrize("missing", [("weight", "bias"), ("bias",), ("skip_weight", "skip_bias"), ("skip_bias",), ("bias", "skip_bias")])
def test_without_some_weights_and_biases(missing: tuple[str, ...], device: torch.device) -> None:
    inputs = make_join((4, 24, 6, 6), activation="relu", device=device) | dict.fromkeys(missing)
    assert_as_good_as_pytorch(inputs, operator="bn_act_join")


def test_one_slope_for_all_channels() -> None:
    assert_as_good_as_pytorch(make_join((3, 20, 6, 5), activation="leaky_relu", slopes=1), operator="bn_act_join")


@pytest.mark.parametrize("mixed", [("contiguous", "channels_last"), ("slice", "contiguous")])
def test_gradients_have_the_strides_of_what_they_belong_to(mixed: tuple[str, str]) -> None:
    one, other = (make_join((3, 20, 6, 5), layout=layout, activation="relu") for layout in mixed)
    found = run(ops.bn_act_join, one | {"skip": other["skip"]})
    assert found["y"].stride() == found["z"].stride() == torch.empty_like(one["y"]).stride()
    assert found["skip"].stride() == torch.empty_like(other["skip"]).stride()


@pytest.mark.parametrize("activation", ["none", "relu", "silu"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", LEVELS)
def test_gradients_of_two_uses(level: str, dtype: torch.dtype, activation: Activation, use_level: Callable[[str], None]) -> None:
    """They are added as PyTorch adds them, bit for bit; one of them may be missing."""
    use_level(level)
    inputs = make_join((3, 67, 5, 4), dtype, activation=activation)
    leaves = [inputs[name].requires_grad_() for name in ("y", "weight", "bias", "skip", "skip_weight", "skip_bias")]
    grad_z, grad_alias, *grad_sums = torch.randn_like(inputs["y"]), torch.randn_like(inputs["y"]), torch.randn(2, 67), torch.randn(2, 67)
    z, alias, *sums = ops.bn_act_join(**inputs, with_alias=True)
    assert z.data_ptr() == alias.data_ptr()
    found = torch.autograd.grad([z, alias, *sums], leaves, [grad_z, grad_alias, *grad_sums], retain_graph=True)
    alone = torch.autograd.grad([alias, *sums], leaves, [grad_z, *grad_sums])
    for result, gradient in ((found, grad_z + grad_alias), (alone, grad_z)):
        expected = torch.autograd.grad(ops.bn_act_join(**inputs), leaves, [gradient, *grad_sums])
        assert all(torch.equal(*each) for each in zip(result, expected, strict=True))


@pytest.mark.parametrize("activation", ["none", "relu", "leaky_relu"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", LEVELS)
def test_an_alias_of_some_pixels(level: str, dtype: torch.dtype, activation: Activation, use_level: Callable[[str], None]) -> None:
    """Its gradient, which may come alone, adds what it would add with zeros between the pixels, bit for bit."""
    use_level(level)
    for (shape, stride), layout in zip([((3, 67, 5, 4), 2), ((9, 64, 12, 7), 2), ((2, 40, 7, 8), 3)], LAYOUTS, strict=True):
        inputs = make_join(shape, dtype, layout, activation=activation)
        leaves = [inputs[name].requires_grad_() for name in ("y", "weight", "bias", "skip", "skip_weight", "skip_bias")]
        z, alias, *sums = ops.bn_act_join(**inputs, with_alias=True, alias_stride=stride)
        assert torch.equal(alias, z[:, :, ::stride, ::stride])
        grad_z, grad_alias, *grad_sums = (torch.randn_like(each) for each in (z, alias, *sums))
        whole = torch.zeros_like(z)
        whole[:, :, ::stride, ::stride] = grad_alias
        found = torch.autograd.grad([z, alias, *sums], leaves, [grad_z, grad_alias, *grad_sums], retain_graph=True)
        alone = torch.autograd.grad([alias, *sums], leaves, [grad_alias, *grad_sums])
        for result, gradient in ((found, grad_z + whole), (alone, whole)):
            expected = torch.autograd.grad(ops.bn_act_join(**inputs), leaves, [gradient, *grad_sums])
            assert all(torch.equal(*each) for each in zip(result, expected, strict=True))


@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])
def test_results_may_go_unused(used: tuple[int, ...], device: torch.device) -> None:
    inputs = make_join((3, 16, 5, 5), activation="relu", device=device)
    doubles = {name: value.double() if isinstance(value, Tensor) else value for name, value in inputs.items()}
    gradients = []
    for operator, values in ((ops.bn_act_join, inputs), (reference.bn_act_join, doubles)):
        leaves = [values[name].clone().requires_grad_() for name in ("y", "skip")]
        results = operator(**(values | dict(zip(("y", "skip"), leaves, strict=True))))
        gradients.append(torch.autograd.grad(sum(results[i].square().sum() for i in used), leaves, materialize_grads=True))
    for result, expected in zip(*gradients, strict=True):
        assert error(result, expected) < 1e-6


def test_gradients_only_where_asked() -> None:
    """Frozen weights cost nothing, and the other gradients keep every bit; the two biases' gradients are two tensors."""
    ops.load()
    inputs = make_join((3, 67, 7, 5), activation="leaky_relu")
    layers, grad = [inputs[name] for name in (*LAYERS, "activation", "slope")], torch.randn_like(inputs["y"])
    for grad_sums in ((None, None), (torch.randn(2, 67), None), (torch.randn(2, 67), torch.randn(2, 67))):
        frozen = torch.ops.dwa_fast.bn_act_join_backward(grad, *grad_sums, *layers)
        asked = torch.ops.dwa_fast.bn_act_join_backward(grad, *grad_sums, *layers, True)
        assert [each.shape for each in frozen[2:]] == [(0,), (0,)]
        assert [each.shape for each in asked[2:]] == [(3, 67), (67,)]
        assert torch.equal(frozen[0], asked[0])
        assert torch.equal(frozen[1], asked[1])
    leaves = [inputs[name].requires_grad_() for name in ("bias", "skip_bias")]
    first, second = torch.autograd.grad(ops.bn_act_join(**inputs)[0].sum(), leaves)
    assert torch.equal(first, second)
    assert first.data_ptr() != second.data_ptr()


@pytest.mark.parametrize("shape", [(0, 4, 4, 4), (2, 0, 4, 4)])
def test_nothing_to_read(shape: tuple[int, ...]) -> None:
    inputs = make_join(shape, activation="relu")
    leaves = [inputs[name].requires_grad_() for name in ("y", "weight", "skip_weight")]
    z, *sums = ops.bn_act_join(**inputs)
    assert z.shape == shape
    assert not any(each.any() for each in (*sums, *torch.autograd.grad(z.sum(), leaves)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_same_bits_for_any_number_of_threads(dtype: torch.dtype, activation: Activation) -> None:
    inputs, results = make_join((6, 67, 32, 31), dtype, activation=activation), []
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        results.append(run(ops.bn_act_join, inputs))
    assert all(torch.equal(result[name], results[0][name]) for result in results[1:] for name in result)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("activation", [each for each in ACTIVATIONS if each != "hardswish"])
def test_nan_and_infinity_propagate(level: str, activation: Activation, use_level: Callable[[str], None]) -> None:
    use_level(level)
    inputs = make_join((2, 35, 4, 5), activation=activation)
    inputs["y"][0, 3, 1, 2], inputs["y"][1, 17, 0, 0], inputs["skip"][1, 34, 3, 4] = math.nan, math.inf, -math.inf
    ours, plain = run(ops.bn_act_join, inputs), run(reference.bn_act_join, inputs, double=True)
    for name, result in ours.items():
        assert torch.equal(result.isnan(), plain[name].isnan()), name
        assert torch.equal(result.isinf(), plain[name].isinf()), name


@pytest.mark.parametrize("level", LEVELS)
def test_zero_is_not_let_through(level: str, use_level: Callable[[str], None]) -> None:
    """Both summands cancel exactly, or are 0 or −0: the gradient is 0 there, as in PyTorch."""
    use_level(level)
    y = torch.tensor([0.0, -0.0, 1.0, -1.0, 2.0, 3.0]).view(1, 1, 1, 6).requires_grad_()
    skip = torch.tensor([0.0, -0.0, -1.0, 1.0, 1.0, -4.0]).view(1, 1, 1, 6).requires_grad_()
    unit = torch.zeros(1), torch.ones(1), None, None, 0.0
    z, *_ = ops.bn_act_join(y, *unit, skip, *unit, "relu")
    for gradient in torch.autograd.grad(z.sum(), [y, skip]):
        assert gradient.flatten().tolist() == [0, 0, 0, 0, 1, 0]


@pytest.mark.parametrize("activation", ["none", "relu", "leaky_relu"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout: str, activation: Activation) -> None:
    ops.load()
    inputs = make_join((2, 19, 5, 4), torch.bfloat16, layout, activation=activation)
    layers, grad = [inputs[name] for name in (*LAYERS, "activation", "slope")], torch.randn_like(inputs["y"])
    for behind in ((), (None, None, False)):
        torch.library.opcheck(torch.ops.dwa_fast.bn_act_join_forward.default, (*layers, *behind))
    for behind in ([], [True], [False, grad], [True, grad[:, :, ::2, ::2], 2]):
        for grad_sums in ((torch.randn(2, 19), torch.randn(2, 19)), (None, None)):
            torch.library.opcheck(torch.ops.dwa_fast.bn_act_join_backward.default, (grad, *grad_sums, *layers, *behind))


def test_without_sums() -> None:
    """The result and its gradient keep their bits."""
    inputs = make_join((2, 19, 5, 4), activation="relu")
    inputs["y"].requires_grad_()
    z, *sums = ops.bn_act_join(**inputs, with_sums=False)
    expected, *_ = ops.bn_act_join(**inputs)
    assert torch.equal(z, expected)
    assert [(each.shape, each.dtype) for each in sums] == [((0,), torch.float32)] * 2
    assert torch.equal(*(torch.autograd.grad(each.sum(), inputs["y"])[0] for each in (z, expected)))


def test_a_cpu_leaves_no_gradient_unwritten() -> None:
    ops.load()
    inputs = make_join((2, 4, 3, 3))
    layers, mask = [inputs[name] for name in LAYERS], torch.zeros(9, dtype=torch.uint8)
    arguments = inputs["y"], None, None, *layers, "relu", None, False, None, 1
    for left in ((inputs["y"], None), (None, mask)):
        with pytest.raises(RuntimeError, match="on a CPU gradients are whole: grad_later and later_mask must not be given"):
            torch.ops.dwa_fast.bn_act_join_backward(*arguments, *left)


def test_meta_tensors_have_the_right_shape() -> None:
    inputs = make_join((2, 8, 3, 3), torch.bfloat16, activation="relu", device="meta")
    z, *sums = ops.bn_act_join(**inputs)
    assert (z.shape, z.dtype, z.stride()) == (inputs["y"].shape, torch.bfloat16, inputs["y"].stride())
    assert [(each.shape, each.dtype) for each in sums] == [((2, 8), torch.float32)] * 2


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"y": [1.0]}, TypeError, "y must be a tensor, got list"),
        ({"mean": torch.zeros(3)}, ValueError, "mean must be [C] with C = 4, got shape (3,)"),
        ({"skip": None}, TypeError, "skip must be a tensor, got NoneType"),
        ({"skip": torch.zeros(2, 4, 1, 1)}, ValueError, "skip must have the shape of y, (2, 4, 3, 3), got (2, 4, 1, 1)"),
        ({"skip": torch.zeros(2, 4, 3, 3).bfloat16()}, TypeError, "skip must have the precision of y, float32, got bfloat16"),
        ({"skip_mean": None}, TypeError, "skip_mean must be a tensor, got NoneType"),
        ({"skip_var": torch.zeros(4).double()}, TypeError, "skip_var must be float32, got float64"),
        ({"skip_weight": torch.zeros(5)}, ValueError, "skip_weight must be [C] with C = 4, got shape (5,)"),
        ({"skip_bias": torch.zeros(4, device="meta")}, ValueError, "skip_bias must be on the device of y, cpu, got meta"),
        ({"skip_mean": torch.zeros(4, requires_grad=True)}, ValueError, "not differentiable in mean and var"),
        ({"activation": "tanh"}, ValueError, "activation must be one of"),
        ({"partials": torch.zeros(2, 1, 4)}, ValueError, "partials and skip_partials must be given together"),
    ],
)
def test_wrong_input(change: Inputs, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=re.escape(message)):
        ops.bn_act_join(**make_join((2, 4, 3, 3)) | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": torch.zeros(4, 3, 3)}, r"y must be \[N, C, H, W\], got shape \[4, 3, 3\]"),
        ({"mean": torch.zeros(3)}, r"mean must be \[C\] with C = 4, got shape \[3\]"),
        ({"skip": torch.zeros(2, 4, 1, 1)}, r"skip must have the shape of y, \[2, 4, 3, 3\], got \[2, 4, 1, 1\]"),
        ({"skip_var": torch.zeros(4).double()}, "skip_var must be float32, got Double"),
        ({"skip_bias": torch.zeros(3)}, r"skip_bias must be \[C\] with C = 4, got shape \[3\]"),
        ({"slope": torch.zeros(1)}, "slope belongs to activation leaky_relu alone"),
    ],
)
def test_the_operator_checks_for_itself(change: Inputs, message: str) -> None:
    ops.load()
    with pytest.raises(RuntimeError, match=message):
        torch.ops.dwa_fast.bn_act_join_forward(*(make_join((2, 4, 3, 3)) | change).values())
