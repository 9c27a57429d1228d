"""Several teachers that take turns from iteration to iteration."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dwa_fast import InputError, distill, synthesize
from dwa_fast.data.manifest import image_name
from dwa_fast.engine.turns import ALONE, Turn, make_turns
from dwa_fast.reference.loop import apply_view, recover
from dwa_fast.schedule import make_schedule
from tests.nets import SIZE, alive, assert_as_near, distance, real_images, small_recipe, small_set, small_teacher

pytestmark = pytest.mark.usefixtures("two_threads")


def another(classes: int = 10) -> nn.Module:
    """A network with other layers than the small residual one."""
    torch.manual_seed(1)
    convolution = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.SiLU(), nn.Conv2d(6, 9, 3, stride=2), nn.BatchNorm2d(9)
    )
    return alive(nn.Sequential(convolution, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(9, classes)))


SETTINGS: dict[str, dict[str, Any]] = {
    "a step of each": {"rho": 0.3},
    "FADRM+": {"view": "crop", "ascent": "none", "lambda_var": 0.01, "stage_sizes": (6, 8, 6, 8)},
    "DWA+": {"view": "crop", "rho": 0.3, "stage_sizes": (6, 8)},
    "Eq. 15 to the letter": {"matching_weights": "original", "rho": 0.3, "batch_size": 5},
    "random steps": {"ascent": "random", "rho": 0.3},
    "by index": {"rho": 0.3, "teacher_turns": "index", "batch_size": 5},
    "two at once": {"rho": 0.3, "teachers_together": 2, "tv_l2": 0.05, "matching_weights": "original", "teacher_priors": (60.0, 64.0)},
    "CV-DD": {"view": "crop", "ascent": "none", "teachers_together": 2, "teacher_turns": "index", "teachers": 3, "batch_size": 4},
}
TEACHERS = [small_teacher(), another(), small_teacher(seed=1)]


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_equals_reference_loop(settings: dict[str, Any], device: torch.device) -> None:
    """Eleven iterations, so that turns run on over uneven stages and begin anew with each batch."""
    images, labels = real_images()
    images, labels = images.double().to(device), labels.to(device)
    settings = dict(settings)
    teachers = TEACHERS[: settings.pop("teachers", 2)]
    config = small_recipe(precision="fp64", device=device.type, iterations=11, **settings)
    got = synthesize(teachers, images, labels, config, seed=3)
    wanted = recover(teachers, images, labels, config, seed=3)
    assert distance(got.losses, wanted.losses) < 1e-6
    assert distance(got.images, wanted.images) < 1e-8
    alone = synthesize(teachers[0], images, labels, small_recipe(precision="fp64", device=device.type, iterations=11), seed=3)
    assert distance(got.images, alone.images) > 1e-3


@pytest.mark.parametrize("settings", [{"stage_sizes": (6, 8)}, {"view": "crop", "teachers_together": 2}])
def test_fused_equals_reference_loop_in_single_precision(settings: dict[str, Any], device: torch.device) -> None:
    images, labels = real_images()
    images, labels = images.to(device), labels.to(device)
    config = small_recipe(backend="fused", precision="fp32", device=device.type, learning_rate=0.01, iterations=11, **settings)
    teachers = small_teacher(), another()
    got = synthesize(teachers, images, labels, config)
    assert_as_near(got, recover(teachers, images, labels, config), recover(teachers, images.double(), labels, config))


def test_turns_and_weights() -> None:
    def turns(count: int, **settings: Any) -> list[Turn]:
        return make_turns(small_recipe(**settings).synthesis, count)

    assert turns(1) == [ALONE]
    assert turns(3) == [((0, 1.0),), ((1, 1.0),), ((2, 1.0),)]
    assert turns(3, teachers_together=2) == [((0, 0.5), (1, 0.5)), ((0, 0.5), (2, 0.5)), ((1, 0.5), (2, 0.5))]
    ((_, first), (_, second)), *_ = turns(5, teachers_together=2, teacher_priors=(63.0, 65.3, 68.5, 67.6, 67.4))
    assert second / first == pytest.approx(math.exp((65.3 - 63.0) / 5))
    assert first + second == pytest.approx(1.0)


def test_whose_turn_it_is() -> None:
    """Images that do not move: the cross-entropy of each iteration is that of its teacher."""
    images, labels = real_images()
    config = small_recipe(iterations=7, learning_rate=1e-30, ascent="none", precision="fp64")
    teachers = [small_teacher(), another(), small_teacher(seed=1)]
    losses = synthesize(teachers, images.double(), labels, config).losses
    for batch, part in enumerate((slice(0, 6), slice(6, 12))):
        schedule = make_schedule(config.synthesis, SIZE, SIZE, seed=0, batch=batch)
        for iteration in range(7):
            view = apply_view(images[part].double(), schedule, iteration)
            with torch.no_grad():
                expected = F.cross_entropy(teachers[iteration % 3].double()(view), labels[part])
            assert losses[batch, iteration, 0] == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("teachers", [[small_teacher()], [small_teacher(), another()]], ids=["one", "two"])
def test_a_list_of_one_and_batches_in_flight(teachers: list[nn.Module]) -> None:
    images, labels = real_images()
    alone, flying = (small_recipe(iterations=5, backend="fused", precision="fp32", device="cpu", concurrent_batches=n) for n in (1, 2))
    expected = synthesize(teachers[0] if len(teachers) == 1 else teachers, images, labels, alone)
    assert torch.equal(synthesize(teachers, images, labels, flying).images, expected.images)


@pytest.mark.parametrize(
    ("teachers", "kind", "message"),
    [
        ([], InputError, "teacher must be a torch.nn.Module or a sequence of at least one, got an empty one"),
        ([small_teacher(), another(7)], InputError, "teachers must know the same classes, got 10, 7 of them"),
        ([small_teacher(), "resnet18"], TypeError, "teacher must be a torch.nn.Module, got str"),
        (
            [small_teacher(), nn.Sequential(nn.Flatten(), nn.Linear(64, 10))],
            InputError,
            "teacher 2 of 2: teacher must have BatchNorm layers",
        ),
    ],
)
def test_what_cannot_be_used_is_refused(teachers: list[Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        synthesize(teachers, *real_images(6), small_recipe(iterations=2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teachers_together": 3}, "teachers_together must be at most the number of teachers, 2, got 3"),
        ({"teacher_priors": (50.0,)}, "teacher_priors must be one number for each of 2 teachers, got 1"),
        ({"teacher_turns": "random"}, "unknown teacher_turns 'random'; known: iteration, index"),
    ],
)
def test_turns_that_cannot_be_taken(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        synthesize(TEACHERS[:2], *real_images(6), small_recipe(iterations=2, **settings))


def test_a_set_by_index(tmp_path: Path) -> None:
    """Image i of every class is that of teacher i mod 2 alone, whatever the batches."""
    config = {"iterations": 4, "batch_size": 4, "backend": "reference", "ascent": "none"}
    distill(TEACHERS[:2], small_set(), small_recipe(teacher_turns="index", **config), ipc=3, output=tmp_path / "both")
    for place in range(2):
        distill(TEACHERS[place], small_set(), small_recipe(**config), ipc=3, output=tmp_path / f"{place}")
    for index in range(3):
        for label in range(10):
            name = Path("images", image_name(label, index, 10))
            both, first, second = ((tmp_path / folder / name).read_bytes() for folder in ("both", "0", "1"))
            assert both == (first, second)[index % 2]
            assert first != second


@pytest.mark.parametrize(
    ("ipc", "settings", "message"),
    [
        (
            4,
            {"batch_ipc": None},
            "ipc 4 in batches of 4 images of a class takes 1 of their 3 turns",
        ),
        (1, {}, "ipc 1 in batches of 1 images of a class takes 1 of their 3 turns"),
        (4, {"batch_ipc": 2}, None),
        (
            1,
            {"teacher_turns": "iteration"},
            "a refinement of 1 iterations takes 1 of their 3 turns",
        ),
    ],
)
def test_teachers_that_are_never_used_are_reported(
    ipc: int, settings: dict[str, Any], message: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = {"iterations": 1, "batch_size": 40, "ascent": "none", "teachers_together": 2, "teacher_turns": "index", **settings}
    distill(TEACHERS, small_set(), small_recipe(**own), ipc=ipc, output=tmp_path)
    found = [text for record in caplog.records if (text := record.getMessage()).startswith("only the first")]
    assert found == ([f"only the first 2 of 3 teachers are used: {message}"] if message else [])


def test_every_teacher_is_tried(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="dwa_fast")
    synthesize([small_teacher(), another()], *real_images(200), small_recipe(iterations=1, ascent="none", batch_size=200))
    assert len([record for record in caplog.records if record.getMessage().startswith("teacher: ")]) == 2
