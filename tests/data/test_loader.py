"""Augmentation, mixing and batches: as configured, and the same in any order of epochs, from memory or from disk."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import RandAugment

from dwa_fast import InputError
from dwa_fast.config import Schedule, SqueezeConfig, ValidationConfig
from dwa_fast.data.augment import Mix, apply_mix, apply_views, draw_mix, draw_views, mirror
from dwa_fast.data.folders import image_folder
from dwa_fast.data.loader import BatchPlan, ImageCache, RandomSampler, TrainingLoader, batch_size_of, batch_sizes, batches, parts
from dwa_fast.recipes import recipe
from dwa_fast.seeding import generator
from tests.nets import DIGITS, small_set

CPU = torch.device("cpu")
CONFIG = replace(recipe("digits").validation, batch_size=7, padding=1, flip=0.5)


def source() -> np.random.Generator:
    return generator(0, "test")


def augment(pixels: Tensor, config: SqueezeConfig | ValidationConfig) -> Tensor:
    return apply_views(pixels, draw_views(len(pixels), config, source()), config.padding)


def test_pad_crop_moves_every_image_by_its_own_offset() -> None:
    pixels = torch.rand(64, 2, 6, 5) + 0.1
    cropped = augment(pixels, ValidationConfig(padding=2, flip=0.0))
    padded = F.pad(pixels, [2] * 4)
    offsets = set()
    for image, crop in zip(padded, cropped, strict=True):
        found = [(y, x) for y in range(5) for x in range(5) if torch.equal(image[:, y : y + 6, x : x + 5], crop)]
        assert len(found) == 1
        offsets |= set(found)
    assert len(offsets) > 15  # 25 are possible


def test_flip_mirrors_about_half_of_the_images() -> None:
    pixels = torch.rand(200, 1, 3, 3)
    flipped = augment(pixels, SqueezeConfig(augmentation="none", flip=0.5))
    mirrored = torch.tensor([torch.equal(new, old.flip(2)) for new, old in zip(flipped, pixels, strict=True)])
    assert 70 < mirrored.sum() < 130
    assert torch.equal(flipped[~mirrored], pixels[~mirrored])


@pytest.mark.parametrize("schedule", ["fast", "short"])
@pytest.mark.parametrize("augmentation", ["none", "pad-crop", "resized-crop"])
def test_the_fast_schedule_mirrors_in_every_other_epoch(augmentation: str, schedule: Schedule) -> None:
    data, config = small_set(), replace(recipe("cifar10", schedule=schedule).squeeze, augmentation=augmentation, batch_size=25)
    sampler, mirrored = RandomSampler(data, config, seed=0), []
    for epoch in range(3):
        flipped = torch.zeros(len(data.labels), dtype=torch.bool)
        for plan in sampler.epoch(epoch):
            views = plan.views
            flipped[plan.indices] = views.flipped if views.crops is None else views.crops[:, 0] < 0  # type: ignore[assignment]
        mirrored.append(flipped)
    assert 15 < mirrored[0].sum() < 45
    assert torch.equal(mirrored[1], ~mirrored[0])
    assert torch.equal(mirrored[2], mirrored[0])
    assert all(plan.views.flipped is None for plan in RandomSampler(data, replace(config, flip=0.0, augmentation="none"), seed=0).epoch(0))


def test_mirror_keeps_the_crops() -> None:
    views = draw_views(50, ValidationConfig(augmentation="resized-crop"), source())
    assert views.crops is not None
    flipped = torch.arange(50) % 3 == 0
    crops = mirror(views, flipped).crops
    assert crops is not None
    assert torch.equal(crops[:, 0] < 0, flipped)
    assert torch.equal(crops.abs(), views.crops.abs())


def test_resized_crop_stays_inside_the_image() -> None:
    ramp = torch.linspace(0, 1, 32).expand(100, 1, 32, 32)
    seen = augment(ramp, ValidationConfig(augmentation="resized-crop", flip=0.5))
    assert seen.shape == ramp.shape
    assert seen.min() >= 0
    assert seen.max() <= 1
    slopes = seen[:, 0, 16, 20] - seen[:, 0, 16, 10]
    assert (slopes > 0).any()
    assert (slopes < 0).any()
    assert (slopes.abs() < 0.33).all()  # crops enlarge: never steeper than the ramp itself
    assert slopes.abs().min() > 0.05


def test_mixup_and_cutmix_share_what_they_say() -> None:
    images = torch.arange(8.0).view(8, 1, 1, 1).expand(8, 1, 10, 10)
    blend = draw_mix(8, (10, 10), ValidationConfig(mixing="mixup"), source())
    assert torch.allclose(apply_mix(images, blend), blend.share * images + (1 - blend.share) * images[blend.partner])
    paste = draw_mix(8, (10, 10), ValidationConfig(mixing="cutmix", mixing_alpha=1.0), source())
    assert paste.partner is not None
    kept = (apply_mix(images, paste) == images).flatten(1).double().mean(1)
    others = paste.partner != torch.arange(8)
    assert torch.allclose(kept[others], torch.tensor(paste.share, dtype=torch.float64))
    for config in (ValidationConfig(mixing="none"), SqueezeConfig()):
        assert draw_mix(8, (10, 10), config, source()) == Mix()
    assert apply_mix(images, Mix()) is images


@pytest.mark.parametrize(("count", "size", "expected"), [(10, 4, [4, 4, 2]), (9, 4, [4, 5]), (1, 4, [1]), (4, 4, [4])])
def test_batches_cover_an_epoch(count: int, size: int, expected: list[int]) -> None:
    parts = batches(count, size, source())
    assert [len(part) for part in parts] == expected
    assert sorted(np.concatenate(parts).tolist()) == list(range(count))
    assert batch_sizes(count, size) == expected


def same(one: BatchPlan, two: BatchPlan) -> bool:
    """Whether two batches are the same to the bit."""
    assert one.views.offsets is not None
    assert two.views.offsets is not None
    assert one.mix.partner is not None
    assert two.mix.partner is not None
    return (
        torch.equal(one.indices, two.indices)
        and torch.equal(one.views.offsets, two.views.offsets)
        and torch.equal(one.mix.partner, two.mix.partner)
        and one.mix.share == two.mix.share
    )


def test_an_epoch_is_the_same_out_of_turn() -> None:
    data = small_set()
    in_turn = RandomSampler(data, CONFIG, seed=3)
    wanted = [in_turn.epoch(number) for number in range(4)]
    other = RandomSampler(data, CONFIG, seed=3)
    for number in (2, 3, 0, 2):
        assert all(map(same, other.epoch(number), wanted[number]))
    assert not same(wanted[0][0], wanted[1][0])
    assert not same(RandomSampler(data, CONFIG, seed=4).epoch(0)[0], wanted[0][0])
    assert in_turn.steps == len(wanted[0])


def test_images_are_held_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What has been read is copied to its place and freed: a set takes its own size, not twice as much."""
    data, chunks = small_set(), list[weakref.ref[torch.Tensor]]()

    def load(indices: Sequence[int]) -> torch.Tensor:
        assert not any(chunk() is not None for chunk in chunks)
        pixels = data.pixels[list(indices)]
        chunks.append(weakref.ref(pixels))
        return pixels

    monkeypatch.setattr("dwa_fast.data.loader._CHUNK", 7)
    watched = SimpleNamespace(labels=data.labels, class_names=data.class_names, image_shape=data.image_shape, name=str, load=load)
    (held,) = ImageCache(watched, CPU, 1.0).batches([torch.arange(60)])
    assert len(chunks) == 9
    assert torch.equal(held, data.pixels)


