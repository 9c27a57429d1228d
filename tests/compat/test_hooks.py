"""BNFeatureHook: values and gradients of the published computation, in eager loops of any layout and precision."""

from __future__ import annotations

import copy
import logging
import re
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from dwa_fast import InputError
from dwa_fast.compat import BNFeatureHook, ViT_BNFeatureHook
from dwa_fast.engine.backend import operators_for
from tests.compat.layers import Plain, as_published, batchnorms, buffers, error, gradient, layer, losses
from tests.nets import real_images, small_teacher


@pytest.mark.parametrize("r_var", [None, 11.0])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-6), (torch.float64, 1e-14), (torch.bfloat16, 4e-3)])
def test_value_and_gradient_are_the_published_ones(
    dtype: torch.dtype, rounding: float, layout: torch.memory_format, r_var: float | None, device: torch.device
) -> None:
    """Errors against float64 are at most twice those of the definition in the same precision, or a few roundings."""
    module = layer(20, device, dtype)
    hook = BNFeatureHook(module) if r_var is None else BNFeatureHook(module, Namespace(r_var=r_var))
    y = torch.randn(5, 20, 6, 7).to(device, dtype).contiguous(memory_format=layout).requires_grad_()
    output = module(y)
    exact = y.detach().double().requires_grad_()
    expected = as_published(exact, module, r_var or 1.0)
    plain = y.detach().requires_grad_()
    published = as_published(plain, module, r_var or 1.0)
    assert torch.equal(output, nn.functional.batch_norm(y, *buffers(module), eps=module.eps))
    assert hook.r_feature.shape == ()
    assert error(hook.r_feature, expected) <= max(2 * error(published, expected), 2e-7)
    wanted = gradient(expected, exact)
    assert error(gradient(hook.r_feature, y), wanted) <= max(2 * error(gradient(published, plain), wanted), rounding)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "DataParallel"])
def test_a_whole_network(wrapped: bool, dtype: torch.dtype, device: torch.device) -> None:
    """Gradients of the images through every layer; the weights have gradients too, as in DWA's loop."""
    network = small_teacher().to(device, dtype)
    called = nn.DataParallel(network, device_ids=[0] if torch.cuda.is_available() else None) if wrapped else network
    images = real_images(6)[0].to(device, dtype)
    results = []
    for kind in (Plain, BNFeatureHook):
        hooks = [kind(module) for module in batchnorms(network)]
        leaf = images.clone().requires_grad_()
        logits, matching = losses(called, leaf, hooks)
        results.append([logits, matching, *torch.autograd.grad(logits.square().sum() + matching, [leaf, *network.parameters()])])
        for hook in hooks:
            hook.hook.remove()
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    for ours, published in zip(*results, strict=True):
        assert error(published, ours.double()) < tolerance
    assert torch.equal(results[0][0], results[1][0])  # the forward pass is not touched


@pytest.mark.parametrize(
    ("kind", "shape"),
    [(nn.BatchNorm1d, (5, 20)), (nn.BatchNorm1d, (5, 20, 7)), (nn.BatchNorm3d, (5, 20, 2, 3, 4))],
    ids=["[N, C]", "[N, C, L]", "[N, C, D, H, W]"],
)
def test_layers_of_other_dimensions(kind: type[nn.Module], shape: tuple[int, ...], device: torch.device) -> None:
    module: Any = kind(20).eval()
    module.running_mean, module.running_var = torch.randn(20), torch.rand(20) + 0.3
    hook = BNFeatureHook(module.to(device))
    y = torch.randn(shape, device=device, requires_grad=True)
    module(y)
    exact = y.detach().double().requires_grad_()
    expected = as_published(exact, module)
    assert error(hook.r_feature, expected) < 1e-6
    assert error(gradient(hook.r_feature, y), gradient(expected, exact)) < 1e-5


def test_in_train_mode_the_running_statistics_are_those_after_the_pass() -> None:
    module = layer().train()
    hook = BNFeatureHook(module)
    y = torch.randn(8, 6, 3, 3)
    module(y)
    assert error(hook.r_feature, as_published(y.double(), module)) < 1e-6


