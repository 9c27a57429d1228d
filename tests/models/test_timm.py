"""Networks of timm by name, and checkpoints as timm writes them."""

from __future__ import annotations

import argparse
import re
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dwa_fast import InputError
from dwa_fast.engine.backend import resolve
from dwa_fast.engine.teacher import prepare
from dwa_fast.io.torch_files import write_archive
from dwa_fast.models.architectures import build, check_architecture
from dwa_fast.models.checkpoint import TeacherInfo, load_teacher, save_teacher
from tests.nets import alive

timm = pytest.importorskip("timm")
SMALL = "timm:test_resnet"


def no_network(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("a name was looked up")


@pytest.mark.parametrize(
    ("name", "channels", "size"),
    [
        ("timm:resnet18", 3, 32),
        ("timm:resnet18.a1_in1k", 1, 32),
        ("timm:vit_tiny_patch16_224", 3, 32),
        ("timm:mobilenetv3_small_050", 3, 64),
    ],
)
def test_networks_are_built_with_fresh_weights(name: str, channels: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    network = build(name, classes=7, channels=channels, size=size).eval()
    assert network(torch.zeros(1, channels, size, size)).shape == (1, 7)


def network(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return alive(build(SMALL, classes=5, size=32))


def assert_weights(module: nn.Module, wanted: nn.Module) -> None:
    own, other = module.state_dict(), wanted.state_dict()
    assert own.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in own.items())


def test_checkpoints_of_timm(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    utils = pytest.importorskip("timm.utils")
    first, second = network(0), network(1)
    average = utils.ModelEmaV3(second, decay=0.9)
    args = argparse.Namespace(model="test_resnet", output=Path("x"))
    optimiser = torch.optim.SGD(first.parameters(), lr=0.1)
    saver = utils.CheckpointSaver(first, optimiser, args=args, model_ema=average, checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path))
    saver.save_checkpoint(0, metric=50.0)
    path = tmp_path / "last.pth.tar"
    module, info = load_teacher(path, architecture=SMALL, size=32)
    assert info == TeacherInfo(architecture=SMALL, classes=5, channels=3, size=32)
    assert_weights(module, first)
    assert "'state_dict' is taken, --weights-key takes another" in caplog.text
    assert_weights(load_teacher(path, architecture=SMALL, size=32, weights_key="state_dict_ema")[0], second)
    torch.save(first.state_dict(), tmp_path / "plain.pth")
    assert_weights(load_teacher(tmp_path / "plain.pth", architecture=SMALL, size=32)[0], first)


def test_own_checkpoint_of_a_network_of_timm(tmp_path: Path) -> None:
    info = TeacherInfo(architecture=SMALL, classes=5, channels=3, size=32)
    save_teacher(tmp_path / "t.pt", network(), info)
    module, found = load_teacher(tmp_path / "t.pt")
    assert found == info
    assert_weights(module, network())
    prepare(module, torch.zeros(1, 3, 32, 32), resolve("reference", "fp32", "cpu"))


REFUSED = {
    "near": ("timm:resnet19", "has no network 'resnet19'; nearest: resnet1", 32),
    "hub": ("timm:hf-hub:somebody/network", "has no network 'hf-hub:somebody/network'", 32),
    "folder": ("timm:local-dir:x", "has no network 'local-dir:x'", 32),
    "empty": ("timm:", "has no network ''", 32),
    "tag": (
        "timm:resnet18.nothing",
        "timm cannot build resnet18.nothing for 7 classes, 3 channels and size 32: Invalid pretrained tag",
        32,
    ),
    "ours": ("resnet19", "unknown architecture 'resnet19'; known: resnet18, ", 32),
}


@pytest.mark.parametrize(("name", "message", "size"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(name: str, message: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    with pytest.raises(InputError, match=re.escape(message)):
        build(name, classes=7, size=size)


def test_hub_name_in_a_checkpoint_downloads_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    info = {"architecture": "timm:hf-hub:a/b", "classes": 5, "channels": 3, "size": 32}
    write_archive(tmp_path / "t.pt", {"state_dict": network().state_dict(), "dwa_fast": info})
    with pytest.raises(InputError, match=r"describes a network that cannot be: timm .* has no network 'hf-hub:a/b'"):
        load_teacher(tmp_path / "t.pt")


def test_without_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(InputError, match=re.escape("timm:resnet18 needs timm, which is not installed: pip install 'dwa-fast[timm]'")):
        check_architecture("student", "timm:resnet18")
