"""Checkpoints as other programs write them: the exact weights, whatever lies around them; the right sentence where there are none."""

from __future__ import annotations

import argparse
import collections
import datetime
import enum
import functools
import io
import os
import pathlib
import pickle
import random
import re
import subprocess
import sys
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dwa_fast import InputError
from dwa_fast.commands.cli import run
from dwa_fast.io.pickles import StandIn
from dwa_fast.io.torch_files import read_archive, read_checkpoint
from dwa_fast.models.architectures import SmallResNet, build
from dwa_fast.models.checkpoint import TeacherInfo, load_teacher, save_teacher, teacher_checksum
from tests.hostile import Harmful
from tests.nets import SIZE, alive

Weights = dict[str, Tensor]


def network(seed: int = 0) -> nn.Module:
    """A small-resnet for ten classes with statistics of its own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return alive(SmallResNet(10, 1))


def load(path: Path, **changes: Any) -> nn.Module:
    return load_teacher(path, **{"architecture": "small-resnet", "channels": 1, "size": SIZE, **changes})[0]


def assert_weights(module: nn.Module, wanted: Weights) -> None:
    own = module.state_dict()
    assert own.keys() == wanted.keys()
    assert [name for name, value in own.items() if not torch.equal(value, wanted[name].to(value.dtype))] == []


def under(prefix: str, weights: Weights) -> Weights:
    return {f"{prefix}{name}": value for name, value in weights.items()}


class Colour(enum.Enum):
    RED = 1


class Attributes(dict[str, Any]):
    """A dictionary class as hyperparameters are kept in: AttributeDict, EasyDict, ConfigDict."""


class Many(list[Any]):
    """A list class."""


class Slots:
    __slots__ = ("a",)

    class Nested(enum.Enum):
        ONE = 1

    def __init__(self) -> None:
        self.a = 1


class Averaged:
    """ModelEmaV2 and its kind, as far as a pickle is concerned: an object that holds a network."""

    def __init__(self) -> None:
        self.module = network(1)


def objects() -> dict[str, Any]:
    """What training scripts keep beside weights."""
    return {
        "args": argparse.Namespace(lr=0.1, output=pathlib.Path("runs"), nested=argparse.Namespace(a=1)),
        "path": pathlib.PurePosixPath("a/b"),
        "windows": pathlib.PureWindowsPath("a\\b"),
        "best": np.float64(71.5),
        "curve": np.arange(5, dtype=np.float32),
        "words": np.array(["a", None], dtype=object),
        "numpy rng": np.random.get_state(),  # noqa: NPY002 (as training scripts keep it)
        "python rng": random.getstate(),
        "torch rng": torch.get_rng_state(),
        "date": datetime.datetime(2026, 1, 2, tzinfo=datetime.timezone.utc),
        "simple": types.SimpleNamespace(a=1),
        "enum": Colour.RED,
        "nested": Slots.Nested.ONE,
        "default": collections.defaultdict(list, {"loss": [1.0]}),
        "deque": collections.deque([1, 2], maxlen=3),
        "counter": collections.Counter("aab"),
        "attributes": Attributes(lr=0.1, sub=Attributes(a=1)),
        "many": Many([1, 2]),
        "slots": Slots(),
        "partial": functools.partial(torch.nn.functional.relu, inplace=True),
        "type": nn.ReLU,
        "module of its own": nn.Linear(2, 2),
        "set": {1, 2},
        "frozen": frozenset({1}),
        "bytes": b"abc",
        "bytearray": bytearray(b"abc"),
        "complex": 1 + 2j,
        "dtype": torch.float16,
        "range": range(3),
        "slice": slice(1, 2),
        "exception": ValueError("x"),
    }


def optimiser(weights: Weights) -> dict[str, Any]:
    return {"state": {i: {"step": torch.tensor(3.0), "exp_avg": v.clone()} for i, v in enumerate(weights.values())}, "param_groups": [{}]}


# What each program makes of the weights; the teacher must come out with exactly these.
WRITERS: dict[str, Callable[[Weights], Any]] = {
    "bare": lambda w: w,
    "ordered": lambda w: collections.OrderedDict(w),
    "parameters": lambda w: {n: nn.Parameter(v) if v.is_floating_point() else v for n, v in w.items()},
    "no counters": lambda w: {n: v for n, v in w.items() if not n.endswith("num_batches_tracked")},
    **{
        f"key {key}": functools.partial(lambda key, w: {"epoch": 3, key: w, "optimizer": optimiser(w)}, key)
        for key in (
            "state_dict model net model_state_dict state_dict_ema model_ema ema network weights params teacher module student "
            "backbone model_state best_model model.state_dict ema_state_dict net_g"
        ).split()
    },
    **{
        f"prefix {prefix}": functools.partial(lambda prefix, w: {"state_dict": under(prefix, w)}, prefix)
        for prefix in (
            "module. _orig_mod. module._orig_mod. _orig_mod.module. module.module. model. net. backbone. model.net. model._orig_mod. "
            "module.model. model.module._orig_mod.net. teacher. _fsdp_wrapped_module. 0."
        ).split()
    },
    "compiled blocks": lambda w: {n.replace("blocks.0.", "blocks.0._orig_mod."): v for n, v in w.items()},
    "parallel blocks": lambda w: {n.replace("blocks.", "blocks.module."): v for n, v in w.items()},
    "ImageNet example": lambda w: {"epoch": 9, "arch": "x", "state_dict": under("module.", w), "best_acc1": torch.tensor(7.0)},
    "torchvision references": lambda w: {
        "model": w,
        "optimizer": optimiser(w),
        "lr_scheduler": {"last_epoch": 3},
        "epoch": 3,
        "args": argparse.Namespace(data_path="x", output_dir=pathlib.Path("y")),
    },
    "Lightning": lambda w: {
        "epoch": 3,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": {**under("model.", w), "loss.weight": torch.rand(10), "metric.confusion": torch.zeros(10, 10)},
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_path": "x", "best_model_score": torch.tensor(1.0)}},
        "hyper_parameters": Attributes(lr=0.1, root=pathlib.Path("y")),
        "optimizer_states": [optimiser(w)],
    },
    "AveragedModel": lambda w: {"n_averaged": torch.tensor(5), **under("module.", w)},
    "thop": lambda w: {**w, "total_ops": torch.zeros(1), "fc.total_params": torch.zeros(1), "blocks.0.total_ops": torch.zeros(1)},
    "DeepSpeed": lambda w: {"module": w, "ds_config": {"a": 1}, "param_shapes": [{n: v.shape for n, v in w.items()}], "mp_world_size": 1},
    "mmcv": lambda w: {"meta": {"mmcv_version": "1.7", "time": "now", "config": Attributes(a=Attributes())}, "state_dict": w},
    "loss of its own": lambda w: {**w, "criterion.weight": torch.rand(10), "val_loss.weight": torch.rand(10)},
    "one object at two keys": lambda w: {"best_model": w, "last_model": w},
    "within": lambda w: {"checkpoint": {"trainer": {"network": w}}},
    "twice the same": lambda w: {"model": w, "state_dict": {n: v.clone() for n, v in w.items()}},
    "robustness": lambda w: {
        "model": {
            "module.normalizer.new_mean": torch.full((1, 1, 1), 0.5),
            "module.normalizer.new_std": torch.full((1, 1, 1), 0.25),
            **under("module.model.", w),
            **under("module.attacker.model.", w),
        }
    },
    "default dictionary": lambda w: collections.defaultdict(dict, {"state_dict": collections.defaultdict(None, w)}),
    "dictionary class": lambda w: Attributes(state_dict=Attributes(w)),
    "objects": lambda w: {**objects(), "state_dict": w},
    "channels last": lambda w: {n: v.contiguous(memory_format=torch.channels_last) if v.dim() == 4 else v for n, v in w.items()},
    "shared storage": lambda w: {n: torch.stack([v, v + 1])[0] for n, v in w.items()},
    "double": lambda w: {n: v.double() if v.is_floating_point() else v for n, v in w.items()},
}


@pytest.mark.parametrize("old", [False, True], ids=["zip", "old"])
@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS.keys())
def test_weights_are_those_that_were_written(tmp_path: Path, writer: Callable[[Weights], Any], old: bool) -> None:
    weights = network().state_dict()
    content = writer(weights)
    if old:
        for name in ("module of its own", "type"):
            content.pop(name, None)  # the old format keeps the source code of modules
    torch.save(content, tmp_path / "t.pt", _use_new_zipfile_serialization=not old)
    assert_weights(load(tmp_path / "t.pt"), weights)


@pytest.mark.parametrize("name", objects())
def test_every_object_is_passed_over(tmp_path: Path, name: str) -> None:
    weights = network().state_dict()
    torch.save([objects()[name], weights], tmp_path / "t.pt")
    assert read_checkpoint(tmp_path / "t.pt", "file")[1].keys() == weights.keys()
    with pytest.raises(InputError, match="must hold a state dict, got list"):
        load(tmp_path / "t.pt")


def test_half_and_bfloat16_weights(tmp_path: Path) -> None:
    for kind in (torch.float16, torch.bfloat16):
        weights = {n: v.to(kind) if v.is_floating_point() else v for n, v in network().state_dict().items()}
        torch.save(weights, tmp_path / "t.pt")
        module = load(tmp_path / "t.pt")
        assert next(module.parameters()).dtype == torch.float32
        assert_weights(module, weights)


@pytest.mark.parametrize("protocol", [2, 3])
def test_pickle_protocols(tmp_path: Path, protocol: int) -> None:
    torch.save({"state_dict": network().state_dict()}, tmp_path / "t.pt", pickle_protocol=protocol)
    assert_weights(load(tmp_path / "t.pt"), network().state_dict())


@pytest.mark.parametrize("protocol", [4, 5])
def test_other_pickle_protocols_are_named(tmp_path: Path, protocol: int) -> None:
    torch.save(network().state_dict(), tmp_path / "t.pt", pickle_protocol=protocol)
    with pytest.raises(InputError, match=f"it was saved with pickle_protocol={protocol}, which PyTorch cannot read without running it"):
        load(tmp_path / "t.pt")


# Weights of seed 0 and of seed 1 in one file: which is taken, under which key the other lies, and what the log says.
PAIRS: dict[str, tuple[Callable[[Weights, Weights], Any], str, str]] = {
    "timm": (lambda a, b: {"state_dict": a, "state_dict_ema": b, "args": argparse.Namespace()}, "state_dict", "state_dict_ema"),
    "torchvision": (lambda a, b: {"model": a, "model_ema": {"n_averaged": torch.tensor(1), **under("module.", b)}}, "model", "model_ema"),
    "ema first": (lambda a, b: {"ema": b, "net": a}, "net", "ema"),
    "best": (lambda a, b: {"best_model": b, "state_dict": under("module.", a)}, "state_dict", "best_model"),
    "Lightning": (
        lambda a, b: {"state_dict": {**under("ema_model.module.", b), **under("model.", a)}},
        "state_dict.model",
        "state_dict.ema_model",
    ),
    "copy among its own names": (lambda a, b: {"state_dict": {**a, **under("ema.module.", b)}}, "state_dict", "state_dict.ema"),
    "callback": (
        lambda a, b: {"state_dict": under("model.", a), "callbacks": {"EMA": {"weights": under("model.", b)}}},
        "state_dict.model",
        "callbacks.EMA",
    ),
}


@pytest.mark.parametrize(("writer", "taken", "other"), PAIRS.values(), ids=PAIRS.keys())
def test_choice_between_weights(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, writer: Callable[[Weights, Weights], Any], taken: str, other: str
) -> None:
    first, second = network(0).state_dict(), network(1).state_dict()
    torch.save(writer(first, second), tmp_path / "t.pt")
    assert_weights(load(tmp_path / "t.pt"), first)
    assert f"{taken!r} is taken, --weights-key takes another" in caplog.text
    assert f"'{other}" in caplog.text
    caplog.clear()
    assert_weights(load(tmp_path / "t.pt", weights_key=other), second)
    assert_weights(load(tmp_path / "t.pt", weights_key=taken), first)
    assert "several" not in caplog.text


UNDECIDED = {
    "student and teacher": (lambda a, b: {"student": a, "teacher": b}, "'student', 'teacher'"),
    "two usual ones": (lambda a, b: {"model": a, "net": b}, "'model', 'net'"),
    "encoders": (lambda a, b: {"state_dict": {**under("encoder_q.", a), **under("encoder_k.", b)}}, "'state_dict.encoder_q'"),
    "ensemble": (lambda a, b: {**under("0.", a), **under("1.", b)}, "'0', '1'"),
}


@pytest.mark.parametrize(("writer", "names"), UNDECIDED.values(), ids=UNDECIDED.keys())
def test_no_choice_without_a_reason(tmp_path: Path, writer: Callable[[Weights, Weights], Any], names: str) -> None:
    torch.save(writer(network(0).state_dict(), network(1).state_dict()), tmp_path / "t.pt")
    with pytest.raises(InputError, match=rf"holds several weights that fit, under {names}.*; choose one with --weights-key"):
        load(tmp_path / "t.pt")


def test_own_checkpoint_takes_a_key_too(tmp_path: Path) -> None:
    info = TeacherInfo(architecture="small-resnet", classes=10, channels=1, size=SIZE)
    save_teacher(tmp_path / "t.pt", network(), info)
    module, found = load_teacher(tmp_path / "t.pt", weights_key="state_dict")
    assert found == info
    assert_weights(module, network().state_dict())
    with pytest.raises(InputError, match="holds no weights under 'ema' that fit a small-resnet; it holds such under 'state_dict'"):
        load_teacher(tmp_path / "t.pt", weights_key="ema")
    assert teacher_checksum(tmp_path / "t.pt") != teacher_checksum(tmp_path / "t.pt", "state_dict")


NORMALISED = {"0.mean": torch.tensor([0.25]), "0.std": torch.full((1, 1, 1, 1), 0.5)}


def test_network_behind_a_normalising_layer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = network().state_dict()
    torch.save({**NORMALISED, **under("1.", weights)}, tmp_path / "t.pt")
    assert_weights(load(tmp_path / "t.pt"), weights)
    assert "normalises its images (0.mean [0.25], 0.std [0.5]); the network alone is taken, which is right where --mean and" in caplog.text
    caplog.clear()
    torch.save(under("1.", weights), tmp_path / "t.pt")
    assert_weights(load(tmp_path / "t.pt"), weights)
    assert "as number 1 of a sequence of layers; the network alone is taken" in caplog.text


def test_what_lies_beside_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = network().state_dict()
    torch.save({**under("model.", weights), "loss.weight": torch.rand(10), "head.weight": torch.rand(3, 10)}, tmp_path / "t.pt")
    assert_weights(load(tmp_path / "t.pt"), weights)
    assert "also holds loss.weight, head.weight, which the network has no place for and which are left out" in caplog.text


def changed(**values: Any) -> Weights:
    return {**network().state_dict(), **{name.replace("__", "."): value for name, value in values.items()}}


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
        "holds an object of class tests.models.test_checkpoint.Averaged, whose code is not run",
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


def zipped(**entries: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name.replace("__", "/").replace("DOT", "."), content)
    return buffer.getvalue()


def saved(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def arrays() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, weight=np.zeros(3))
    return buffer.getvalue()


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
