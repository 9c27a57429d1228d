"""Weights, statistics and logits that are not finite are named, wherever a network comes in."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dwa_fast import InputError, synthesize
from dwa_fast.engine.ascent import check_norms
from dwa_fast.engine.refine import finite, matching_dominates
from dwa_fast.models.finite import check_finite_weights, check_logits, has_finite_weights
from tests.nets import real_images, small_recipe, small_teacher


def faulty(name: str, value: float, place: int = 0) -> nn.Module:
    """A teacher with one value of a parameter or buffer set."""
    teacher = small_teacher()
    with torch.no_grad():
        teacher.state_dict()[name].flatten()[place] = value
    return teacher


FAULTS: dict[str, tuple[str, float, str]] = {
    "weight": ("fc.weight", float("nan"), "weight of layer 'fc' (1 NaN of 160)"),
    "running mean": ("stem.1.running_mean", float("inf"), "running_mean of layer 'stem.1' (1 infinite of 8)"),
    "running variance": ("stem.1.running_var", float("inf"), "running_var of layer 'stem.1' (1 infinite of 8)"),
    "negative variance": ("stem.1.running_var", -0.5, "running_var of layer 'stem.1' (1 negative of 8)"),
}


@pytest.mark.parametrize(("name", "value", "message"), FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("backend", ["reference", "fused"])
def test_synthesis_names_the_tensor(name: str, value: float, message: str, backend: str) -> None:
    images, labels = real_images(6)
    with pytest.raises(InputError, match=re.escape(f"of the teacher are not finite: {message}; train it again")):
        synthesize(faulty(name, value), images, labels, small_recipe(backend=backend))


def test_long_lists_are_cut() -> None:
    teacher = small_teacher()
    for p in teacher.parameters():
        nn.init.constant_(p, float("nan"))
    count = len(list(teacher.parameters()))
    three = r"(\w+ of layer '[\w.]+' \(\d+ NaN of \d+\)(, )?){3}"
    with pytest.raises(InputError, match=rf"of the student are not finite: {three} and {count - 3} more; "):
        check_finite_weights(teacher, "student")


def test_all_kinds_of_a_tensor_are_counted() -> None:
    norm = nn.BatchNorm1d(4)
    norm.running_var = torch.tensor([float("nan"), -1.0, float("-inf"), 1.0])
    with pytest.raises(InputError, match=re.escape("not finite: running_var (1 NaN, 1 infinite, 1 negative of 4); ")):
        check_finite_weights(norm)


@pytest.mark.parametrize("module", [small_teacher(), nn.Identity(), nn.Linear(2, 2).to(torch.bfloat16)])
def test_sound_networks_pass(module: nn.Module) -> None:
    check_finite_weights(module)
    assert has_finite_weights(module)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["fc.weight", "stem.1.running_var"])
def test_one_value_is_enough(name: str, value: float) -> None:
    assert not has_finite_weights(faulty(name, value, place=3))


class ComplexWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.none = nn.Parameter(torch.tensor([1 + 2j, 3j])), nn.Parameter(torch.zeros(0))


def test_finite_weights_of_any_kind() -> None:
    module = ComplexWeight()
    assert has_finite_weights(module)
    module.weight.data[1] = complex(0.0, float("inf"))
    assert not has_finite_weights(module)


LOGITS: dict[str, tuple[Callable[[], Any], str]] = {
    "a tuple": (lambda: (torch.zeros(2, 3),), "network must give [N, classes] logits, got tuple"),
    "maps": (lambda: torch.zeros(2, 3, 1, 1), "network must give [N, classes] logits, got shape (2, 3, 1, 1)"),
    "other classes": (lambda: torch.zeros(2, 4), "network gives logits of 4 classes, the data have 3"),
    "NaN": (lambda: torch.tensor([[0.0, 1, 2], [float("nan"), 1, 2]]), "network gives logits that are not finite for 1 of 2 images"),
    "infinite": (lambda: torch.full((2, 3), float("inf")), "network gives logits that are not finite for 2 of 2 images"),
}


@pytest.mark.parametrize(("make", "message"), LOGITS.values(), ids=LOGITS)
def test_logits_are_checked(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        check_logits(make(), "network", 3)


def test_sound_logits_come_back() -> None:
    logits: Tensor = torch.zeros(2, 3)
    assert check_logits(logits, "network") is logits


def test_losses_that_overflow_are_named() -> None:
    """A matching term without its cross-entropy is the teacher's doing, whatever the learning rate."""
    good, big = [1.0, 2.0, 3.0], float("inf")
    everything = r"losses \(cross-entropy, R_mean, R_var\) are not finite from iteration 1 of 1 on; no image has changed yet"
    rows: dict[str, list[list[float]]] = {
        r"losses \(R_var\) are not finite from iteration 2 of 3 on; the teacher's activations overflow; take a lower rho": [
            good,
            [1.0, 2.0, big],
            [1.0, big, big],
        ],
        everything: [[float("nan"), big, big]],
        r"losses \(cross-entropy\) are not finite from iteration 2 of 2 on; lower the learning rate or rho$": [good, [big, 2.0, 3.0]],
    }
    for message, losses in rows.items():
        with pytest.raises(InputError, match=message):
            finite(torch.tensor(losses), "bf16")
    with pytest.raises(InputError, match=r"activations overflow; take --precision bf16 or another teacher$"):
        finite(torch.tensor([[1.0, 2.0, big]]), "fp16")
    assert torch.equal(finite(torch.tensor([good]), "fp32"), torch.tensor([good]))


def test_a_gradient_of_the_teacher_itself_is_not_blamed_on_rho() -> None:
    for norms, message in (
        (
            [float("inf"), float("nan")],
            r"step 1 of 2 \(norm inf\); the weights have not moved yet, so the teacher's own",
        ),
        ([1.0, float("nan")], r"step 2 of 2 \(norm nan\); lower rho$"),
    ):
        with pytest.raises(InputError, match=message):
            check_norms(torch.tensor(norms), "fp32")


@pytest.mark.parametrize(("ce", "mean", "says"), [(5.0, 6e6, True), (5.0, 4e4, False), (1e-3, 2e4, True), (1e-3, 50.0, False)])
def test_matching_losses_that_dominate(ce: float, mean: float, says: bool) -> None:
    """Above 100 times the cross-entropy, or 100 where the images are learnt."""
    config = small_recipe(lambda_mean=0.01, lambda_var=0.0).synthesis
    found = matching_dominates(torch.tensor([[9.0, 1e9, 0.0], [ce, mean, 7.0]]), config)
    assert (found is not None) == says
    if ce == 5.0 and found:
        assert found == (
            "matching losses dominate: 0.01 × 6e+06 + 0 × 7 beside a cross-entropy of 5 in the last iteration; "
            "lower --lambda-mean or --lambda-var"
        )


def test_a_run_says_once_that_they_dominate(caplog: pytest.LogCaptureFixture) -> None:
    images, labels = real_images(12)  # two batches
    for weight, count in ((1e-3, 0), (1e3, 1)):
        caplog.clear()
        synthesize(small_teacher(), images, labels, small_recipe(iterations=2, lambda_mean=weight, lambda_var=weight, backend="reference"))
        assert sum("matching losses dominate: " in record.message for record in caplog.records) == count
