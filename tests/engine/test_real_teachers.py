"""Teachers as people have them: subclasses, hooks, wrappers, odd forward passes. The oracle is the untouched teacher in float64."""

from __future__ import annotations

import copy
import functools
import logging
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import transforms
from torchvision.transforms import v2

from dwa_fast import InputError, recipe, synthesize
from dwa_fast.engine import backend
from dwa_fast.engine.ascent import Ascent
from dwa_fast.engine.backend import resolve
from dwa_fast.engine.teacher import prepare
from dwa_fast.reference.loop import recover
from dwa_fast.seeding import generator
from dwa_fast.sets.synthesize import SynthesisResult
from tests.engine.teachers import BACKENDS, CLASSES, SIZE, TEACHERS, BNReLU, Net, config, double, teacher
from tests.nets import alive, distance, expected_gradient, image_gradient, real_images, small_teacher


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


def test_what_has_no_bf16_says_so() -> None:
    """Householder products know float32 and float64 only."""
    with pytest.raises(InputError, match=r"teacher does not work in bf16: .*; ask for precision fp32"):
        synthesize(teacher("orthogonal"), torch.randn(2, 3, SIZE, SIZE), torch.tensor([0, 1]), config(precision="bf16"))


def test_what_has_no_bf16_computes_in_fp32_unless_asked(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(backend, "precisions", lambda chosen, device: ["bf16", "fp32"])  # as on a processor with AVX-512 BF16
    images, labels = torch.randn(2, 3, SIZE, SIZE), torch.tensor([0, 1])
    with caplog.at_level(logging.WARNING, "dwa_fast"):
        automatic = synthesize(teacher("orthogonal"), images, labels, config(precision="auto"))
    assert re.search(r"teacher does not work in bf16: .*; it computes in fp32", caplog.text)
    assert automatic.execution["precision"] == "fp32"
    assert torch.equal(automatic.images, synthesize(teacher("orthogonal"), images, labels, config(precision="fp32")).images)


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


@functools.cache
def four_digits() -> tuple[Tensor, Tensor]:
    return real_images(4)


def short_run(module: nn.Module, backend: str) -> SynthesisResult:
    """A few iterations on four digits."""
    images, labels = (each.clone() for each in four_digits())
    return synthesize(module, images, labels, recipe("digits", iterations=3, steps=2, backend=backend, precision="fp32", device="cpu"))


@functools.cache
def as_it_is(backend: str) -> SynthesisResult:
    """The same with a small teacher, and no settings of a caller around it."""
    return short_run(small_teacher(), backend)


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "DataParallel": nn.DataParallel,
    "AveragedModel": torch.optim.swa_utils.AveragedModel,
    "compiled": lambda module: torch.compile(module, backend="eager"),  # type: ignore[return-value]
    "compiled, then DataParallel": lambda module: nn.DataParallel(torch.compile(module, backend="eager")),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_are_taken_off(name: str, backend: str) -> None:
    plain, wrapped = as_it_is(backend), short_run(WRAPPERS[name](small_teacher()).eval(), backend)
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
    "attribute": ("logits", "got SimpleNamespace; say which are the logits with logits='logits'"),
    "dictionary": ("logits", "got dict with logits, features; say which are the logits with logits='logits'"),
    "tuple": (1, r"got tuple of 2; say which are the logits with logits=0 \(or 1, …\)"),
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
    assert torch.equal(synthesize(several, images, labels, config(backend), logits=output).images, wanted.images)
    with pytest.raises(InputError, match="teacher has no output 'scores'; it gives"):
        synthesize(several, images, labels, config(backend), logits="scores")


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


class NoGradient(Net):
    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images)


class Detached(Net):
    def features(self, images: Tensor) -> Tensor:
        return super().features(images.detach())


class Rounded(Net):
    def features(self, images: Tensor) -> Tensor:
        return super().features((images * 255).round() / 255)


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "in train mode for ever": (lambda: Net(AlwaysTrain(6)), "BatchNorm layer 'norm1' stays in train mode after eval"),
    "random": (AlwaysDropout, "teacher gives other logits for the same images each time"),
    "no layer runs": (Unreached, "none of the 2 BatchNorm layers of the teacher runs in a forward pass"),
    "InstanceNorm": (lambda: Net(nn.InstanceNorm2d(6, track_running_stats=True), nn.InstanceNorm2d(8)), "Net has none"),
    "scripted": (
        lambda: Net(torch.jit.script(nn.BatchNorm2d(6).eval())),
        "layer 'norm1' is scripted, so that its input cannot be taken",
    ),
    "without gradients": (NoGradient, "teacher gives logits that have no gradient with respect to its images and weights"),
    "of detached images": (Detached, "gradients of the teacher with respect to the images are 0 everywhere"),
    "of rounded images": (Rounded, "gradients of the teacher with respect to the images are 0 everywhere"),
    "with a softmax": (lambda: nn.Sequential(Net(), nn.Softmax(1)), "teacher gives probabilities, .* leave out its softmax"),
    "with one output": (lambda: nn.Sequential(Net(), nn.Linear(5, 1)), "teacher gives one output per image"),
    "on the meta device": (lambda: Net().to("meta"), "teacher has no values: conv1.weight is on the meta device"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_sentence(name: str, backend: str) -> None:
    make, message = REFUSED[name]
    with pytest.raises(InputError, match=message) as caught:
        synthesize(make().eval(), torch.randn(2, 3, SIZE, SIZE), torch.tensor([0, 1]), config(backend))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("transform", [transforms.Normalize, v2.Normalize])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_transform_of_torchvision_in_front_is_a_part_of_the_network(
    transform: Callable[..., nn.Module], backend: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It checks the values of its std, which no trace can follow."""
    torch.manual_seed(3)
    mean, std = (0.2, -0.1, 0.4), (0.5, 2.0, 1.5)
    module, images, labels = alive(Net()), torch.randn(3, 3, SIZE, SIZE), torch.tensor([0, 1, 2])
    layer = nn.Conv2d(3, 3, 1, groups=3)
    with torch.no_grad():
        layer.weight.copy_(1 / torch.tensor(std)[:, None, None, None])
        layer.bias.copy_(-torch.tensor(mean) / torch.tensor(std))  # type: ignore[union-attr]
    settings = config(backend, ascent="none", learning_rate=0.01)
    wanted = synthesize(nn.Sequential(layer, module).eval(), images, labels, settings)
    got = synthesize(nn.Sequential(transform(mean, std), module).eval(), images, labels, settings)
    assert distance(got.losses, wanted.losses.double()) < 1e-4
    assert distance(got.images, wanted.images.double()) < 1e-3
    assert not caplog.messages


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_output_of_a_single_tensor_is_not_selected(backend: str) -> None:
    with pytest.raises(InputError, match=r"teacher has one output, a tensor of shape \(3, 5\); leave out logits=0"):
        synthesize(Net().eval(), torch.randn(2, 3, SIZE, SIZE), torch.tensor([0, 1]), config(backend), logits=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_the_caller_has_set_changes_nothing(backend: str) -> None:
    """Gradients off, inference mode, autocast and another default precision."""
    wanted = as_it_is(backend).images
    for around in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16)):
        module = small_teacher()
        with around:
            assert torch.equal(short_run(module, backend).images, wanted)
    module = small_teacher()
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(short_run(module, backend).images, wanted)
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
