"""Checkpoints as other programs write them: the exact weights, whatever lies around them."""

from __future__ import annotations

import argparse
import collections
import functools
import pathlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dwa_fast import InputError
from dwa_fast.io.torch_files import read_checkpoint
from dwa_fast.models.checkpoint import TeacherInfo, load_teacher, save_teacher, teacher_checksum
from tests.models.checkpoints import Attributes, Weights, assert_weights, load, network, objects, optimiser, under
from tests.nets import SIZE

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
