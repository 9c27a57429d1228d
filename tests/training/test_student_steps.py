"""A student's steps: losses, weight decay, parts of a batch, the average of the weights, the labels of several teachers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dwa_fast import InputError
from dwa_fast.config import ValidationConfig
from dwa_fast.data.augment import Mix, Views
from dwa_fast.data.loader import BatchPlan, ImageCache, RandomSampler, TrainingBatch, TrainingLoader
from dwa_fast.seeding import derive
from dwa_fast.training import fit, state
from dwa_fast.training.validate import hard_loss, optimiser_of, soft_loss
from tests.nets import DIGITS, SIZE, small_set, small_teacher, stop_at
from tests.training.students import CPU, QUICK, students


@pytest.mark.parametrize("optimiser", ["adamw", "sgd"])
@pytest.mark.parametrize("vectors", [True, False])
def test_weight_decay_may_leave_vectors_alone(optimiser: str, vectors: bool) -> None:
    """With a gradient of 0 only the decay moves a weight."""
    student = small_teacher()
    before = [p.detach().clone() for p in student.parameters()]
    config = ValidationConfig(optimiser=optimiser, decay_vectors=vectors, weight_decay=0.5)  # type: ignore[arg-type]
    for p in student.parameters():
        p.grad = torch.zeros_like(p)
    optimiser_of(student, config).step()
    for p, old in zip(student.parameters(), before, strict=True):
        assert torch.equal(p, old) == (not vectors and p.dim() == 1)


@torch.no_grad()
def test_soft_loss_is_the_tempered_divergence() -> None:
    logits, teacher_logits = torch.randn(4, 5), torch.randn(4, 5)
    for scale, factor in ((False, 1.0), (True, 49.0)):
        config = ValidationConfig(temperature=7.0, scale_loss=scale)
        target = (teacher_logits / 7).softmax(1)
        expected = (target * (target.log() - (logits / 7).log_softmax(1))).sum(1).mean() * factor
        assert float(soft_loss(logits, teacher_logits, config)) == pytest.approx(float(expected), rel=1e-5)


@torch.no_grad()
def test_hard_loss_mixes_both_labels() -> None:
    labels, partner = torch.tensor([1, 2]), torch.tensor([1, 0])
    raw = torch.randn(2, 5)
    logits = raw.log_softmax(1)
    for mix, share in ((Mix(partner, 0.7), 0.7), (Mix(), 1.0)):
        plan, mixed = BatchPlan(torch.arange(2), Views(), mix), mix.partner is not None
        shares = torch.tensor([share, 1 - share])
        batch = TrainingBatch(torch.zeros(2, 3), labels, plan, labels[partner] if mixed else None, shares if mixed else None)
        other = logits[0, 2] + logits[1, 1]
        expected = -(share * (logits[0, 1] + logits[1, 2]) + (1 - share) * other) / 2
        assert float(hard_loss(raw, batch)) == pytest.approx(float(expected), rel=1e-6)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[nn.Module, list[dict[str, torch.Tensor]]]]:
    """Trains one student of a small architecture; gives it as it is tested in the end, and its state at first and after each step."""

    def run(make: Callable[[], nn.Module], config: ValidationConfig, teacher: Any = None, **more: Any) -> Any:
        torch.manual_seed(0)
        network, tested = make(), []
        states = [copy.deepcopy(network.state_dict())]
        monkeypatch.setattr("dwa_fast.training.validate.new_network", lambda *_, **__: network)
        monkeypatch.setattr("dwa_fast.training.validate.top1", lambda model, *_: tested.append(copy.deepcopy(model)) or 0.0)
        progress = more.pop("progress", lambda *_: states.append(copy.deepcopy(network.state_dict())))
        students(replace(config, students=1), teacher, "small-resnet", progress=progress, **more)
        return tested[-1], states

    return run


def flat() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(SIZE**2, 10))


def normed() -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(SIZE**2, 10))


ONE_STEP = replace(QUICK, epochs=1, batch_size=60, optimiser="sgd", momentum=0.0, weight_decay=0.0, learning_rate=0.1, augmentation="none")
ONE_STEP = replace(ONE_STEP, mixing="cutmix", mixing_alpha=1.0, flip=0.0, temperature=2.0)


def first_batch(config: ValidationConfig) -> TrainingBatch:
    data = small_set()
    sampler = RandomSampler(data, config, seed=derive(0, "student", 0))
    return next(TrainingLoader(ImageCache(data, CPU, 1.0), sampler, DIGITS.data, config.padding).epoch(0))


@pytest.mark.parametrize("changes", [{}, {"labels": "hard"}, {"loss": "mse", "hard_weight": 0.3}], ids=["kl", "hard", "mse"])
def test_parts_of_a_batch_add_up_to_its_gradient(trained: Any, changes: dict[str, Any]) -> None:
    """Seven parts of 8 or 9 images each, without BatchNorm."""
    config = replace(ONE_STEP, **changes)
    (whole, states), (parted, _) = trained(flat, config), trained(flat, replace(config, accumulation=7))
    for name, before in states[0].items():
        steps = [network.get_parameter(name).detach() - before for network in (whole, parted)]
        assert torch.allclose(*steps, rtol=1e-3, atol=1e-6)
        assert float(steps[0].norm()) > 1e-3


def test_batchnorm_sees_the_parts(trained: Any) -> None:
    config = replace(ONE_STEP, accumulation=2)
    _, states = trained(normed, config)
    means, variances = torch.zeros(1), torch.ones(1)
    for half in first_batch(config).images.split(30):
        means, variances = 0.9 * means + 0.1 * half.mean(), 0.9 * variances + 0.1 * half.var()
    assert torch.allclose(states[-1]["0.running_mean"], means, rtol=1e-5)
    assert torch.allclose(states[-1]["0.running_var"], variances, rtol=1e-5)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_a_teacher_in_train_mode_sees_the_parts(mode: Any) -> None:
    """BSSL: each half is normalised by its own statistics."""
    config = replace(ONE_STEP, accumulation=2, teacher_mode=mode)
    batch, teacher = first_batch(config), small_teacher()
    found = fit.teacher_labels([teacher], config, (1, SIZE, SIZE), CPU)(batch)
    with torch.no_grad():
        expected = torch.cat([copy.deepcopy(teacher).train(mode == "train")(half) for half in batch.images.split(30)])
        whole = copy.deepcopy(teacher).train(mode == "train")(batch.images)
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4)
    assert torch.allclose(found, whole, rtol=1e-3, atol=1e-4) == (mode == "eval")


def test_squared_error_of_logits_and_cross_entropy(trained: Any) -> None:
    """The step of MSE + c·CE with each image's own class, under CutMix, in plain PyTorch."""
    config = replace(ONE_STEP, loss="mse", hard_weight=0.3)
    found, states = trained(flat, config)
    network, batch = flat(), first_batch(config)
    network.load_state_dict(states[0])
    with torch.no_grad():
        wanted = small_teacher()(batch.images).double()
    logits = network.double()(batch.images.double())
    own_class = -logits.log_softmax(1)[torch.arange(60), batch.labels].mean()
    ((logits - wanted).square().mean() + 0.3 * own_class).backward()
    for p, after in zip(network.parameters(), found.parameters(), strict=True):
        assert p.grad is not None
        assert torch.allclose(p - 0.1 * p.grad, after.double(), rtol=1e-4, atol=1e-6)


