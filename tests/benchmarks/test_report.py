"""benchmarks/report.py: what is shown is what was measured, in one run, of numbers that match; and README shows what is committed."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

from dwa_fast.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
README = f"""before

{"{begin}"}
what was there
{"{end}"}

after
"""


@pytest.fixture
def report() -> ModuleType:
    return importlib.import_module("report")


def row(peer: str, precision: str, milliseconds: float, **other: Any) -> dict[str, Any]:
    """A row as throughput.py writes it, as far as it is shown."""
    return {
        "peer": peer,
        "precision": precision,
        "milliseconds": milliseconds,
        "milliseconds_10": 0.9 * milliseconds,
        "milliseconds_90": 1.5 * milliseconds,
        "milliseconds_per_image": milliseconds / 50,
        "iterations_per_second": 1e3 / milliseconds,
        "percent_of_floor": 100 * 40 / milliseconds,
        "gradient_error": 1e-3,
        "loss_error": 2e-3,
        "allowed_errors": [4e-3, 5e-3],
        "matches": True,
        "peak_memory_mib": 1000 / milliseconds,
        "kernels": None,
        **other,
    }


ROWS = [
    row("published", "fp32", 800.0),
    row("eager", "fp32", 500.0),
    row("eager", "bf16", 250.0),
    row("compiled", "fp32", 410.0),
    row("compiled", "bf16", 208.0),
    row("fused", "fp32", 400.0),
    row("fused", "bf16", 200.0),
]


def workload(name: str, rows: list[dict[str, Any]], **other: Any) -> dict[str, Any]:
    floors = {precision: {"operations": 1, "bytes": 1, "seconds": 0.04} for precision in ("fp32", "bf16", "tf32")}
    ascents = [("published", "fp32", 9.0), ("fused", "fp32", 4.0), ("fused", "bf16", 2.5)]
    return {
        "workload": name,
        "teacher": "random weights",
        "batch": 50,
        "published_batch": 100,
        "size": 32,
        "device": "cpu",
        "floors": floors,
        "rows": rows,
        "ascent": [{"peer": peer, "precision": precision, "steps": 12, "seconds": seconds} for peer, precision, seconds in ascents],
        "whole_batch": {"precision": "bf16", "iterations": 4, "seconds": 3.5, "setup_seconds": 1.0, "published_seconds": 12.0},
        "whole_sets": [
            {"ipc": ipc, "batches": 2 * ipc, "iterations": 1000, "precision": "bf16", "hours": ipc / 10, "published_hours": ipc / 2}
            for ipc in (10, 50)
        ],
        **other,
    }


def content(*workloads: dict[str, Any], **other: Any) -> dict[str, Any]:
    return {
        "commit": "0123456789abcdef0123456789abcdef01234567",
        "command": ["/somewhere/benchmarks/throughput.py", "--workload", "digits", "--json", "out/x.json", "--rounds", "9"],
        "device": "AMD EPYC",
        "driver": None,
        "threads": 2,
        "vector level": "avx512_bf16",
        "versions": {"dwa_fast": "0.1.0", "torch": "2.14.1", "cuda": "13.0", "python": "3.11.7"},
        "ceilings": {"copy": 19.9e9, "bf16": 480e9, "fp32": 120e9},
        "workloads": list(workloads),
        **other,
    }


def on_gpu(**other: Any) -> dict[str, Any]:
    """What throughput.py measures on a GPU."""
    rows = [row("published", "fp32", 9.0, kernels=900), row("eager+graph", "bf16", 2.0, kernels=310), row("fused", "bf16", 0.9, kernels=71)]
    measured = workload("cifar100-resnet18", rows, device="cuda", batch=100)
    return content(measured, device="NVIDIA H200", driver="580.1", threads=16, **other)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Puts JSON below a folder of results."""

    def put(name: str, what: Any) -> Path:
        path = tmp_path / "results" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(what if isinstance(what, str) else json.dumps(what))
        return path

    return put


