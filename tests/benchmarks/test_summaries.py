"""benchmarks/summaries.py: every benchmark's file has its table, whatever it is called, and numbers are those of the file."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

PART = {"part": "bn_act", "calls": 2.0, "milliseconds": 4.0, "floor": 3.0}
POINT = {"size": 1, "median": 0.5}
FILES: dict[str, Any] = {
    "anatomy": {
        "commit": "0123456789abcdef+changes",
        "results": [{"workload": "digits", "batch": 4, "precision": "bf16", "milliseconds": 5.0, "parts": [PART, PART]}],
    },
    "swapping": {
        "workload": "digits",
        "batch": 4,
        "teacher": "random weights",
        "rows": [
            {
                "code_base": "dwa",
                "way": "hooks",
                "seconds": 0.01,
                "seconds_10": 0.009,
                "seconds_90": 0.011,
                "iteration_gain": None,
                "batch_seconds": 20.0,
                "batch_iterations": 1000,
                "batch_gain": 1.5,
            }
        ],
    },
    "whole_set": {"samples": {"bare loop": [1.0], "whole set": [2.0]}, "shares": [0.5], "share": 0.5, "same images": True},
    "family": {
        "workload": "imagenet-resnet18",
        "second": "resnet34",
        "batch": 2,
        "sizes": [200, 224],
        "family": {"two teachers in turn, against the mean of both": [1.0123, 0.99, 1.04]},
    },
    "faults": {
        "images": 30,
        "rows": [{"what": "killed", "outcomes": [{"finished": 30, "lost": 5, "equal": True}, {"finished": 10, "lost": 0, "equal": True}]}],
    },
    "scaling": {
        "workload": "digits",
        "curves": [
            {
                "cost": "seconds",
                "varied": "images",
                "expected_exponent": "1",
                "lines": [
                    {"peer": "fused", "power_law": {"slope": 0.99, "slope_error": 0.02}, "points": [POINT, {"size": 8, "median": 4.0}]}
                ],
            }
        ],
    },
    "operators": {
        "benchmarks": [
            {
                "stats": {"median": 0.002},
                "extra_info": {
                    "operator": "view",
                    "subject": subject,
                    "precision": "bf16",
                    "implementation": "fused",
                    "bytes": size,
                    "gigabytes_per_second": 3.0,
                    "percent_of_copy": 50.0,
                    "copy_ceiling_gigabytes_per_second": 6.0,
                },
            }
            for subject, size in (("small", 1), ("large", 9))
        ]
    },
}
WANTED = {
    "anatomy": ["| bn_act | 2 | 4.00 | 50.0 | 3.00 | 75 |", "commit `0123456789ab` with uncommitted changes"],
    "swapping": ["| dwa | hooks | 10 (9 … 11) | – | 20 | 1.50 |"],
    "whole_set": ["50.0 % of its throughput (50.0 … 50.0), with the same pixels in the files"],
    "family": ["| two teachers in turn, against the mean of both | 1.012 (0.990 … 1.040) |", "batch 2, sizes 200 and 224; time of an"],
    "faults": ["| killed | 2 | 1 | 40 of 60 | 5 | 2 of 2 |"],
    "scaling": ["| seconds against images | fused | 1 … 8 | 0.5 … 4 | 0.99 ± 0.02 | 1 |"],
    "operators": ["| view | large | bf16 | fused | 2.000 | 3.0 | 50 |"],
}


@pytest.fixture
def summaries() -> ModuleType:
    return importlib.import_module("summaries")


@pytest.mark.parametrize("name", list(FILES))
def test_each_file_has_its_table(summaries: ModuleType, name: str, tmp_path: Path) -> None:
    (tmp_path / f"{name}-of-today.json").write_text(json.dumps(FILES[name]))
    text = summaries.page(tmp_path)
    assert all(line in text for line in WANTED[name]), text
    assert text.count("## ") == 1
    assert f"[{name}-of-today.json]" in text


def test_nothing_beside_the_loop(summaries: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "throughput.json").write_text(json.dumps({"workloads": []}))
    assert summaries.page(tmp_path) is None
