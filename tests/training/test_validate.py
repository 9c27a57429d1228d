"""Students: what they are teacher_logits, that they learn and repeat, and that they go on where they were stopped."""

from __future__ import annotations

import copy
import json
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
from dwa_fast.data.datasets import digits
from dwa_fast.data.images import MemorySet
from dwa_fast.data.loader import BatchPlan, ImageCache, RandomSampler, TrainingBatch, TrainingLoader
from dwa_fast.data.subsets import some_classes
from dwa_fast.models.architectures import ARCHITECTURES
from dwa_fast.seeding import derive
from dwa_fast.threads import torch_threads
from dwa_fast.training import fit, state
from dwa_fast.training.validate import ValidationResult, hard_loss, optimiser_of, soft_loss, validate
from tests.nets import DIGITS, SIZE, small_set, small_teacher, stop_at, tight

CPU = torch.device("cpu")
QUICK = replace(DIGITS.validation, epochs=4, batch_size=20, padding=1, students=2)  # three steps for an epoch of small_set


def held_out() -> MemorySet:
    data = digits("test", SIZE)
    return MemorySet(data.pixels[:100], data.labels[:100], data.class_names)


def students(config: ValidationConfig = QUICK, teacher: Any = None, student: str = "small-resnet", **more: Any) -> ValidationResult:
    return validate(
        small_set(),
        held_out(),
        small_teacher() if teacher is None else teacher,
        student,
        replace(DIGITS, validation=config),
        device=CPU,
        **more,
    )