def rows_of(text: str, *starts: str) -> list[list[str]]:
    """Cells of the Markdown rows that begin so, without the first two."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return [cells[len(starts) :] for cells in rows if tuple(cells[: len(starts)]) == starts]


def test_readme_shows_what_is_committed(report: ModuleType) -> None:
    runs = report.committed(report.RESULTS)
    for page, brief in ((ROOT / "README.md", True), (ROOT / "docs" / "speed.md", False)):
        text = page.read_text(encoding="utf-8")
        assert report.replaced(text, report.RESULTS, page, brief=brief) == text, f"the part of {page} about speed is stale: make report"
    for group in report.grouped(runs):
        with Image.open(report.figure_of(group)) as figure:
            assert figure.text["Source"] == report.digest(group), f"{report.figure_of(group)} is stale: make report"
        more = report.summaries.page(report.figure_of(group).parent)
        page = report.figure_of(group).with_name("README.md")
        assert more == (page.read_text(encoding="utf-8") if page.exists() else None), f"{page} is stale: make report"


SUBJECT = "cifar100-resnet18, 32 px, batch 50 (published: 100)"


def test_one_row_per_workload_and_precision(report: ModuleType, write: Callable[..., Path]) -> None:
    text = report.section([report.read(write("cpu/a.json", content(workload("cifar100-resnet18", ROWS), workload("digits", ROWS))))])
    iterations, around = rows_of(text, SUBJECT, "bf16")
    assert iterations == ["200 (180 … 300)", "4.00", "1.04 (compiled)", "20", "5 / 1.25"]
    assert around == ["2500 / 9000", "3.5 / 12 (4 iterations)", "1 / 5", "5 / 25"]
    iterations, around = rows_of(text, SUBJECT, "fp32")
    assert iterations == ["400 (360 … 600)", "2.00", "1.02 (compiled)", "10", "2.5 / 1.25"]
    assert around == ["4000 / 9000", "–", "–", "–"]
    assert "iterations of a batch: 1000 on cifar100-resnet18, 1000 on digits." in text
    assert "Errors above" not in text


def test_facts_of_the_run(report: ModuleType, write: Callable[..., Path]) -> None:
    changed = content(workload("digits", ROWS), commit="0123456789abcdef0123456789abcdef01234567+changes")
    text = report.section([report.read(write("cpu/a.json", changed))])
    assert text.startswith("### AMD EPYC, 2 threads, avx512_bf16\n")
    assert "Commit `0123456789ab` with uncommitted changes; `python benchmarks/throughput.py --workload digits --rounds 9`;" in text
    assert "dwa_fast 0.1.0, torch 2.14.1, python 3.11.7; ceilings in this run: copy 19.9 GB/s, bf16 480 GFLOP/s, fp32 120 GFLOP/s." in text
    assert "/tmp" not in text


def test_a_processor_with_amx_says_so(report: ModuleType, write: Callable[..., Path]) -> None:
    measured = workload("digits", [row("published", "fp32", 9.0), row("fused", "bf16", 1.0)])
    path = write("cpu/a.json", content(measured, device="Intel(R) Xeon(R) Processor", **{"bf16 instructions": "AMX"}))
    assert report.section([report.read(path)]).startswith("### Intel Xeon, 2 threads, avx512_bf16 and AMX\n")


@pytest.mark.parametrize(
    ("wrong", "shown"),
    [
        ([], ["200 (180 … 300)", "4.00", "1.04 (compiled)", "20"]),
        ([("fused", "bf16")], ["200 (180 … 300)", "–", "–", "–"]),
        ([("compiled", "bf16")], ["200 (180 … 300)", "4.00", "1.25 (eager)", "20"]),
        ([("compiled", "bf16"), ("eager", "bf16")], ["200 (180 … 300)", "4.00", "–", "20"]),
        ([("published", "fp32")], ["200 (180 … 300)", "–", "1.04 (compiled)", "20"]),
    ],
)
def test_no_ratio_between_numbers_that_do_not_match(
    wrong: list[tuple[str, str]], shown: list[str], report: ModuleType, write: Callable[..., Path]
) -> None:
    rows = [{**each, "matches": (each["peer"], each["precision"]) not in wrong} for each in ROWS]
    text = report.section([report.read(write("cpu/a.json", content(workload("cifar100-resnet18", rows))))], every_peer=True)
    assert rows_of(text, SUBJECT, "bf16")[0][:4] == shown
    named = sorted(text.partition("neither ratio nor rival: ")[2].partition(".\n")[0].split(", "))
    assert named == (sorted(f"{peer} {precision} on cifar100-resnet18" for peer, precision in wrong) or [""])
    for peer, precision in wrong:
        (cells,) = rows_of(text, SUBJECT, precision, peer)
        assert cells[3:6] == ["–", "–", "–"]


def test_peers_that_were_left_out(report: ModuleType, write: Callable[..., Path]) -> None:
    alone = workload(
        "digits", [row("fused", "bf16", 20.0, peak_memory_mib=None)], ascent=[], whole_batch=None, whole_sets=[], teacher="t.pt"
    )
    text = report.section([report.read(write("cpu/a.json", content(alone)))], every_peer=True)
    subject = "digits, 32 px, batch 50 (published: 100), own teacher"
    assert rows_of(text, subject, "bf16")[0] == ["20 (18 … 30)", "–", "–", "200", "– / –"]
    assert rows_of(text, subject, "bf16")[1] == ["– / –", "–", "–", "–"]
    without = content(workload("digits", ROWS[:5], whole_batch=None, whole_sets=[]))
    assert rows_of(report.section([report.read(write("cpu/b.json", without))]), SUBJECT) == []


def test_every_peer(report: ModuleType, write: Callable[..., Path]) -> None:
    text = report.section([report.read(write("cpu/a.json", content(workload("cifar100-resnet18", ROWS))))], every_peer=True)
    (cells,) = rows_of(text, SUBJECT, "bf16", "compiled")
    shown = ["208 (187 … 312)", "4.81", "4.16", "3.85", "0.96 (fused)", "19", "4.81", "–", "1.0e-03 (4.0e-03)", "2.0e-03 (5.0e-03)"]
    assert cells == shown


def test_what_a_gpu_adds(report: ModuleType, write: Callable[..., Path]) -> None:
    text = report.section([report.read(write("h200/throughput.json", on_gpu()))])
    assert text.startswith("### NVIDIA H200\n")
    assert "cuda 13.0, python 3.11.7, driver 580.1;" in text
    assert rows_of(text, "cifar100-resnet18, 32 px, batch 100", "bf16")[0][1:] == [
        "10.00",
        "2.22 (eager+graph)",
        "4444",
        "1111 / 111",
        "71 / 900",
    ]


def test_ratios_stay_within_a_run(report: ModuleType, write: Callable[..., Path]) -> None:
    """The second run saw a machine half as fast; its published loop is no rival of the first run's rows."""
    slower = [{**each, "milliseconds": 2 * each["milliseconds"]} for each in ROWS]
    slower[0]["milliseconds"] = 2400.0
    paths = [write(f"cpu/{name}.json", content(workload("cifar100-resnet18", rows))) for name, rows in (("a", ROWS), ("b", slower))]
    (group,) = report.grouped(report.read(path) for path in paths)
    text = report.section(group)
    assert [rows_of(text, f"run {number}: {SUBJECT}", "bf16")[0][1] for number in (1, 2)] == ["4.00", "6.00"]
    assert [line[:18] for line in text.splitlines() if line.startswith("- ")] == ["- Run 1, commit `0", "- Run 2, commit `0"]


