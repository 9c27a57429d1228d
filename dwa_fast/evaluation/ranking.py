"""DD-Ranking's score of a distilled set, which takes out what soft labels and the training of the students contribute."""

from __future__ import annotations

import math

from dwa_fast.config import check_real


def label_robust_score(*, real_hard: float, distilled_hard: float, distilled: float, random: float, weight: float = 0.5) -> float:
    """The label-robust score (LRS), percent: larger is better.

    HLR = real_hard − distilled_hard and IOR = distilled − random, as fractions; α = w · IOR − (1 − w) · HLR;
    LRS = (e^α − e⁻¹) / (e − e⁻¹). (NUS-HPC-AI-Lab/DD-Ranking)

    Args:
        real_hard, distilled_hard: top-1 of students trained on hard labels of all real images and of the distilled ones, percent.
        distilled, random: top-1 of students of the distilled set, with soft labels and all, and of as many random real images with the
            same training, percent.
        weight: w, 0 to 1.
    Raises:
        InputError: a number is out of its range.
    """
    accuracies = {"real_hard": real_hard, "distilled_hard": distilled_hard, "distilled": distilled, "random": random}
    for name, value in accuracies.items():
        check_real(name, value, 0, 100)
    check_real("weight", weight, 0, 1)
    alpha = (weight * (distilled - random) - (1 - weight) * (real_hard - distilled_hard)) / 100
    return 100 * (math.exp(alpha) - math.exp(-1)) / (math.e - math.exp(-1))
