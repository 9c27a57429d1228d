"""The refinement in stages of several sizes, against the reference loop and an interpolation by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dwa_fast import InputError, distill, recipe, synthesize
from dwa_fast.data.manifest import read_manifest
from dwa_fast.engine.synthesis import Batch, Synthesizer
from dwa_fast.reference.loop import recover
from dwa_fast.schedule import Stage, make_schedule, make_stages
from tests.nets import SIZE, alive, assert_as_near, distance, real_images, small_recipe, small_set, small_teacher, stop_at

pytestmark = pytest.mark.usefixtures("two_threads")

SETTINGS: dict[str, dict[str, Any]] = {
    "directed step": {},
    "crops, remainder": {"view": "crop", "iterations": 11, "stage_sizes": (6, 8, 5, 8)},
    "FADRM": {"view": "crop", "ascent": "none", "lambda_var": 0.01, "stage_sizes": (6, 8, 6, 8)},
    "larger first, Eq. 15 to the letter": {"stage_sizes": (12, 8), "matching_weights": "original", "rho": 0.3, "stage_mix": 0.8},
    "noise start, priors": {"initial": "noise", "tv_l2": 0.05, "l2_scale": 0.2, "stage_mix": 0.2},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_equals_reference_loop(settings: dict[str, Any], device: torch.device) -> None:
    images, labels = real_images()
    images, labels = images.double().to(device), labels.to(device)
    config = small_recipe(precision="fp64", device=device.type, **{"iterations": 12, "stage_sizes": (6, 8), **settings})
    got = synthesize(small_teacher(), images, labels, config, seed=3)
    wanted = recover(small_teacher(), images, labels, config, seed=3)
    assert distance(got.losses, wanted.losses) < 1e-6
    assert distance(got.images, wanted.images) < 1e-8
    assert distance(got.images, images) > 0.1


@pytest.mark.parametrize("settings", [{}, {"view": "crop", "ascent": "none"}])
def test_fused_equals_reference_loop_in_single_precision(settings: dict[str, Any], device: torch.device) -> None:
    images, labels = real_images()
    images, labels = images.to(device), labels.to(device)
    fused = {"backend": "fused", "precision": "fp32", "device": device.type, "learning_rate": 0.01}
    config = small_recipe(iterations=12, stage_sizes=(6, 8, 6, 8), **fused, **settings)
    got = synthesize(small_teacher(), images, labels, config)
    assert_as_near(got, recover(small_teacher(), images, labels, config), recover(small_teacher(), images.double(), labels, config))


def interpolation(size: int, source: int) -> Tensor:
    """The matrix of a bilinear resize along one axis, [size, source]: pixel centres are kept, pixels beyond an edge are those at it."""
    places = np.clip((np.arange(size) + 0.5) * source / size - 0.5, 0, source - 1)
    return torch.from_numpy(np.maximum(0, 1 - np.abs(places[:, None] - np.arange(source))))


@pytest.mark.parametrize("mix", [0.0, 0.3, 1.0])
def test_initial_images_are_mixed_in_between_the_stages(mix: float) -> None:
    """With a learning rate of nearly 0, so that nothing else changes them."""
    images, labels = real_images(6)
    images = images.double()
    config = small_recipe(iterations=6, stage_sizes=(6, 7, 8), stage_mix=mix, learning_rate=1e-30, ascent="none", precision="fp64")
    x = interpolation(6, SIZE) @ images @ interpolation(6, SIZE).T
    for before, size in ((6, 7), (7, 8)):
        known = interpolation(size, SIZE) @ images @ interpolation(size, SIZE).T
        x = mix * interpolation(size, before) @ x @ interpolation(size, before).T + (1 - mix) * known
    assert distance(synthesize(small_teacher(), images, labels, config).images, x) < 1e-14


def test_a_single_stage_is_a_refinement_without_stages() -> None:
    images, labels = real_images(6)
    both = [synthesize(small_teacher(), images, labels, small_recipe(iterations=5, stage_sizes=sizes)) for sizes in ((), (SIZE,))]
    assert torch.equal(both[0].images, both[1].images)
    assert torch.equal(both[0].losses, both[1].losses)


def test_a_step_is_recorded_once_for_each_size(device: torch.device) -> None:
    images, labels = real_images(12)
    config = small_recipe(iterations=4, stage_sizes=(6, 8, 6, 8), device=device.type)
    with Synthesizer(small_teacher(), images, config.synthesis, config.data) as engine:
        recorded = []
        for number in range(2):
            part = slice(6 * number, 6 * number + 6)
            engine.run([Batch(number, images[part], labels[part])], seed=0)
            recorded.append(dict(engine.replicas[0]._refinement._refinements))
    assert sorted(shape[2] for shape in recorded[0]) == [6, 8]
    assert recorded[0] == recorded[1]


def test_images_before_the_end_have_the_size_of_their_stage() -> None:
    images, labels = real_images(6)
    config = small_recipe(iterations=5, stage_sizes=(6, 8))
    with Synthesizer(small_teacher(), images, config.synthesis, config.data) as engine:
        replica = engine.replicas[0]
        replica.begin(Batch(0, images, labels), seed=0)
        replica.advance(2)
        assert replica.finish()[0].shape[2:] == (6, 6)
        replica.advance(3)
        finished, losses = replica.finish()
    whole = synthesize(small_teacher(), images, labels, config)
    assert torch.equal(finished, whole.images)
    assert torch.equal(losses, whole.losses[0])


def test_stages_share_the_iterations() -> None:
    config = small_recipe(iterations=11, stage_sizes=(6, 8, 6, 8)).synthesis
    assert make_stages(config, 8, 8) == [Stage(6, 6, 0, 3), Stage(8, 8, 3, 6), Stage(6, 6, 6, 9), Stage(8, 8, 9, 11)]
    assert make_stages(small_recipe(iterations=11).synthesis, 8, 9) == [Stage(8, 9, 0, 11)]


def test_schedule_of_stages() -> None:
    config = recipe("imagenet", iterations=400, stage_sizes=(50, 100)).synthesis
    schedule, whole = (make_schedule(each, 100, 100, seed=0, batch=0) for each in (config, recipe("imagenet", iterations=400).synthesis))
    small, large = schedule.part(0, 200).rows, schedule.part(200, 400).rows
    for rows, size in ((small, 50), (large, 100)):
        assert ((rows[:, 0] + rows[:, 2]).max(), (rows[:, 1] + rows[:, 3]).max()) == (size, size)
        areas = (rows[:, 2] * rows[:, 3]) / size**2
        assert areas.min() == pytest.approx(0.08, abs=0.02)
        assert rows[:, 5:].max() == 32
    assert torch.equal(schedule.learning_rates, whole.learning_rates)
    assert schedule.learning_rates[200] == pytest.approx(0.125)  # half-way down the cosine


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stage_sizes": (8, 6)}, "the last of stage_sizes must be the size of the images, 8 × 8 pixels, got 8, 6"),
        ({"stage_sizes": (6, 8, 8), "iterations": 2}, "iterations must be at least the number of stages, 3, got 2"),
        ({"stage_sizes": (0, 8)}, "stage_sizes must be an integer of at least 1, got 0"),
        ({"stage_mix": 1.5}, "stage_mix must be a finite number of at least 0 and at most 1, got 1.5"),
        ({"stage_sizes": (1, 8)}, r"teacher cannot take images of shape \(1, 1, 1\): "),
    ],
)
def test_what_cannot_be_used_is_refused(change: dict[str, Any], message: str) -> None:
    images, labels = real_images(6)
    teacher = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
    with pytest.raises(InputError, match=message):
        synthesize(alive(teacher), images, labels, small_recipe(**{"iterations": 4, **change}))


class OfItsSize(nn.Module):
    """Pools by a factor that it computes from the size of its input, so that a trace for one size is wrong for another."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.head = nn.Linear(6, 10)

    def forward(self, images: Tensor) -> Tensor:
        scale = 1.0 + images.shape[2] / 8
        logits: Tensor = self.head(self.layers(images).mean((2, 3)) * scale)
        return logits


