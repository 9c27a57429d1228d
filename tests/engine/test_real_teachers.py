"""Teachers as people have them: subclasses, hooks, wrappers, odd forward passes. The oracle is the untouched teacher in float64."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torchvision.ops import FrozenBatchNorm2d

from dwa_fast import InputError, recipe, synthesize
from dwa_fast.engine.ascent import Ascent
from dwa_fast.engine.backend import resolve
from dwa_fast.engine.teacher import prepare
from dwa_fast.recipes import Recipe
from dwa_fast.reference.loop import recover
from dwa_fast.seeding import generator
from tests.nets import alive, distance, expected_gradient, image_gradient, small_teacher

SIZE, CLASSES = 12, 5
BACKENDS = ["reference", "fused"]


class Net(nn.Module):
    """Two convolutions with a layer each behind them, and a classifier."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 6, 3, padding=1, bias=False), layers[0] if layers else nn.BatchNorm2d(6)
        self.conv2, self.norm2 = nn.Conv2d(6, 8, 3, stride=2), layers[1] if len(layers) > 1 else nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, images: Tensor) -> Any:
        return self.classify(self.features(images))

    def features(self, images: Tensor) -> Tensor:
        return F.relu(self.norm2(self.conv2(F.relu(self.norm1(self.conv1(images))))))

    def classify(self, features: Tensor) -> Tensor:
        return self.fc(features.mean((2, 3)))


class BNReLU(nn.BatchNorm2d):
    """An activation inside, as timm has it."""

    def forward(self, input: Tensor) -> Tensor:
        return F.relu(super().forward(input))


class BNNamed(nn.BatchNorm2d):
    """A subclass that changes nothing."""


class BNLabelled(nn.BatchNorm2d):
    """One that is called with more than its input."""

    def forward(self, input: Tensor, scale: float = 1.0) -> Tensor:  # type: ignore[override]
        return super().forward(input) * scale


class OwnFrozenBatchNorm2d(nn.Module):
    """Frozen statistics as DETR has them: no subclass of anything."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias, mean, var = (each.view(1, -1, 1, 1) for each in (self.weight, self.bias, self.running_mean, self.running_var))
        return (x - mean) * (var + 1e-5).rsqrt() * weight + bias


class Keyword(Net):
    def features(self, images: Tensor) -> Tensor:
        return F.relu(self.norm2(input=self.conv2(F.relu(self.norm1(input=self.conv1(images))))))


class Labelled(Net):
    def features(self, images: Tensor) -> Tensor:
        return F.relu(self.norm2(self.conv2(self.norm1(self.conv1(images), 0.5))))


class Views(Net):
    """The most common line of CIFAR networks, with more than one pixel left."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8 * 25, CLASSES)

    def classify(self, features: Tensor) -> Tensor:
        return self.fc(features.view(features.size(0), -1))


class NoGradPart(Net):
    def features(self, images: Tensor) -> Tensor:
        first = F.relu(self.norm1(self.conv1(images)))
        with torch.no_grad():
            gate = torch.sigmoid(first.mean((2, 3), keepdim=True))
        return F.relu(self.norm2(self.conv2(first * gate)))


class ValueBranch(Net):
    def classify(self, features: Tensor) -> Tensor:
        return super().classify(features if features.sum() > 0 else -features)


class ShapeBranch(Net):
    """Compares shapes and makes numbers of them, as Hugging Face's networks do; its batch size is a number in places."""

    def features(self, images: Tensor) -> Tensor:
        count, channels, height, width = images.shape
        if channels != 3 or int(height) % 2:
            raise ValueError("wanted three channels and an even height")
        tokens = images.reshape(count * 3, height, width).reshape(count, 3, height, width)
        return super().features(tokens[:count].expand(count, -1, -1, -1))


class BatchBranch(Net):
    """Another path for more than four images."""

    def classify(self, features: Tensor) -> Tensor:
        return super().classify(features * 2 if len(features) > 4 else features)


class MadeInside(Net):
    def features(self, images: Tensor) -> Tensor:
        return nn.ReLU(inplace=True)(self.norm2(self.conv2(nn.ReLU(inplace=True)(self.norm1(self.conv1(images))))))