def test_the_gradient_of_a_distance_of_zero_is_zero() -> None:
    module = layer()
    y = torch.randn(4, 6, 5, 5)
    module.running_mean, module.running_var = y.mean((0, 2, 3)), y.var((0, 2, 3), unbiased=False)
    hook = BNFeatureHook(module)
    module(y.requires_grad_())
    assert gradient(hook.r_feature, y).isfinite().all()


def test_close_takes_it_off() -> None:
    module = layer()
    hook = BNFeatureHook(module)
    assert len(module._forward_hooks) == 1
    assert hook.r_feature is None
    module(torch.randn(2, 6, 3, 3))
    before = hook.r_feature
    hook.close()
    module(torch.randn(2, 6, 3, 3))
    assert hook.r_feature is before
    assert not module._forward_hooks


def test_batches_of_several_sizes_through_one_hook() -> None:
    module = layer()
    hook = BNFeatureHook(module)
    for shape in [(4, 6, 5, 5), (2, 6, 5, 5), (4, 6, 5, 5), (1, 6, 1, 2)]:
        y = torch.randn(shape)
        module(y)
        assert error(hook.r_feature, as_published(y.double(), module)) < 1e-6


def test_a_copied_network_has_hooks_of_its_own() -> None:
    """Also after a forward pass, whose result cannot be copied."""
    network = nn.Sequential(nn.Conv2d(1, 6, 3), layer())
    hook = BNFeatureHook(network[1])  # type: ignore[arg-type]
    network(torch.randn(2, 1, 5, 5))
    before = hook.r_feature
    twin = copy.deepcopy(network)
    twin(torch.randn(2, 1, 5, 5))
    (bound,) = twin[1]._forward_hooks.values()
    assert bound.__self__ is not hook
    assert bound.__self__.r_feature != before
    assert hook.r_feature is before
    bound.__self__.close()
    assert not twin[1]._forward_hooks
    assert network[1]._forward_hooks


def test_several_devices_are_refused() -> None:
    """What nn.DataParallel hands to each device, made without one."""
    module = layer()
    BNFeatureHook(module)
    replica = module._replicate_for_data_parallel()
    replica.weight = replica.bias = None
    with pytest.raises(InputError, match=r"cannot follow nn\.DataParallel over several devices: every replica sees only its part"):
        replica(torch.randn(2, 6, 3, 3))


def test_without_operators_plain_ones_measure_aloud(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("dwa_fast.ops.cause", lambda: "the extension is not built")
    module = layer()
    hook = BNFeatureHook(module)
    y = torch.randn(3, 6, 4, 4)
    for _ in range(2):
        module(y)
    assert error(hook.r_feature, as_published(y.double(), module)) < 1e-6
    assert [record.levelno for record in caplog.records if record.levelno > logging.INFO] == [logging.WARNING]
    assert "measured with plain PyTorch, not by the fused operators: the extension is not built" in caplog.text


def test_double_precision_is_plain_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    module = layer(dtype=torch.float64)
    BNFeatureHook(module)
    module(torch.randn(2, 6, 3, 3, dtype=torch.float64))
    assert "they do not compute in float64 on cpu" in caplog.text


def test_nothing_is_said_where_they_run(caplog: pytest.LogCaptureFixture, device: torch.device) -> None:
    module = layer(device=device)
    BNFeatureHook(module)
    module(torch.randn(2, 6, 3, 3, device=device))
    assert operators_for(torch.device(device), torch.float32).name == "fused"
    assert not [record for record in caplog.records if record.levelno > logging.INFO]


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNorm2d], ids=lambda kind: kind.__name__)
def test_every_layer_with_running_statistics_of_the_batch(kind: Callable[[int], nn.Module]) -> None:
    module: Any = kind(6).eval()
    module.running_mean, module.running_var = torch.randn(6), torch.rand(6) + 0.3
    hook = BNFeatureHook(module)
    y = torch.randn(5, 6, 4, 3, requires_grad=True)
    module(y)
    exact = y.detach().double().requires_grad_()
    expected = as_published(exact, module)
    assert error(hook.r_feature, expected) < 1e-6
    assert error(gradient(hook.r_feature, y), gradient(expected, exact)) < 1e-5


class WithLabels(nn.BatchNorm2d):
    """Layers of public code bases that are called with labels, or with one pair."""

    def forward(self, x: Any, labels: Tensor | None = None) -> Tensor:
        return nn.functional.relu(super().forward(x[0] if isinstance(x, tuple) else x))