@pytest.fixture
def dropping(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of an architecture with dropout."""

    def make(classes: int, channels: int, size: int) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(channels * size**2, classes))

    monkeypatch.setitem(ARCHITECTURES, "dropping", make)
    return "dropping"


def test_validate_trains_students_that_beat_chance_and_repeats() -> None:
    config = replace(DIGITS.validation, epochs=30, padding=1, students=2, mixing="none", labels="hard", learning_rate=5e-3)
    recipe, teacher = replace(DIGITS, validation=config), small_teacher()
    results = [validate(small_set(), digits("test", SIZE), teacher, "small-resnet", recipe, device=CPU) for _ in range(2)]
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


@pytest.mark.parametrize("optimiser", ["adamw", "sgd"])
def test_goes_on_to_the_same_accuracies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimiser: Any) -> None:
    """Stopped within an epoch of either student."""
    monkeypatch.setattr(state, "_SECONDS", 0.0)
    config = replace(QUICK, optimiser=optimiser, learning_rate=0.05, students=2)

    def run(**more: Any) -> ValidationResult:
        return students(config, **more)

    whole = run()
    for step in (8, 20):
        with pytest.raises(KeyboardInterrupt):
            run(resume_dir=tmp_path, progress=stop_at(step))
    ticks: list[int] = []
    assert run(resume_dir=tmp_path, progress=lambda done, total: ticks.append(done)) == whole
    assert ticks == list(range(18, 25))
    assert [path.name for path in tmp_path.iterdir()] == ["students.json"]
    assert run(resume_dir=tmp_path, progress=stop_at(1)) == whole  # nothing is trained again


@pytest.mark.parametrize("student", ["small-resnet", "dropping"])
def test_state_is_that_of_the_undisturbed_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, student: str, dropping: str) -> None:
    """Accuracies of a hundred images could hide a difference; the weights after every epoch cannot. Dropout plans numbers of its own."""
    monkeypatch.setattr(state, "_SECONDS", 0.0)

    def weights(folder: Path) -> dict[str, torch.Tensor]:
        content: dict[str, torch.Tensor] = torch.load(folder / "student0.state", weights_only=True)["weights"]
        return content

    with pytest.raises(KeyboardInterrupt):
        students(student=student, resume_dir=tmp_path / "whole", progress=stop_at(10))  # after three epochs
    for step in (4, 7, 10):
        with pytest.raises(KeyboardInterrupt):
            students(student=student, resume_dir=tmp_path / "stopped", progress=stop_at(step))
    one, two = weights(tmp_path / "whole"), weights(tmp_path / "stopped")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_another_thread_count_is_logged_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The order of sums, so the last bits, depend on it; resuming goes ahead with the present number."""
    monkeypatch.setattr(state, "_SECONDS", 0.0)
    with torch_threads(2), pytest.raises(KeyboardInterrupt):
        students(replace(QUICK, students=2), resume_dir=tmp_path, progress=stop_at(8))
    assert not caplog.records
    with torch_threads(1):
        students(replace(QUICK, students=2), resume_dir=tmp_path)
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [f"{tmp_path}: started with 2 CPU threads, resumed with 1; the last bits of the results may differ"]


def test_more_students_join_those_that_are_there(tmp_path: Path) -> None:
    one = students(replace(QUICK, students=1), resume_dir=tmp_path)
    three = students(replace(QUICK, students=3), resume_dir=tmp_path)
    assert three.accuracies[:1] == one.accuracies
    assert three == students(replace(QUICK, students=3))


def test_other_settings_are_refused(tmp_path: Path) -> None:
    config = replace(QUICK, students=1, epochs=1)
    students(config, resume_dir=tmp_path)
    with pytest.raises(
        InputError, match=r"holds students of other settings \(seed was 0, is 5; temperature was 20.0, is 4.0\); choose another"
    ):
        students(replace(config, temperature=4.0), resume_dir=tmp_path, seed=5)
    with pytest.raises(InputError, match=r"other settings \(teacher was '[0-9a-f]+', is '[0-9a-f]+'\)"):
        students(config, small_teacher(1), resume_dir=tmp_path)
    students(replace(config, memory_limit=0.0), resume_dir=tmp_path)
    (tmp_path / "students.json").write_text(json.dumps({"format": 1, "settings": {}, "accuracies": {"0": 101}}))
    with pytest.raises(
        InputError,
        match=r"students\.json cannot be read: expected accuracies in percent; remove it to train all students again",
    ):
        students(config, resume_dir=tmp_path)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_a_student_does_not_depend_on_those_before_it(tmp_path: Path, mode: Any) -> None:
    """A teacher in train mode moves its running statistics; the next student must not notice."""

    class Running(nn.Module):
        """A teacher whose answers depend on its running statistics in train mode too."""

        def __init__(self) -> None:
            super().__init__()
            self.network = small_teacher()

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            norm = next(m for m in self.network.modules() if isinstance(m, nn.BatchNorm2d))
            assert norm.running_mean is not None
            logits: torch.Tensor = self.network(images) + norm.running_mean.sum() * torch.arange(10)
            return logits

    teacher = Running().eval()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    config = replace(QUICK, teacher_mode=mode, temperature=1.0, learning_rate=0.05)
    both = students(config, teacher).accuracies
    assert students(replace(config, students=1), teacher, resume_dir=tmp_path).accuracies == both[:1]
    assert students(config, teacher, resume_dir=tmp_path).accuracies == both  # trains the second alone
    assert not teacher.training
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_students_in_bf16() -> None:
    config = replace(QUICK, students=1, mixing="none", labels="hard", learning_rate=5e-3)
    exact, rounded = students(replace(config, epochs=10)), students(replace(config, epochs=10, precision="bf16"))
    assert rounded.mean > 30
    assert abs(exact.mean - rounded.mean) < 20


def test_a_folder_without_a_finished_student_takes_other_settings(tmp_path: Path) -> None:
    """Such as a lower learning rate after a divergence."""
    with pytest.raises(InputError, match="training diverged"):
        students(replace(QUICK, learning_rate=1e30), resume_dir=tmp_path)
    assert students(QUICK, resume_dir=tmp_path) == students(QUICK)


def test_divergence_keeps_what_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = students(replace(QUICK, students=1), resume_dir=tmp_path)
    monkeypatch.setattr(fit, "cosine", lambda *_: 1e30)
    with pytest.raises(InputError, match=r"training diverged: loss not finite in epoch 1 of 4; lower --learning-rate \(0\.\d+\)$"):
        students(resume_dir=tmp_path)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["students.json"]
    assert students(resume_dir=tmp_path).accuracies[:1] == first.accuracies


def test_teachers_are_checked_as_synthesis_does(tmp_path: Path) -> None:
    broken = small_teacher()
    broken.get_buffer("stem.1.running_var")[2] = float("inf")
    cases = {
        r"not finite: running_var of layer 'stem\.1' \(1 infinite of 8\); train it again": broken,
        "teacher gives logits of 7 classes, the data have 10": ARCHITECTURES["small-resnet"](7, 1, SIZE),
        "teacher gives logits of 1 classes, the data have 10": ARCHITECTURES["small-resnet"](1, 1, SIZE),
        r"teacher must give \[N, classes\] logits, got shape \(2, 1, 8, 8\)": nn.Identity(),
        r"teacher cannot take images of shape \(1, 8, 8\): ": nn.Linear(3, 10),
    }
    for message, teacher in cases.items():
        with pytest.raises(InputError, match=message):
            students(teacher=teacher.eval(), resume_dir=tmp_path)
    with pytest.raises(InputError, match=r"a batch of one image leaves a BatchNorm layer of the teacher with one value per channel"):
        students(replace(QUICK, batch_size=1, teacher_mode="train"), tight(10, 1, SIZE))
    assert students(replace(QUICK, students=1, labels="hard"), broken).accuracies  # which is not asked


def test_batches_of_one_value_per_channel_are_refused_beforehand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARCHITECTURES, "tight", tight)
    with pytest.raises(InputError, match="a batch of one image leaves a BatchNorm layer of the student with one value per channel"):
        students(replace(QUICK, batch_size=1), student="tight")


