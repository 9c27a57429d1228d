"""DD-Ranking's score: its ends, and numbers computed by hand."""

from __future__ import annotations

import pytest

from dwa_fast import InputError
from dwa_fast.evaluation.ranking import label_robust_score


@pytest.mark.parametrize(
    ("accuracies", "weight", "score"),
    [
        ((90, 90, 100, 0), 1.0, 100),  # α = 1
        ((100, 0, 50, 50), 0.0, 0),  # α = −1
        ((80, 80, 40, 40), 0.5, 26.8941),  # α = 0: (1 − 0.367879) / 2.350402
        ((90, 60, 45, 25), 0.5, 24.8192),  # α = 0.5 · 0.2 − 0.5 · 0.3 = −0.05: (0.951229 − 0.367879) / 2.350402
        ((90, 60, 45, 25), 0.25, 20.0637),  # α = 0.25 · 0.2 − 0.75 · 0.3 = −0.175: (0.839457 − 0.367879) / 2.350402
    ],
)
def test_the_score(accuracies: tuple[float, float, float, float], weight: float, score: float) -> None:
    real_hard, distilled_hard, distilled, random = accuracies
    found = label_robust_score(real_hard=real_hard, distilled_hard=distilled_hard, distilled=distilled, random=random, weight=weight)
    assert found == pytest.approx(score, abs=1e-3)


def test_what_is_no_accuracy_is_refused() -> None:
    with pytest.raises(InputError, match="distilled must be a finite number of at least 0 and at most 100, got 101"):
        label_robust_score(real_hard=90, distilled_hard=60, distilled=101, random=25)
