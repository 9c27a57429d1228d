"""Bad input to the Python interface: one clear sentence each. Checkpoints are in test_teacher, folders in tests/data and test_cli."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dwa_fast import InputError, class_statistics, distill, load_data, recipe, relabel, squeeze, synthesize, validate
from dwa_fast.config import DataConfig, SqueezeConfig, ValidationConfig
from dwa_fast.models.architectures import build
from tests.nets import real_images, small_recipe, small_set, small_teacher

IMAGES, LABELS = real_images(4)


def with_value(value: float) -> Tensor:
    images = IMAGES.clone()
    images[0, 0, 0, :2] = value
    return images


def without_running_statistics() -> nn.Module:
    teacher: Any = small_teacher()
    teacher.stem[1] = nn.BatchNorm2d(8, track_running_stats=False)
    return teacher


class Twice(nn.Module):
    """One BatchNorm layer that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc = nn.BatchNorm2d(1), nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.norm(self.norm(images)).flatten(1))


def broken() -> nn.Module:
    teacher: Any = small_teacher()
    nn.init.constant_(teacher.fc.bias, float("nan"))
    return teacher


NORM = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3)).eval()
CASES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "rank": ({"images": IMAGES[0]}, InputError, "images must be [N, 1, H, W] and not empty, got shape (1, 8, 8)"),
    "channels": ({"images": torch.zeros(4, 3, 8, 8)}, InputError, "images must be [N, 1, H, W] and not empty, got shape (4, 3, 8, 8)"),
    "empty": (
        {"images": IMAGES[:0], "labels": LABELS[:0]},
        InputError,
        "images must be [N, 1, H, W] and not empty, got shape (0, 1, 8, 8)",
    ),
    "list": ({"images": [1, 2]}, TypeError, "images must be a torch.Tensor, got list"),
    "bytes": ({"images": IMAGES.to(torch.uint8)}, TypeError, "images must be normalised floating point, got torch.uint8"),
    "NaN": ({"images": with_value(float("nan"))}, InputError, "images must be finite, got 2 pixels that are NaN or infinite"),
    "infinite": ({"images": with_value(float("inf"))}, InputError, "images must be finite, got 2 pixels that are NaN or infinite"),
    "label count": ({"labels": LABELS[:3]}, InputError, "labels must be [4], one per image, got shape (3,)"),
    "label rank": ({"labels": LABELS[:, None]}, InputError, "labels must be [4], one per image, got shape (4, 1)"),
    "label type": ({"labels": LABELS.float()}, TypeError, "labels must be integers, got torch.float32"),
    "label list": ({"labels": [0, 1, 2, 3]}, TypeError, "labels must be a torch.Tensor, got list"),
    "label high": ({"labels": LABELS + 9}, InputError, "labels must lie in 0 … 9, the classes of the teacher, got 12"),
    "label low": ({"labels": LABELS - 1}, InputError, "labels must lie in 0 … 9, the classes of the teacher, got -1"),
    "teacher type": ({"teacher": "resnet18"}, TypeError, "teacher must be a torch.nn.Module, got str"),
    "no BatchNorm": (
        {"teacher": nn.Sequential(nn.Flatten(), nn.Linear(64, 10))},
        InputError,
        "teacher must have BatchNorm layers (1d, 2d or 3d), whose statistics are matched; Sequential has none",
    ),
    "no statistics": (
        {"teacher": without_running_statistics()},
        InputError,
        "BatchNorm layer 'stem.1' keeps no running statistics; it needs track_running_stats=True",
    ),
    "no logits": ({"teacher": NORM}, InputError, "teacher must give [N, classes] logits, got shape (3, 3, 6, 6)"),
    "bare BatchNorm": (
        {"teacher": nn.BatchNorm2d(1).eval()},
        InputError,
        "teacher must be a classifier that gives [N, classes] logits, got a single BatchNorm2d",
    ),
    "NaN teacher": (
        {"teacher": broken()},
        InputError,
        "weights or running statistics of the teacher are not finite: bias of layer 'fc' (10 NaN of 10); train it again",
    ),
    "called twice": (
        {"teacher": Twice().eval()},
        InputError,
        "BatchNorm layer 'norm' runs 2 times in a forward pass; each layer may run once",
    ),
    "image size": (
        {"images": torch.zeros(4, 1, 9, 9), "teacher": Twice().eval()},
        InputError,
        "teacher cannot take images of shape (1, 9, 9)",
    ),
    "image size of a transformer": (
        {"teacher": build("deit-tiny-bn", classes=10, channels=1, size=16).eval()},
        InputError,
        "teacher cannot take images of shape (1, 8, 8): Wrong image height! Expected 16 but got 8!",
    ),
    "single BatchNorm1d": (
        {"teacher": nn.BatchNorm1d(1).eval()},
        InputError,
        "teacher must be a classifier that gives [N, classes] logits, got a single BatchNorm1d",
    ),
    "recipe type": ({"recipe": {"iterations": 3}}, TypeError, "recipe must be a Recipe, such as recipe('cifar100'), got dict"),
    "seed": ({"seed": -1}, InputError, "seed must be an integer of at least 0, got -1"),
    "seed type": ({"seed": 0.5}, InputError, "seed must be an integer of at least 0, got 0.5"),
}


