"""Replacement layers against PyTorch's own: global means, strided 1×1 convolutions. Others are in test_lean_convolutions and test_stems."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from dwa_fast.engine.backend import resolve
from dwa_fast.engine.layers import GlobalMean, StridedPointwise, replace_strided_pointwise
from dwa_fast.engine.teacher import prepare
from tests.nets import small_teacher


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_global_mean_has_pytorchs_bits(dtype: torch.dtype, layout: torch.memory_format) -> None:
    y, gradient = torch.randn(3, 17, 5, 4).to(dtype).contiguous(memory_format=layout).requires_grad_(), torch.randn(3, 17, 1, 1).to(dtype)
    means = [pool(y) for pool in (nn.AdaptiveAvgPool2d(1), GlobalMean())]
    assert torch.equal(*means)
    gradients = [torch.autograd.grad(mean, y, gradient)[0] for mean in means]
    assert torch.equal(*gradients)
    assert gradients[1].stride()[2:] == (0, 0)  # a value per channel lies in memory once
    assert [GlobalMean.suits(nn.AdaptiveAvgPool2d(size)) for size in (1, (1, 1), 2, (1, 2))] == [True, True, False, False]


def test_a_layer_behind_a_global_mean_may_change_it_in_place() -> None:
    """As the dropout of EfficientNet and MobileNet does."""
    y, gradient = torch.randn(2, 3, 4, 5, requires_grad=True), torch.randn(2, 3)
    found = [torch.autograd.grad(pool(y).flatten(1).mul_(3), y, gradient)[0] for pool in (GlobalMean(), nn.AdaptiveAvgPool2d(1))]
    assert torch.equal(*found)


# Plain PyTorch dies of this on processors with AVX-512; ours goes through.
RUN = """
import torch
from torch import nn
from dwa_fast import recipe, synthesize

class Block(nn.Module):
    def __init__(self, c, o):
        super().__init__()
        self.a, self.b, self.skip = nn.Conv2d(c, o, 3, 2, 1, bias=False), nn.BatchNorm2d(o), nn.Conv2d(c, o, 1, 2, bias=False)
    def forward(self, x):
        return self.b(self.a(x)).relu() + self.skip(x)

torch.manual_seed(0)
net = nn.Sequential(nn.Conv2d(3, 6, 3, 1, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), Block(6, 8), Block(8, 12),
                    nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 10)).eval()
x = torch.rand(120, 3, 64, 64)
config = recipe("cifar10", iterations=1, batch_size=120, steps=3, backend="fused", precision="fp32", device="cpu")
print(torch.isfinite(synthesize(net, x, torch.arange(120) % 10, config).losses).all().item())
"""


@pytest.mark.parametrize(
    ("channels", "stride", "height", "width"), [(6, (2, 2), 8, 8), (8, (2, 2), 7, 9), (5, (3, 2), 7, 4), (1, (2, 2), 1, 1)]
)
def test_strided_pointwise_matches_the_convolution(channels: int, stride: tuple[int, int], height: int, width: int) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(channels, 7, 1, stride).double()
    ours = StridedPointwise(layer)
    found = []
    for each in (layer, ours):
        x = torch.randn(2, channels, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_(True)
        y = each(x)
        found.append((y, *torch.autograd.grad(y.square().sum(), (x, layer.weight, layer.bias))))
    for theirs, own in zip(*found, strict=True):
        torch.testing.assert_close(own, theirs)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(16, 8, 1, 2),
        nn.Conv2d(6, 8, 1),
        nn.Conv2d(6, 8, 3, 2),
        nn.Conv2d(6, 8, 1, 2, padding=1),
        nn.Conv2d(6, 6, 1, 2, groups=2),
        nn.Linear(6, 8),
    ],
)
def test_strided_pointwise_leaves_other_layers_alone(layer: nn.Module) -> None:
    holder = nn.Sequential(layer)
    replace_strided_pointwise(holder)
    assert holder[0] is layer


def test_prepared_teachers_hold_none_of_the_layers_that_crash() -> None:
    teacher = small_teacher()
    strided = nn.Conv2d(1, 1, 1, 2)
    module = nn.Sequential(strided, teacher)
    network, _ = prepare(module, torch.zeros(2, 1, 16, 16), resolve("fused", "fp32", "cpu"))
    assert not any(StridedPointwise.suits(layer) for layer in network.modules())
    assert StridedPointwise.suits(strided)  # the caller's is untouched
    assert {name for name, _ in module.named_parameters()} == {name.removeprefix("module.") for name, _ in network.named_parameters()}


def test_ascent_goes_through_where_the_librarys_dies(tmp_path: Path) -> None:
    command = [sys.executable, "-c", RUN]  # elsewhere: it would import the dwa_fast of the folder that it starts in
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "True"