class Functional(Net):
    """Calls one layer's arithmetic, not the layer; hooks do not see it."""

    def features(self, images: Tensor) -> Tensor:
        first, m = self.conv1(images), self.norm1
        first = F.batch_norm(first, m.running_mean, m.running_var, m.weight, m.bias, False, m.momentum, m.eps)
        return F.relu(self.norm2(self.conv2(F.relu(first))))


def hooked(register: str) -> nn.Module:
    """A hook on a BatchNorm layer that changes what comes in or goes out."""
    net = Net()
    if register == "forward":
        net.norm1.register_forward_hook(lambda layer, inputs, output: output * 1.5 + 0.3)
    else:
        net.norm1.register_forward_pre_hook(lambda layer, inputs: (inputs[0] * 1.5 + 0.3,))
    return net


class NumberOfWeights(Net):
    """A captured step must not take a number of θ for that of θ̃."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * self.scale * self.scale.item())


def pruned() -> nn.Module:
    net = Net()
    prune.l1_unstructured(net.conv2, "weight", amount=0.5)
    return net


def old_weight_norm() -> nn.Module:
    net = Net()
    with pytest.warns(FutureWarning, match="weight_norm"):
        nn.utils.weight_norm(net.conv2)
    return net


def parametrised(wrap: Callable[..., nn.Module]) -> nn.Module:
    net = Net()
    wrap(net.conv2)
    return net


def with_replaced_forward() -> nn.Module:
    net = Net()
    net.norm1.forward = MethodType(lambda self, input: F.relu(nn.BatchNorm2d.forward(self, input)), net.norm1)  # type: ignore[method-assign]
    return net


def with_hooked_activation() -> nn.Module:
    behind = nn.ReLU(), nn.Identity(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(150, CLASSES)
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), *behind)
    for index in (2, 3, 4):
        net[index].register_forward_hook(lambda layer, inputs, output: output + 0.1)
    return net


TEACHERS: dict[str, tuple[Callable[[], nn.Module], int, bool]] = {  # layers that are matched, and whether it is traced
    "subclass with an activation": (lambda: Net(BNReLU(6), BNReLU(8)), 2, True),
    "a subclass beside a plain layer": (lambda: Net(nn.BatchNorm2d(6), BNReLU(8)), 2, True),
    "subclass that changes nothing": (lambda: Net(BNNamed(6), BNNamed(8)), 2, True),
    "subclass that takes more": (lambda: Labelled(BNLabelled(6)), 2, True),
    "replaced forward": (with_replaced_forward, 2, True),
    "forward hook": (lambda: hooked("forward"), 2, True),
    "pre-hook": (lambda: hooked("pre"), 2, True),
    "hooks behind the layer": (with_hooked_activation, 1, True),
    "SyncBatchNorm": (lambda: nn.SyncBatchNorm.convert_sync_batchnorm(Net()), 2, True),
    "SyncBatchNorm beside BatchNorm2d": (lambda: Net(nn.SyncBatchNorm(6), nn.BatchNorm2d(8)), 2, True),
    "torchvision's FrozenBatchNorm2d": (lambda: Net(FrozenBatchNorm2d(6), FrozenBatchNorm2d(8)), 2, True),
    "frozen, of one's own": (lambda: Net(OwnFrozenBatchNorm2d(6)), 2, True),
    "keywords": (Keyword, 2, True),
    "keywords, frozen": (lambda: Net(FrozenBatchNorm2d(6)), 2, True),
    "view": (Views, 2, True),
    "no_grad inside": (NoGradPart, 2, False),
    "branch on values": (ValueBranch, 2, False),
    "a number read from the weights": (NumberOfWeights, 2, False),
    "branch on shapes": (ShapeBranch, 2, True),
    "branch on the batch": (BatchBranch, 2, False),
    "modules made inside": (MadeInside, 2, True),
    "functional": (Functional, 1, True),
    "pruned": (pruned, 2, True),
    "old weight norm": (old_weight_norm, 2, True),
    "weight norm": (lambda: parametrised(parametrizations.weight_norm), 2, True),
    "spectral norm": (lambda: parametrised(parametrizations.spectral_norm), 2, True),
    "orthogonal": (lambda: parametrised(parametrizations.orthogonal), 2, True),
}


def teacher(name: str) -> nn.Module:
    torch.manual_seed(3)
    return alive(TEACHERS[name][0]())


def double(module: nn.Module) -> nn.Module:
    return copy.deepcopy(
        module, {id(v): v.detach().clone() for m in module.modules() for v in vars(m).values() if isinstance(v, Tensor)}
    ).double()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", TEACHERS)
def test_network_is_the_teacher(name: str, backend: str) -> None:
    module, images, labels = teacher(name), torch.randn(6, 3, SIZE, SIZE), torch.tensor([0, 1, 2, 3, 4, 0])
    network, classes = prepare(module, images, resolve(backend, "fp32", "cpu"), batch_sizes=[6])  # type: ignore[arg-type]
    assert classes == CLASSES
    assert len(network.layers) == TEACHERS[name][1]
    assert network.traced == (backend == "fused" and TEACHERS[name][2])
    layout = torch.channels_last if backend == "fused" else torch.contiguous_format
    got, got_terms = image_gradient(network, images.to(memory_format=layout), labels)
    exact = double(module).requires_grad_(False)
    wanted, wanted_terms = expected_gradient(exact, images.double(), labels)
    plain, plain_terms = expected_gradient(copy.deepcopy(exact).float(), images, labels)
    assert distance(got_terms, wanted_terms) < max(2 * distance(plain_terms, wanted_terms), 1e-6)
    assert distance(got, wanted) < max(2 * distance(plain, wanted), 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", TEACHERS)
def test_run_is_that_of_the_published_loop(name: str, backend: str) -> None:
    """Ascent, losses and images, with a smaller last batch."""
    module, images, labels = teacher(name), torch.randn(5, 3, SIZE, SIZE), torch.tensor([0, 1, 2, 3, 4])
    config = recipe(
        "cifar10", iterations=3, steps=2, rho=0.1, batch_size=3, learning_rate=0.01, backend=backend, precision="fp32", device="cpu"
    )
    wanted = recover(double(module), images.double(), labels, config)
    got = synthesize(module, images, labels, config)
    assert distance(got.losses, wanted.losses.double()) < 1e-4
    assert distance(got.images, wanted.images) < 1e-3


@pytest.mark.parametrize("name", ["spectral norm", "weight norm", "pruned", "subclass with an activation", "frozen, of one's own"])
def test_bf16_is_near(name: str) -> None:
    images, labels = torch.randn(4, 3, SIZE, SIZE), torch.tensor([0, 1, 2, 3])
    exact, lower = (synthesize(teacher(name), images, labels, config("fused", precision)) for precision in ("fp32", "bf16"))
    assert distance(lower.losses[:, 0], exact.losses[:, 0]) < 0.03


def config(backend: str = "fused", precision: str = "fp32", **changes: Any) -> Recipe:
    return recipe("cifar10", **{"iterations": 2, "steps": 1, "rho": 0.1, "device": "cpu", **changes}, backend=backend, precision=precision)


def test_what_has_no_bf16_says_so() -> None:
    """Householder products know float32 and float64 only."""
    with pytest.raises(InputError, match=r"teacher does not work in bf16: .*; ask for precision fp32"):
        synthesize(teacher("orthogonal"), torch.randn(2, 3, SIZE, SIZE), torch.tensor([0, 1]), config(precision="bf16"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_ascent_of_a_part_without_gradients(backend: str) -> None:
    """θ̃ moves as autograd says, which tracing would lose: the gate's gradient."""
    module, images, labels = teacher("no_grad inside"), torch.randn(4, 3, SIZE, SIZE), torch.tensor([0, 1, 2, 3])
    execution = resolve(backend, "fp32", "cpu")  # type: ignore[arg-type]
    network, _ = prepare(module, images, execution)
    ascent = Ascent(network, config(backend).synthesis, execution)
    ascent.adjust(images.to(memory_format=torch.channels_last), labels, generator(0, "ascent", 0))
    exact = double(module)
    F.cross_entropy(exact(images.double()), labels).backward()
    norm = torch.stack([p.grad.norm() for p in exact.parameters() if p.grad is not None]).norm()
    wanted = {name: 0.1 * p.grad / norm for name, p in exact.named_parameters() if p.grad is not None}
    arena = ascent.arena
    moved = {id(p): p.detach() for p in arena.parameters}
    for name, p in network.module.named_parameters():
        name = name.removeprefix("teacher.")
        change = moved[id(p)].double() - module.get_parameter(name).double()
        assert distance(change, wanted[name]) < 1e-3


