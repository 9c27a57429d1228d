"""Records: what goes in comes out, and nothing else is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dwa_fast import InputError
from dwa_fast.report.records import RECORD, Chart, HeatMap, Picture, Record, Scatter, Series, Table, environment, read_record, write_record

WHOLE = Record(
    kind="ablation",
    title="λ_var",
    summary="Best in the middle.",
    command="dwa-fast ablate lambda-var",
    settings={"synthesis": {"iterations": 5}},
    environment={"torch": "2"},
    seconds=1.5,
    tables=[Table(title="t", columns=["a", "b"], rows=[["1", "2"]])],
    charts=[Chart(title="c", x_label="λ", y_label="top-1 %", x=[0.1, 0.2], series=[Series(name="dwa", values=[1.0, None])])],
    heat_maps=[HeatMap(title="h", x_label="K", y_label="ρ", value_label="%", x=[1, 2], y=[0.1], values=[[1.0, None]])],
    scatters=[Scatter(title="s", groups={"real": [[0.0, 1.0]]})],  # type: ignore[list-item]
    pictures=[Picture(title="sheet", file="sheets/a.png")],
)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    write_record(tmp_path, WHOLE)
    again = read_record(tmp_path / RECORD)
    write_record(tmp_path, again)
    assert again.charts[0].series[0].values == [1.0, None]
    assert read_record(tmp_path / RECORD) == again
    assert (again.title, again.tables, again.heat_maps, again.pictures) == (WHOLE.title, WHOLE.tables, WHOLE.heat_maps, WHOLE.pictures)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("[", "cannot be read"),
        ("[]", "is no record of this dwa_fast"),
        ('{"dwa_fast_record": 99}', "is no record of this dwa_fast"),
        ('{"dwa_fast_record": 1, "kind": "x", "title": "y", "colour": 1}', "is no whole record: .*colour"),
        ('{"dwa_fast_record": 1, "kind": "x", "title": "y", "tables": [1]}', "is no whole record"),
        ('{"dwa_fast_record": 1, "kind": "x", "title": "y", "charts": 1}', "is no whole record"),
        ('{"dwa_fast_record": 1, "kind": "x", "title": ["y"]}', "is no whole record: title is no text"),
        ('{"dwa_fast_record": 1, "kind": "x", "title": "y", "settings": []}', "is no whole record: settings is no mapping"),
        ('{"dwa_fast_record": 1, "kind": "x", "title": "y", "seconds": "1"}', "is no whole record: seconds is no number"),
        (
            '{"dwa_fast_record": 1, "kind": "x", "title": "y", "tables": [{"title": "t", "columns": ["a", "b"], "rows": [["1"]]}]}',
            r"is no whole record: table 't' needs \['a', 'b'\] in every row",
        ),
        ('{"dwa_fast_record": 1, "kind": "x", "title": "y", "pictures": [{"title": "z", "file": 1}]}', "picture 'z' names no file"),
        ("[" * 100_000, "cannot be read"),
        (
            '{"dwa_fast_record": 1, "kind": "x", "title": "y", "pictures": [{"title": "z", "file": "../p"}]}',
            "outside of its folder: '../p'",
        ),
        ('{"dwa_fast_record": 1, "kind": "x", "title": "y", "pictures": [{"title": "z", "file": "/p"}]}', "outside .*'/p'"),
    ],
)
def test_what_is_no_record_is_refused(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / RECORD).write_text(content)
    with pytest.raises(InputError, match=message):
        read_record(tmp_path / RECORD)


def test_environment_is_plain_values() -> None:
    assert json.loads(json.dumps(environment(torch.device("cpu"))))["device"] == "cpu"
