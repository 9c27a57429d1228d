"""Files that hold no weights of the network, or a program: one sentence that says what they are, and nothing of them is run."""

from __future__ import annotations

import functools
import os
import pathlib
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dwa_fast import InputError
from dwa_fast.commands.cli import run
from dwa_fast.io.pickles import StandIn
from dwa_fast.io.torch_files import read_archive
from dwa_fast.models.architectures import SmallResNet, build
from dwa_fast.models.checkpoint import TeacherInfo, load_teacher, save_teacher
from tests.hostile import Harmful
from tests.models.checkpoints import Averaged, arrays, assert_weights, changed, load, network, saved, under, zipped
from tests.nets import SIZE


def module_archive(path: Path) -> None:
    torch.save({"model": network(), "epoch": 3}, path)


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "extra head": (lambda p: torch.save(changed(head__weight=torch.rand(3, 10)), p), "weights 1 unknown (head.weight…)"),
    "extra layer": (lambda p: torch.save(under("module.", changed(blocks__0__se__bias=torch.rand(3))), p), "1 unknown (blocks.0.se.bias…)"),
    "own normalisation": (lambda p: torch.save(changed(mean=torch.rand(1)), p), "weights 1 unknown (mean…)"),
    "layers before": (
        lambda p: torch.save({"0.weight": torch.rand(1, 1, 3, 3), **under("1.", network().state_dict())}, p),
        "holds a sequence of layers, of which the network is number 1; others have weights too (0.weight…), and would be missing",
    ),
    "backbone and head": (
        lambda p: torch.save({"state_dict": {**under("backbone.", {n: v for n, v in changed().items() if "fc" not in n})}}, p),
        "weights 2 missing (fc.weight, fc.bias…)",
    ),
    "integers": (
        lambda p: torch.save(changed(fc__weight=torch.zeros(10, 64, dtype=torch.int8)), p),
        "fc.weight as torch.int8; expected floating",
    ),
    "complex": (
        lambda p: torch.save(changed(fc__weight=torch.zeros(10, 64) * 1j), p),
        "fc.weight as torch.complex64; expected floating-point",
    ),
    "sparse": (
        lambda p: torch.save(changed(fc__weight=torch.zeros(10, 64).to_sparse()), p),
        "fc.weight as a Tensor of layout torch.sparse_coo",
    ),
    "expanded": (lambda p: torch.save(changed(fc__weight=torch.zeros(1).expand(10, 64)), p), "does not hold as many values"),
    "meta": (lambda p: torch.save(changed(fc__weight=torch.zeros(10, 64, device="meta")), p), "does not hold as many values"),
    "pruned": (
        lambda p: torch.save({n.replace("fc.weight", "fc.weight_orig"): v for n, v in changed(fc__weight_mask=torch.ones(1)).items()}, p),
        "torch.nn.utils.prune.remove makes plain ones",
    ),
    "classes": (
        lambda p: torch.save({"model": SmallResNet(12, 1).state_dict()}, p),
        "small-resnet with 10 classes: fc.weight has shape (12, 64), expected (10, 64); all of it fits a small-resnet with 12 classes",
    ),
    "channels": (
        lambda p: torch.save(SmallResNet(10, 3).state_dict(), p),
        "stem.0.weight has shape (16, 3, 3, 3), expected (16, 1, 3, 3); all of it fits a small-resnet with 3 channels",
    ),
    "architecture": (
        lambda p: torch.save(under("module.", build("convnet128", classes=10, channels=1, size=SIZE).state_dict()), p),
        "; all of it fits a convnet128 with 10 classes: --architecture convnet128",
    ),
    "module at a key": (
        module_archive,
        (
            "it holds 'model' (an object of class dwa_fast.models.architectures.SmallResNet, whose code is not run: "
            "save its state_dict()), 'epoch'"
        ),
    ),
    "average": (
        lambda p: torch.save(Averaged(), p),
        "holds an object of class tests.models.checkpoints.Averaged, whose code is not run",
    ),
    "old module": (lambda p: torch.save(network(), p, _use_new_zipfile_serialization=False), "it holds more than tensors (a module), "),
    "nothing": (lambda p: torch.save({}, p), "holds no weights; expected a state dict, bare or at a key; it holds nothing"),
    "arrays": (lambda p: torch.save({"model": {n: v.numpy() for n, v in changed().items()}}, p), "holds no weights; expected a state dict"),
    "pieces": (
        lambda p: torch.save({"model": {"fc.weight": DTensor()}}, p),
        "its weights are pieces of distributed tensors (tests.models.test_check",
    ),
}


