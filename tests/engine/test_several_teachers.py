"""Several teachers that take turns from iteration to iteration."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dwa_fast import InputError, synthesize
from dwa_fast.reference.loop import apply_view, recover
from dwa_fast.schedule import make_schedule
from tests.nets import SIZE, alive, assert_as_near, distance, real_images, small_recipe, small_teacher

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
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_equals_reference_loop(settings: dict[str, Any], device: torch.device) -> None:
    """Eleven iterations, so that turns run on over uneven stages and begin anew with each batch."""
    images, labels = real_images()
    images, labels = images.double().to(device), labels.to(device)
    config = small_recipe(precision="fp64", device=device.type, iterations=11, **settings)
    got = synthesize([small_teacher(), another()], images, labels, config, seed=3)
    wanted = recover([small_teacher(), another()], images, labels, config, seed=3)
    assert distance(got.losses, wanted.losses) < 1e-6
    assert distance(got.images, wanted.images) < 1e-8
    alone = synthesize(small_teacher(), images, labels, config, seed=3)
    assert distance(got.images, alone.images) > 1e-3


@pytest.mark.parametrize("settings", [{"stage_sizes": (6, 8)}, {"view": "crop", "ascent": "none"}])
def test_fused_equals_reference_loop_in_single_precision(settings: dict[str, Any], device: torch.device) -> None:
    images, labels = real_images()
    images, labels = images.to(device), labels.to(device)
    config = small_recipe(backend="fused", precision="fp32", device=device.type, learning_rate=0.01, iterations=11, **settings)
    teachers = small_teacher(), another()
    got = synthesize(teachers, images, labels, config)
    assert_as_near(got, recover(teachers, images, labels, config), recover(teachers, images.double(), labels, config))


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


def test_every_teacher_is_tried(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="dwa_fast")
    synthesize([small_teacher(), another()], *real_images(200), small_recipe(iterations=1, ascent="none", batch_size=200))
    assert len([record for record in caplog.records if record.getMessage().startswith("teacher: ")]) == 2
