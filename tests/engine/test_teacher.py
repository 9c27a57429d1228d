"""Teachers: architectures, checkpoints of all published shapes, and what is refused."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dwa_fast import InputError
from dwa_fast.engine.backend import resolve
from dwa_fast.engine.teacher import prepare
from dwa_fast.models.architectures import build
from dwa_fast.models.batchnorm import batchnorm_layers
from dwa_fast.models.checkpoint import TeacherInfo, load_teacher, save_teacher
from tests.nets import real_images, small_teacher

EXECUTION = resolve("reference", "fp32", "cpu")


@pytest.mark.parametrize(
    ("name", "channels"),
    [("resnet18", 3), ("resnet18-cifar", 1), ("resnet50-cifar", 3), ("small-resnet", 1), ("vgg16-bn-cifar", 1), ("deit-tiny-bn", 3)],
)
def test_architectures_give_logits_and_can_be_matched(name: str, channels: int) -> None:
    module = build(name, classes=7, channels=channels, size=32).eval()
    network, classes = prepare(module, torch.randn(1, channels, 32, 32), EXECUTION)
    images = torch.randn(2, channels, 32, 32)
    assert classes == 7
    assert torch.allclose(network(images).double(), module.double()(images.double()), rtol=1e-5, atol=1e-5)
    assert len(network.layers) == len(batchnorm_layers(module))


class Answer(nn.Module):
    """A teacher whose logits are changed by something other than the images."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.network, self.change = small_teacher(), change

    def forward(self, x: Tensor) -> Tensor:
        return self.network(self.change(x))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x: x + torch.rand_like(x), "draws random numbers in eval mode"),
        (lambda x: 2 * x if x.requires_grad else x, "depends on requires_grad"),
    ],
    ids=["random", "requires_grad"],
)
def test_logits_that_change_are_refused_with_their_cause(change: Callable[[Tensor], Tensor], said: str) -> None:
    with pytest.raises(InputError, match=said):
        prepare(Answer(change).eval(), torch.randn(1, 1, 8, 8), EXECUTION)