def test_value_branch_is_called_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "dwa_fast"):
        synthesize(teacher("branch on values"), torch.randn(4, 3, SIZE, SIZE), torch.tensor([0, 1, 2, 3]), config())
    assert [record.message.split(" (")[0] for record in caplog.records] == ["teacher cannot be traced", "teacher cannot be captured"]


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "DataParallel": nn.DataParallel,
    "AveragedModel": torch.optim.swa_utils.AveragedModel,
    "compiled": lambda module: torch.compile(module, backend="eager"),  # type: ignore[return-value]
    "compiled, then DataParallel": lambda module: nn.DataParallel(torch.compile(module, backend="eager")),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_are_taken_off(name: str, backend: str) -> None:
    images, labels = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 3])
    settings = recipe("digits", iterations=3, steps=2, backend=backend, precision="fp32", device="cpu")
    plain = synthesize(small_teacher(), images, labels, settings)
    wrapped = synthesize(WRAPPERS[name](small_teacher()).eval(), images, labels, settings)
    assert torch.equal(wrapped.images, plain.images)
    assert torch.equal(wrapped.losses, plain.losses)


def test_distributed_data_parallel_is_taken_off(tmp_path: Any) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        network, _ = prepare(nn.parallel.DistributedDataParallel(small_teacher()), torch.zeros(1, 1, 8, 8), resolve("fused", "fp32", "cpu"))
    finally:
        torch.distributed.destroy_process_group()
    assert network.traced