def test_the_average_of_the_weights_is_tested(trained: Any) -> None:
    config = replace(ONE_STEP, epochs=3, weight_ema=0.9)
    found, states = trained(normed, config)
    assert len(states) == 4
    for name, value in found.state_dict().items():
        if "running" in name or "num" in name:
            assert torch.equal(value, states[-1][name])
            continue
        average = states[0][name].double()
        for after in states[1:]:
            average = 0.9 * average + 0.1 * after[name].double()
        assert torch.allclose(value.double(), average, rtol=1e-5, atol=1e-7)
        assert not torch.allclose(value, states[-1][name], rtol=1e-5)
    plain, same = trained(normed, replace(config, weight_ema=0.0))
    assert all(torch.equal(states[-1][name], same[-1][name]) for name in same[-1])  # the training itself is the same
    assert all(torch.equal(plain.state_dict()[name], same[-1][name]) for name in same[-1])


def test_the_average_goes_on_to_the_same_bits(trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with tests on the way, which exchange average and weights."""
    monkeypatch.setattr(state, "_SECONDS", 0.0)
    config = replace(QUICK, weight_ema=0.8, learning_rate=0.05)
    make = lambda: fit.new_network("small-resnet", classes=10, channels=1, size=SIZE, seed=3, device=CPU)  # noqa: E731
    whole, _ = trained(make, config, test_every=1)
    for step in (4, 8):
        with pytest.raises(KeyboardInterrupt):
            trained(make, config, resume_dir=tmp_path, progress=stop_at(step))
    resumed, _ = trained(make, config, resume_dir=tmp_path, test_every=3)
    assert all(torch.equal(one, two) for one, two in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True))


def test_labels_of_several_teachers_are_their_mean(tmp_path: Path) -> None:
    """Of two like one another the mean is that of one; others are other students, and other settings of a folder."""
    config, one, other = replace(QUICK, students=1, temperature=1.0, learning_rate=0.02), small_teacher(), small_teacher(1)
    alone = students(config, one, resume_dir=tmp_path / "alone")
    assert students(config, [one], resume_dir=tmp_path / "alone") == alone
    with pytest.raises(InputError, match=r"teacher was '[0-9a-f]{12}…', is \['[0-9a-f]{12}…', "):
        students(config, [one, other], resume_dir=tmp_path / "alone")
    batch = first_batch(config)
    found = fit.teacher_labels([one, other], config, (1, SIZE, SIZE), CPU)(batch)
    with torch.no_grad():
        assert torch.allclose(found, (one(batch.images) + other(batch.images)) / 2, rtol=1e-3, atol=1e-4)
    with pytest.raises(InputError, match="expected at least one teacher, got an empty list"):
        students(config, [])


def test_an_average_that_never_moves_is_refused() -> None:
    with pytest.raises(InputError, match="weight_ema must be below 1, at which the average would never move"):
        ValidationConfig(weight_ema=1.0)