def test_sets_of_other_classes_are_refused() -> None:
    few = some_classes(small_set(), range(7))
    with pytest.raises(InputError, match="distilled images have 7 classes, the held-out images 10"):
        validate(few, held_out(), small_teacher(), "small-resnet", replace(DIGITS, validation=QUICK), device=CPU)
    empty = MemorySet(held_out().pixels[:0], held_out().labels[:0], held_out().class_names)
    with pytest.raises(InputError, match="there are no held-out images; expected at least one"):
        validate(small_set(), empty, small_teacher(), "small-resnet", replace(DIGITS, validation=QUICK), device=CPU)


def test_a_teacher_that_fails_on_the_way_is_named() -> None:
    class Failing(nn.Module):
        """Finite for two images, infinite for the twenty of a batch."""

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.full((len(images), 10), float("inf") if len(images) > 2 else 1.0)

    with pytest.raises(InputError, match=r"loss not finite in epoch 1 of 4; the teacher's logits for its images are not finite$"):
        students(teacher=Failing())


def test_classes_in_another_order_are_refused_and_other_names_said(caplog: pytest.LogCaptureFixture) -> None:
    """An accuracy by the numbers of other classes would be a wrong one."""
    config, test = replace(QUICK, labels="hard", epochs=1, students=1), held_out()
    swapped = replace(test, class_names=[test.class_names[1], test.class_names[0], *test.class_names[2:]])
    with pytest.raises(InputError, match=r"class 0 of the distilled images is '0', .* is '1': the classes are the same in another order"):
        validate(small_set(), swapped, None, "small-resnet", replace(DIGITS, validation=config), device=CPU)
    named = replace(test, class_names=[f"digit {name}" for name in test.class_names])
    validate(small_set(), named, None, "small-resnet", replace(DIGITS, validation=config), device=CPU)
    assert "that of the held-out images is 'digit 0'; classes are taken to be the same by their numbers" in caplog.text
    caplog.clear()
    validate(small_set(), test, None, "small-resnet", replace(DIGITS, validation=config), device=CPU)
    assert "classes" not in caplog.text


def test_early_tests_change_nothing_and_are_kept(tmp_path: Path, dropping: str) -> None:
    seen: list[tuple[int, int, float]] = []
    config = replace(QUICK, epochs=5, students=2)
    plain = students(config, student=dropping)
    result = students(config, student=dropping, resume_dir=tmp_path, test_every=2, tested=lambda *each: seen.append(each))
    assert result.accuracies == plain.accuracies
    assert [(student, epochs) for student, epochs, _ in seen] == [(0, 2), (0, 4), (1, 2), (1, 4)]
    assert result.tests == [{2: seen[0][2], 4: seen[1][2]}, {2: seen[2][2], 4: seen[3][2]}]
    assert students(config, student=dropping, resume_dir=tmp_path).tests == result.tests
    after_two_epochs = students(config, student="small-resnet", test_every=1).tests[0]
    assert sorted(after_two_epochs) == [1, 2, 3, 4]


def test_processes_give_what_one_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also early tests, from a student that had been interrupted after its first test."""
    counts: list[tuple[int, int]] = []
    config = replace(QUICK, learning_rate=5e-3, mixing="none")
    alone = students(config, test_every=2)
    assert alone.accuracies[0] != alone.accuracies[1]
    assert alone.tests[0] != alone.tests[1]
    monkeypatch.setattr(state, "_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt):
        students(config, resume_dir=tmp_path, test_every=2, progress=stop_at(10))
    assert json.loads((tmp_path / "students.json").read_text())["accuracies"] == {}
    together = students(config, resume_dir=tmp_path, test_every=2, jobs=8, progress=lambda *count: counts.append(count))
    assert together == alone
    assert counts[-1] == (24, 24)
    assert counts == sorted(counts)
    assert students(config, resume_dir=tmp_path) == alone


def test_early_tests_that_are_no_accuracies_are_refused(tmp_path: Path) -> None:
    students(resume_dir=tmp_path, test_every=1)
    path = tmp_path / "students.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tests": {"0": {"1": 101}}}))
    with pytest.raises(InputError, match=r"students\.json cannot be read"):
        students(resume_dir=tmp_path)


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
    with pytest.raises(InputError, match=r"teacher was '[0-9a-f]+', is \['[0-9a-f]+', "):
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
