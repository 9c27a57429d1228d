"""Statistics of each class in place of the running ones (LPLD): how they are taken, matched, and passed to sets."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from dwa_fast import (
    ClassStatistics,
    InitialConfig,
    InputError,
    MemorySet,
    class_statistics,
    distill,
    image_folder,
    normalise,
    recipe,
    synthesize,
)
from dwa_fast.data.manifest import image_name, read_manifest
from dwa_fast.data.pixels import denormalise, to_levels
from dwa_fast.data.real import sample
from dwa_fast.engine.synthesis import Batch, Synthesizer
from dwa_fast.models.batchnorm import batchnorm_layers
from dwa_fast.reference.loop import recover
from dwa_fast.threads import torch_threads
from tests.nets import DIGITS, alive, assert_as_near, distance, small_recipe, small_set, small_teacher, stop_at

pytestmark = pytest.mark.usefixtures("two_threads")

SETTINGS: dict[str, dict[str, Any]] = {
    "LPLD": {"initial": "noise", "view": "crop", "ascent": "none", "lambda_var": 0.01},
    "DWA's step": {"rho": 0.3},
    "weights of Eq. 15": {"rho": 0.3, "matching_weights": "original"},
    "rounds": {"rounds": 3, "initial": "noise", "ascent": "none"},
    "stages": {"stage_sizes": (6, 8), "stage_mix": 0.3},
    "two teachers": {"teachers": 2},
    "two teachers at once": {"teachers": 2, "teachers_together": 2, "matching_weights": "original"},
}


def teachers_of(settings: dict[str, Any]) -> tuple[list[nn.Module], dict[str, Any]]:
    """The teachers, and the settings of the synthesis."""
    return [small_teacher(), small_teacher(1)][: settings.get("teachers", 1)], {k: v for k, v in settings.items() if k != "teachers"}


def whole_classes(each: int = 4, classes: tuple[int, ...] = (3, 7, 5)) -> tuple[Tensor, Tensor]:
    """Real digits class by class, normalised, and their labels."""
    data = small_set()
    chosen = torch.cat([(data.labels == label).nonzero().flatten()[:each] for label in classes])
    return normalise(data.load(chosen.tolist()), DIGITS.data), data.labels[chosen]


def class_recipe(**changes: Any) -> Any:
    return small_recipe(**{"statistics": "class", "batch_size": 4, "iterations": 11, "learning_rate": 0.1, **changes})


def test_statistics_are_those_of_all_images_of_a_class() -> None:
    data, teacher = small_set(), small_teacher().double()
    (found,) = class_statistics(small_teacher(), data, class_recipe(precision="fp64"))
    inputs: dict[str, Tensor] = {}
    for name, layer in batchnorm_layers(teacher).items():
        layer.register_forward_pre_hook(lambda _, given, name=name: inputs.update({name: given[0]}))
    with torch.no_grad():
        teacher(normalise(data.pixels, DIGITS.data).double())
    assert found.keys() == inputs.keys()
    for name, features in inputs.items():
        for label in range(10):
            own = features[data.labels == label].transpose(0, 1).flatten(1)
            torch.testing.assert_close(found[name][0, label], own.mean(1), rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(found[name][1, label], own.var(1, unbiased=False), rtol=1e-10, atol=1e-12)


def test_statistics_of_many_images_in_single_precision() -> None:
    """More than pass through the teacher at once; several teachers see them in one pass."""
    data, steps = MemorySet(small_set().pixels.repeat(25, 1, 1, 1), small_set().labels.repeat(25), small_set().class_names), []
    exact = class_statistics([small_teacher(), small_teacher(1)], data, class_recipe(precision="fp64"), classes=[2])
    given = {"classes": [2], "progress": lambda done, total: steps.append((done, total))}
    for fine, rough in zip(exact, class_statistics([small_teacher(), small_teacher(1)], data, class_recipe(), **given), strict=True):
        for name, each in rough.items():
            assert each.dtype is torch.float32
            torch.testing.assert_close(each[:, 2].double(), fine[name][:, 2], rtol=1e-5, atol=1e-6)
            assert each[:, [0, 1, 3, 4, 5, 6, 7, 8, 9]].isnan().all()
    assert steps == [(0, 150), (100, 150), (150, 150)]


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_equals_reference_loop(settings: dict[str, Any], device: torch.device) -> None:
    teachers, changes = teachers_of(settings)
    images, labels = whole_classes()
    images, labels = images.double().to(device), labels.to(device)
    config = class_recipe(precision="fp64", device=device.type, **changes)
    statistics = class_statistics(teachers, small_set(), config)
    got = synthesize(teachers, images, labels, config, seed=3, class_statistics=statistics)
    wanted = recover(teachers, images, labels, config, seed=3, class_statistics=statistics)
    assert distance(got.losses, wanted.losses) < 1e-6
    assert distance(got.images, wanted.images) < 1e-8
    running = recover(teachers, images, labels, config, seed=3)
    assert distance(wanted.images, running.images) > 1e-2


@pytest.mark.parametrize("settings", [SETTINGS["LPLD"], SETTINGS["two teachers at once"]], ids=["LPLD", "two teachers"])
def test_fused_equals_reference_loop_in_single_precision(settings: dict[str, Any], device: torch.device) -> None:
    """Three batches on one captured step, each of another class."""
    teachers, changes = teachers_of(settings)
    images, labels = whole_classes()
    images, labels = images.to(device), labels.to(device)
    config = class_recipe(**{**changes, "backend": "fused", "precision": "fp32", "device": device.type, "learning_rate": 0.01})
    statistics = class_statistics(teachers, small_set(), config)
    got = synthesize(teachers, images, labels, config, class_statistics=statistics)
    plain, exact = (recover(teachers, each, labels, config, class_statistics=statistics) for each in (images, images.double()))
    assert_as_near(got, plain, exact)


def test_a_step_is_captured_once_for_all_classes(device: torch.device) -> None:
    images, labels = whole_classes()
    config = class_recipe(device=device.type)
    (own,) = class_statistics(small_teacher(), small_set(), config)
    captured = []
    with Synthesizer(small_teacher(), images, config.synthesis, config.data) as engine:
        for number, label in enumerate((3, 7, 5)):
            part = slice(4 * number, 4 * number + 4)
            batch = Batch(number, images[part], labels[part], aims=[{name: each[:, label] for name, each in own.items()}])
            engine.run([batch], seed=0)
            (refinement,) = engine.replicas[0]._refinement._refinements.values()
            captured.append(dict(refinement._captured))
    assert captured[0] == captured[1] == captured[2]


def test_loss_by_hand() -> None:
    """One layer over images of the pixels 1 and 3: mean 2 and variance 1, matched with the mean 5 and the variance 3 of their class."""
    layer = nn.BatchNorm2d(1)
    teacher = nn.Sequential(layer, nn.Flatten(), nn.Linear(64, 10)).eval()
    images = torch.tensor([1.0, 3.0]).repeat(4 * 32).view(4, 1, 8, 8)
    statistics = {"0": torch.stack([torch.arange(10.0), torch.full((10,), 3.0)])[..., None]}
    config = class_recipe(iterations=1, ascent="none", jitter=0, learning_rate=1e-6, backend="fused", precision="fp32", device="cpu")
    losses = synthesize(teacher, images, torch.full((4,), 5), config, class_statistics=[statistics]).losses
    torch.testing.assert_close(losses[0, 0, 1:], torch.tensor([10 * 3.0, 10 * 2.0]))  # w = 10 of the first layer


def statistics_of(config: Any) -> ClassStatistics:
    return class_statistics(small_teacher(), small_set(), config)[0]


def test_what_cannot_be_matched_is_refused() -> None:
    images, labels = whole_classes()
    config = class_recipe(iterations=2)
    own = statistics_of(config)
    first = next(iter(own))
    cases: list[tuple[Any, Tensor, Any, str]] = [
        (config, labels, None, "statistics 'class' need class_statistics, a list of one for each teacher"),
        (
            class_recipe(batch_size=8),
            labels,
            [own],
            "statistics 'class' need batches of one class, got one of classes 3, 7; order the images",
        ),
        (small_recipe(iterations=2), labels, [own], "class_statistics would not be used: the recipe matches running statistics"),
        (config, labels, own, "class_statistics must be a list of one mapping for each of 1 teachers, got dict"),
        (config, labels, [own, own], "class_statistics must be a list of one mapping for each of 1 teachers, got [dict, dict]"),
        (config, labels, [own[first]], "class_statistics must be a list of one mapping for each of 1 teachers, got [Tensor]"),
        (
            config,
            labels,
            [{**own, first: own[first][:, :9]}],
            "class_statistics of BatchNorm layer 'stem.1' must be [2, 10, 8], got shape (2, 9, 8)",
        ),
        (config, labels, [{"fc": own[first]}], "class_statistics lack BatchNorm layer 'stem.1'; they are those of another teacher"),
        (
            config,
            labels,
            [{**own, first: -own[first]}],
            "class_statistics of BatchNorm layer 'stem.1' are not finite, or hold negative variances",
        ),
        (config, labels, class_statistics(small_teacher(), small_set(), config, classes=[3, 5]), "'stem.1' are not finite"),
    ]
    for settings, given, statistics, message in cases:
        with pytest.raises(InputError, match=re.escape(message)):
            synthesize(small_teacher(), images, given, settings, class_statistics=statistics)
    assert synthesize(small_teacher(), images, labels, class_recipe(iterations=0)).losses.shape == (3, 0, 3)  # nothing is matched


def test_images_that_cannot_be_measured(tmp_path: Path) -> None:
    data, folder = small_set(), tmp_path / "data"
    for label in range(10):
        (folder / str(label)).mkdir(parents=True)
        for index, image in enumerate(data.pixels[data.labels == label]):
            Image.fromarray(image[0].numpy()).save(folder / str(label) / f"{index}.png")
    files = image_folder(folder, 8, channels=1)
    config = class_recipe()
    whole = statistics_of(config)
    for name, each in class_statistics(small_teacher(), files, config)[0].items():
        torch.testing.assert_close(each, whole[name])
    (folder / "4" / "2.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"2.png is no image that can be read: .* --skip-bad-images from all others"):
        class_statistics(small_teacher(), files, config)
    skipped: dict[str, str] = {}
    (found,) = class_statistics(small_teacher(), files, config, skipped=skipped)
    assert list(skipped) == ["4/2.png"]
    given = class_recipe(iterations=1, batch_ipc=None, initial="noise", ascent="none")
    with pytest.raises(InputError, match=r"2.png is no image that can be read: .* --skip-bad-images from all others"):
        distill(small_teacher(), files, given, ipc=2, output=tmp_path / "set")
    distill(small_teacher(), files, given, ipc=2, output=tmp_path / "set", initial=InitialConfig(skip_bad_images=True))
    assert read_manifest(tmp_path / "set")["skipped"] == skipped
    kept = torch.arange(60) != 4 * 6 + 2
    (wanted,) = class_statistics(small_teacher(), MemorySet(data.pixels[kept], data.labels[kept], data.class_names), config)
    for name, each in found.items():
        torch.testing.assert_close(each, wanted[name])
    with pytest.raises(InputError, match="class '4' has no image that can be decoded"):
        class_statistics(small_teacher(), files, config, skipped=dict.fromkeys((f"4/{index}.png" for index in range(6)), "torn"))
    large = alive(small_teacher())
    next(iter(batchnorm_layers(large).values())).weight.data.fill_(1e38)  # type: ignore[union-attr,operator]
    with pytest.raises(InputError, match="activations of the teacher overflow at BatchNorm layer"):
        class_statistics(large, files, config, skipped=skipped)


def test_set_of_classes(tmp_path: Path) -> None:
    """A batch has one class, the statistics are those of all real images; interrupted, the set resumes to the same bytes."""
    given = class_recipe(iterations=4, batch_ipc=None, batch_size=20, initial="noise", ascent="none")
    steps: list[tuple[int, int]] = []
    whole = tmp_path / "whole"
    assert distill(small_teacher(), small_set(), given, ipc=3, output=whole, measuring=lambda *step: steps.append(step)) == 30
    assert steps[-1] == (60, 60)
    manifest = read_manifest(whole)
    assert (manifest["settings"]["statistics"], manifest["settings"]["batch_ipc"], len(manifest["losses"])) == ("class", 3, 10)
    running = small_recipe(iterations=4, batch_ipc=None, batch_size=20, initial="noise", ascent="none", learning_rate=0.1)
    with pytest.raises(InputError, match=r"made with other settings \(statistics was 'class', is 'running'\)"):
        distill(small_teacher(), small_set(), running, ipc=3, output=whole)
    stopped = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        distill(small_teacher(), small_set(), given, ipc=3, output=stopped, progress=stop_at(18))
    steps.clear()
    assert distill(small_teacher(), small_set(), given, ipc=3, output=stopped, measuring=lambda *step: steps.append(step)) == 18
    assert steps[-1] == (36, 36)  # those of the missing classes alone
    names = sorted(path.relative_to(whole) for path in whole.rglob("*.png"))
    assert len(names) == 30
    assert all((whole / name).read_bytes() == (stopped / name).read_bytes() for name in names)


def test_a_set_of_classes_grows(tmp_path: Path) -> None:
    given = class_recipe(iterations=3, batch_ipc=2, initial="noise", ascent="none")
    distill(small_teacher(), small_set(), given, ipc=2, output=tmp_path / "grown")
    assert distill(small_teacher(), small_set(), given, ipc=4, output=tmp_path / "grown") == 20
    distill(small_teacher(), small_set(), given, ipc=4, output=tmp_path / "at once")
    names = sorted(path.relative_to(tmp_path / "grown") for path in (tmp_path / "grown").rglob("*.png"))
    assert len(names) == 40
    assert all((tmp_path / "grown" / name).read_bytes() == (tmp_path / "at once" / name).read_bytes() for name in names)


def test_a_set_is_what_synthesize_makes_class_by_class(tmp_path: Path) -> None:
    data, given = small_set(), class_recipe(iterations=4, batch_ipc=None, backend="reference")
    distill(small_teacher(), data, given, ipc=4, output=tmp_path / "set")
    order = [index for label in range(10) for index in sample(data, label, 4, seed=0)]
    statistics = class_statistics(small_teacher(), data, given)
    images = normalise(data.load(order), DIGITS.data)
    with torch_threads(2):
        result = synthesize(small_teacher(), images, data.labels[order], given, class_statistics=statistics)
    for place, levels in enumerate(to_levels(denormalise(result.images, DIGITS.data))):
        with Image.open(tmp_path / "set" / "images" / image_name(place // 4, place % 4, 10)) as image:
            assert torch.equal(torch.from_numpy(np.array(image)), levels[0])


def test_single_images_of_a_class_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="statistics 'class' are those of several images of one class; set batch_ipc to more than 1"):
        distill(small_teacher(), small_set(), class_recipe(), ipc=2, output=tmp_path / "set")


def test_method() -> None:
    """LPLD as published: T, learning rate and weight of the matching terms."""
    tiny, imagenet = (recipe(name, method="lpld").synthesis for name in ("tiny", "imagenet"))
    assert (imagenet.iterations, imagenet.learning_rate, imagenet.lambda_mean, imagenet.lambda_var) == (4000, 0.25, 0.01, 0.01)
    assert (tiny.iterations, tiny.learning_rate, tiny.lambda_mean, tiny.lambda_var) == (4000, 0.1, 0.05, 0.05)
    for config in (tiny, imagenet):
        assert (config.statistics, config.batch_ipc, config.initial, config.ascent, config.view) == ("class", None, "noise", "none", "crop")