def test_one_command_makes_the_readme(report: ModuleType, write: Callable[..., Path], tmp_path: Path) -> None:
    """From nothing measured to a CPU and a GPU; what is around the section stays, and a second time changes nothing."""
    readme = tmp_path / "README.md"
    readme.write_text(README.format(begin=report.BEGIN, end=report.END))

    def updated() -> str:
        report.update(readme, tmp_path / "results")
        text = readme.read_text()
        report.update(readme, tmp_path / "results")
        assert readme.read_text() == text
        assert text.startswith(f"before\n\n{report.BEGIN}\n\n")
        assert text.endswith(f"\n\n{report.END}\n\nafter\n")
        assert "what was there" not in text
        return text

    text = updated()
    assert "CPU: not measured yet with this version. `make bench`" in text
    assert "GPU: not measured yet. `make gpu`" in text
    write("cpu/accuracy.json", {"rows": []})
    write("cpu/throughput.json", content(workload("cifar100-resnet18", ROWS)))
    text = updated()
    assert "CPU: not measured" not in text
    assert "GPU: not measured yet. `make gpu`" in text
    assert "| 4.00 | 1.04 (compiled) |" in text
    assert "](results/cpu/throughput.png)" in text
    write("a/throughput.json", on_gpu())
    text = updated()
    assert "not measured" not in text
    assert text.index("### AMD EPYC") < text.index("](results/cpu/throughput.png)") < text.index("### NVIDIA H200")
    with Image.open(tmp_path / "results" / "a" / "throughput.png") as figure:
        assert figure.getpixel((0, 0))[:3] == (255, 255, 255)
        (group,) = (each for each in report.grouped(report.committed(tmp_path / "results")) if each[0].kind == "cuda")
        assert figure.text["Source"] == report.digest(group)
    write("a/throughput.json", on_gpu(more=1))
    (changed,) = (each for each in report.grouped(report.committed(tmp_path / "results")) if each[0].kind == "cuda")
    assert figure.text["Source"] != report.digest(changed)


