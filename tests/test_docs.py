"""The documents: their commands parse, the guide on digits runs, their links lead somewhere, and messages that they quote exist."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dwa_fast.commands.cli import _DESCRIPTIONS, _parse, run
from dwa_fast.errors import InputError
from dwa_fast.models.architectures import ARCHITECTURES

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
GUIDE = ROOT / "docs" / "guides" / "digits.md"
_PLACEHOLDERS = {"…": [], "DIR": ["folder"]}  # what a reader puts in their place


def blocks(page: Path, *languages: str) -> Iterator[str]:
    """The code blocks of a page in one of those languages."""
    for language, body in re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL):
        if language in languages:
            yield body


def commands(page: Path) -> Iterator[list[str]]:
    """Arguments of every call of dwa-fast in a page, also through an interpreter."""
    for block in blocks(page, "sh", "bash", "console"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            if not words:
                continue
            if words[0].endswith("dwa-fast"):
                yield words[1:]
            elif "-m" in words and "dwa_fast" in words:
                yield words[words.index("dwa_fast") + 1 :]


def test_there_are_pages_with_commands() -> None:
    assert {"README.md", "digits.md", "several-gpus.md"} <= {page.name for page in PAGES if list(commands(page))}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_parse(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in commands(page):
        arguments = [each for word in words for each in _PLACEHOLDERS.get(word, [word])]
        shortened = "…" in words  # the rest stands elsewhere on the page
        code = exit_code(arguments)
        said = "".join(capsys.readouterr())
        assert code == 0 or (shortened and "required" in said.lower()), f"dwa-fast {' '.join(words)}\n{said}"


def exit_code(arguments: list[str]) -> int:
    """0 where the command line is one, or asks for help."""
    try:
        _parse(arguments)
    except SystemExit as stop:
        return int(stop.code or 0)
    except InputError:
        return 2
    return 0


def test_a_wrong_command_would_be_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text("```sh\ntorchrun \\\n  -m dwa_fast verify --fast DIR  # no such flag\n```\n```python\ndwa-fast verify\n```\n")
    assert list(commands(page)) == [["verify", "--fast", "DIR"]]
    with pytest.raises(AssertionError, match="dwa-fast verify --fast DIR"):
        test_commands_parse(page, capsys)


def test_quick_start_runs_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """README's first command and its first Python block."""
    monkeypatch.chdir(tmp_path)
    readme = ROOT / "README.md"
    first = next(words for words in commands(readme) if words[0] == "squeeze")
    assert run(first) == 0
    code = next(blocks(readme, "python"))
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["result"].images.shape == (10, 1, 16, 16)
    assert len(list((tmp_path / "digits-distilled" / "images").rglob("*.png"))) == 10


def test_guide_on_digits_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    for arguments in commands(GUIDE):
        assert run(arguments) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "complete, 20 images, every file as it was written" in said
    assert said.count("% top-1, 2 students") == 2
    written = ("dwa/manifest.json", "dwa/losses.jsonl", "dwa/preview.png", "dwa-students/record.json", "report.html", "report.md")
    assert [name for name in written if not (tmp_path / "digits" / name).is_file()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" not in target:
            path, _, anchor = target.partition("#")
            there = page.parent / path if path else page
            assert there.exists(), f"{page.name} links to {target}"
            assert not anchor or anchor in anchors(there), f"{page.name} links to {target}"


def anchors(page: Path) -> set[str]:
    """What GitHub makes of the headings of a page, and those that a report names itself."""
    text = page.read_text(encoding="utf-8")
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return set(re.findall(r'<a id="([^"]+)">', text)) | {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def messages() -> list[str]:
    """Every text in the package and its Makefile, with … for what a message fills in."""
    found = [(ROOT / "Makefile").read_text(encoding="utf-8")]
    for path in (ROOT / "dwa_fast").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%[sd]", "…", node.value))
    return found


def occurs(quoted: str, found: list[str]) -> bool:
    """Whether one of these texts has every part of the quoted message, in order."""
    parts = [part for part in quoted.split("…") if part]
    return any(all_in_order(parts, text) for text in found)


def all_in_order(parts: list[str], text: str) -> bool:
    start = 0
    for part in parts:
        start = text.find(part, start) + len(part)
        if start < len(part):
            return False
    return True


def test_quoted_messages_exist() -> None:
    quoted = re.findall(r"^> (.*)$", (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    found = messages()
    assert len(quoted) > 20
    assert [message for message in quoted if not occurs(message, found)] == []
    assert not occurs("teacher must have a soul; … has none", found)


def test_every_flag_that_a_page_names_exists(capsys: pytest.CaptureFixture[str]) -> None:
    known = set()
    for command in _DESCRIPTIONS:
        with pytest.raises(SystemExit):
            _parse([command, "--help"])
        known |= set(re.findall(r"--[a-z][a-z0-9-]*", capsys.readouterr().out))
    for page in (path for path in PAGES if path.parent.name == "guides" or path.name in ("method.md", "troubleshooting.md")):
        inline = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        named = {
            flag
            for code in re.findall(r"`([^`]+)`", inline)
            if "pip " not in code
            for flag in re.findall(r"(?<!\w)--[a-z][a-z0-9-]*", code)
        }
        assert named <= known, f"{page.name} names {sorted(named - known)}"


def test_guide_names_every_architecture() -> None:
    text = (ROOT / "docs" / "guides" / "another-teacher.md").read_text(encoding="utf-8")
    assert [name for name in ARCHITECTURES if f"`{name}`" not in text] == []


def test_readme_names_the_versions_of_pytorch_that_are_tested() -> None:
    """Those of constraints.txt and of `make test-oldest`."""
    oldest, newest = (re.search(r"\btorch==(\d+\.\d+)\.", (ROOT / name).read_text()) for name in ("Makefile", "constraints.txt"))
    assert oldest
    assert newest
    assert f"PyTorch {oldest[1]} or later (tested with {oldest[1]} and {newest[1]})" in (ROOT / "README.md").read_text()
