"""Patches: which a teacher chooses, how images are made of them, and sets that start from them or are nothing else (RDED)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dwa_fast import InputError, distill, recipe, synthesize
from dwa_fast.config import InitialConfig
from dwa_fast.data.folders import image_folder
from dwa_fast.data.images import FileSet, MemorySet
from dwa_fast.data.initial import initial_images
from dwa_fast.data.manifest import image_name, read_manifest
from dwa_fast.data.patches import Patch, cut, draw_patches, scores, stitch
from dwa_fast.data.pixels import normalise
from dwa_fast.seeding import generator
from dwa_fast.sets.verify import problems
from tests.files import contents
from tests.nets import small_recipe, small_set, small_teacher

CONFIG = small_recipe(iterations=0, initial="patches", ascent="none")


def grey(per_class: int = 6, classes: int = 2, size: int = 8) -> MemorySet:
    """Uniform images, each of its own level: 10, 20, … in class 0, 11, 21, … in class 1."""
    levels = torch.tensor([10 * (image + 1) + label for label in range(classes) for image in range(per_class)], dtype=torch.uint8)
    labels = torch.arange(classes).repeat_interleave(per_class)
    return MemorySet(levels[:, None, None, None].repeat(1, 1, size, size), labels, [str(label) for label in range(classes)])


def likes_bright(images: Tensor) -> Tensor:
    """The class of an image is the likelier, the brighter the image is; only of class 0."""
    bright = images.mean((1, 2, 3))
    return torch.stack([bright, torch.zeros_like(bright)], 1)


def images_of(data: Any, ipc: int, label: int = 0, **settings: Any) -> tuple[list[Tensor], Any]:
    """The levels of the images of a class."""
    start = initial_images(data, CONFIG, InitialConfig(**settings), ipc=ipc, seed=0, predict=likes_bright)
    start.check({label: ipc - 1})
    loaded = start.load([(label, index) for index in range(ipc)])
    return [(each * CONFIG.data.std[0] + CONFIG.data.mean[0]).mul(255).round().int()[0] for each in loaded], start


def test_patches_lie_within_the_image_and_cover_the_range() -> None:
    drawn = draw_patches(200, 5, 32, generator(0, "patches", 3))
    assert [len(own) for own in drawn] == [5] * 200
    assert [own[0].candidate for own in drawn] == list(range(200))
    every = [patch for own in drawn for patch in own]
    assert all(min(patch[1:3]) >= 0 and max(patch.top, patch.left) + patch.side <= 32 for patch in every)
    sides = [patch.side for patch in every]
    assert (min(sides), max(sides)) == (9, 32)  # √0.08 · 32 is 9.05
    areas = np.array(sides) ** 2 / 32**2
    assert abs(areas.mean() - 0.54) < 0.02  # uniform in 0.08 … 1
    assert draw_patches(200, 5, 32, generator(0, "patches", 3)) == drawn
    assert all(patch.side == 1 for own in draw_patches(3, 5, 1, generator(0, "patches", 3)) for patch in own)


def test_cut() -> None:
    image = torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8)
    assert torch.equal(cut(image, Patch(0, 0, 0, 8), 8), image)
    assert torch.equal(cut(image, Patch(0, 2, 3, 4), 4), image[:, 2:6, 3:7])
    board = (torch.arange(8)[:, None] + torch.arange(8)).remainder(2).mul(255).to(torch.uint8)[None]
    assert (cut(board, Patch(0, 0, 0, 8), 2).int() - 128).abs().max() <= 1  # antialiased
    assert cut(board, Patch(0, 0, 0, 1), 4).unique().tolist() == [0]


def test_stitch_is_row_by_row() -> None:
    patches = torch.arange(1, 5, dtype=torch.uint8)[:, None, None, None].expand(4, 3, 2, 2)
    assert stitch(patches)[1].tolist() == [[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4], [3, 3, 4, 4]]
    assert torch.equal(stitch(patches[:1]), patches[0])


def test_scores_are_those_of_the_patch_in_a_frame_of_zeros() -> None:
    patches, seen = torch.randint(0, 256, (3, 1, 3, 3), dtype=torch.uint8), []

    def predict(images: Tensor) -> Tensor:
        seen.append(images)
        return images.mean((1, 2, 3))[:, None] * torch.tensor([1.0, -2.0])

    found = scores(patches, 1, 8, predict, CONFIG.data, 2)
    framed = torch.zeros(3, 1, 8, 8)
    framed[:, :, 2:5, 2:5] = normalise(patches, CONFIG.data)
    assert torch.equal(seen[0], framed)
    torch.testing.assert_close(found, F.cross_entropy(predict(framed), torch.ones(3, dtype=torch.int64), reduction="none"))
    with pytest.raises(InputError, match="teacher gives logits that are not finite for 3 of 3 images"):
        scores(patches, 1, 8, lambda images: torch.full((len(images), 2), torch.nan), CONFIG.data, 2)


def test_the_best_patches_best_first() -> None:
    found, start = images_of(grey(), ipc=3)
    assert [each.unique().tolist() for each in found] == [[60], [50], [40]]
    assert start.settings == {"patch_candidates": 300, "patch_crops": 5, "patch_factor": 1}
    more, _ = images_of(grey(), ipc=6)
    assert all(torch.equal(one, other) for one, other in zip(found, more, strict=False))  # a set can grow
    worst, _ = images_of(grey(), ipc=6, label=1)  # a bright one of class 1 looks like class 0
    assert [each.unique().tolist() for each in worst] == [[11], [21], [31], [41], [51], [61]]


def test_the_choice_is_reported_class_by_class() -> None:
    _, start = images_of(grey(), ipc=1)
    calls: list[tuple[int, int]] = []
    start.check({0: 0, 1: 0}, lambda done, total: calls.append((done, total)))
    assert calls == [(0, 2), (1, 2), (2, 2)]


def test_the_best_square_of_an_image() -> None:
    """Images that are bright in one corner: squares of it win over the whole."""
    data = grey(per_class=1, size=16)
    data.pixels[0] = 0
    data.pixels[0, :, :9, :9] = 255
    found, _ = images_of(data, ipc=1, patch_crops=200)
    assert found[0].float().mean() > 240
    whole, _ = images_of(data, ipc=1, patch_crops=1)
    assert whole[0].float().mean() < 240


def test_candidates_are_a_seeded_sample() -> None:
    few, _ = images_of(grey(per_class=20), ipc=2, patch_candidates=4)
    assert [each.unique().tolist() for each in few] != [[200], [190]]


def test_four_patches_to_an_image() -> None:
    """Patch k of image i is the (k · ipc + i)-th best."""
    found, start = images_of(grey(per_class=9), ipc=2, patch_factor=2)
    corners = [[int(each[row, column]) for row in (0, 4) for column in (0, 4)] for each in found]
    assert corners == [[90, 70, 50, 30], [80, 60, 40, 20]]
    assert start.settings["patch_ipc"] == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"patch_factor": 3}, "patch_factor must divide the size of the images, 8, got 3"),
        ({"patch_candidates": 1}, "ipc 2 takes patches of 2 images of each class, but patch_candidates is 1"),
        ({"patch_factor": 2}, "class '0' has 6 images, but ipc 2 takes patches of 8 of them"),
    ],
)
def test_settings_that_cannot_be_met(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        images_of(grey(), ipc=2, **settings)


def write_files(folder: Path) -> FileSet:
    for label in range(2):
        (folder / f"c{label}").mkdir(parents=True)
        for image in range(6):
            Image.fromarray(np.full((8, 8), 10 * (image + 1), np.uint8)).save(folder / f"c{label}" / f"{image}.png")
    (folder / "c0" / "5.png").write_bytes(b"no image")
    return image_folder(folder, size=8, channels=1)


def test_bad_files(tmp_path: Path) -> None:
    data = write_files(tmp_path)
    with pytest.raises(InputError, match=r"c0.5\.png.*--skip-bad-images"):
        images_of(data, ipc=2)
    found, start = images_of(data, ipc=2, skip_bad_images=True)
    assert [each.unique().tolist() for each in found] == [[50], [40]]
    assert list(start.skipped) == [str(Path("c0", "5.png"))]
    with pytest.raises(InputError, match="class 'c0' has 5 images that can be decoded, and 6 patches are needed"):
        images_of(data, ipc=6, skip_bad_images=True)


def run(folder: Path, ipc: int = 2, **more: Any) -> int:
    config = small_recipe(**{"iterations": 0, "initial": "patches", "ascent": "none", "batch_size": 4, "backend": "reference", **more})
    ticks: list[tuple[int, int]] = []
    made = distill(small_teacher(), small_set(), config, ipc=ipc, output=folder, threads=1, progress=lambda *tick: ticks.append(tick))
    assert ticks[-1][0] == ticks[-1][1] > 0
    assert [done for done, _ in ticks] == sorted(done for done, _ in ticks)
    return made


def test_a_set_of_patches(tmp_path: Path) -> None:
    """RDED: no refinement; the files are the patches, the same ones when a part of the set is made again."""
    assert run(tmp_path / "set") == 20
    assert list(problems(tmp_path / "set")) == []
    before = contents(tmp_path / "set")
    start = initial_images(
        small_set(), CONFIG, InitialConfig(), ipc=2, seed=0, predict=lambda images: small_teacher().eval()(images).detach()
    )
    start.check(dict.fromkeys(range(10), 1))
    for label in (0, 7):
        with Image.open(tmp_path / "set" / "images" / image_name(label, 1, 10)) as image:
            assert torch.equal(normalise(torch.from_numpy(np.array(image))[None, None], CONFIG.data), start.load([(label, 1)]))
    (tmp_path / "set" / "images" / image_name(7, 1, 10)).unlink()
    assert run(tmp_path / "set") == 4
    assert contents(tmp_path / "set") == before
    assert run(tmp_path / "set", ipc=3) == 10
    with pytest.raises(InputError, match="initial was 'patches', is 'real'"):
        run(tmp_path / "set", ipc=3, initial="real")


def test_a_refinement_that_starts_from_patches(tmp_path: Path) -> None:
    run(tmp_path / "patches", ipc=1, iterations=3, ascent="directed")
    run(tmp_path / "real", ipc=1, iterations=3, ascent="directed", initial="real")
    run(tmp_path / "unrefined", ipc=1)
    patches, real, unrefined = (contents(tmp_path / name) for name in ("patches", "real", "unrefined"))
    name = str(Path("images", image_name(3, 0, 10)))
    assert len({patches[name], real[name], unrefined[name]}) == 3
    assert read_manifest(tmp_path / "patches")["settings"]["patch_crops"] == 5
    assert "patch_crops" not in read_manifest(tmp_path / "real")["settings"]


def test_no_iterations_give_the_initial_images() -> None:
    images, labels = torch.randn(3, 1, 8, 8), torch.tensor([0, 4, 9])
    ticks: list[tuple[int, int]] = []
    config = replace(CONFIG, synthesis=replace(CONFIG.synthesis, initial="real"))
    result = synthesize(small_teacher(), images, labels, config, progress=lambda *tick: ticks.append(tick))
    assert torch.equal(result.images, images)
    assert result.losses.shape == (1, 0, 3)
    assert ticks == [(1, 1)]


def test_one_patch_to_a_large_image_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    large = recipe("folder", method="rded", size=72, mean=(0.5,), std=(0.5,))
    for settings, warned in (({}, True), ({"patch_factor": 2}, False)):
        caplog.clear()
        initial_images(grey(per_class=4, size=72), large, InitialConfig(**settings), ipc=1, seed=0, predict=lambda images: images)
        assert ("RDED is published with 2 × 2 for images of more than 64 pixels" in caplog.text) is warned


def test_method() -> None:
    own = recipe("cifar10", method="rded").synthesis
    assert (own.initial, own.iterations, own.adjusts, own.sees_images) == ("patches", 0, False, True)