class DTensor:
    """The name of PyTorch's class."""


@pytest.mark.filterwarnings("ignore:.*sparse tensor invariants")
@pytest.mark.parametrize(("write", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(tmp_path: Path, write: Callable[[Path], Any], message: str) -> None:
    write(tmp_path / "t.pt")
    wanted = re.escape(message)
    if "sparse" in message:
        wanted += "|cannot be read: it is damaged"  # PyTorch 2.11 itself does not read them with weights_only
    with pytest.raises(InputError, match=wanted):
        load(tmp_path / "t.pt", classes=10)


def test_stem_of_another_resnet_names_it(tmp_path: Path) -> None:
    torch.save(build("resnet18", classes=10, channels=3, size=32).state_dict(), tmp_path / "t.pt")
    message = (
        "conv1.weight has shape (64, 3, 7, 7), expected (64, 3, 3, 3); all of it fits a resnet18 with 10 classes: --architecture resnet18"
    )
    with pytest.raises(InputError, match=re.escape(message)):
        load(tmp_path / "t.pt", architecture="resnet18-cifar", channels=3, size=32)


def test_deeper_network_is_none_of_the_shallower_one(tmp_path: Path) -> None:
    """Every name and shape of a ResNet-18 is in a ResNet-34 too."""
    torch.save(build("resnet34-cifar", classes=10, size=32).state_dict(), tmp_path / "t.pt")
    with pytest.raises(
        InputError, match=r"weights 80 unknown \(layer1.2.conv1.weight, .*; all of it fits a resnet34-cifar with 10 classes"
    ):
        load(tmp_path / "t.pt", architecture="resnet18-cifar", channels=3, size=32)


FILES: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "it is empty"),
    "web page": (lambda: b"\n<!DOCTYPE html><html>", "it is a web page instead of the file"),
    "Git LFS": (lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull fetches the file"),
    "npz": (arrays, "it holds NumPy arrays (.npz)"),
    "npy": (lambda: b"\x93NUMPY\x01\x00", "it is a NumPy array"),
    "HDF5": (lambda: b"\x89HDF\r\n", "it is an HDF5 file"),
    "gzip": (lambda: b"\x1f\x8b\x08", "it is packed (gzip); unpack it"),
    "zip of files": (lambda: zipped(model__readmeDOTtxt=b"x"), "it is a zip archive without weights of torch.save; unpack it"),
    "pickle": (lambda: pickle.dumps({"a": 1}), "it is a pickle, which could run code and is left alone"),
    "truncated": (lambda: saved(network().state_dict())[:-100], "it is cut short or damaged; copy or download it again"),
    "index": (lambda: b'{"metadata": {"total_size": 9}, "weight_map": {}}', "it is the index of weights in several files"),
    "safetensors, cut": (lambda: (40).to_bytes(8, "little") + b'{"fc.weight": ', "it is a safetensors file that is cut short or damaged"),
    "TorchScript": (lambda: zipped(x__constantsDOTpkl=b"", x__dataDOTpkl=b"\x80\x02"), "it is a TorchScript archive, which is a program"),
    "exported": (lambda: zipped(x__archive_format=b"pt2"), "it is an exported program (.pt2); load it with torch.export.load"),
}


@pytest.mark.parametrize(("content", "message"), FILES.values(), ids=FILES.keys())
def test_files_that_are_none(tmp_path: Path, content: Callable[[], bytes], message: str) -> None:
    if "safetensors" in message:
        pytest.importorskip("safetensors")
    (tmp_path / "t.pt").write_bytes(content())
    for read in (lambda path: read_archive(path, "checkpoint"), load):
        if read is load or "safetensors" not in message:
            with pytest.raises(InputError, match=rf"cannot be read: .*{re.escape(message)}"):
                read(tmp_path / "t.pt")


@pytest.mark.filterwarnings("ignore")
def test_programs_of_torch_are_told(tmp_path: Path) -> None:
    layer = nn.Linear(2, 2).eval()
    torch.jit.script(layer).save(tmp_path / "script.pt")
    torch.export.save(torch.export.export(layer, (torch.zeros(1, 2),)), tmp_path / "program.pt2")
    for name, message in (("script.pt", "it is a TorchScript archive"), ("program.pt2", "it is an exported program")):
        with pytest.raises(InputError, match=message):
            load(tmp_path / name)


def test_folders_are_told(tmp_path: Path) -> None:
    for names, message in (
        ((), "it is a folder without a file of weights"),
        (("config.json", "model.safetensors"), r"it is a folder; pass a file in it \(model.safetensors\)"),
        ((".metadata", "__0_0.distcp"), "it is a distributed checkpoint, in pieces; .* dcp_to_torch_save"),
    ):
        for name in names:
            (tmp_path / name).touch()
        with pytest.raises(InputError, match=message):
            load(tmp_path)
    (tmp_path / "__0_0.distcp").write_bytes(saved({}))
    with pytest.raises(InputError, match="it is a distributed checkpoint"):
        load(tmp_path / "__0_0.distcp")


@pytest.mark.parametrize("name", ["model.safetensors", "model.bin"])
def test_safetensors_under_any_name(tmp_path: Path, name: str) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    weights = network().state_dict()
    safetensors.save_file(under("module.", weights), tmp_path / name, metadata={"format": "pt"})
    assert_weights(load(tmp_path / name), weights)


def test_torch_archive_under_the_name_of_safetensors(tmp_path: Path) -> None:
    torch.save(network().state_dict(), tmp_path / "t.safetensors")
    assert_weights(load(tmp_path / "t.safetensors"), network().state_dict())


def test_safetensors_without_their_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    (tmp_path / "t.pt").write_bytes((2).to_bytes(8, "little") + b"{}")
    with pytest.raises(InputError, match="it is a safetensors file; pip install safetensors"):
        load(tmp_path / "t.pt")


class Calls:
    """Unpickling this calls a function, and sets a state on what it gives."""

    def __init__(self, function: Any, *args: Any, state: Any = None) -> None:
        self.reduced = function, args, state

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reduced


def attacks(canary: Path) -> dict[str, Any]:
    command = f"mkdir {canary}"
    return {
        "system": Harmful(canary),
        "process": Calls(subprocess.Popen, command, state={"shell": True}),
        "evaluate": Calls(eval, f"__import__('os').mkdir({str(canary)!r})"),
        "execute": Calls(exec, f"import os; os.mkdir({str(canary)!r})"),
        "look-up": Calls(getattr, canary, "mkdir"),
        "method": Calls(pathlib.Path.mkdir, canary),
        "bound": Calls(canary.mkdir),
        "partial": Calls(functools.partial(os.mkdir, str(canary))),
        "import": Calls(__import__, "os"),
        "torch": Calls(torch.load, str(canary), state={"weights_only": False}),
        "hub": Calls(torch.hub.load, str(canary), "x"),
        "class": Calls(type, "X", (object,), {"__setstate__": canary.mkdir}),
        "set attribute": Calls(setattr, StandIn, "__setstate__", canary.mkdir),
        "stand-in": Calls(StandIn, state={"class_name": "x"}),
    }


@pytest.mark.parametrize("old", [False, True], ids=["zip", "old"])
@pytest.mark.parametrize("name", attacks(Path("x")))
def test_nothing_of_a_file_is_run(tmp_path: Path, outside: Path, monkeypatch: pytest.MonkeyPatch, name: str, old: bool) -> None:
    monkeypatch.chdir(tmp_path)
    weights = network().state_dict()
    before = dict(vars(StandIn)), set(torch.serialization.get_safe_globals())
    torch.save({"x": attacks(outside / "canary")[name], "model": weights}, tmp_path / "t.pt", _use_new_zipfile_serialization=not old)
    if name in ("system", "partial", "look-up of a function"):  # of os, of which PyTorch lets nothing through
        with pytest.raises(InputError, match="it holds more than tensors"):
            load(tmp_path / "t.pt")
    else:
        assert_weights(load(tmp_path / "t.pt"), weights)
    assert (dict(vars(StandIn)), set(torch.serialization.get_safe_globals())) == before


def test_weights_key_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": network(0).state_dict(), "state_dict_ema": network(1).state_dict()}, "t.pt")
    command = [
        "synthesize",
        "--recipe",
        "digits",
        "--teacher",
        "t.pt",
        "--output",
        "set",
        "--ipc",
        "1",
        "--iterations",
        "2",
        "--steps",
        "1",
    ]
    assert run([*command, "--weights-key", "ema"]) == 1
    assert "no weights under 'ema' that fit a small-resnet; it holds such under 'state_dict', 'state_dict_ema'" in capsys.readouterr().err
    assert run([*command, "--weights-key", "state_dict_ema"]) == 0
    assert "several" not in capsys.readouterr().err
    assert run(command) == 1  # the other weights of the file are another teacher
    assert "teacher" in capsys.readouterr().err


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    """PyTorch reads such a file without a word."""
    path = tmp_path / "teacher.pt"
    weights = build("convnet128", classes=7, channels=1, size=8).state_dict()
    torch.save(weights, path)
    content = bytearray(path.read_bytes())
    largest = max(weights.values(), key=torch.numel).contiguous().numpy().tobytes()
    content[content.index(largest) + len(largest) // 2] ^= 1
    path.write_bytes(content)
    assert any(not torch.equal(value, weights[name]) for name, value in torch.load(path, weights_only=True).items())
    with pytest.raises(InputError, match=r"cannot be read: it is damaged: the checksum of .*data/\d+ in it is not that of its bytes"):
        load_teacher(path, architecture="convnet128", channels=1, size=8)


def test_archives_without_checksums_are_read(tmp_path: Path) -> None:
    path = tmp_path / "teacher.pt"
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(build("convnet128", classes=7, channels=1, size=8).state_dict(), path)
    finally:
        torch.serialization.set_crc32_options(before)
    assert load_teacher(path, architecture="convnet128", channels=1, size=8)[1].classes == 7


INFO: dict[str, Any] = {"architecture": "small-resnet", "classes": 5, "channels": 3, "size": 32}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "CNN"}, "unknown architecture 'CNN'"),
        ({"architecture": "resnet18"}, "the network is no resnet18 as described: conv1.weight is missing"),
        ({"classes": 4}, r"no small-resnet as described: fc.weight is of shape \(5, 64\), expected of shape \(4, 64\)"),
        ({"classes": 0}, "classes must be an integer of at least 1, got 0"),
        ({"size": -1}, "size must be an integer of at least 1, got -1"),
        ({"class_names": ["a"] * 5}, "class_names must be a list of different names"),
        ({"mean": (0.5,), "std": (0.5,)}, "it has 3 channels and 1 values of mean and std"),
    ],
    ids=str,
)
def test_what_could_not_be_loaded_again_is_not_saved(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        save_teacher(tmp_path / "t.pt", build("small-resnet", classes=5), TeacherInfo(**{**INFO, **change}))
    assert not list(tmp_path.iterdir())


def test_weights_alone_are_no_teacher(tmp_path: Path) -> None:
    network = build("small-resnet", classes=5)
    for module, info in ((network.state_dict(), TeacherInfo(**INFO)), (network, INFO)):
        with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module and a TeacherInfo, got (OrderedD|d)ict"):
            save_teacher(tmp_path / "t.pt", module, info)  # type: ignore[arg-type]
