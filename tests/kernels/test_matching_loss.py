"""matching_loss in Triton, interpreted on a CPU and real on a GPU, against its plain twin in float64."""

from __future__ import annotations

import importlib
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from dwa_fast.reference import ops as reference
from tests.kernels.cases import Launches, meta
from tests.kernels.support import assert_as_good_as_pytorch, captured, error

pytest.importorskip("triton", reason="this PyTorch comes without Triton")
kernel = importlib.import_module("dwa_fast.kernels.matching_loss")

RESNET_18 = [64] * 5 + [128] * 5 + [256] * 5 + [512] * 5
NETWORKS = [[1], [3, 1, 17], RESNET_18, [2048, 513, 512, 511], [2] * 257]  # more channels than a block, more layers than a block


class Network(NamedTuple):
    """The arguments of matching_loss."""

    sums: Tensor
    variances: Tensor
    channel_ptr: Tensor
    counts: Tensor
    weights: Tensor

    def double(self) -> Network:
        return Network(self.sums.double(), self.variances.double(), self.channel_ptr, self.counts, self.weights.double())


def network(channels: list[int], device: torch.device | str, spread: float = 0.3) -> Network:
    """Sums whose means are off by about `spread` standard deviations, and whose variances by that factor."""
    counts = torch.tensor([100 * (1 + index % 7) ** 2 for index in range(len(channels))], dtype=torch.int64)
    variances = torch.rand(sum(channels)) + 0.1
    n = counts.repeat_interleave(torch.tensor(channels, dtype=torch.int64))
    mean = spread * torch.randn(sum(channels))
    square = variances * (1 + spread * torch.rand(sum(channels))) + mean.square()
    channel_ptr = torch.tensor([0, *channels]).cumsum(0)
    weights = torch.tensor([10.0] + [1.0] * len(channels))[: len(channels)]
    return Network(*(tensor.to(device) for tensor in (torch.stack([mean * n, square * n]), variances, channel_ptr, counts, weights)))