@pytest.mark.parametrize("shape", ["bare", "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_published_checkpoint_shapes(tmp_path: Path, shape: str, prefix: str) -> None:
    source = build("convnet128", classes=7, channels=1, size=8)
    weights = {prefix + name: value for name, value in source.state_dict().items()}
    path = tmp_path / "teacher.pt"
    torch.save(weights if shape == "bare" else {shape: weights, "epoch": 3, "best_acc1": 50.0}, path)
    module, info = load_teacher(path, architecture="convnet128", channels=1, size=8)
    assert info.classes == 7
    assert not module.training
    for name, value in module.state_dict().items():
        assert torch.equal(value, source.state_dict()[name])


def test_own_checkpoint_describes_itself(tmp_path: Path) -> None:
    info = TeacherInfo(architecture="convnet128", classes=7, channels=1, size=8, accuracy=93.5)
    save_teacher(tmp_path / "t.pt", build("convnet128", classes=7, channels=1, size=8), info)
    assert load_teacher(tmp_path / "t.pt")[1] == info
    assert [path.name for path in tmp_path.iterdir()] == ["t.pt"]


def _truncated(path: Path) -> None:
    torch.save(small_teacher().state_dict(), path)
    path.write_bytes(path.read_bytes()[:5000])


class Harmful:
    """Unpickling this would run code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("harm-was-done"),)


DAMAGED: dict[str, tuple[Any, str]] = {
    "missing": (lambda path: None, "does not exist"),
    "folder": (lambda path: path.mkdir(), "cannot be read: it is a folder without a file of weights"),
    "empty": (lambda path: path.touch(), "cannot be read: it is empty"),
    "text": (lambda path: path.write_text("hello"), "cannot be read: it is damaged, no PyTorch file, or holds more than tensors"),
    "truncated": (_truncated, "cannot be read: it is cut short or damaged; copy or download it again"),
    "code": (
        lambda path: torch.save({"state_dict": Harmful()}, path),
        r"holds no weights; .*; it holds 'state_dict' \(an object of class unknown, whose code is not run: save its state_dict",
    ),
    "plain pickle": (lambda path: path.write_bytes(pickle.dumps(Harmful())), "it is a pickle, which could run code and is left alone"),
    "whole module": (
        lambda path: torch.save(small_teacher(), path),
        r"holds an object of class dwa_fast.models.architectures.SmallResNet, whose code is not run; .* save its state_dict\(\)",
    ),
    "a tensor": (lambda path: torch.save(torch.zeros(3), path), "must hold a state dict, got Tensor"),
    "no weights": (lambda path: torch.save({"epoch": 3}, path), "holds no weights"),
    "another network": (
        lambda path: torch.save(build("resnet18", classes=7).state_dict(), path),
        r"20 missing .* and 102 unknown \(conv1.weight, .*; all of it fits a resnet18 with 7 classes, 3 channels: --architecture resnet18",
    ),
    "other classes": (
        lambda path: torch.save(build("convnet128", classes=9, channels=1, size=8).state_dict(), path),
        r"with 7 classes: classifier.weight has shape \(9, 128\), expected \(7, 128\); all of it fits a convnet128 with 9 classes",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGED.values(), ids=DAMAGED.keys())
def test_bad_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Any, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "teacher.pt"
    damage(path)
    with pytest.raises(InputError, match=message):
        load_teacher(path, architecture="convnet128", classes=7, channels=1, size=8)
    assert not (tmp_path / "harm-was-done").exists()


def test_checkpoint_and_flags_disagree(tmp_path: Path) -> None:
    info = TeacherInfo(architecture="convnet128", classes=7, channels=1, size=8)
    save_teacher(tmp_path / "t.pt", build("convnet128", classes=7, channels=1, size=8), info)
    with pytest.raises(InputError, match="holds a convnet128, not a resnet18"):
        load_teacher(tmp_path / "t.pt", architecture="resnet18")
    with pytest.raises(InputError, match="knows 7 classes, the data have 9"):
        load_teacher(tmp_path / "t.pt", classes=9)
    with pytest.raises(InputError, match="is for images of 1 channels, not 3"):
        load_teacher(tmp_path / "t.pt", channels=3)
    with pytest.raises(InputError, match="is for images of 8 pixels, not 224"):
        load_teacher(tmp_path / "t.pt", size=224)
    assert load_teacher(tmp_path / "t.pt", classes=7, channels=1, size=8)[1] == info


def test_unnamed_checkpoint_needs_an_architecture(tmp_path: Path) -> None:
    torch.save(small_teacher().state_dict(), tmp_path / "t.pt")
    with pytest.raises(InputError, match="does not say which network it holds; name it with --architecture"):
        load_teacher(tmp_path / "t.pt")


def test_data_parallel_is_unwrapped() -> None:
    network, _ = prepare(nn.DataParallel(small_teacher()), torch.zeros(1, 1, 8, 8), EXECUTION)
    assert next(iter(network.layers)) == "stem.1"


def test_layer_that_is_not_reached_takes_no_part() -> None:
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.main, self.unused = small_teacher(), nn.BatchNorm2d(3)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.main(images)

    images = torch.randn(4, 1, 8, 8)
    with_auxiliary, _ = prepare(Auxiliary().eval(), images, EXECUTION)
    plain, _ = prepare(small_teacher(), images, EXECUTION)
    with_auxiliary(images), plain(images)
    assert torch.equal(with_auxiliary.matching(10.0), plain.matching(10.0))


def test_a_sparse_tensor_is_named() -> None:
    buffered, sparse = small_teacher(), small_teacher()
    buffered.register_buffer("graph", torch.eye(3).to_sparse())
    sparse.extra = nn.Parameter(torch.eye(3).to_sparse())
    for module, name, layout in ((buffered, "graph", "torch.sparse_coo"), (sparse, "extra", "torch.sparse_coo")):
        with pytest.raises(InputError, match=f"teacher holds {name} as a sparse tensor \\({layout}\\); expected a dense one"):
            prepare(module, torch.zeros(1, 1, 8, 8), EXECUTION)


def test_copies_are_compared_without_tensorfloat32() -> None:
    """Its ten bits would hide a wrong copy, or refuse a right one."""
    allowed = []

    class Watching(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            allowed.append(torch.backends.cudnn.allow_tf32)
            return super().forward(x)

    execution = replace(resolve("fused", "fp32", "cpu"), precision="tf32")
    prepare(Watching(small_teacher()), real_images()[0], execution)
    assert allowed
    assert not any(allowed)