def test_readme_that_cannot_be_written(report: ModuleType, write: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"README.md needs a line '<!-- speed: .*' and after it a line '<!-- /speed -->'"):
        report.replaced(f"{report.END}\n{report.BEGIN}\n", tmp_path, tmp_path / "README.md")
    write("cpu/a.json", content(workload("digits", ROWS)))
    write("cpu/b.json", content(workload("digits", ROWS), threads=4))
    with pytest.raises(InputError, match="holds runs of several machines or numbers of threads"):
        report.replaced(README.format(begin=report.BEGIN, end=report.END), tmp_path / "results", tmp_path / "README.md")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (None, "cannot read .*a.json: No such file"),
        ("{", "a.json is not JSON: Expecting"),
        ([], "a.json does not hold what this version's"),
        ({"rows": []}, "a.json does not hold what this version's"),
        ({"workloads": [{"workload": "digits", "rows": []}]}, "a.json does not hold what this version's"),
        ({"ceilings": {}, "workloads": []}, "a.json does not hold what this version's"),
        ({"tests": {}, "throughput": None}, "a.json does not hold what this version's"),
    ],
)
def test_files_that_cannot_be_used(what: Any, message: str, report: ModuleType, write: Callable[..., Path], tmp_path: Path) -> None:
    path = tmp_path / "a.json" if what is None else write("cpu/a.json", what)
    with pytest.raises(InputError, match=message):
        report.read(path)


def test_files_of_an_earlier_version_are_not_passed_over(report: ModuleType, write: Callable[..., Path], tmp_path: Path) -> None:
    write("cpu/old.json", {"workloads": [{"workload": "digits", "rows": []}]})
    with pytest.raises(InputError, match=r"old\.json does not hold what this version's"):
        report.committed(tmp_path / "results")


def test_command(report: ModuleType, write: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [*ROWS[:-1], {**ROWS[-1], "matches": False}]
    paths = [
        str(write("cpu/a.json", content(workload("digits", rows), workload("tiny", ROWS)))),
        str(write("h200/throughput.json", on_gpu())),
    ]
    assert report.main(paths) == 0
    text = capsys.readouterr().out
    assert text.index("### AMD EPYC") < text.index("### NVIDIA H200")
    assert report.main([*paths, "--markdown", str(tmp_path / "new" / "t.md"), "--plot", str(tmp_path / "new" / "t.png")]) == 0
    assert capsys.readouterr().out == ""
    assert (tmp_path / "new" / "t.md").read_text(encoding="utf-8") + "\n" == text
    with Image.open(tmp_path / "new" / "t.png") as figure:
        assert figure.format == "PNG"
    for wrong in ([], ["--readme", paths[0]], ["--readme", "--plot", "x.png"]):
        with pytest.raises(SystemExit):
            report.main(wrong)
        assert "either files" in capsys.readouterr().err


def test_plot_draws_every_number(report: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bar per peer and precision, the floor over each, the ratio beside it; none where the numbers do not match."""
    drawn: list[Any] = []
    panel = report.bars._panel
    monkeypatch.setattr(report.bars, "_panel", lambda axis, result: (panel(axis, result), drawn.append(axis)))
    rows = [*ROWS[:-1], {**ROWS[-1], "matches": False}]
    report.bars.plot([workload("digits", rows), workload("tiny", ROWS), on_gpu()["workloads"][0]], tmp_path / "p.png", "t", "s")
    bars = [[patch.get_width() for patch in axis.patches] for axis in drawn]
    assert bars == [[each["milliseconds"] for each in ROWS]] * 2 + [[9.0, 2.0, 0.9]]
    labels = [[text.get_text() for text in axis.texts] for axis in drawn]
    assert labels[1] == ["800 ms", "500 ms, 1.60×", "250 ms, 3.20×", "410 ms, 1.95×", "208 ms, 3.85×", "400 ms, 2.00×", "200 ms, 4.00×"]
    assert labels[0][:-1] == labels[1][:-1]
    assert labels[0][-1] == "numbers do not match"
    assert {path.vertices[0, 0] for lines in drawn[0].collections for path in lines.get_paths() if len(path.vertices) == 2} >= {40.0}


@pytest.mark.slow
def test_reads_what_throughput_writes(
    report: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file of a real run, on the smallest workload."""
    throughput = importlib.import_module("throughput")
    monkeypatch.setattr(throughput.machine, "copy_ceiling", lambda device, rounds: 2e10)
    monkeypatch.setattr(throughput.machine, "arithmetic_ceiling", lambda device, precision, rounds: 1e12)
    arguments = "--workload digits --batch-size 2 --iterations 1 --rounds 1 --peers published eager fused --precision fp32 --device cpu"
    throughput.main([*arguments.split(), "--json", str(tmp_path / "real.json")])
    capsys.readouterr()
    assert report.main([str(tmp_path / "real.json"), "--plot", str(tmp_path / "real.png"), "--markdown", str(tmp_path / "real.md")]) == 0
    text = (tmp_path / "real.md").read_text(encoding="utf-8")
    (run,) = [report.read(tmp_path / "real.json")]
    ours = next(each for each in run.content["workloads"][0]["rows"] if each["peer"] == "fused")
    cells = rows_of(text, "digits, 16 px, batch 2 (published: 100)", "fp32")[0]
    assert cells[1:3] == [f"{ours['ratio_to_published']:.2f}", f"{ours['ratio_to_best_rival']:.2f} (eager)"]
