"""JSON files and archives: one error message for whatever is wrong with them."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import pytest
import torch

from dwa_fast.errors import InputError
from dwa_fast.io.files import read_json, write_json
from dwa_fast.io.torch_files import read_archive, write_archive


def seconds(content: Any) -> float:
    if content["format"] != 1:
        raise ValueError("it holds something else")
    return float(content["seconds"])


def test_what_was_written_is_read(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"format": 1, "seconds": 2})
    assert read_json(tmp_path / "a.json", seconds) == 2.0


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "Expecting property name"),
        ("[" * 100_000, "maximum recursion depth"),
        (json.dumps({"format": 2, "seconds": 1}), "it holds something else"),
        (json.dumps({"format": 1}), "it has no 'seconds'"),
        (json.dumps({"format": 1, "seconds": None}), "float"),
        (json.dumps([]), "list indices"),
    ],
    ids=["no JSON", "deep", "value", "key", "type", "list"],
)
def test_damaged_files_are_named_with_the_reason_and_advice(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(InputError, match=rf"a\.json cannot be read: .*{reason}.*; remove it to make it again$"):
        read_json(tmp_path / "a.json", seconds)
    with pytest.raises(InputError, match=r"; ask its owner$"):
        read_json(tmp_path / "a.json", seconds, advice="ask its owner")


def test_what_the_system_refuses_is_not_to_be_removed(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a\.json cannot be read: No such file or directory$"):
        read_json(tmp_path / "a.json", seconds)
    with pytest.raises(InputError, match=r"^there is none$"):
        read_json(tmp_path / "a.json", seconds, missing="there is none")
    (tmp_path / "a.json").mkdir()
    with pytest.raises(InputError, match=r"a\.json cannot be read: Is a directory$"):
        read_json(tmp_path / "a.json", seconds, missing="there is none")


def test_an_archive_on_a_full_disk(tmp_path: Path) -> None:
    """One sentence that names the cause, which torch.save alone does not; what was there stays."""
    write_archive(tmp_path / "t.pt", {"weights": torch.zeros(3)})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        with pytest.raises(InputError, match=r"^cannot write .*t\.pt: File too large$"):
            write_archive(tmp_path / "t.pt", {"weights": torch.zeros(10_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == ["t.pt"]
    assert torch.equal(read_archive(tmp_path / "t.pt", "archive")["weights"], torch.zeros(3))
