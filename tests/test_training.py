"""Training of teachers and students, the views that they see, and the diversity of a set."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dwa_fast import InputError
from dwa_fast.augment import augment, mix
from dwa_fast.config import SqueezeConfig, ValidationConfig
from dwa_fast.datasets import digits
from dwa_fast.diversity import class_diversity, pairwise_distance
from dwa_fast.recipes import full_recipe
from dwa_fast.seeding import generator
from dwa_fast.squeeze import squeeze
from dwa_fast.training import batches, cosine, fresh, step_count, top1
from dwa_fast.validate import _loss, _optimizer, validate
from tests.nets import SIZE, small_set, small_teacher

CPU = torch.device("cpu")
RECIPE = full_recipe("digits")


def source() -> np.random.Generator:
    return generator(0, "test")


def test_pad_crop_moves_every_image_by_its_own_offset() -> None:
    pixels = torch.rand(64, 2, 6, 5) + 0.1
    cropped = augment(pixels, ValidationConfig(padding=2, flip=0.0), source())
    padded = F.pad(pixels, [2] * 4)
    offsets = set()
    for image, crop in zip(padded, cropped, strict=True):
        found = [(y, x) for y in range(5) for x in range(5) if torch.equal(image[:, y : y + 6, x : x + 5], crop)]
        assert len(found) == 1
        offsets |= set(found)
    assert len(offsets) > 15  # 25 are possible


def test_flip_mirrors_about_half_of_the_images() -> None:
    pixels = torch.rand(200, 1, 3, 3)
    flipped = augment(pixels, SqueezeConfig(augmentation="none", flip=0.5), source())
    mirrored = torch.tensor([torch.equal(new, old.flip(2)) for new, old in zip(flipped, pixels, strict=True)])
    assert 70 < mirrored.sum() < 130
    assert torch.equal(flipped[~mirrored], pixels[~mirrored])


def test_resized_crop_stays_inside_the_image() -> None:
    ramp = torch.linspace(0, 1, 32).expand(100, 1, 32, 32)
    seen = augment(ramp, ValidationConfig(augmentation="resized-crop", flip=0.5), source())
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
    blended, partner, share = mix(images, "mixup", 0.8, source())
    assert torch.allclose(blended, share * images + (1 - share) * images[partner])
    pasted, partner, share = mix(images, "cutmix", 1.0, source())
    kept = (pasted == images).flatten(1).double().mean(1)
    others = partner != torch.arange(8)
    assert torch.allclose(kept[others], torch.tensor(share, dtype=torch.float64))
    same, _, share = mix(images, "none", 1.0, source())
    assert same is images
    assert share == 1


@pytest.mark.parametrize(("count", "size", "expected"), [(10, 4, [4, 4, 2]), (9, 4, [4, 5]), (1, 4, [1]), (4, 4, [4])])
def test_batches_cover_an_epoch(count: int, size: int, expected: list[int]) -> None:
    parts = list(batches(count, size, source()))
    assert [len(part) for part in parts] == expected
    assert sorted(np.concatenate(parts).tolist()) == list(range(count))
    assert step_count(count, size) == len(expected)


def test_learning_rate_warms_up_and_falls() -> None:
    assert [cosine(step, 10, 4) for step in (0, 2, 4, 7, 10)] == pytest.approx([0.01, 0.505, 1.0, 0.5, 0.0], abs=1e-12)


def test_fresh_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    before = torch.rand(1)
    torch.manual_seed(1)
    first, again, other = (fresh("small-resnet", classes=10, channels=1, size=8, seed=seed, device=CPU) for seed in (5, 5, 6))
    assert torch.equal(torch.rand(1), before)
    assert torch.equal(first.get_parameter("fc.weight"), again.get_parameter("fc.weight"))
    assert not torch.equal(first.get_parameter("fc.weight"), other.get_parameter("fc.weight"))


def test_squeeze_learns_and_repeats() -> None:
    config = replace(RECIPE.squeeze, epochs=3, padding=1)
    train, test = digits("train", SIZE), digits("test", SIZE)
    ticks: list[tuple[int, int]] = []
    teachers = [
        squeeze(train, "small-resnet", config, size=SIZE, device=CPU, seed=1, progress=lambda done, total: ticks.append((done, total)))
        for _ in range(2)
    ]
    assert top1(teachers[0], test, config, CPU) > 85
    assert not teachers[0].training
    assert ticks[: len(ticks) // 2] == [(step, 33) for step in range(1, 34)]
    for one, two in zip(teachers[0].parameters(), teachers[1].parameters(), strict=True):
        assert torch.equal(one, two)


def test_validate_trains_students_that_beat_chance_and_repeats() -> None:
    config = replace(RECIPE.validation, epochs=30, padding=1, students=2, mixing="none", labels="hard", learning_rate=5e-3)
    arguments: dict[str, Any] = {"size": SIZE, "device": CPU}
    teacher = small_teacher()
    results = [validate(small_set(), digits("test", SIZE), teacher, "small-resnet", config, **arguments) for _ in range(2)]
    assert results[0] == results[1]
    assert len(set(results[0].seeds)) == 2
    assert results[0].mean > 50
    assert results[0].std == pytest.approx(abs(results[0].accuracies[0] - results[0].accuracies[1]) / 2**0.5)
    assert all(p.requires_grad for p in teacher.parameters())


@pytest.mark.parametrize("optimiser", ["adamw", "sgd"])
@pytest.mark.parametrize("vectors", [True, False])
def test_weight_decay_may_leave_vectors_alone(optimiser: str, vectors: bool) -> None:
    """With a gradient of 0 only the decay moves a weight."""
    student = small_teacher()
    before = [p.detach().clone() for p in student.parameters()]
    config = ValidationConfig(optimiser=optimiser, decay_vectors=vectors, weight_decay=0.5)  # type: ignore[arg-type]
    for p in student.parameters():
        p.grad = torch.zeros_like(p)
    _optimizer(student, config).step()
    for p, old in zip(student.parameters(), before, strict=True):
        assert torch.equal(p, old) == (not vectors and p.dim() == 1)


@torch.no_grad()
def test_soft_loss_is_the_tempered_divergence() -> None:
    images, labels, partner = torch.randn(4, 3), torch.zeros(4, dtype=torch.int64), torch.arange(4)
    student, teacher = nn.Linear(3, 5), nn.Linear(3, 5)
    for scale, factor in ((False, 1.0), (True, 49.0)):
        config = ValidationConfig(temperature=7.0, scale_loss=scale)
        target = (teacher(images) / 7).softmax(1)
        expected = (target * (target.log() - (student(images) / 7).log_softmax(1))).sum(1).mean() * factor
        assert float(_loss(student, teacher, images, labels, partner, 1.0, config)) == pytest.approx(float(expected), rel=1e-5)


@torch.no_grad()
def test_hard_loss_mixes_both_labels() -> None:
    images, labels, partner = torch.randn(2, 3), torch.tensor([1, 2]), torch.tensor([1, 0])
    student = nn.Linear(3, 5)
    logits = student(images).log_softmax(1)
    expected = -(0.7 * (logits[0, 1] + logits[1, 2]) + 0.3 * (logits[0, 2] + logits[1, 1])) / 2
    loss = _loss(student, nn.Identity(), images, labels, partner, 0.7, ValidationConfig(labels="hard"))
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)


def test_diversity_by_hand() -> None:
    features = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]])
    assert pairwise_distance(features) == pytest.approx(4 * 25)  # four ordered pairs at distance 5
    features = torch.randn(6, 3, 2)
    assert pairwise_distance(features) == pytest.approx(sum(float((a - b).square().sum()) for a in features for b in features), rel=1e-5)


def test_diversity_reads_the_last_convolution() -> None:
    network = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.ReLU(), nn.Conv2d(1, 1, 1, bias=False), nn.Flatten())
    for layer in (network[0], network[2]):
        nn.init.constant_(layer.weight, 2.0)
    images = torch.tensor([1.0, 3.0, 5.0, 5.0]).view(4, 1, 1, 1)
    assert class_diversity(network, images, torch.tensor([0, 0, 1, 1])) == {0: pytest.approx(2 * (4 * 2) ** 2), 1: 0.0}
    with pytest.raises(InputError, match="teacher must have a Conv2d to measure diversity on; Identity has none"):
        class_diversity(nn.Identity(), images, torch.zeros(4))
