"""Networks as their training steps run them."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dwa_fast.engine import training_form as module_under_test
from dwa_fast.engine.training_form import training_form
from dwa_fast.models.architectures import build
from dwa_fast.models.finite import has_finite_weights

CPU = torch.device("cpu")
SHAPE = (3, 16, 16)


class Mixed(nn.Module):
    """A plain average of statistics, a skip, dropout, a layer that stays in eval mode, a strided 1×1 convolution and `view`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8, momentum=None)
        self.inner, self.again = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.down, self.frozen = nn.Conv2d(8, 12, 1, stride=2, bias=False), nn.BatchNorm2d(12)
        self.pool, self.drop, self.fc = nn.AvgPool2d(2), nn.Dropout(0.3), nn.Linear(12 * 16, 5)

    def train(self, mode: bool = True) -> Mixed:
        super().train(mode)
        self.frozen.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(images)))
        x = F.relu(self.again(self.inner(x)) + x)
        x = self.drop(self.pool(F.silu(self.frozen(self.down(x)))))
        logits: Tensor = self.fc(x.view(len(images), -1))
        return logits


def train(network: nn.Module, forward: module_under_test.Forward, steps: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Some steps of SGD on the same images, dropout from the same seed."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    source = torch.Generator().manual_seed(1)
    images, labels = torch.randn(12, *SHAPE, generator=source).to(dtype), torch.arange(12) % 5
    for step in range(steps):
        torch.manual_seed(step)
        optimizer.zero_grad()
        F.cross_entropy(forward(images), labels).backward()
        optimizer.step()
    return network


def small(name: str) -> nn.Module:
    torch.manual_seed(0)
    return (Mixed() if name == "mixed" else build(name, classes=5, channels=3, size=16)).train()


def was_fused(caplog: pytest.LogCaptureFixture) -> bool:
    return "not fused" not in caplog.text


@pytest.mark.parametrize("name", ["mixed", "convnet128", "small-resnet"])
def test_a_training_is_that_of_the_network(name: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "dwa_fast")
    start = small(name)
    exact, plain, own = copy.deepcopy(start).double(), copy.deepcopy(start), copy.deepcopy(start)
    steps = 1 if name == "mixed" else 3  # dropout draws other numbers in float64
    if name == "mixed":
        exact.get_submodule("drop").p = plain.get_submodule("drop").p = own.get_submodule("drop").p = 0.0  # type: ignore[assignment]
    train(exact, exact, steps, torch.float64)
    train(plain, plain, steps)
    train(own, training_form(own, SHAPE, CPU), steps)
    assert was_fused(caplog)
    for (key, value), theirs, mine in zip(exact.state_dict().items(), plain.state_dict().values(), own.state_dict().values(), strict=True):
        rounding = 3e-6 * float(value.double().norm())
        assert float((mine - value).double().norm()) <= 3 * float((theirs - value).double().norm()) + rounding, key
    assert own.state_dict().keys() == start.state_dict().keys()
    assert all(value.is_contiguous() for value in own.state_dict().values())


FAMILIES = ("resnet18", "resnet50", "mobilenet-v2", "shufflenet-v2", "efficientnet-b0", "vgg16-bn", "deit-tiny-bn")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name.startswith("resnet") else [pytest.mark.slow]) for name in FAMILIES])
@pytest.mark.parametrize("training", [True, False])
def test_networks_known_by_name_are_fused(name: str, training: bool, caplog: pytest.LogCaptureFixture) -> None:
    """With a max-pooling behind the first activation, depthwise convolutions, additions, gates; depth that magnifies rounding."""
    caplog.set_level(logging.INFO, "dwa_fast")
    torch.manual_seed(0)
    training_form(build(name, classes=5, channels=3, size=64).train(training), (3, 64, 64), CPU)
    assert was_fused(caplog)


def test_dropout_is_applied_and_follows_the_seed() -> None:
    network = small("mixed")
    forward, images = training_form(network, SHAPE, CPU), torch.randn(4, *SHAPE)
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        results.append(forward(images))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_making_it_changes_nothing() -> None:
    network = small("mixed")
    before = copy.deepcopy(network.state_dict())
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    training_form(network, SHAPE, CPU)
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert all(p.grad is None for p in network.parameters())
    assert has_finite_weights(network)


def test_in_eval_mode_it_gives_the_logits_of_the_network() -> None:
    network = train(small("small-resnet"), small("small-resnet"), 1).eval()
    images = torch.randn(9, *SHAPE)
    before = copy.deepcopy(network.state_dict())
    with torch.no_grad():
        assert torch.allclose(training_form(network, SHAPE, CPU)(images), network(images), atol=1e-5)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_a_shared_layer_keeps_its_calls() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.fc = nn.BatchNorm2d(3), nn.Linear(3, 5)

        def forward(self, images: Tensor) -> Tensor:
            logits: Tensor = self.fc(self.norm(F.relu(self.norm(images))).mean((2, 3)))
            return logits

    network = Shared().train()
    images = torch.randn(6, *SHAPE)
    twin = copy.deepcopy(network)
    assert torch.allclose(training_form(network, SHAPE, CPU)(images), twin(images), atol=1e-5)
    assert int(network.norm.num_batches_tracked) == 2  # type: ignore[arg-type]
    assert torch.allclose(network.norm.running_var, twin.norm.running_var)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["branches", "differs"])
def test_what_cannot_be_fused_trains_as_it_is(kind: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.fc = nn.BatchNorm2d(3), nn.Linear(3, 5)

        def forward(self, images: Tensor) -> Tensor:
            features = self.norm(images).mean((2, 3))
            if kind == "branches" and features.sum() > 100:
                features = -features
            logits: Tensor = self.fc(features)
            return logits

    caplog.set_level(logging.INFO, "dwa_fast")
    if kind == "differs":  # a fused layer that is wrong
        forward = module_under_test._TrainedBatchNormAct.forward
        monkeypatch.setattr(module_under_test._TrainedBatchNormAct, "forward", lambda self, y: 1.03 * forward(self, y))
    network, images = Branching().train(), torch.randn(6, *SHAPE)
    twin = copy.deepcopy(network)
    assert torch.allclose(training_form(network, SHAPE, CPU)(images), twin(images), atol=1e-6)
    assert not was_fused(caplog)


def test_one_image_per_channel_is_refused_as_by_pytorch() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 16), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 5)).train()
    forward = training_form(network, SHAPE, CPU)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        forward(torch.randn(1, *SHAPE))


def test_under_autocast_a_skip_may_be_float32() -> None:
    """Images that are added to features in bfloat16, whatever the comparison in float32 has seen."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.fc = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Linear(3, 5)

        def forward(self, images: Tensor) -> Tensor:
            logits: Tensor = self.fc(F.relu(self.norm(self.conv(images)) + images).mean((2, 3)))
            return logits

    network, images = Residual().train(), torch.randn(6, *SHAPE)
    exact, form = copy.deepcopy(network), training_form(network, SHAPE, CPU)
    with torch.autocast("cpu", torch.bfloat16):
        logits = form(images)
    torch.testing.assert_close(logits.float(), exact(images), rtol=0.02, atol=0.02)
    logits.float().square().sum().backward()
    assert network.conv.weight.grad is not None