def both_ways(given: Network, grad: Tensor, means: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    loss, norms = kernel.matching_loss_forward(*given, means)
    return loss, kernel.matching_loss_backward(grad, *given, norms, means), norms


def plainly(given: Network, grad: Tensor, means: Tensor | None = None) -> tuple[Tensor, Tensor]:
    sums = given.sums.detach().requires_grad_()
    loss = reference.matching_loss(sums, *given[1:], means)
    return loss.detach(), torch.autograd.grad(loss, sums, grad.to(loss))[0]


@pytest.mark.parametrize("spread", [0.3, 1e-3])
@pytest.mark.parametrize("channels", NETWORKS, ids=lambda channels: f"{len(channels)}x{max(channels)}")
def test_matches_float64(channels: list[int], spread: float, device: torch.device) -> None:
    given, grad = network(channels, device, spread), torch.tensor([0.01, 0.11], device=device)
    loss, grad_sums, _ = both_ways(given, grad)
    plain, expected = plainly(given, grad), plainly(given.double(), grad)
    assert_as_good_as_pytorch(loss, plain[0], expected[0])
    for moment in range(2):
        assert_as_good_as_pytorch(grad_sums[moment], plain[1][moment], expected[1][moment])


@pytest.mark.parametrize("channels", NETWORKS, ids=lambda channels: f"{len(channels)}x{max(channels)}")
def test_other_means_match_float64(channels: list[int], device: torch.device) -> None:
    given, grad = network(channels, device), torch.tensor([0.01, 0.11], device=device)
    means = 0.3 * torch.randn(sum(channels)).to(device)
    loss, grad_sums, _ = both_ways(given, grad, means)
    plain, expected = plainly(given, grad, means), plainly(given.double(), grad, means.double())
    assert_as_good_as_pytorch(loss, plain[0], expected[0])
    for moment in range(2):
        assert_as_good_as_pytorch(grad_sums[moment], plain[1][moment], expected[1][moment])
    for result, same in zip(kernel.matching_gradient(*given, grad, means=means), (loss, grad_sums), strict=True):
        assert torch.equal(result, same)
    for result, same in zip(both_ways(given, grad, torch.zeros_like(means)), both_ways(given, grad), strict=True):
        assert torch.equal(result, same)


def test_by_hand(device: torch.device) -> None:
    """n = 2: μ − m = (3, 4), σ² − v = (1, 0); then one channel with μ = m and σ² − v = −2, of weight 10."""
    sums = torch.tensor([[6.0, 8.0, 0.0], [22.0, 40.0, 6.0]], device=device)
    variances = torch.tensor([1.0, 4.0, 5.0], device=device)
    channel_ptr, counts = torch.tensor([0, 2, 3], device=device), torch.tensor([2, 2], device=device)
    weights = torch.tensor([1.0, 10.0], device=device)
    given = Network(sums, variances, channel_ptr, counts, weights)
    loss, grad_sums, norms = both_ways(given, torch.tensor([1.0, 1.0], device=device))
    assert loss.tolist() == [5.0, 21.0]
    assert norms.tolist() == [[5.0, 0.0], [1.0, 2.0]]
    _, _, norms = both_ways(given, torch.ones(2, device=device), torch.tensor([-3.0, -4.0, 7.0], device=device))
    assert norms.tolist() == [[10.0, 7.0], [1.0, 2.0]]
    expected = torch.tensor([[0.3 - 3.0, 0.4, 0.0], [0.5, 0.0, -5.0]], device=device)
    torch.testing.assert_close(grad_sums, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["mean", "variance", "both"])
def test_gradient_of_a_zero_norm_is_zero(kind: str, device: torch.device) -> None:
    """Layer 1 of three matches exactly; its own term vanishes, the others stay."""
    given, grad = network([4, 5, 6], device), torch.tensor([0.5, 2.0], device=device)
    counts, middle = torch.tensor([64, 64, 64], device=device), slice(4, 9)
    sums = given.sums * 64 / given.counts.repeat_interleave(torch.tensor([4, 5, 6], device=device))
    if kind != "variance":
        sums[0, middle] = 0
    else:
        sums[0, middle] = 64.0
    given.variances[middle] = 0.5
    sums[1, middle] = (64 * 0.5 + (64 if kind == "variance" else 0)) if kind != "mean" else 100.0
    given = given._replace(sums=sums, counts=counts)
    loss, grad_sums, norms = both_ways(given, grad)
    assert (norms[:, 1] == 0).tolist() == [kind != "variance", kind != "mean"]
    assert grad_sums.isfinite().all()
    if kind == "both":
        assert not grad_sums[:, middle].any()
    if kind == "variance":
        assert not grad_sums[1, middle].any()
    plain = plainly(given.double(), grad)
    assert error(loss, plain[0]) < 1e-6
    assert error(grad_sums, plain[1]) < 1e-6


def test_no_layers_and_a_layer_without_channels(device: torch.device) -> None:
    loss, grad_sums, norms = both_ways(network([], device), torch.ones(2, device=device))
    assert (loss.tolist(), grad_sums.shape, norms.shape) == ([0, 0], (2, 0), (2, 0))
    given, grad = network([3, 0, 5], device), torch.ones(2, device=device)
    loss, grad_sums, norms = both_ways(given, grad)
    expected = plainly(given.double(), grad)
    assert error(loss, expected[0]) < 1e-6
    assert error(grad_sums, expected[1]) < 1e-6
    assert norms[:, 1].tolist() == [0, 0]


def test_sums_that_are_not_contiguous(device: torch.device) -> None:
    given, grad = network([3, 20], device), torch.tensor([1.0, 2.0], device=device)
    apart = given._replace(sums=given.sums.t().contiguous().t())
    for result, expected in zip(both_ways(apart, grad), both_ways(given, grad), strict=True):
        assert torch.equal(result, expected)
    same = torch.ones(1, device=device).expand(2)
    assert torch.equal(both_ways(given, same)[1], both_ways(given, same.contiguous())[1])


@pytest.mark.parametrize("channels", NETWORKS, ids=lambda channels: f"{len(channels)}x{max(channels)}")
def test_loss_and_gradient_at_once(channels: list[int], device: torch.device) -> None:
    given, grad = network(channels, device), torch.tensor([0.01, 0.11], device=device)
    for result, expected in zip(kernel.matching_gradient(*given, grad), both_ways(given, grad), strict=False):
        assert torch.equal(result, expected)


@pytest.mark.parametrize("aims", [False, True])
@pytest.mark.parametrize("channels", [[64, 3, 300], RESNET_18[::3]])
def test_from_partial_sums(channels: list[int], aims: bool, device: torch.device) -> None:
    """The arena's rows are added up in float64; the counter is 0 again, so that the next launch may follow."""
    rows = [1 + 97 * layer for layer in range(len(channels))]
    sizes = [2 * r * c + 5 for r, c in zip(rows, channels, strict=True)]  # gaps between the layers' parts
    starts = torch.tensor([0, *sizes]).cumsum(0)[:-1]
    given, grad = network(channels, "cpu"), torch.tensor([0.01, 0.11])
    arena, sums = torch.full((sum(sizes),), torch.nan), []
    for start, r, each in zip(starts.tolist(), rows, given.sums.split(channels, 1), strict=True):
        parts = torch.rand(2, r, each.shape[1]) + 0.5
        parts *= (each / parts.sum(1))[:, None]
        arena[start:][: parts.numel()] = parts.flatten()
        sums.append(parts.double().sum(1).float())
    given = Network(*(each.to(device) for each in given._replace(sums=torch.cat(sums, 1))))
    places, finished = torch.stack([starts, torch.tensor(rows)]).to(device), torch.zeros(1, dtype=torch.int32, device=device)
    means = 0.3 * torch.randn(sum(channels)) if aims else None
    own = None if means is None else means.to(device)
    expected = kernel.matching_gradient(*given, grad.to(device), means=own)
    for _ in range(2):
        found = kernel.matching_gradient(arena.to(device), *given[1:], grad.to(device), places, finished, own)
        plain = reference.matching_gradient(arena.double(), *(each.cpu() for each in given[1:]), grad.double(), places.cpu(), means=means)
        for result, same, exact in zip(found, expected, plain, strict=True):
            torch.testing.assert_close(result, same, rtol=1e-6, atol=1e-9)
            assert error(result.cpu(), exact) < 1e-6
        assert finished.item() == 0


def test_same_bits_again(device: torch.device) -> None:
    given, grad = network(RESNET_18, device), torch.tensor([0.01, 0.11], device=device)
    for first, second in zip(both_ways(given, grad), both_ways(given, grad), strict=True):
        assert torch.equal(first, second)


@pytest.mark.gpu
def test_captured_in_a_cuda_graph() -> None:
    given, grad = network(RESNET_18, "cuda"), torch.tensor([0.01, 0.11], device="cuda")
    called = both_ways(given, grad)
    for expected, replayed in zip(called, captured(lambda: both_ways(given, grad)), strict=True):
        assert torch.equal(expected, replayed)


def launches() -> Launches:
    """A ResNet-18 for CIFAR and a ResNet-50 at 224 pixels, batch 100; and odd sizes."""
    sums, channel_ptr, counts = meta(2, 26560), meta(54, dtype=torch.int64), meta(53, dtype=torch.int64)
    of_channels, of_layers, of_terms = meta(26560), meta(53), meta(2, 53)
    yield "53 layers", partial(kernel.matching_loss_forward, sums, of_channels, channel_ptr, counts, of_layers)
    back = partial(kernel.matching_loss_backward, meta(2), sums, of_channels, channel_ptr, counts, of_layers, of_terms)
    yield "53 layers", back
    at_once = partial(kernel.matching_gradient, meta(4_000_000), of_channels, channel_ptr, counts, of_layers, meta(2))
    in_arena = partial(at_once, meta(2, 53, dtype=torch.int64), meta(1, dtype=torch.int32))
    yield "53 layers in an arena", in_arena
    yield "53 layers in an arena, other means", partial(in_arena, of_channels)
    yield "53 layers, other means", partial(back, of_channels)