def test_a_teacher_that_computes_with_its_size(caplog: pytest.LogCaptureFixture) -> None:
    images, labels = real_images(6)
    torch.manual_seed(0)
    teacher = alive(OfItsSize())
    config = small_recipe(iterations=4, stage_sizes=(6, 8), backend="fused", precision="fp32", device="cpu", learning_rate=0.01)
    got = synthesize(teacher, images, labels, config)
    assert_as_near(got, recover(teacher, images, labels, config), recover(teacher, images.double(), labels, config))
    assert "teacher cannot be traced (the trace differs" in caplog.text


@pytest.mark.parametrize(("method", "ascent"), [("fadrm", "none"), ("dwa+", "directed")])
def test_a_set_resumes(method: str, ascent: str, tmp_path: Path) -> None:
    """Patches in four stages of two sizes, from the recipe to the files; a run that is stopped in its second batch ends in the same."""
    teachers = [small_teacher(), small_teacher(seed=1)][: 1 + method.endswith("+")]
    changes = {"size": SIZE, "batch_size": 5, "iterations": 9, "stage_sizes": (6, 8, 6, 8), "jitter": 1, "backend": "reference"}
    config = recipe("digits", method=method, **changes)

    def run(folder: Path, **more: Any) -> int:
        return distill(teachers, small_set(), config, ipc=1, output=folder, **more)

    assert run(tmp_path / "whole") == 10
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", progress=stop_at(12))
    assert run(tmp_path / "stopped") == 5
    names = [path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*") if path.is_file()]
    assert len(names) >= 12
    assert all((tmp_path / "whole" / name).read_bytes() == (tmp_path / "stopped" / name).read_bytes() for name in names)
    settings = read_manifest(tmp_path / "whole")["settings"]
    assert (settings["stage_sizes"], settings["initial"], settings["ascent"]) == ([6, 8, 6, 8], "patches", ascent)
    assert "stage_mix" not in settings
    other = recipe("digits", method=method, **{**changes, "stage_sizes": ()})
    with pytest.raises(InputError, match=r"stage_sizes was \[6, 8, 6, 8\], is \(\)"):
        distill(teachers, small_set(), other, ipc=1, output=tmp_path / "whole")