@pytest.mark.parametrize(("change", "kind", "message"), CASES.values(), ids=CASES.keys())
def test_synthesize_refuses(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"teacher": small_teacher(), "images": IMAGES, "labels": LABELS, "recipe": small_recipe(), **change}
    seed = arguments.pop("seed", 0)
    with pytest.raises(kind, match=re.escape(message)):
        synthesize(*arguments.values(), seed=seed)


CONFIGS: dict[str, tuple[Callable[[], Any], str]] = {
    "K": (lambda: recipe("digits", steps=0), "steps must be an integer of at least 1, got 0"),
    "rho": (lambda: recipe("digits", rho=-0.1), "rho must be a finite number of at least 0, got -0.1"),
    "lambda_mean": (lambda: recipe("digits", lambda_mean=-1), "lambda_mean must be a finite number of at least 0, got -1"),
    "lambda_var": (lambda: recipe("digits", lambda_var=float("nan")), "lambda_var must be a finite number of at least 0, got nan"),
    "prior": (lambda: recipe("digits", tv_l2=-1), "tv_l2 must be a finite number of at least 0, got -1"),
    "T": (lambda: recipe("digits", iterations=-1), "iterations must be an integer of at least 0, got -1"),
    "T type": (lambda: recipe("digits", iterations=2.5), "iterations must be an integer of at least 0, got 2.5"),
    "batch": (lambda: recipe("digits", batch_size=0), "batch_size must be an integer of at least 1, got 0"),
    "lr": (lambda: recipe("digits", learning_rate=0.0), "learning_rate must be a finite number above 0, got 0.0"),
    "flip": (lambda: recipe("digits", flip=1.5), "flip must be a finite number of at least 0 and at most 1, got 1.5"),
    "crop": (lambda: recipe("digits", crop_scale=(0.5, 2.0)), "crop_scale must be (low, high) with 0 < low ≤ high ≤ 1, got (0.5, 2.0)"),
    "curriculum": (lambda: recipe("digits", curriculum="sine"), "unknown curriculum 'sine'; known: none, step, linear, cosine"),
    "milestone": (lambda: recipe("digits", milestone=2), "milestone must be a finite number of at least 0 and at most 1, got 2"),
    "mean": (lambda: recipe("digits", mean=(0.5, 0.5)), "mean and std must hold 1 or 3 values each, got 2 and 1"),
    "std": (lambda: recipe("digits", std=(0.0,)), "std must be a finite number above 0, got 0.0"),
    "recipe": (lambda: recipe("cifar1000"), "unknown recipe 'cifar1000'; known: digits, cifar10, cifar100, tiny, imagenet, folder"),
    "method": (
        lambda: recipe("digits", method="mtt"),
        "unknown method 'mtt'; known: dwa, sre2l, cda, rded, real-start, random-step, coupled",
    ),
    "backend": (lambda: recipe("digits", backend="tpu"), "unknown backend 'tpu'; known: auto, reference, fused, compiled"),
    "precision": (
        lambda: recipe("digits", precision="fp8"),
        "unknown precision 'fp8'; known: auto, fp32, tf32, bf16, fp16, fp64",
    ),
    "ascent": (lambda: recipe("digits", ascent="up"), "unknown ascent 'up'; known: directed, random, none"),
    "layout": (lambda: DataConfig(layout="mnist"), "unknown layout 'mnist'; known: digits, cifar10, cifar100, tiny, folder"),  # type: ignore[arg-type]
    "held out": (lambda: DataConfig(held_out_share=1), "held_out_share must be below 1, which would leave nothing to train with"),
    "epochs": (lambda: SqueezeConfig(epochs=0), "epochs must be an integer of at least 1, got 0"),
    "students": (lambda: ValidationConfig(students=0), "students must be an integer of at least 1, got 0"),
    "temperature": (lambda: ValidationConfig(temperature=0), "temperature must be a finite number above 0, got 0"),
}


