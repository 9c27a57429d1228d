"""The report as a whole: what is found, what is left out, and that nothing else is touched."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dwa_fast.commands.cli import run
from dwa_fast.data.set_layout import MANIFEST
from dwa_fast.report.page import write_report
from dwa_fast.report.records import RECORD
from tests.hostile import contents
from tests.report.material import BRIEF, make_run, make_set


def files(folder: Path) -> dict[str, bytes | str]:
    return {name: content for name, content in contents(folder).items() if content != ""}


def test_command_writes_page_and_markdown(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (runs / "b" / RECORD).write_text("[")
    assert run(["report", str(runs), "--output", str(tmp_path / "out" / "page.html"), "--title", "Tables"]) == 0
    said = capsys.readouterr().out
    assert f"left out: {runs}/b/{RECORD} cannot be read" in said
    assert f"{tmp_path}/out/page.html: 1 run, 1 kind of distilled sets; the same as Markdown in {tmp_path}/out/page.md" in said
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["page-files", "page.html", "page.md"]
    page, text = ((tmp_path / "out" / name).read_text() for name in ("page.html", "page.md"))
    for content in (page, text):
        assert "Tables" in content
        assert "λ" in content
        assert "cannot be read" in content
    for number in (1, 2, 3, 4):
        assert f"(page-files/run-1-{number}.png)" in text
    assert sorted(path.name for path in (tmp_path / "out" / "page-files").iterdir()) == [
        *(f"run-1-{number}.png" for number in (1, 2, 3, 4)),
        "set-1-1.png",
    ]


def test_same_runs_same_bytes(runs: Path, tmp_path: Path) -> None:
    before = contents(runs)
    for name in "ab":
        write_report([runs], tmp_path / name / "page.html", "t")
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert contents(runs) == before
    write_report([runs], tmp_path / "a" / "page.html", "t")
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_pictures_of_earlier_runs_go_and_all_else_stays(runs: Path, tmp_path: Path) -> None:
    page, folder = tmp_path / "page.html", tmp_path / "page-files"
    write_report([runs], page, "](page-files/set-8-1.png)")
    mine = ["cat.png", "notes.txt", "run-1-9.png", "set-8-1.png"]  # the last two: named as the report's, but not on its page
    for name in mine:
        (folder / name).write_text("mine")
    write_report([runs / "b"], page, "t")
    assert sorted(path.name for path in folder.iterdir()) == sorted(["run-1-1.png", *mine])
    assert all((folder / name).read_text() == "mine" for name in mine)


def test_what_lies_below_two_folders_is_shown_once(runs: Path, tmp_path: Path) -> None:
    shown = write_report([runs / "a", runs], tmp_path / "page.html", "t")
    assert [section.subtitle.split(" · ")[1] for section in shown.runs] == ["a", "runs/b"]


def test_a_report_among_the_runs_is_not_reported(runs: Path) -> None:
    first = write_report([runs], runs / "report.html", "t")
    assert write_report([runs], runs / "report.html", "t") == first


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "record": (lambda folder: (folder / RECORD).write_text("{}"), "a/record.json is no record of this dwa_fast"),
    "deep": (lambda folder: (folder / RECORD).write_text("[" * 100_000), "a/record.json cannot be read"),
    "manifest": (lambda folder: (folder / MANIFEST).write_text('{"name": "a web app"}'), "a/manifest.json is no manifest of format"),
    "figure": (
        lambda folder: (folder / RECORD).write_text((folder / RECORD).read_text().replace("0.2", '"0.2"')),
        "runs/a: 'a sweep' needs finite numbers in 's', got '0.2'",
    ),
    "escape": (
        lambda folder: (folder / RECORD).write_text((folder / RECORD).read_text().replace("sheet.png", "../../../etc/passwd")),
        "names a picture outside of its folder: '../../../etc/passwd'",
    ),
}


@pytest.mark.parametrize(("damage", "sentence"), BROKEN.values(), ids=BROKEN.keys())
def test_what_is_broken_is_named_and_left_out(runs: Path, tmp_path: Path, damage: Callable[[Path], object], sentence: str) -> None:
    damage(runs / "a")
    shown = write_report([runs], tmp_path / "page.html", "t")
    (said,) = shown.left_out
    assert sentence in said
    assert "Again" in [section.title for section in shown.runs]


def test_pictures_outside_of_the_folder_are_not_shown(runs: Path, tmp_path: Path) -> None:
    secret = make_run(tmp_path / "secret") / "sheet.png"
    (runs / "a" / "sheet.png").unlink()
    (runs / "a" / "sheet.png").symlink_to(secret)
    (runs / "b" / "sheet.png").write_bytes(b"%!PS-Adobe")
    write_report([runs], tmp_path / "page.html", "t")
    page = (tmp_path / "page.html").read_text()
    assert "a sheet: sheet.png cannot be shown: it lies outside of the folder of its record" in page
    assert "a sheet: sheet.png cannot be shown: cannot identify image file" in page


WRONG: dict[str, tuple[list[str], str]] = {
    "no folder": (["report", "nowhere"], "nowhere is not a folder"),
    "none given": (["report"], "report needs at least one folder to search"),
    "empty": (["report", "empty"], "no record and no distilled set that can be shown lies below empty"),
    "all broken": (["report", "broken"], "lies below broken (broken/record.json is no record of this dwa_fast"),
    "sets": (["report", "runs", "--sets", "-1"], "sets must be an integer of at least 0, got -1"),
    "suffix": (["report", "runs", "--output", "page.pdf"], "the report is an HTML page, NAME.html; got 'page.pdf'"),
    "another file": (["report", "runs", "--output", "README.html"], "README.md is no report of dwa-fast, and would be lost"),
    "a folder": (["report", "runs", "--output", "taken.html"], "cannot write taken.html"),
    "link": (["report", "runs", "--output", "link.html"], "link-files is a symbolic link"),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG.keys())
def test_bad_input_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    make_run(tmp_path / "runs")
    (tmp_path / "README.md").write_text("# Mine")
    for name in ("empty", "broken", "taken.html", "elsewhere"):
        (tmp_path / name).mkdir()
    (tmp_path / "broken" / RECORD).write_text("{}")
    (tmp_path / "link-files").symlink_to(tmp_path / "elsewhere")
    before = contents(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert run(arguments) == 1
    errors = capsys.readouterr().err
    assert len(errors.splitlines()) == 1
    assert message in errors
    assert contents(tmp_path) == before


def test_many_classes_are_cut_and_said(tmp_path: Path) -> None:
    make_set(tmp_path / "large", classes=60, ipc=1)
    shown = write_report([tmp_path / "large"], tmp_path / "page.html", "t")
    (section,) = shown.sets
    assert section.subtitle == "large · 60 images of 60 classes"
    page = (tmp_path / "page.html").read_text()
    assert "The image of each of the first 10 of 60 classes, a row per class" in page
    assert "class 9<" in page
    assert "class 10<" not in page


def test_sets_that_differ_in_their_seed_alone_are_shown_once(tmp_path: Path) -> None:
    other = {"seed": 0, "rho": 0.1, "batch_ipc": 2, "teacher": ["0a", "1b"]}  # batch_ipc: a setting that older sets lack
    for name, changes in {"a": {"seed": 0}, "b": {"seed": 1}, "c": other, "d": {"seed": 2}}.items():
        make_set(tmp_path / "sets" / name, **changes)
    shown = write_report([tmp_path / "sets"], tmp_path / "page.html", "t")
    assert [(each.title, each.subtitle) for each in shown.sets] == [
        ("dwa, digits, 8 px, ipc 2", "sets/a · 6 images of 3 classes · 2 more sets with another seed"),
        ("dwa, digits, 8 px, ipc 2, 2 teachers, batch_ipc 2, rho 0.1", "sets/c · 6 images of 3 classes"),
    ]
    assert not shown.sets_note
    shown = write_report([tmp_path / "sets"], tmp_path / "page.html", "t", most_sets=1)
    assert len(shown.sets) == 1
    for name in ("page.html", "page.md"):
        assert "Shown: 1 of 2 kinds of sets; --sets 2 shows all." in (tmp_path / name).read_text()


def test_a_copy_of_a_set_is_no_other_seed(tmp_path: Path) -> None:
    for name, seed in {"a": 0, "b": 1, "c": 0}.items():
        make_set(tmp_path / "sets" / name, seed=seed)
    (shown,) = write_report([tmp_path / "sets"], tmp_path / "page.html", "t").sets
    assert shown.subtitle == "sets/a · 6 images of 3 classes · 1 more set with another seed · 1 more with the same seed"


def test_sets_of_one_title_have_the_names_of_their_folders(tmp_path: Path) -> None:
    """What tells them apart, such as the real images, stands in no title."""
    for name, digest in {"a": "0a", "b": "1b"}.items():
        make_set(tmp_path / "sets" / name, seed=0, real_images_digest=digest)
    make_set(tmp_path / "sets" / "c", seed=0, rho=0.1)
    shown = write_report([tmp_path / "sets"], tmp_path / "page.html", "t").sets
    titles = ["dwa, digits, 8 px, ipc 2 (sets/a)", "dwa, digits, 8 px, ipc 2 (sets/b)", "dwa, digits, 8 px, ipc 2, rho 0.1"]
    assert [each.title for each in shown] == titles


def test_titles_name_the_teachers_of_a_set(tmp_path: Path) -> None:
    one, two = {"architecture": "convnet128", "accuracy": 81.76}, {"architecture": "timm:resnet18", "accuracy": None}
    make_set(tmp_path / "sets" / "a", teacher="0a", teachers=[one])
    make_set(tmp_path / "sets" / "b", teacher=["0a", "1b"], teachers=[one, two])
    make_set(tmp_path / "sets" / "c", teacher="0a", image_shape=[1, 8, 6], seed=3)
    shown = write_report([tmp_path / "sets"], tmp_path / "page.html", "t")
    assert [each.title for each in shown.sets] == [
        "dwa, digits, 8 px, ipc 2, teacher convnet128 (81.8 %)",
        "dwa, digits, 8 px, ipc 2, 2 teachers convnet128 (81.8 %) and timm:resnet18",
        "dwa, digits, 6 × 8 px, ipc 2",
    ]


@pytest.mark.parametrize("shape", [5, "x", {"a": 1}, [1, "x", "y"], [1, 16, 1e9], [1, 8, 0], []])
def test_a_set_of_a_foreign_shape_is_shown_without_it(tmp_path: Path, shape: Any) -> None:
    make_set(tmp_path / "set", image_shape=shape)
    assert [each.title for each in write_report([tmp_path / "set"], tmp_path / "page.html", "t").sets] == ["dwa, digits, ipc 2"]


def test_record_of_foreign_types_does_no_harm(tmp_path: Path) -> None:
    """Every value of a whole record replaced by one of another type, one at a time: shown or left out, never an error."""
    content = json.loads((make_run(tmp_path / "good") / RECORD).read_text())
    for number, name in enumerate(content):
        for kind, value in enumerate((None, 7, "x", [1], {"a": [{}]})):
            folder = tmp_path / "runs" / f"{number}-{kind}"
            folder.mkdir(parents=True)
            (folder / RECORD).write_text(
                json.dumps(content | {name: value, **({} if name == "charts" else {"charts": []}), "heat_maps": [], "scatters": []})
            )
    shown = write_report([tmp_path / "good", tmp_path / "runs"], tmp_path / "page.html", "t")
    assert len(shown.runs) + len(shown.left_out) == 1 + 5 * len(content)
    assert len(shown.left_out) > 2 * len(content)


def test_runs_of_different_presets_are_told_apart(tmp_path: Path) -> None:
    """Records that name none were trained as the paper says; a run without students has none."""

    def run_of(name: str, title: str, data: Any, settings: Any) -> None:
        make_run(tmp_path / "runs" / name, replace(BRIEF, title=title, settings=settings, data=data))

    students = {"validation": {"epochs": 3}}
    run_of("a", "older", {}, students)
    run_of("b", "diversity", {}, {})
    report = write_report([tmp_path / "runs"], tmp_path / "report.html", "t")
    assert report.runs_note == ""
    run_of("c", "newer", {"preset": {"name": "rded", "changed": {}}}, students)
    run_of("d", "odd", {"preset": ["edc"]}, students)
    report = write_report([tmp_path / "runs"], tmp_path / "report.html", "t")
    assert report.runs_note == (
        "Students were trained with different presets, which makes their numbers differ: paper (older), rded (newer), – (odd)."
    )
    for file in ("report.html", "report.md"):
        assert "which makes their numbers differ: paper" in (tmp_path / file).read_text(encoding="utf-8").replace("\\", "")


def test_runs_on_held_out_training_images_are_told_apart(tmp_path: Path) -> None:
    students = {"validation": {"epochs": 3}}
    for name, settings in {"a": students, "b": {**students, "data": {"held_out_share": 0.0}}, "c": {}}.items():
        make_run(tmp_path / "runs" / name, replace(BRIEF, title=name, settings=settings))
    assert write_report([tmp_path / "runs"], tmp_path / "report.html", "t").runs_note == ""
    make_run(tmp_path / "runs" / "d", replace(BRIEF, title="d", settings={**students, "data": {"held_out_share": 0.1}}))
    make_run(tmp_path / "runs" / "e", replace(BRIEF, title="e", settings={**students, "held_out_share": 0.25}))
    shares = "the test images (a; b), 10 % of the training images (d), 25 % of the training images (e)"
    wanted = f"Students were tested on different images: {shares}."
    assert write_report([tmp_path / "runs"], tmp_path / "report.html", "t").runs_note == wanted
    assert wanted in (tmp_path / "report.html").read_text(encoding="utf-8")
