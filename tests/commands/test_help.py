"""What is typed and what is answered before a command runs: flags, misspelled words, help, the version."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

import dwa_fast
from dwa_fast.commands import cli
from dwa_fast.commands.cli import run
from dwa_fast.commands.flags import flags_of
from dwa_fast.commands.table import commands
from dwa_fast.models.architectures import ARCHITECTURES


def usage_error(arguments: Sequence[str]) -> int:
    """Exit code of a command line that the parser refuses."""
    with pytest.raises(SystemExit) as stop:
        run(arguments)
    return int(stop.value.code or 0)


@pytest.mark.parametrize(("typed", "meant"), [("sythesize", "; did you mean synthesize?"), ("x", "; there are info, demo, squeeze, ")])
def test_a_misspelled_command(typed: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert usage_error([typed, "--recipe", "digits"]) == 2
    assert capsys.readouterr().err.startswith(f"dwa-fast: there is no command {typed!r}{meant}")


@pytest.mark.parametrize(
    ("command", "flag"),
    [
        ("synthesize --teacher a.pt --teacher b.pt", "--teacher"),
        ("compare --ipc 1 --ipc 2", "--ipc"),
        ("compare --methods real --methods=dwa", "--methods"),
        ("compare --synthesis.stage_sizes 8 --synthesis.stage-sizes 16", "--synthesis.stage-sizes"),
        ("diversity --sets a --sets b", "--sets"),
        ("squeeze --mean 0.5 --mean 0.4", "--mean"),
    ],
)
def test_a_list_that_stands_twice(command: str, flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert usage_error(command.split()) == 2
    assert f"{flag} stands 2 times; it takes all of its values at once: {flag} A B" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("synthesize --lr 0.1 --output o", "synthesize has no flag --lr; did you mean --learning-rate?"),
        ("squeeze --out=t.pt", "squeeze has no flag --out; did you mean --output?"),
        ("squeeze --bs 8", "squeeze has no flag --bs; did you mean --batch-size?"),
        ("squeeze --wd 0", "squeeze has no flag --wd; did you mean --weight-decay?"),
        ("validate --validation.students 1", "validate has no flag --validation.students; did you mean --students?"),
        ("compare --students 1", "compare has no flag --students; did you mean --validation.students?"),
        ("squeeze --gpu 0", "squeeze has no flag --gpu; did you mean --device?"),
        ("squeeze --arch resnet18", "squeeze has no flag --arch; did you mean --architecture?"),
        ("validate --imges s", "validate has no flag --imges; did you mean --images?"),
        ("compare --lr 1", "compare has no flag --lr; did you mean --synthesis.learning-rate or --validation.learning-rate?"),
        ("info --zzz", "info has no flag --zzz; dwa-fast info --help lists its flags"),
    ],
)
def test_an_unknown_flag_names_the_one_that_is_meant(arguments: str, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert usage_error([*arguments.split(), "--recipe", "digits"]) == 2
    assert capsys.readouterr().err == f"dwa-fast: {sentence}\n"


@pytest.mark.parametrize("name", commands())
def test_the_flags_of_a_command_are_those_of_its_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    usage_error([name, "--help"])
    shown = re.findall(r"^[│ ] (--[a-z][\w.-]*)", capsys.readouterr().out, re.MULTILINE)
    assert sorted(shown) == sorted(flag for flag, _ in flags_of(commands()[name]))


@pytest.mark.parametrize(
    "arguments", [[], ["distil"], ["synthesize"], ["synthesize", "--recipe", "digits", "--ipc", "two"], ["info", "-x"]]
)
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    assert usage_error(arguments) == 2


@pytest.mark.parametrize(
    "command",
    ["demo", "squeeze", "synthesize", "relabel", "validate", "compare", "ablate", "cross", "diversity", "incremental", "verify", "info"],
)
def test_help_explains_every_flag(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert usage_error([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert "usage: dwa-fast" in text
    for flag in re.split(r"^[│ ] (?=--[a-z])", text, flags=re.MULTILINE)[1:]:
        sentence = re.sub(r"[│╭╮╰╯─\s]+", " ", flag)
        words = re.sub(r"--[\w-]+|\{.*?\}|\(default.*|\(required.*|At least \d+\.|Above [^.]*\.|0 to 1\.", "", sentence)
        assert re.search(r"[a-z]{3,}", words), f"{command} {sentence} is not explained"


def test_help_shows_the_defaults_of_the_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    usage_error(["synthesize", "--recipe", "tiny", "--help"])
    text = re.sub(r"[│\s]+", " ", capsys.readouterr().out)
    assert "--learning-rate FLOAT Adam's first learning rate; falls to 0 on a cosine. Above 0. (default: 0.1)" in text


def test_no_field_is_wrapped() -> None:
    """The help of a flag is the comment on the line of its field: where a formatter wraps the line, it is lost."""
    package = Path(cli.__file__).parents[1]
    wrapped = [
        f"{path.name}:{field.lineno}"
        for path in package.rglob("*.py")
        for made in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(made, ast.ClassDef) and any("dataclass" in ast.unparse(each) for each in made.decorator_list)
        for field in made.body
        if isinstance(field, ast.AnnAssign) and field.lineno != field.end_lineno
    ]
    assert wrapped == []


def test_help_shows_the_range_that_is_checked(capsys: pytest.CaptureFixture[str]) -> None:
    usage_error(["synthesize", "--recipe", "digits", "--help"])
    text = re.sub(r"[│\s]+", " ", capsys.readouterr().out)
    assert "Images per class. At least 1. (default: 10)" in text  # of a command
    assert "Quality of jpeg files; without chroma subsampling. 1 to 100. (default: 95)" in text  # of a configuration
    assert "Fraction of the image area that a crop covers. Above 0, at most 1. (default: 0.08 1.0)" in text  # of a pair
    assert "1 or 3 values. Above 0. (default: 0.3185)" in text  # of each of several numbers
    assert "Default: as when the set was started, or all. At least 1. (default: None)" in text  # of a number that may be missing


@pytest.mark.parametrize(("command", "flag"), [("squeeze", "--architecture"), ("validate", "--student")])
def test_help_names_every_architecture(command: str, flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    usage_error([command, "--recipe", "digits", "--help"])
    text = re.sub(r"[│\s]+", " ", capsys.readouterr().out)
    assert f"One of {', '.join(ARCHITECTURES)}." in text.split(f" {flag} ", 1)[1]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"dwa-fast {dwa_fast.__version__}\n"