def test_wrappers_inside_are_taken_off() -> None:
    """PyTorch's ImageNet example puts the features alone into DataParallel."""
    plain = Net()
    wrapped = copy.deepcopy(plain)
    wrapped.conv2 = nn.DataParallel(wrapped.conv2)  # type: ignore[assignment]
    wrapped.norm1 = torch.compile(wrapped.norm1, backend="eager")  # type: ignore[assignment]
    images, labels = torch.randn(4, 3, SIZE, SIZE), torch.tensor([0, 1, 2, 3])
    assert torch.equal(*(synthesize(alive(each), images, labels, config()).images for each in (plain, wrapped)))


class Several(Net):
    """Gives more than logits."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, images: Tensor) -> Any:
        features = self.features(images)
        logits = self.classify(features)
        if self.kind == "attribute":
            return SimpleNamespace(logits=logits, features=features)
        if self.kind == "square":
            return logits[:, :, None, None]
        return {"logits": logits, "features": features} if self.kind == "dictionary" else (features, logits)


OUTPUTS = {
    "attribute": ("logits", "got SimpleNamespace; name the logits with output='logits'"),
    "dictionary": ("logits", "got dict with logits, features; name the logits with output='logits'"),
    "tuple": (1, r"got tuple of 2; say which of them are the logits with output=0 \(or 1, …\)"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", OUTPUTS)
def test_logits_among_several_outputs(kind: str, backend: str) -> None:
    images, labels = torch.randn(4, 3, SIZE, SIZE), torch.tensor([0, 1, 2, 3])
    output, message = OUTPUTS[kind]
    torch.manual_seed(3)
    several = alive(Several(kind))
    with pytest.raises(InputError, match=message):
        synthesize(several, images, labels, config(backend))
    plain = Net()
    plain.load_state_dict(several.state_dict())
    wanted = synthesize(plain.eval(), images, labels, config(backend))
    assert torch.equal(synthesize(several, images, labels, config(backend), output=output).images, wanted.images)
    with pytest.raises(InputError, match="teacher has no output 'scores'; it gives"):
        synthesize(several, images, labels, config(backend), output="scores")


def test_logits_of_one_pixel_are_refused_with_the_way_out() -> None:
    with pytest.raises(InputError, match=r"got shape \(3, 5, 1, 1\); put nn.Flatten\(\) behind it: nn.Sequential"):
        synthesize(alive(Several("square")), torch.randn(2, 3, SIZE, SIZE), torch.tensor([0, 1]), config())


class AlwaysTrain(nn.BatchNorm2d):
    def train(self, mode: bool = True) -> nn.BatchNorm2d:
        return super().train(True)


class AlwaysDropout(Net):
    def classify(self, features: Tensor) -> Tensor:
        return super().classify(F.dropout(features, 0.5))


class Unreached(Net):
    def features(self, images: Tensor) -> Tensor:
        return self.conv2(self.conv1(images))


class Unregistered(Net):
    """A convolution in a plain list, which PyTorch does not know: its weights are frozen by nobody."""

    def __init__(self) -> None:
        super().__init__()
        self.others = [nn.Conv2d(6, 6, 1)]

    def features(self, images: Tensor) -> Tensor:
        first = self.others[0].to(images.dtype)(F.relu(self.norm1(self.conv1(images))))
        return F.relu(self.norm2(self.conv2(first)))


@pytest.mark.parametrize("make", [Unregistered, lambda: Net(BNReLU(6), nn.BatchNorm2d(8)), Net])
@pytest.mark.parametrize("backend", BACKENDS)
def test_several_batches_at_once(make: Callable[[], nn.Module], backend: str) -> None:
    """Networks are copied, with what is recorded of their layers."""
    torch.manual_seed(3)
    module, images, labels = alive(make()), torch.randn(5, 3, SIZE, SIZE), torch.tensor([0, 1, 2, 3, 4])
    settings = config(backend, batch_size=3, learning_rate=0.01, matching_weights="original", concurrent_batches=2)
    wanted = recover(double(module), images.double(), labels, settings)
    got = synthesize(module, images, labels, settings)
    assert distance(got.losses, wanted.losses.double()) < 1e-4
    assert distance(got.images, wanted.images) < 1e-3


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "in train mode for ever": (lambda: Net(AlwaysTrain(6)), "BatchNorm layer 'norm1' stays in train mode after eval"),
    "random": (AlwaysDropout, "teacher gives other logits for the same images each time"),
    "no layer runs": (Unreached, "none of the 2 BatchNorm layers of the teacher runs in a forward pass"),
    "InstanceNorm": (lambda: Net(nn.InstanceNorm2d(6, track_running_stats=True), nn.InstanceNorm2d(8)), "Net has none"),
    "scripted": (
        lambda: Net(torch.jit.script(nn.BatchNorm2d(6).eval())),
        "layer 'norm1' is scripted, so that its input cannot be taken",
    ),
    "on the meta device": (lambda: Net().to("meta"), "teacher has no values: conv1.weight is on the meta device"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_sentence(name: str, backend: str) -> None:
    make, message = REFUSED[name]
    with pytest.raises(InputError, match=message) as caught:
        synthesize(make().eval(), torch.randn(2, 3, SIZE, SIZE), torch.tensor([0, 1]), config(backend))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_the_caller_has_set_changes_nothing(backend: str) -> None:
    """Gradients off, inference mode, autocast and another default precision."""
    images, labels = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 3])
    settings = recipe("digits", iterations=3, steps=2, backend=backend, precision="fp32", device="cpu")
    wanted = synthesize(small_teacher(), images, labels, settings).images
    for around in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16)):
        module = small_teacher()
        with around:
            assert torch.equal(synthesize(module, images.clone(), labels.clone(), settings).images, wanted)
    module = small_teacher()
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(synthesize(module, images, labels, settings).images, wanted)
    finally:
        torch.set_default_dtype(torch.float32)


def test_teacher_is_not_changed() -> None:
    for name in TEACHERS:
        module = teacher(name)
        before = {key: value.clone() for key, value in module.state_dict().items()}
        hooks = [len(layer._forward_pre_hooks) for layer in module.modules()]
        prepare(module, torch.randn(2, 3, SIZE, SIZE), resolve("fused", "fp32", "cpu"))
        assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
        assert hooks == [len(layer._forward_pre_hooks) for layer in module.modules()]
