"""bn_act beside its numbers: bits, gradients where they are asked for, tracing, and what it refuses."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dwa_fast import ops
from dwa_fast.ops.activation import Activation
from dwa_fast.reference import ops as reference
from tests.ops.conftest import LEVELS
from tests.ops.layers import DTYPES, EPS, LAYOUTS, VARIANTS, Inputs, error, extension, make, make_join, run


@pytest.mark.parametrize("shape", [(5, 67, 9, 7), (6, 64, 32, 32)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("skip", "activation"), VARIANTS)
def test_same_bits_for_any_number_of_threads(shape: tuple[int, ...], dtype: torch.dtype, skip: bool, activation: Activation) -> None:
    inputs = make(shape, dtype, skip=skip, activation=activation)
    results = []
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        results.append(run(ops.bn_act, inputs))
    for result in results[1:]:
        assert all(torch.equal(result[name], results[0][name]) for name in result)


def test_same_bits_again(device: torch.device) -> None:
    inputs = make((6, 48, 16, 16), torch.bfloat16, skip=True, activation="relu", device=device)
    first, second = run(ops.bn_act, inputs), run(ops.bn_act, inputs)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("used", ["z", "sums"])
def test_one_result_may_go_unused(used: str, device: torch.device) -> None:
    inputs = make((3, 16, 5, 5), skip=True, activation="relu", device=device)
    doubles = {name: value.double() if isinstance(value, Tensor) else value for name, value in inputs.items()}
    gradients = []
    for operator, values in ((ops.bn_act, inputs), (reference.bn_act, doubles)):
        y = values["y"].clone().requires_grad_()
        z, sums = operator(**(values | {"y": y}))
        (z if used == "z" else sums).square().sum().backward()
        gradients.append(y.grad)
    assert error(*gradients) < 1e-6


@pytest.mark.parametrize("activation", ["none", "relu", "silu"])
def test_only_the_skip_needs_a_gradient(activation: Activation, device: torch.device) -> None:
    inputs = make((3, 16, 5, 5), skip=True, activation=activation, device=device)
    expected = run(reference.bn_act, inputs, double=True)["skip"]
    inputs["skip"].requires_grad_()
    z, _ = ops.bn_act(**inputs)
    z.backward(torch.randn(z.shape, generator=torch.Generator().manual_seed(1)).to(z))
    assert error(inputs["skip"].grad, expected) < 1e-6
    assert inputs["y"].grad is None


@pytest.mark.parametrize("activation", ["none", "relu", "silu"])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", LEVELS)
def test_gradients_of_two_uses(
    level: str, dtype: torch.dtype, skip: bool, activation: Activation, use_level: Callable[[str], None]
) -> None:
    """They are added as PyTorch adds them, bit for bit; one of them may be missing."""
    use_level(level)
    y, added = (torch.randn(3, 67, 5, 4).to(dtype).requires_grad_() for _ in range(2))
    vectors = [torch.randn(67), torch.rand(67) + 0.1, torch.randn(67).requires_grad_(), torch.randn(67).requires_grad_()]
    layer = y, *vectors, EPS, added if skip else None, activation
    leaves = [y, *vectors[2:], *([added] if skip else [])]
    grad_z, grad_alias = torch.randn_like(y), torch.randn_like(y)
    grad_sums = torch.randn(2, 67)
    z, alias, sums = ops.bn_act(*layer, with_alias=True)
    assert z.data_ptr() == alias.data_ptr()
    found = torch.autograd.grad([z, alias, sums], leaves, [grad_z, grad_alias, grad_sums], retain_graph=True)
    alone = torch.autograd.grad([alias, sums], leaves, [grad_z, grad_sums])
    for result, gradient in ((found, grad_z + grad_alias), (alone, grad_z)):
        expected = torch.autograd.grad(ops.bn_act(*layer), leaves, [gradient, grad_sums])
        assert all(torch.equal(*each) for each in zip(result, expected, strict=True))


SAMPLED = [((3, 67, 5, 4), 2), ((2, 16, 1, 9), 2), ((9, 64, 12, 7), 2), ((2, 40, 7, 8), 3), ((2, 5, 3, 3), 4)]  # shapes and strides


@pytest.mark.parametrize(("skip", "activation"), [(True, "none"), (False, "relu"), (True, "relu"), (True, "silu"), (False, "leaky_relu")])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", LEVELS)
def test_an_alias_of_some_pixels(
    level: str, dtype: torch.dtype, skip: bool, activation: Activation, use_level: Callable[[str], None]
) -> None:
    """Its gradient, which may come alone, adds what it would add with zeros between the pixels, bit for bit."""
    use_level(level)
    for (shape, stride), layout in zip(SAMPLED, itertools.cycle(LAYOUTS)):
        inputs = make(shape, dtype, layout, skip=skip, activation=activation)
        leaves = [inputs[name].requires_grad_() for name in ("y", "weight", "bias", "skip", "slope") if inputs[name] is not None]
        z, alias, sums = ops.bn_act(**inputs, with_alias=True, alias_stride=stride)
        assert torch.equal(alias, z[:, :, ::stride, ::stride])
        assert alias.data_ptr() == z.data_ptr()
        grad_z, grad_alias, grad_sums = (torch.randn_like(each) for each in (z, alias, sums))
        whole = torch.zeros_like(z)
        whole[:, :, ::stride, ::stride] = grad_alias
        found = torch.autograd.grad([z, alias, sums], leaves, [grad_z, grad_alias, grad_sums], retain_graph=True)
        alone = torch.autograd.grad([alias, sums], leaves, [grad_alias, grad_sums])
        for result, gradient in ((found, grad_z + whole), (alone, whole)):
            expected = torch.autograd.grad(ops.bn_act(**inputs), leaves, [gradient, grad_sums])
            assert all(torch.equal(*each) for each in zip(result, expected, strict=True))


def test_gradients_of_an_alias_of_some_pixels_match_float64(device: torch.device) -> None:
    """Through the squares of both results, as the plain twin in float64 has them."""
    for operator, made in (("bn_act", make), ("bn_act_join", make_join)):
        inputs = made((3, 64, 9, 6), activation="relu", device=device)
        doubles = {name: value.double() if isinstance(value, Tensor) else value for name, value in inputs.items()}
        gradients = []
        for module, values in ((ops, inputs), (reference, doubles)):
            leaves = {name: values[name].clone().requires_grad_() for name in ("y", "weight", "bias")}
            z, alias, *_ = getattr(module, operator)(**(values | leaves), with_alias=True, alias_stride=2)
            loss = z.sin().sum() + alias.square().sum()
            gradients.append(torch.autograd.grad(loss, list(leaves.values())))
        for result, expected in zip(*gradients, strict=True):
            assert error(result, expected) < 1e-6


def test_gradients_of_any_strides(device: torch.device) -> None:
    """z.sum() hands back an expanded scalar, a flattening layer a contiguous tensor."""
    inputs = make((3, 16, 5, 5), activation="relu", device=device)
    for scale in (torch.ones((), device=device).expand(3, 16, 5, 5), torch.randn(3, 16, 5, 5, device=device)):
        y = inputs["y"].clone().requires_grad_()
        z, _ = ops.bn_act(**(inputs | {"y": y}))
        z.backward(scale)
        expected = scale * (z > 0) * (inputs["weight"] / (inputs["var"] + EPS).sqrt())[:, None, None]
        torch.testing.assert_close(y.grad, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("skip", "activation"), VARIANTS)
def test_gradients_of_weight_and_bias_only_where_asked(dtype: torch.dtype, skip: bool, activation: Activation) -> None:
    """Frozen weights cost nothing, and the other gradients keep every bit."""
    ops.load()
    inputs = make((3, 67, 7, 5), dtype, skip=skip, activation=activation)
    forward = tuple(inputs.values())
    layer = (*forward[:7], torch.ops.dwa_fast.bn_act_forward(*forward)[2], skip, *forward[7:])
    grad = torch.randn_like(inputs["y"])
    for grad_sums in (None, torch.randn(2, 67)):
        frozen = torch.ops.dwa_fast.bn_act_backward(grad, grad_sums, *layer)
        asked = torch.ops.dwa_fast.bn_act_backward(grad, grad_sums, *layer, True)
        assert (frozen[2].shape, asked[2].shape) == ((0,), (2, 67))
        assert (frozen[3].shape, asked[3].shape) == ((0,), (0 if inputs["slope"] is None else 67,))
        assert torch.equal(frozen[0], asked[0])
        assert torch.equal(frozen[1], asked[1])


def test_second_derivatives_are_refused() -> None:
    inputs = make((2, 4, 3, 3))
    inputs["y"].requires_grad_()
    z, _ = ops.bn_act(**inputs)
    (gradient,) = torch.autograd.grad(z.square().sum(), inputs["y"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


OPCHECKED = [  # every variant in one layout, and every layout with one of them, where time is short
    pytest.param(layout, *variant, marks=[pytest.mark.slow] * (layout != "channels_last" and variant != (True, "relu")))
    for layout in LAYOUTS
    for variant in VARIANTS
]


@pytest.mark.parametrize(("layout", "skip", "activation"), OPCHECKED)
def test_opcheck(layout: str, skip: bool, activation: Activation) -> None:
    ops.load()
    inputs = make((2, 19, 5, 4), torch.bfloat16, layout, skip=skip, activation=activation)
    forward = tuple(inputs.values())
    torch.library.opcheck(torch.ops.dwa_fast.bn_act_forward.default, forward)
    torch.library.opcheck(torch.ops.dwa_fast.bn_act_forward.default, (*forward, None, False))
    mask = torch.ops.dwa_fast.bn_act_forward(*forward)[2]
    shared = (*forward[:7], mask, skip, *forward[7:])
    grad = torch.randn_like(inputs["y"])
    torch.library.opcheck(torch.ops.dwa_fast.bn_act_backward.default, (grad, torch.randn(2, 19), *shared))
    torch.library.opcheck(torch.ops.dwa_fast.bn_act_backward.default, (grad, None, *shared))
    torch.library.opcheck(torch.ops.dwa_fast.bn_act_backward.default, (grad, None, *shared, True))
    torch.library.opcheck(torch.ops.dwa_fast.bn_act_backward.default, (grad, None, *shared, False, grad))
    torch.library.opcheck(torch.ops.dwa_fast.bn_act_backward.default, (grad, None, *shared, False, grad[:, :, ::2, ::2], 2))


@pytest.mark.parametrize("skip", [False, True])
def test_without_sums(skip: bool) -> None:
    """The result and its gradient keep their bits."""
    inputs = make((2, 19, 5, 4), skip=skip, activation="relu")
    inputs["y"].requires_grad_()
    z, sums = ops.bn_act(**inputs, with_sums=False)
    expected, _ = ops.bn_act(**inputs)
    assert torch.equal(z, expected)
    assert (sums.shape, sums.dtype) == ((0,), torch.float32)
    assert torch.equal(*(torch.autograd.grad(each.sum(), inputs["y"])[0] for each in (z, expected)))


def test_meta_tensors_have_the_right_shape() -> None:
    inputs = make((2, 8, 3, 3), torch.bfloat16, skip=True, activation="relu", device="meta")
    z, sums = ops.bn_act(**inputs)
    assert (z.shape, z.dtype, z.stride()) == (inputs["y"].shape, torch.bfloat16, inputs["y"].stride())
    assert (sums.shape, sums.dtype, sums.device.type) == ((2, 8), torch.float32, "meta")


WRONG: list[tuple[Inputs, type[Exception], str]] = [
    ({"y": [1.0]}, TypeError, "y must be a tensor, got list"),
    ({"y": torch.zeros(2, 4, 3, 3).double()}, TypeError, "y must be float32 or bfloat16 on cpu, got float64"),
    ({"y": torch.zeros(2, 4, 3, 3).half()}, TypeError, "y must be float32 or bfloat16 on cpu, got float16"),
    ({"y": torch.zeros(4, 3, 3)}, ValueError, "y must be [N, C, H, W], got shape (4, 3, 3)"),
    ({"mean": None}, TypeError, "mean must be a tensor, got NoneType"),
    ({"mean": torch.zeros(3)}, ValueError, "mean must be [C] with C = 4, got shape (3,)"),
    ({"var": torch.zeros(4).double()}, TypeError, "var must be float32, got float64"),
    ({"var": torch.zeros(4, 1)}, ValueError, "var must be [C] with C = 4, got shape (4, 1)"),
    ({"weight": torch.zeros(4).bfloat16()}, TypeError, "weight must be float32, got bfloat16"),
    ({"bias": torch.zeros(4, device="meta")}, ValueError, "bias must be on the device of y, cpu, got meta"),
    ({"mean": torch.zeros(4, requires_grad=True)}, ValueError, "bn_act is not differentiable in mean and var"),
    ({"skip": 1}, TypeError, "skip must be a tensor, got int"),
    ({"skip": torch.zeros(2, 4, 3, 3).bfloat16()}, TypeError, "skip must have the precision of y, float32, got bfloat16"),
    ({"skip": torch.zeros(2, 4, 1, 1)}, ValueError, "skip must have the shape of y, (2, 4, 3, 3), got (2, 4, 1, 1)"),
    ({"skip": torch.zeros(2, 4, 3, 3, device="meta")}, ValueError, "skip must be on the device of y, cpu, got meta"),
    ({"activation": True}, TypeError, "activation must be a name, got bool"),
    (
        {"activation": "tanh"},
        ValueError,
        "activation must be one of none, relu, relu6, silu, hardswish, gelu, gelu_tanh, leaky_relu, got 'tanh'",
    ),
    ({"slope": torch.zeros(1)}, ValueError, "slope belongs to the activation leaky_relu, got one with none"),
    ({"activation": "leaky_relu"}, ValueError, "the activation leaky_relu needs a slope, [1] or [C]"),
    ({"activation": "leaky_relu", "slope": 0.1}, TypeError, "slope must be a tensor, got float"),
    ({"activation": "leaky_relu", "slope": torch.zeros(1).double()}, TypeError, "slope must be float32, got float64"),
    ({"activation": "leaky_relu", "slope": torch.zeros(3)}, ValueError, "slope must be [1] or [C] with C = 4, got shape (3,)"),
    ({"activation": "leaky_relu", "slope": torch.zeros(4, device="meta")}, ValueError, "slope must be on the device of y, cpu, got meta"),
    ({"with_alias": True, "alias_stride": 0}, ValueError, "alias_stride must be at least 1, got 0"),
    ({"with_alias": True, "alias_stride": 2.0}, TypeError, "alias_stride must be an integer, got float"),
    ({"alias_stride": 2}, ValueError, "alias_stride belongs to with_alias, got 2 without it"),
    ({"leaves_skip": True}, ValueError, "leaves_skip belongs to a skip, got it without one"),
    ({"partials": torch.zeros(2, 1, 4), "with_sums": False}, ValueError, "partials belong to with_sums, got them without it"),
]


@pytest.mark.parametrize(("change", "kind", "message"), WRONG, ids=[row[-1] for row in WRONG])
def test_wrong_input(change: Inputs, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=re.escape(message)):
        ops.bn_act(**(make((2, 4, 3, 3)) | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": torch.zeros(4, 3, 3)}, r"y must be \[N, C, H, W\], got shape \[4, 3, 3\]"),
        ({"y": torch.zeros(2, 4, 3, 3).half()}, "y must be float32 or bfloat16 on a CPU, got Half"),
        ({"mean": torch.zeros(3)}, r"mean must be \[C\] with C = 4, got shape \[3\]"),
        ({"var": torch.zeros(4).double()}, "var must be float32, got Double"),
        ({"skip": torch.zeros(2, 4, 3, 3).bfloat16()}, "skip must have the precision of y, Float, got BFloat16"),
        ({"skip": torch.zeros(2, 4, 1, 1)}, r"skip must have the shape of y, \[2, 4, 3, 3\], got \[2, 4, 1, 1\]"),
        ({"activation": "tanh"}, "activation must be none, relu, relu6, silu, hardswish, gelu, gelu_tanh or leaky_relu, got tanh"),
        ({"slope": torch.zeros(1)}, "slope belongs to activation leaky_relu alone"),
        ({"activation": "leaky_relu"}, "activation leaky_relu needs a slope"),
        ({"activation": "leaky_relu", "slope": torch.zeros(3)}, r"slope must be \[1\] or \[C\] with C = 4, got shape \[3\]"),
        ({"activation": "leaky_relu", "slope": torch.zeros(1).double()}, "slope must be float32, got Double"),
    ],
)
def test_the_operator_checks_for_itself(change: Inputs, message: str) -> None:
    """Callers of torch.ops.dwa_fast pass by the checks in Python: wrong input is refused in C++ too."""
    ops.load()
    with pytest.raises(RuntimeError, match=message):
        torch.ops.dwa_fast.bn_act_forward(*(make((2, 4, 3, 3)) | change).values())


def test_a_foreign_mask_is_refused() -> None:
    ops.load()
    inputs = list(make((2, 4, 3, 3)).values())[:6]
    with pytest.raises(RuntimeError, match=r"mask must be what bn_act_forward returned, uint8 \[9\], got Byte \[8\]"):
        torch.ops.dwa_fast.bn_act_backward(inputs[0], None, *inputs, None, torch.zeros(8, dtype=torch.uint8), True, "relu", None)


@pytest.mark.parametrize(
    ("sampled", "stride", "message"),
    [
        ((2, 4, 3, 3), 2, r"grad_again must have the shape of y, \[2, 4, 2, 2\], got \[2, 4, 3, 3\]"),
        ((2, 4, 3, 3), 0, "alias_stride must be at least 1, got 0"),
    ],
)
def test_a_foreign_gradient_of_an_alias_is_refused(sampled: tuple[int, ...], stride: int, message: str) -> None:
    ops.load()
    inputs, none = list(make((2, 4, 3, 3)).values())[:6], torch.zeros(0, dtype=torch.uint8)
    behind = None, none, False, "relu", None, False, torch.zeros(sampled), stride
    with pytest.raises(RuntimeError, match=message):
        torch.ops.dwa_fast.bn_act_backward(inputs[0], None, *inputs, *behind)


@pytest.mark.parametrize(
    ("behind", "message"),
    [
        ((False,), "on a CPU gradients are whole: with_skip must be true"),
        ((True, torch.zeros(2, 4, 3, 3)), "on a CPU gradients are whole: grad_later and later_mask must not be given"),
        ((True, None, torch.zeros(9, dtype=torch.uint8)), "on a CPU gradients are whole: grad_later and later_mask must not be given"),
    ],
)
def test_a_cpu_leaves_no_gradient_unwritten(behind: tuple[object, ...], message: str) -> None:
    ops.load()
    inputs, mask = list(make((2, 4, 3, 3)).values())[:6], torch.zeros(9, dtype=torch.uint8)
    arguments = inputs[0], None, *inputs, None, mask, True, "relu", None, False, None, 1, True, *behind
    with pytest.raises(RuntimeError, match=message):
        torch.ops.dwa_fast.bn_act_backward(*arguments)


def test_leaving_the_gradient_of_a_skip_is_refused_on_a_cpu() -> None:
    first, second = make((2, 4, 3, 3), activation="relu"), make((2, 4, 3, 3), skip=True, activation="relu")
    first["y"].requires_grad_()
    _, alias, _ = ops.bn_act(**first, with_alias=True)
    z, _ = ops.bn_act(**(second | {"skip": alias}), leaves_skip=True)
    with pytest.raises(RuntimeError, match="on a CPU gradients are whole: with_skip must be true"):
        z.sum().backward()


def test_the_skip_is_needed_again() -> None:
    ops.load()
    inputs, none = list(make((2, 4, 3, 3)).values())[:6], torch.zeros(0, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="activation silu behind a skip needs the skip again"):
        torch.ops.dwa_fast.bn_act_backward(inputs[0], None, *inputs, None, none, True, "silu", None)


def test_levels_have_names() -> None:
    assert ops.cpu_level() in LEVELS
    with pytest.raises(ValueError, match="level must be baseline, avx2, avx512 or avx512_bf16, got avx1024"):
        extension().set_cpu_level("avx1024")


@pytest.mark.gpu
def test_captured_in_a_cuda_graph() -> None:
    """A replay equals a call, bit for bit: nothing in the operator waits or allocates outside the graph."""
    inputs = make((8, 64, 16, 16), torch.bfloat16, skip=True, activation="relu", device="cuda")
    called = run(ops.bn_act, inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        z, sums = ops.bn_act(**inputs)
    graph.replay()
    assert torch.equal(z, called["z"])
    assert torch.equal(sums, called["sums"])