def test_images_beyond_the_memory_limit_are_read_from_disk(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The batches are the same as from memory. A file that has become unreadable stops the loader, and no thread is left waiting."""
    for index in range(20):
        path = tmp_path / str(index % 4) / f"{index}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(source().integers(0, 256, (8, 8), dtype=np.uint8)).save(path)
    data = image_folder(tmp_path, 8, 1)
    held = ImageCache(data, CPU, 1.0)
    with caplog.at_level(logging.INFO, logger="dwa_fast"):
        read = ImageCache(data, CPU, 1e-9)
    assert "more than the memory limit of 1e-09 GiB; read from disk during training" in caplog.text
    sampler = RandomSampler(data, CONFIG, seed=0)
    for one, two in zip(
        TrainingLoader(held, sampler, DIGITS.data, 1).epoch(1), TrainingLoader(read, sampler, DIGITS.data, 1).epoch(1), strict=True
    ):
        assert torch.equal(one.images, two.images)
        assert torch.equal(one.labels, data.labels[two.plan.indices])
    (tmp_path / "0" / "0.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"0\.png is no image that can be read: it is empty"):
        list(TrainingLoader(read, sampler, DIGITS.data, 1).epoch(0))


@pytest.mark.parametrize(
    ("images", "classes", "expected"),
    # RDED: 10, 50 and 100 for ipc 1, 10 and 50, doubled from 100 classes on; between them as the next lower; never more than the images
    [
        (10, 10, 10), (100, 10, 50), (500, 10, 100), (100, 100, 20), (1000, 100, 100), (50_000, 1000, 200),
        (20, 10, 10), (490, 10, 50), (5, 10, 5), (100, 2, 100), (10_000, 10, 100), (15, 100, 15),
    ],
)  # fmt: skip
def test_batch_size_by_images_per_class(images: int, classes: int, expected: int) -> None:
    assert batch_size_of(ValidationConfig(batch_size=None), images, classes) == expected
    assert batch_size_of(ValidationConfig(batch_size=7), images, classes) == 7


@pytest.mark.parametrize(
    ("count", "wanted", "sizes"), [(16, 1, [16]), (16, 2, [8, 8]), (10, 3, [3, 3, 4]), (3, 2, [3]), (5, 4, [2, 3]), (1, 2, [1])]
)
def test_parts_of_a_batch_have_two_images_at_least(count: int, wanted: int, sizes: list[int]) -> None:
    rows = torch.arange(count)
    found = [rows[part] for part in parts(count, wanted)]
    assert list(map(len, found)) == sizes
    assert torch.equal(torch.cat(found), rows)


@pytest.mark.parametrize(("size", "number"), [((6, 4), 2), ((7, 8), 3), ((5, 5), 5)])
def test_cells_are_shuffled_as_columns_and_as_rows(size: tuple[int, int], number: int) -> None:
    """Strip by strip; the last one has what is left over."""
    pixels = torch.randint(256, (9, 2, *size), dtype=torch.uint8)
    config = ValidationConfig(augmentation="none", flip=0.0, shuffle_cells=number)
    views = draw_views(9, config, source())
    assert views.cells is not None
    assert len(views.cells.flatten(1).unique(dim=0)) > 1
    for image, found, (columns, rows) in zip(pixels, apply_views(pixels, views, 0), views.cells.tolist(), strict=True):
        for axis, order in ((2, columns), (1, rows)):
            assert sorted(order) == list(range(number))
            width = image.shape[axis] // number
            strips = [
                *image.split(width, axis)[: number - 1],
                image.narrow(axis, (number - 1) * width, image.shape[axis] - (number - 1) * width),
            ]
            image = torch.cat([strips[place] for place in order], axis)
        assert torch.equal(found, image)


@pytest.mark.parametrize("channels", [1, 3])
def test_rand_augment_is_torchvisions_for_each_image(channels: int) -> None:
    pixels = torch.randint(256, (12, channels, 8, 8), dtype=torch.uint8)
    config = ValidationConfig(augmentation="none", flip=0.0, rand_augment=2, rand_magnitude=20)
    views = draw_views(12, config, source())
    assert views.rand_augment is not None
    before = torch.random.get_rng_state()
    found = apply_views(pixels, views, 0)
    assert torch.equal(found, apply_views(pixels, views, 0))
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(views.rand_augment.seed)
    assert torch.equal(found, torch.stack(list(map(RandAugment(2, 20), pixels))))
    other = replace(views, rand_augment=replace(views.rand_augment, seed=views.rand_augment.seed ^ 1))
    assert not torch.equal(found, apply_views(pixels, other, 0))


@pytest.mark.parametrize("smallest", [0.08, 0.5, 0.9, 1.0])
def test_crops_have_the_distribution_of_torchvisions(smallest: float) -> None:
    """Areas, the share of whole images, sides and places, of 4000 crops of each."""
    size, count = 512, 4000
    views = draw_views(count, ValidationConfig(augmentation="resized-crop", smallest_crop=smallest, flip=0.0), source())
    assert views.crops is not None
    width, height, x, y = views.crops.double().unbind(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = [RandomResizedCrop.get_params(torch.empty(1, size, size), [smallest, 1.0], [3 / 4, 4 / 3]) for _ in range(count)]
    top, left, tall, wide = torch.tensor(theirs, dtype=torch.float64).T / size
    pairs = {
        "area": (width * height, tall * wide),
        "whole image": ((width * height == 1).double(), (tall * wide == 1).double()),
        "logarithm of the ratio": (torch.log(width / height), torch.log(wide / tall)),
        "left edge": ((1 + x - width) / 2, left),
        "top edge": ((1 + y - height) / 2, top),
    }
    for name, (own, wanted) in pairs.items():
        error = 5 * max(float(wanted.std()), 1e-3) * (2 / count) ** 0.5  # five standard errors of a difference of means
        assert float(own.mean()) == pytest.approx(float(wanted.mean()), abs=error), name
        assert float(own.std()) == pytest.approx(float(wanted.std()), rel=0.12, abs=2e-3), name


def test_what_students_alone_have_changes_no_other_view() -> None:
    plain, more = CONFIG, replace(CONFIG, shuffle_cells=2, rand_augment=1)
    one, two = draw_views(7, plain, source()), draw_views(7, more, source())
    assert torch.equal(one.offsets, two.offsets)  # type: ignore[arg-type]
    assert torch.equal(one.flipped, two.flipped)  # type: ignore[arg-type]


def test_a_batch_has_what_a_step_reads() -> None:
    """Images, labels, and for mixed images the partners' labels with both shares."""
    data = small_set()
    for batch in TrainingLoader(ImageCache(data, CPU, 1.0), RandomSampler(data, CONFIG, seed=0), DIGITS.data, 1).epoch(0):
        mix = batch.plan.mix
        assert mix.partner is not None
        assert list(batch.tensors()) == ["images", "labels", "partner_labels", "shares"]
        assert torch.equal(batch.tensors()["partner_labels"], data.labels[batch.plan.indices[mix.partner]])
        assert batch.tensors()["shares"].tolist() == pytest.approx([mix.share, 1 - mix.share])
    plain = replace(CONFIG, mixing="none")
    batch = next(TrainingLoader(ImageCache(data, CPU, 1.0), RandomSampler(data, plain, seed=0), DIGITS.data, 1).epoch(0))
    assert list(batch.tensors()) == ["images", "labels"]