@pytest.mark.parametrize(("make", "message"), CONFIGS.values(), ids=CONFIGS.keys())
def test_configurations_refuse(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        make()


EXECUTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "device": ({"device": "gpu"}, "unknown device 'gpu'; known: auto, cpu, cuda, cuda:0, …"),
    "other device": ({"device": "meta"}, "device 'meta' is not supported; supported: cpu, cuda"),
    "missing device": ({"device": "cuda:99"}, "device 'cuda:99' is not there: PyTorch"),
    "reference precision": (
        {"backend": "reference", "precision": "bf16"},
        "precision 'bf16' is not offered by back-end 'reference' on cpu; it offers: fp32, fp64",
    ),
    "fused precision": (
        {"backend": "fused", "precision": "fp64", "device": "cpu"},
        "precision 'fp64' is not offered by back-end 'fused' on cpu; it offers: ",
    ),
}


@pytest.mark.parametrize(("change", "message"), EXECUTIONS.values(), ids=EXECUTIONS.keys())
def test_execution_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        synthesize(small_teacher(), IMAGES, LABELS, small_recipe(**change))


def test_fused_says_why_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dwa_fast.ops.cause", lambda: "the extension is not built")
    with pytest.raises(InputError, match="back-end 'fused' cannot run: the extension is not built"):
        synthesize(small_teacher(), IMAGES, LABELS, small_recipe(backend="fused"))
    assert synthesize(small_teacher(), IMAGES, LABELS, small_recipe(backend="auto")).images.shape == IMAGES.shape


def test_losses_that_are_not_finite_are_named() -> None:
    with pytest.raises(InputError, match=r"losses \(.*\) are not finite from iteration \d+ of 24 on"):
        synthesize(small_teacher(), IMAGES, LABELS, small_recipe(lambda_var=1e38, first_layer_weight=1e38))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has …"), "asked for 2.50 GiB more"),
        (torch.OutOfMemoryError("out of memory: a step asked for 512 MiB more on the CPU"), "asked for 512 MiB more"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes."), "asked for 4096 bytes more"),
    ],
)
def test_out_of_memory_is_one_sentence(monkeypatch: pytest.MonkeyPatch, error: Exception, message: str) -> None:
    def fail(*arguments: Any, **named: Any) -> None:
        raise error

    monkeypatch.setattr("dwa_fast.engine.synthesis.make_schedule", fail)
    with pytest.raises(InputError, match=rf"out of memory on cpu: a batch of 4 images {message}; lower the batch size"):
        synthesize(small_teacher(), IMAGES, LABELS, small_recipe(device="cpu"))


