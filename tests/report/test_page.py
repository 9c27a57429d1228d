"""The HTML page: whole, self-contained, and hostile text is text."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dwa_fast.report.page import write_report
from tests.report.material import BRIEF, EVIL, make_run, make_set, spoil

VOID = {"meta", "img", "br", "hr", "link", "input"}


@dataclass
class Element:
    name: str
    attributes: dict[str, str | None]
    inside: list[str]  # names of the elements around it
    text: str = ""


@dataclass
class Reader(HTMLParser):
    """Every element of a page; fails where tags are not balanced."""

    elements: list[Element] = field(default_factory=list)
    open: list[Element] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, dict(attrs), [each.name for each in self.open])
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(Element(tag, dict(attrs), [each.name for each in self.open]))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, tag
        assert self.open.pop().name == tag

    def handle_data(self, data: str) -> None:
        for element in self.open:
            element.text += data


def read(path: Path) -> list[Element]:
    """Every element of a page that is whole, without scripts, and needs nothing else."""
    text = path.read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>\n")
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert not reader.open
    names = [each.attributes["id"] for each in reader.elements if "id" in each.attributes]
    assert len(names) == len(set(names))
    for each in reader.elements:
        assert each.name not in {"script", "link", "iframe", "object", "embed", "form", "base"}
        assert not [name for name in each.attributes if name.startswith("on")]
        for target in ("src", "href", "xlink:href", "action", "data", "srcset"):
            value = each.attributes.get(target) or "data:image/png;base64,"
            assert value.startswith("data:image/png;base64,") or value[1:] in names, (each.name, value[:80])
        if each.name == "img":
            assert each.attributes["alt"]
        if each.name == "table":
            assert "div" in each.inside
    return reader.elements


@pytest.fixture(scope="module")
def elements(tmp_path_factory: pytest.TempPathFactory) -> list[Element]:
    folder = tmp_path_factory.mktemp("page")
    make_run(folder / "runs" / "a")
    make_run(folder / "runs" / "b", BRIEF)
    make_set(folder / "runs" / "sets" / "dwa")
    write_report([folder / "runs"], folder / "page.html", "Tables of the paper")
    return read(folder / "page.html")


def named(elements: list[Element], name: str) -> list[Element]:
    return [each for each in elements if each.name == name]


def test_page_says_what_it_is(elements: list[Element]) -> None:
    assert named(elements, "html")[0].attributes["lang"] == "en"
    assert [each.text for each in (*named(elements, "title"), *named(elements, "h1"))] == ["Tables of the paper"] * 2
    metas = {each.attributes.get("name"): each.attributes["content"] for each in named(elements, "meta") if "content" in each.attributes}
    assert metas["viewport"] == "width=device-width, initial-scale=1"
    assert metas["color-scheme"] == "light dark"
    links = [(each.attributes["href"], each.text) for each in named(elements, "a")]
    assert links == [("#run-1", "λ_var alone"), ("#run-2", "Again"), ("#set-1", "dwa, digits, 8 px, ipc 2")]


def test_everything_of_a_record_is_shown(elements: list[Element]) -> None:
    (section,) = (each for each in named(elements, "section") if each.attributes["id"] == "run-1")
    for text in (
        *("ablation · runs/a · 3 min 05 s · peak memory 812 MiB", "Best in the middle.", "dwa-fast ablate lambda-var --recipe digits"),
        *("students", "39.6 ± 0.4", "Three seeds.", "a sweep", "a grid", "a plane", "ten classes.", "a sheet"),
        *("iterations", "500", "0.08, 1.0", "deep · er", "… (99 in all)", "torch", "2.14"),
    ):
        assert text in section.text
    assert [each.attributes["alt"] for each in named(elements, "img")][:4] == ["a sweep", "a grid", "a plane", "a sheet"]
    assert [each.text for each in named(elements, "summary")][:3] == ["Settings", "synthesis", "Versions and machine"]


def test_headers_of_rows_and_columns(elements: list[Element]) -> None:
    scopes = [(each.attributes["scope"], each.text) for each in named(elements, "th")][:4]
    assert scopes == [("col", "λ_var"), ("col", "top-1 %"), ("row", "0.01"), ("row", "0.11")]


def pixels(element: Element) -> np.ndarray:  # type: ignore[type-arg]
    source = str(element.attributes["src"]).partition("base64,")[2]
    with Image.open(io.BytesIO(base64.b64decode(source))) as image:
        return np.asarray(image)


def test_pictures_of_a_record_are_in_the_page(elements: list[Element]) -> None:
    picture = pixels(next(each for each in named(elements, "img") if each.attributes["alt"] == "a sheet"))
    assert picture.shape == (4, 5, 3)
    assert (picture == [200, 30, 30]).all()


def test_contact_sheet_has_a_row_per_class(elements: list[Element]) -> None:
    sheet = named(elements, "img")[-1]
    assert sheet.attributes["alt"] == "All 2 images of each of all 3 classes, a row per class"
    shown = pixels(sheet)[..., 0]
    assert shown.shape == (3 * 130 - 2, 2 * 130 - 2)  # 8 pixels, enlarged to 128, and a gap of 2
    assert [[int(shown[130 * row, 130 * column]) for column in range(2)] for row in range(3)] == [[0, 1], [10, 11], [20, 21]]
    assert [each.text for each in named(elements, "li")][-3:] == ["class 0", "class 1", "class 2"]


@pytest.mark.parametrize(("size", "ipc", "tile"), [(8, 1, 128), (8, 10, 64), (28, 2, 112), (100, 1, 100), (100, 10, 64), (224, 1, 128)])
def test_small_images_are_enlarged_by_a_whole_number(tmp_path: Path, size: int, ipc: int, tile: int) -> None:
    folder = make_set(tmp_path / "set", classes=2, ipc=ipc, image_shape=[1, size, size])
    checked = (np.indices((size, size)).sum(0) % 2 * 255).astype(np.uint8)
    for file in folder.rglob("*.png"):
        Image.fromarray(checked).save(file)
    write_report([folder], tmp_path / "page.html", "t")
    shown = pixels(named(read(tmp_path / "page.html"), "img")[0])[..., 0]
    assert shown.shape == (2 * (tile + 2) - 2, ipc * (tile + 2) - 2)
    if tile >= size:
        assert (shown[:tile, :tile] == checked.repeat(tile // size, 0).repeat(tile // size, 1)).all()


def test_missing_images_are_grey_and_a_set_in_the_making_says_so(tmp_path: Path) -> None:
    make_set(tmp_path / "sets")
    images = tmp_path / "sets" / "images"
    (images / "new001" / "class001_id001.png").unlink()
    (images / "new002" / "class002_id000.png").unlink()
    (images / "new002" / "class002_id000.png").symlink_to(images / "new000" / "class000_id000.png")
    make_set(tmp_path / "begun", complete=False)
    contents = write_report([tmp_path / "sets", tmp_path / "begun"], tmp_path / "page.html", "t")
    elements = read(tmp_path / "page.html")
    shown = pixels(named(elements, "img")[0])[..., 0]
    assert [[int(shown[130 * row, 130 * column]) for column in range(2)] for row in range(3)] == [[0, 1], [10, 128], [128, 21]]
    assert contents.sets[1].subtitle.endswith("begun · 0 images of 3 classes · not complete")
    assert ", unfinished" in contents.sets[1].title
    assert "ipc" not in contents.sets[1].title
    assert "No whole row of images yet." in named(elements, "main")[0].text


def test_hostile_text_is_text(tmp_path: Path) -> None:
    spoil(tmp_path / "runs")
    contents = write_report([tmp_path / "runs"], tmp_path / "page.html", EVIL)
    assert not contents.left_out
    elements = read(tmp_path / "page.html")
    shown = EVIL.replace("\x1b", r"\x1b")
    for name, attribute in (
        ("title", ""),
        ("h1", ""),
        ("h2", ""),
        ("code", ""),
        ("div", "aria-label"),
        ("img", "alt"),
        ("dd", ""),
        ("summary", ""),
    ):
        found = [str(each.attributes.get(attribute, "")) if attribute else each.text for each in named(elements, name)]
        assert any(shown in text for text in found), (name, found)


def test_widths_are_those_of_the_window(tmp_path: Path) -> None:
    """Tables scroll in their own container; pictures and figures shrink; nothing has a fixed width."""
    make_run(tmp_path / "runs")
    write_report([tmp_path / "runs"], tmp_path / "page.html", "t")
    style = named(read(tmp_path / "page.html"), "style")[0].text
    for rule in (".scroll{overflow-x:auto;max-width:100%}", "img{max-width:100%;height:auto", "@media(prefers-color-scheme:dark)"):
        assert rule in style
    for grid in style.split("grid-template-columns:")[1:]:
        assert "minmax(0" in grid.split(";")[0] or "minmax(min(100%" in grid.split(";")[0]
    assert "url(" not in style
