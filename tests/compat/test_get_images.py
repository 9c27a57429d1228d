"""get_images: call shapes, files, initial images, display and verifier of the published scripts. Equality is in test_swapping."""

from __future__ import annotations

import copy
import io
import logging
import re
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn

from dwa_fast import InputError
from dwa_fast.compat import fields, get_images, namespace, recover
from dwa_fast.recipes import RECIPES, recipe
from tests.compat.loops import colour_teacher

CLASSES, SIZE = 4, 16
POCKET = replace(recipe("imagenet", size=SIZE), name="pocket")
FIELDS = {"iteration": 2, "batch_size": 3, "lr": 0.1, "jitter": 2, "r_bn": 0.01, "first_bn_multiplier": 10.0}


@pytest.fixture(autouse=True)
def pocket(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recipe of small images that are cropped; and what is said once per process is said once per test here."""
    monkeypatch.setitem(RECIPES, "pocket", POCKET)
    fields.log_once.cache_clear()
    recover._warn_of_devices.cache_clear()


def teacher() -> nn.Module:
    return copy.deepcopy(colour_teacher(CLASSES, SIZE, (8, 8, 8)))


def run(*rest: Any, network: nn.Module | None = None, **fields: Any) -> Tensor:
    """get_images on a plain back-end: what is tested here does not depend on it."""
    args = Namespace(**{**FIELDS, **fields})
    return get_images(args, teacher() if network is None else network, *rest, recipe="pocket", backend="reference", device="cpu")


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("shape", ["with a hook", "without", "by name"])
def test_every_call_shape_writes_the_published_files(shape: str, tmp_path: Path) -> None:
    args = Namespace(**FIELDS, syn_data_path=str(tmp_path / "syn" / "test"), store_best_images=True)
    calls: dict[str, Callable[[], Tensor]] = {
        "with a hook": lambda: get_images(args, teacher(), None, 7, recipe="pocket", backend="reference"),
        "without": lambda: get_images(args, teacher(), 7, recipe="pocket", backend="reference"),
        "by name": lambda: get_images(
            args=args, model_teacher=teacher(), hook_for_display=None, ipc_id=7, recipe="pocket", backend="reference"
        ),
    }
    losses = calls[shape]()
    assert losses.shape == (2, 2, 3)
    assert files(tmp_path / "syn" / "test") == [f"new00{label}/class00{label}_id007.jpg" for label in range(CLASSES)]


def test_files_are_jpeg_of_pillows_default_quality(tmp_path: Path) -> None:
    run(None, 0, syn_data_path=str(tmp_path), store_best_images=True)
    with Image.open(tmp_path / "new000" / "class000_id000.jpg") as image:
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (SIZE, SIZE))
        tables = image.quantization
    plain = io.BytesIO()
    Image.new("RGB", (SIZE, SIZE)).save(plain, format="JPEG")
    assert tables == Image.open(plain).quantization


def test_levels_are_cut_off_as_published(tmp_path: Path) -> None:
    pixels = torch.tensor([0.0, 0.5, 1.0, 1.5]).view(1, 1, 2, 2).expand(1, 3, 2, 2).repeat_interleave(8, 2).repeat_interleave(8, 3)
    recover._store(tmp_path, pixels, torch.tensor([12]), 3, 10450)
    levels = np.array(Image.open(tmp_path / "new00012" / "class00012_id003.jpg"))
    assert levels[::8, ::8, 0].tolist() == [[0, 127], [255, 255]]


@pytest.mark.parametrize("fields", [{}, {"store_best_images": False}])
def test_without_the_flag_nothing_is_written(fields: dict[str, Any], tmp_path: Path) -> None:
    run(None, 0, syn_data_path=str(tmp_path / "syn"), **fields)
    assert not (tmp_path / "syn").exists()


def test_tinys_own_name_of_the_flag(tmp_path: Path) -> None:
    run(None, 0, syn_data_path=str(tmp_path), store_last_images=True)
    assert len(files(tmp_path)) == CLASSES


def test_same_seed_same_bits_and_every_index_its_own(tmp_path: Path) -> None:
    first, again, other = (run(None, index) for index in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    args = Namespace(**FIELDS)
    assert not torch.equal(first, get_images(args, teacher(), None, 0, recipe="pocket", backend="reference", seed=1))


def test_what_was_understood_is_said_once_per_setting(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for jitter in (2, 2, 3):
        run(None, 0, jitter=jitter, exp_name="x", ipc_start=0, ipc_end=1)
    said = [record.getMessage() for record in caplog.records if record.getMessage().startswith("get_images")]
    assert said == [
        "get_images: SRe2L's loop; data set recipe pocket; 16 × 16 pixels, mean 0.485 0.456 0.406, std 0.229 0.224 0.225; "
        f"view: crop of 0.08 to 1 of the area, flip and roll by 0 to {jitter} pixels; curriculum: none; "
        "2 iterations, batches of 3, λ_mean 0.01, λ_var 0.01"
        for jitter in (2, 3)
    ]


def test_without_logging_it_is_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A script that sets up no logging sees it too."""
    monkeypatch.setattr(fields.log, "hasHandlers", lambda: False)
    run(None, 0)
    assert capsys.readouterr().err.startswith("get_images: SRe2L's loop; data set recipe pocket; 16 × 16 pixels")


def test_the_teacher_may_be_wrapped_and_stays_as_it_was() -> None:
    network = teacher()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    assert torch.equal(run(None, 0, network=nn.DataParallel(network)), run(None, 0))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_several_devices_are_not_used_and_it_says_so(caplog: pytest.LogCaptureFixture) -> None:
    wrapped = nn.DataParallel(teacher())
    wrapped.device_ids = [0, 1, 2]
    run(None, 0, network=wrapped)
    assert "computes on the first of the 3 devices of nn.DataParallel: a split batch would have other statistics" in caplog.text


# Initial images


def pictures(folder: Path, colours: dict[str, list[int]], size: tuple[int, int] = (40, 24)) -> Path:
    """Class folders of pictures, each black on the left and of one grey on the right."""
    for name, greys in colours.items():
        (folder / name).mkdir(parents=True)
        for number, grey in enumerate(greys):
            levels = np.zeros((size[1], size[0], 3), dtype=np.uint8)
            levels[:, size[0] // 2 :] = grey
            Image.fromarray(levels).save(folder / name / f"{number}.png")
    return folder


def start_of(folder: Path, index: int, **fields: Any) -> Tensor:
    """The initial images that get_images takes, [classes, 3, S, S] in [0, 1]."""
    args = Namespace(**FIELDS, init_path=str(folder), rho=0.1, **fields)
    asked = namespace.read_namespace(args, teacher(), recipe="pocket", backend="reference", precision="auto", device="cpu")
    batches = list(recover._batches(asked, CLASSES, index))
    assert [batch.number for batch in batches] == [2 * index, 2 * index + 1]
    mean, std = (torch.tensor(value)[:, None, None] for value in (asked.normalisation.mean, asked.normalisation.std))
    return torch.cat([batch.images for batch in batches]) * std + mean


def test_class_folders_are_read_in_sorted_order_and_squashed(tmp_path: Path) -> None:
    folder = pictures(tmp_path, {"b": [40, 41], "a": [20, 21], "d": [80, 81], "c": [60, 61]})
    start = start_of(folder, 1)
    assert torch.allclose(start[:, :, :, -3:].mean((1, 2, 3)) * 255, torch.tensor([21.0, 41, 61, 81]), atol=1e-3)
    assert start[:, :, :, :3].abs().max() < 1e-6  # all of the width is there
    resize = torchvision.transforms.Resize((SIZE, SIZE))
    wanted = torch.from_numpy(np.array(resize(Image.open(folder / "a" / "1.png")))).permute(2, 0, 1) / 255
    assert torch.allclose(start[0], wanted, atol=1e-6)


def test_files_of_a_class_are_in_sorted_order_whatever_the_disk_says(tmp_path: Path) -> None:
    folder = pictures(tmp_path, {name: [] for name in "abcd"})
    for number in (5, 2, 9, 0, 7, 1, 8, 3, 6, 4):
        for name in "abcd":
            Image.new("RGB", (8, 8), (20 * number,) * 3).save(folder / name / f"{number}.png")
    greys = [float(start_of(folder, index).mean() * 255) for index in range(10)]
    assert greys == pytest.approx([20.0 * number for number in range(10)], abs=1e-3)


def test_the_namespaces_own_order_of_classes(tmp_path: Path) -> None:
    folder = pictures(tmp_path, {"b": [40], "a": [20], "d": [80], "c": [60], "e": [99]})
    start = start_of(folder, 0, sorted_path=["d", "a", "b", "c"])
    assert torch.allclose(start[:, :, :, -3:].mean((1, 2, 3)) * 255, torch.tensor([80.0, 20, 40, 60]), atol=1e-3)


def test_tensors_are_taken_where_they_are(tmp_path: Path) -> None:
    tensor = torch.randn(CLASSES, 3, SIZE, SIZE)
    torch.save(tensor, tmp_path / "tensor_5.pt")
    asked = Namespace(**FIELDS, init_path=str(tmp_path), rho=0.1)
    read = namespace.read_namespace(asked, teacher(), recipe="pocket", backend="reference", precision="auto", device="cpu")
    assert torch.equal(torch.cat([batch.images for batch in recover._batches(read, CLASSES, 5)]), tensor)


# Display and verifier


def heard(capsys: pytest.CaptureFixture[str]) -> list[int]:
    """The iterations that were printed."""
    out = capsys.readouterr().out
    assert out.count("loss_ce ") == out.count("loss_r_bn_feature ") == out.count("loss_total ") == out.count("---iteration")
    return [int(number) for number in re.findall(r"^------------iteration (\d+)----------$", out, re.MULTILINE)]


@pytest.mark.parametrize(
    ("fields", "iterations", "calls"),
    [
        ({}, [0, 100], 1),  # SRe2L shows the images
        ({"easy2hard_mode": "cosine", "milestone": 1.0}, [0, 100, 102], 2),  # CDA the view too, and the last iteration
    ],
)
def test_the_hook_sees_what_it_sees_in_the_scripts(
    fields: dict[str, Any], iterations: list[int], calls: int, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[tuple[Tensor, Tensor]] = []
    run(lambda images, targets: seen.append((images.clone(), targets)), 0, iteration=103, batch_size=4, **fields)
    assert heard(capsys) == iterations
    assert len(seen) == calls * len(iterations)
    assert all(targets.tolist() == list(range(CLASSES)) for _, targets in seen)
    assert all(images.shape == (CLASSES, 3, SIZE, SIZE) for images, _ in seen)
    first, last = seen[calls - 1][0], seen[-1][0]
    assert 0.9 < first.std() < 1.1  # the noise before the first step
    assert first.max() > 2.7 > last.max()  # and pixels in their bounds after it
    if calls == 2:
        assert not torch.equal(seen[0][0], seen[1][0])


def test_showing_does_not_change_the_result() -> None:
    fields = {"iteration": 103, "tv_l2": 1e-3}
    assert torch.equal(run(lambda *_: None, 0, **fields), run(None, 0, **fields))


def test_printed_losses_are_those_of_the_iteration(capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[Tensor] = []
    losses = run(lambda images, _: seen.append(images.clone()), 0, batch_size=4, tv_l2=0.5, l2_scale=0.1)
    printed = dict(re.findall(r"^(loss_\w+) (\S+)$", capsys.readouterr().out, re.MULTILINE))
    ce, mean, var = losses[0, 0].tolist()
    assert float(printed["loss_ce"]) == pytest.approx(ce)
    assert float(printed["loss_r_bn_feature"]) == pytest.approx(mean + var)
    prior = 0.5 * 4 * 2**0.5 * (3 * CLASSES) ** 0.5 * SIZE + 0.1 * 3**0.5 * SIZE  # of white noise, roughly: crops smooth it
    assert 0.4 * prior < float(printed["loss_total"]) - (ce + 0.01 * (mean + var)) < 1.1 * prior


def test_the_verifier_of_torchvision_counts_what_it_recognises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """DWA's ImageNet script names it; its weights come from torch's cache."""
    network = torchvision.models.squeezenet1_1()
    with torch.no_grad():
        network.classifier[1].weight.zero_()
        network.classifier[1].bias.copy_(torch.eye(1000)[2])  # takes everything for class 2
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    torch.save(network.state_dict(), cache / Path(torchvision.models.SqueezeNet1_1_Weights.IMAGENET1K_V1.url).name)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = pictures(tmp_path / "init", {name: [100] for name in "abcd"})
    big = replace(POCKET, data=replace(POCKET.data, size=32))
    monkeypatch.setitem(RECIPES, "pocket", big)
    args = Namespace(**{**FIELDS, "batch_size": 4}, init_path=str(folder), rho=0.1, verifier=True, verifier_arch="squeezenet1_1")
    get_images(args, colour_teacher(CLASSES, 32, (8, 8, 8)), 0, recipe="pocket", backend="reference")
    assert "\nVerifier accuracy:  25.0\n" in capsys.readouterr().out


# Teachers and arguments of all kinds


def test_a_teacher_in_half_precision_and_one_that_was_compiled() -> None:
    plain = run(None, 0, iteration=1, batch_size=4)
    compiled = torch.compile(teacher(), backend="eager")
    assert torch.equal(run(None, 0, iteration=1, batch_size=4, network=compiled), plain)  # type: ignore[arg-type]
    assert torch.allclose(run(None, 0, iteration=1, batch_size=4, network=teacher().half()), plain, rtol=2e-2)


def test_an_index_may_be_a_scalar_of_another_library() -> None:
    fields = {"iteration": 1, "batch_size": 4}
    plain = run(None, 3, **fields)
    for index in (np.int64(3), torch.tensor(3), torch.tensor([3])):
        assert torch.equal(run(None, index, **fields), plain)
        assert torch.equal(run(index, **fields), plain)  # as DWA's ImageNet script calls it


def test_the_seed_of_the_namespace_counts_where_none_is_given() -> None:
    fields = {"iteration": 1, "batch_size": 4}
    seeded = run(None, 0, seed=5, **fields)
    args = Namespace(**{**FIELDS, **fields})
    assert torch.equal(seeded, get_images(args, teacher(), None, 0, recipe="pocket", backend="reference", seed=5))
    assert not torch.equal(seeded, run(None, 0, **fields))
    args.seed = 5
    assert not torch.equal(seeded, get_images(args, teacher(), None, 0, recipe="pocket", backend="reference", seed=6))


def test_an_output_that_cannot_be_written_is_found_before_the_first_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recover, "Synthesizer", None)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write to"):
        run(None, 0, syn_data_path=str(tmp_path / "file" / "syn"), store_best_images=True)


OTHER = "this is another method's loop: keep it; BNFeatureHook still works in it where the script makes BNFeatureHook(module)"
OTHER_LOOPS: dict[str, tuple[Callable[[], Any], str]] = {
    "5 (CV-DD, FADRM, DIVA, multi-GPU SRe2L, LPLD)": (
        lambda: get_images(Namespace(), None, "cuda", 0, True),  # type: ignore[arg-type]
        f"get_images takes (args, teacher, hook_for_display, ipc_id) or (args, teacher, ipc_id), got 5 arguments: {OTHER}",
    ),
    "6 (three teachers)": (lambda: get_images(Namespace(), teacher(), teacher(), teacher(), None, 0), "got 6 arguments: this is"),  # type: ignore[arg-type]
    "7 (DELT)": (lambda: get_images(Namespace(), 1, 2, 3, 4, 5, 6), "got 7 arguments: this is"),  # type: ignore[arg-type]
    "10 (PRISM)": (lambda: get_images(*range(10)), "got 10 arguments: this is"),  # type: ignore[arg-type]
    "bc_i": (
        lambda: get_images(Namespace(), teacher(), None, 0, bc_i=None, weights=None),
        "get_images takes no bc_i, weights; beside the scripts' own",
    ),
    "bc": (lambda: get_images(Namespace(), teacher(), None, bc=None), f"Where the script passes it, {OTHER}"),
    "a slip": (
        lambda: get_images(Namespace(), teacher(), None, 0, precison="fp32"),
        "takes recipe, seed, backend, precision, device and ignore.",
    ),
    "list of teachers": (
        lambda: get_images(Namespace(), [teacher(), teacher()], None, 0),  # type: ignore[arg-type]
        f"model_teacher must be one torch.nn.Module, got a list of 2: {OTHER}",
    ),
    "ModuleList": (lambda: get_images(Namespace(), nn.ModuleList([teacher()]), None, 0), "got a ModuleList of 1: this is"),
    "student (CUDD)": (
        lambda: get_images(Namespace(), teacher(), nn.ReLU(), 0),
        "must be a function or None, got the network ReLU: this is",
    ),
    "display": (lambda: get_images(Namespace(), teacher(), 3, 0), "hook_for_display must be a function or None, got int"),
}


@pytest.mark.parametrize(("call", "message"), OTHER_LOOPS.values(), ids=OTHER_LOOPS.keys())
def test_loops_of_other_methods_are_told_which_level_works(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(TypeError, match=re.escape(message)):
        call()


WRONG: dict[str, tuple[dict[str, Any], tuple[Any, ...], type[Exception], str]] = {
    "iteration": ({"iteration": 0}, (None, 0), InputError, "args.iteration must be an integer of at least 1, got 0"),
    "batch": ({"batch_size": "100"}, (None, 0), InputError, "args.batch_size must be an integer of at least 1, got '100'"),
    "lr": ({"lr": 0}, (None, 0), InputError, "args.lr must be a finite number above 0, got 0"),
    "jitter": ({"jitter": -1}, (None, 0), InputError, "args.jitter must be an integer of at least 0, got -1"),
    "r_bn": ({"r_bn": float("nan")}, (None, 0), InputError, "args.r_bn must be a finite number of at least 0, got nan"),
    "r_var": ({"r_var": -1}, (None, 0), InputError, "args.r_var must be a finite number of at least 0, got -1"),
    "tv_l2": ({"tv_l2": -1}, (None, 0), InputError, "args.tv_l2 must be a finite number of at least 0, got -1"),
    "steps": ({"steps": 0, "init_path": "."}, (None, 0), InputError, "args.steps must be an integer of at least 1, got 0"),
    "rho": ({"rho": -1, "init_path": "."}, (None, 0), InputError, "args.rho must be a finite number of at least 0, got -1"),
    "milestone": ({"milestone": 2}, (None, 0), InputError, "args.milestone must be a finite number of at least 0 and at most 1, got 2"),
    "mode": (
        {"easy2hard_mode": "sine"},
        (None, 0),
        InputError,
        "unknown args.easy2hard_mode 'sine'; known: step, linear, cosine",
    ),
    "flag": ({"store_best_images": "no"}, (None, 0), InputError, "args.store_best_images must be True or False, got 'no'"),
    "no folder": ({"store_best_images": True}, (None, 0), InputError, "args.syn_data_path must be the path of a folder, got None"),
    "no start": ({"rho": 0.1}, (None, 0), InputError, "args.init_path is missing: DWA starts from real images"),
    "init": (
        {"init_path": "nowhere", "rho": 0},
        (None, 0),
        InputError,
        "args.init_path must be a folder with a sub-folder of images per class",
    ),
    "index": ({}, (None, -1), InputError, "ipc_id must be an integer of at least 0, got -1"),
    "no index": ({}, (), InputError, "ipc_id must be an integer of at least 0, got None"),
    "hook for index": ({}, (print,), InputError, "ipc_id must be an integer of at least 0, got <built-in function print>"),
    "teacher": ({"network": "resnet18"}, (None, 0), TypeError, "model_teacher must be a torch.nn.Module, got str"),
    "verifier": (
        {"verifier": True, "verifier_arch": "vit_huge"},
        (0,),
        InputError,
        "args.verifier_arch must be a classifier of torchvision with ImageNet weights, got 'vit_huge'",
    ),
}


@pytest.mark.parametrize(("fields", "rest", "kind", "message"), WRONG.values(), ids=WRONG.keys())
def test_refuses(fields: dict[str, Any], rest: tuple[Any, ...], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=re.escape(message)):
        run(*rest, **fields)


def test_refuses_what_it_cannot_start_from(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "three", {name: [100] for name in "abc"})
    with pytest.raises(InputError, match="has 3 class folders, expected 4"):
        run(None, 0, init_path=str(folder), rho=0.1)
    pictures(folder, {"d": [1, 2]})
    with pytest.raises(InputError, match=re.escape("a has 1 images, and image 1 (counted from 0) is needed")):
        run(None, 1, init_path=str(folder), rho=0.1)
    (folder / "c" / "0.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"c/0\.png is no image that can be read: it is empty"):
        run(None, 0, init_path=str(folder), rho=0.1)
    torch.save(torch.zeros(3, 3, SIZE, SIZE), tmp_path / "tensor_0.pt")
    with pytest.raises(InputError, match=re.escape("holds a tensor of shape (3, 3, 16, 16); expected one of shape (4, 3, 16, 16)")):
        run(None, 0, init_path=str(tmp_path), rho=0.1)


def test_refuses_a_device_that_there_is_not() -> None:
    for name, message in (("gpu", "unknown device 'gpu'; known: auto, cpu"), ("cuda:99", "device 'cuda:99' is not there")):
        with pytest.raises(InputError, match=message):
            get_images(Namespace(**FIELDS), teacher(), None, 0, recipe="pocket", backend="reference", device=name)


def test_refuses_a_teacher_of_another_data_set() -> None:
    with pytest.raises(InputError, match="the data set has 10 classes, but the teacher knows 4"):
        get_images(Namespace(**FIELDS, dataset="cifar10"), colour_teacher(CLASSES, 32, (8, 8, 8)), None, 0, backend="reference")


def test_a_teacher_predicts_its_real_images_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Tensor] = []

    def check(predict: Callable[[Tensor], Tensor], batches: Any, normalisation: Any) -> None:
        for pixels, labels in batches:
            assert predict(pixels).shape == (len(labels), CLASSES)
            tried.append(pixels)

    monkeypatch.setattr(recover, "check_predictions", check)
    folder = pictures(tmp_path, {name: [20, 40] for name in "abcd"})
    network = teacher()
    run(None, 0, network=network)  # from noise
    assert not tried
    for index in (0, 1):
        run(None, index, network=network, init_path=str(folder), rho=0.1)
    assert len(tried) == 1
    assert 0 <= float(tried[0].min()) <= float(tried[0].max()) <= 1