def test_other_errors_of_a_run_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **named: Any) -> None:
        raise RuntimeError("something else")

    monkeypatch.setattr("dwa_fast.engine.synthesis.make_schedule", fail)
    with pytest.raises(RuntimeError, match="something else"):
        synthesize(small_teacher(), IMAGES, LABELS, small_recipe())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: load_data(recipe("digits"), None, "train"), "config must be a DataConfig, such as .* got Recipe"),  # type: ignore[arg-type]
        (lambda: squeeze("photos", recipe("digits")), "data must be a set of images, .* got str"),  # type: ignore[arg-type]
        (lambda: squeeze(small_set(), recipe("digits").data), "recipe must be a Recipe, .* got DataConfig"),  # type: ignore[arg-type]
        (
            lambda: validate("set", small_set(), None, "small-resnet", recipe("digits")),  # type: ignore[arg-type]
            "distilled must be a set of images, .* got str",
        ),
        (
            lambda: validate(small_set(), small_set(), None, small_teacher(), small_recipe()),  # type: ignore[arg-type]
            "student must be the name of an architecture, such as 'resnet18', got SmallResNet",
        ),
        (
            lambda: relabel(small_set(), small_teacher(), "digits", output="labels"),  # type: ignore[arg-type]
            "recipe must be a Recipe, .* got str",
        ),
        (lambda: class_statistics(small_teacher(), IMAGES, recipe("digits")), "data must be a set of images, .* got Tensor"),  # type: ignore[arg-type]
    ],
)
def test_arguments_of_another_type_are_named(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        call()


@pytest.mark.parametrize(
    "call",
    [
        lambda config: squeeze(small_set(), config),
        lambda config: distill(small_teacher(), small_set(), config, ipc=1, output="set"),
        lambda config: relabel(small_set(), small_teacher(), config, output="labels"),
        lambda config: validate(small_set(), small_set(), small_teacher(), "small-resnet", config),
    ],
    ids=["squeeze", "distill", "relabel", "validate"],
)
def test_images_of_another_size_than_the_recipes_are_refused(call: Callable[[Any], Any]) -> None:
    with pytest.raises(InputError, match=r"images have 1 channel of 8 × 8 pixels, and the recipe is for 1 channel of 16 × 16 pixels"):
        call(recipe("digits"))
    with pytest.raises(InputError, match=r"images have 1 channel of 8 × 8 pixels, and the recipe is for 3 channels of 8 × 8 pixels"):
        call(recipe("cifar10", size=8))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: squeeze(small_set(), small_recipe(), seed=-1), "seed must be an integer of at least 0, got -1"),
        (lambda: squeeze(small_set(), small_recipe(), test_every=-1), "test_every must be an integer of at least 0, got -1"),
        (lambda: relabel(small_set(), small_teacher(), small_recipe(), output="labels", seed=-1), "seed must be an integer of at least 0"),
        (lambda: relabel(small_set(), None, small_recipe(), output="labels"), "soft labels come from a teacher, got None"),  # type: ignore[arg-type]
        (
            lambda: validate(small_set(), small_set(), small_teacher(), "small-resnet", small_recipe(), seed=-1, resume_dir="students"),
            "seed must be an integer of at least 0, got -1",
        ),
        (
            lambda: validate(small_set(), small_set(), small_teacher(), "small-resnet", small_recipe(), test_every=-1),
            "test_every must be an integer of at least 0, got -1",
        ),
    ],
)
def test_nothing_is_written_for_arguments_that_cannot_be_used(
    call: Callable[[], Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        call()
    assert not list(tmp_path.iterdir())


class OtherLabels:
    """A set of images whose labels are those of another type."""

    def __init__(self, labels: Any) -> None:
        own = small_set()
        self.labels, self.class_names, self.image_shape, self.name, self.load = labels, own.class_names, own.image_shape, own.name, own.load


@pytest.mark.parametrize("labels", [small_set().labels.int(), small_set().labels.tolist()], ids=["int32", "list"])
def test_labels_of_another_type_are_refused(labels: Any) -> None:
    data, message = OtherLabels(labels), r"labels of data must be a tensor \[N\] of int64, got "
    for call in (
        lambda: squeeze(data, small_recipe()),
        lambda: distill(small_teacher(), data, small_recipe(), ipc=1, output="set"),
        lambda: class_statistics(small_teacher(), data, small_recipe()),
    ):
        with pytest.raises(InputError, match=message):
            call()


def test_synthesize_takes_labels_of_any_integers() -> None:
    config = small_recipe(iterations=2, backend="reference")
    wanted = synthesize(small_teacher(), IMAGES, LABELS, config).images
    assert torch.equal(synthesize(small_teacher(), IMAGES, LABELS.to(torch.uint8), config).images, wanted)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_every_stage_takes_the_device_of_the_recipe() -> None:
    config = small_recipe(device="cuda")
    for call in (
        lambda: squeeze(small_set(), config),
        lambda: relabel(small_set(), small_teacher(), config, output="labels"),
        lambda: validate(small_set(), small_set(), small_teacher(), "small-resnet", config),
    ):
        with pytest.raises(InputError, match="device 'cuda'"):
            call()


def test_numbers_of_classes_are_checked() -> None:
    with pytest.raises(InputError, match="classes must lie in 0 … 9, got 10"):
        class_statistics(small_teacher(), small_set(), small_recipe(), classes=[3, 10])