CALLS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "by position": lambda module, y: module(y),
    "by name": lambda module, y: module(x=y),
    "with labels": lambda module, y: module(y, torch.arange(4)),
    "labels by name": lambda module, y: module(y, labels=torch.arange(4)),
    "in a pair": lambda module, y: module((y, torch.arange(4))),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_every_way_to_call_a_layer(call: Callable[[nn.Module, Tensor], Any]) -> None:
    """The input is measured, whatever the layer does with it."""
    module = WithLabels(6).eval()
    hook = BNFeatureHook(module)
    y = torch.randn(4, 6, 3, 3)
    call(module, y)
    assert error(hook.r_feature, as_published(y.double(), module)) < 1e-6


def test_statistics_of_the_last_pass() -> None:
    """As FD2's class has them: None before the first pass, then with gradients."""
    module = layer()
    hook = BNFeatureHook(module)
    assert (hook.r_feature, hook.mean, hook.var) == (None, None, None)
    y = torch.randn(5, 6, 4, 3, requires_grad=True)
    module(y)
    exact = y.detach().double().requires_grad_()
    flat = exact.transpose(0, 1).flatten(1)
    for ours, expected in ((hook.mean, flat.mean(1)), (hook.var, flat.var(1, unbiased=False))):
        assert ours is not None
        assert error(ours, expected) < 1e-6
        found, wanted = (
            torch.autograd.grad(each.square().sum(), leaf, retain_graph=True)[0] for each, leaf in ((ours, y), (expected, exact))
        )
        assert error(found, wanted) < 1e-5


def test_a_loss_over_hooks_that_no_pass_has_reached_fails_at_once() -> None:
    with pytest.raises(TypeError, match="NoneType"):
        sum(hook.r_feature * 10.0 for hook in [BNFeatureHook(layer())])


def test_features_of_a_transformer() -> None:
    """CDA's and DELT's hook: [B, N, C], statistics over B and N, also where N is C."""

    class Tokens(nn.BatchNorm1d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.transpose(1, 2)).transpose(1, 2)

    for tokens in (5, 6):
        module = Tokens(6).eval()
        module.running_mean, module.running_var = torch.randn(6), torch.rand(6) + 0.3
        hook = ViT_BNFeatureHook(module)
        y = torch.randn(3, tokens, 6, requires_grad=True)
        module(y)
        exact = y.detach().double().requires_grad_()
        expected = as_published(exact.transpose(1, 2), module)  # type: ignore[arg-type]
        assert error(hook.r_feature, expected) < 1e-6
        assert error(gradient(hook.r_feature, y), gradient(expected, exact)) < 1e-5
    with pytest.raises(InputError, match=re.escape("ViT_BNFeatureHook wants features [B, N, C], got shape (2, 6, 3, 3)")):
        hook.hook_fn(module, (torch.randn(2, 6, 3, 3),), None)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_first_pass_without_gradients_spoils_nothing(context: Callable[[], Any]) -> None:
    module = layer()
    hook = BNFeatureHook(module)
    y = torch.randn(4, 6, 3, 3)
    with context():
        module(y)
        first = float(hook.r_feature)
    leaf = y.clone().requires_grad_()
    module(leaf)
    exact = y.double().requires_grad_()
    expected = as_published(exact, module)
    assert first == pytest.approx(float(expected.detach()), rel=1e-6)
    assert error(gradient(hook.r_feature, leaf), gradient(expected, exact)) < 1e-5


def test_the_number_of_layers_is_said_at_the_first_pass(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    network = nn.Sequential(*(layer() for _ in range(3)))
    attached = [BNFeatureHook(module) for module in network]  # type: ignore[arg-type]
    closed = BNFeatureHook(layer())
    closed.close()
    assert not caplog.records
    for _ in range(2):
        network(torch.randn(2, 6, 3, 3))
    other = BNFeatureHook(layer(dtype=torch.float64))
    again = [BNFeatureHook(module) for module in network]  # type: ignore[arg-type]
    network(torch.randn(2, 6, 3, 3))
    said = [record.getMessage() for record in caplog.records if record.getMessage().startswith("hooks")]
    assert said == ["hooks: 3 BatchNorm layers, fused operators", "hooks: 4 BatchNorm layers, fused operators"]
    assert len([*attached, *again, other]) == 7
