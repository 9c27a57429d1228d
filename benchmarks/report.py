"""Tables and a plot of what throughput.py measured, and the parts of README.md and docs/speed.md that show what is committed.

python benchmarks/report.py FILE.json [...] --markdown OUT.md --plot OUT.png
python benchmarks/report.py --readme     from benchmarks/results/*/*.json; `make report`
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bars
import gpu_tables
import summaries
import tables

from dwa_fast.errors import InputError
from dwa_fast.io.files import output_folder

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BEGIN = "<!-- speed: written by `make report` from benchmarks/results/, not by hand -->"
END = "<!-- /speed -->"
_UNMEASURED = {
    "cpu": "CPU: not measured yet with this version. `make bench` measures in minutes and writes table and plot into `benchmark-output/`.",
    "cuda": (
        "GPU: not measured yet. `make gpu` measures and checks everything there with one command and no network; its files belong into "
        "`benchmarks/results/<device>/`, and `make report` shows them here."
    ),
}


@dataclass(frozen=True)
class Run:
    """One JSON file: all of it was measured in one process."""

    path: Path
    content: dict[str, Any]  # as throughput.py wrote it
    digest: str  # SHA-256 of the file

    @property
    def machine(self) -> tuple[Path, str, int]:
        """What runs must share to stand under one heading."""
        return self.path.parent, self.content["device"], self.content["threads"]

    @property
    def kind(self) -> str:
        """cpu or cuda."""
        kind: str = self.content["workloads"][0]["device"]
        return kind


def main(arguments: Sequence[str] | None = None) -> int:
    """Write what was asked for; the tables to the screen where no file was."""
    options = _parse(sys.argv[1:] if arguments is None else arguments)
    if options.readme:
        update(ROOT / "docs" / "speed.md", RESULTS)
        update(ROOT / "README.md", RESULTS, brief=True)
        return 0
    runs = [read(path) for path in options.files]
    for target in filter(None, (options.markdown, options.plot)):
        output_folder(target.parent)
    if options.markdown or not options.plot:
        text = "\n".join(
            ["# Iterations of the inner loop, dwa_fast and its peers\n", *(section(each, every_peer=True) for each in grouped(runs))]
        )
        if options.markdown:
            options.markdown.write_text(text, encoding="utf-8")
        else:
            print(text)
    if options.plot:
        bars.plot([result for run in runs for result in run.content["workloads"]], options.plot, title(runs), digest(runs))
    return 0


def read(path: Path) -> Run:
    """One file.

    Raises:
        InputError: it cannot be read, or throughput.py did not write it.
    """
    content = _load(path)
    if not isinstance(content, dict) or not content.get("workloads") or "ceilings" not in content:
        raise InputError(f"{path} does not hold what this version's benchmarks/throughput.py measures: measure again")
    return Run(path, content, hashlib.sha256(path.read_bytes()).hexdigest())


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from error


def committed(folder: Path) -> list[Run]:
    """Every run in the folders of devices; files of other benchmarks are not looked at."""
    return [read(path) for path in sorted(folder.glob("*/*.json")) if "workloads" in _load(path)]


def proofs(folder: Path) -> list[Path]:
    """The folders of devices in which `make gpu` left something."""
    return sorted({path.parent for name in (gpu_tables.SPEED, gpu_tables.CHECK) for path in folder.glob(f"*/{name}")})


def grouped(runs: Iterable[Run]) -> list[list[Run]]:
    """Runs of one machine together, CPUs first."""
    groups: dict[tuple[Path, str, int], list[Run]] = {}
    for run in runs:
        groups.setdefault(run.machine, []).append(run)
    return sorted(groups.values(), key=lambda group: group[0].kind)


def digest(runs: Sequence[Run]) -> str:
    """What a plot says that it was drawn from."""
    return " ".join(run.digest for run in runs)


def title(runs: Sequence[Run]) -> str:
    """The machines, without repetition."""
    return "; ".join(dict.fromkeys(_machine(run) for run in runs))


def _machine(run: Run) -> str:
    content = run.content
    if run.kind == "cuda":
        return str(content["device"])
    amx = " and AMX" if content.get("bf16 instructions") == "AMX" else ""
    processor = str(content["device"]).replace("(R)", "").removesuffix(" Processor")
    return f"{processor}, {content['threads']} threads, {content['vector level']}{amx}"


def section(runs: Sequence[Run], *, every_peer: bool = False, figure: str | None = None) -> str:
    """Heading, facts and tables of one machine."""
    lines = [f"### {_machine(runs[0])}", "", *(_facts(run, number, len(runs)) for number, run in enumerate(runs, 1)), ""]
    labelled = [
        (f"run {number}: " if len(runs) > 1 else "", result) for number, run in enumerate(runs, 1) for result in run.content["workloads"]
    ]
    lines += [*tables.iterations(labelled), "", *tables.around(labelled)]
    if every_peer:
        lines += ["", *tables.peers(labelled)]
    if figure:
        lines += [
            "",
            *_more(runs[0].path.parent, figure),
            f"![Milliseconds per iteration of every peer on {_machine(runs[0])}, and the floor]({figure})",
        ]
    return "\n".join(lines) + "\n"


def _brief(groups: Sequence[Sequence[Run]]) -> str:
    """One table of all machines: a row per workload and machine, in the precision that is measured first."""
    head = ["workload", "machine", "precision", "fused, ms per iteration", "× published (fp32)", "× fastest other in this precision"]
    lines = [head, ["---"] * len(head)]
    for runs in groups:
        rows = [
            line.strip("| ").split(" | ") for run in runs for line in tables.iterations([("", each) for each in run.content["workloads"]])
        ]
        first = {
            cells[0]: cells[:5] for cells in reversed(rows) if len(cells) > 5 and cells[0] != "workload" and not cells[0].startswith("-")
        }
        for name, precision, milliseconds, *ratios in reversed(first.values()):
            lines.append([name, _machine(runs[0]), precision, milliseconds.partition(" (")[0], *ratios])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def _more(folder: Path, figure: str) -> list[str]:
    """A link to the page of the folder, where there is one."""
    page = figure.rpartition("/")[0] + "/README.md"
    what = "where an iteration's time goes, what swapping gains, whole sets, faults, cost curves and every operator"
    return [f"Also measured there: [{what}]({page}).", ""] if summaries.page(folder) else []


def _facts(run: Run, number: int, of: int) -> str:
    """One line: what ran, on what, and what the machine reached."""
    content = run.content
    commit, _, changed = content["commit"].partition("+")
    versions = [f"{name} {version}" for name, version in content["versions"].items() if version and (name != "cuda" or run.kind == "cuda")]
    versions += [f"driver {content['driver']}"] if content.get("driver") else []
    reached = [f"{name} {each / 1e9:.0f} GFLOP/s" for name, each in content["ceilings"].items() if name != "copy"]
    parts = [
        f"{f'Run {number}, commit' if of > 1 else 'Commit'} `{commit[:12]}`{' with uncommitted changes' if changed else ''}",
        f"`{_command(content['command'])}`",
        ", ".join(versions),
        f"ceilings in this run: copy {content['ceilings']['copy'] / 1e9:.1f} GB/s, {', '.join(reached)}",
    ]
    return f"- {'; '.join(parts)}."


def _command(arguments: Sequence[str]) -> str:
    """What to type, without where the results went."""
    kept = [each for place, each in enumerate(arguments) if "--json" not in arguments[max(0, place - 1) : place + 1]]
    return shlex.join(["python", f"benchmarks/{Path(kept[0]).name}", *kept[1:]])


def update(page: Path, results: Path, *, brief: bool = False) -> None:
    """Write the marked part of a page from a folder of results, and the plot beside each device's files."""
    page.write_text(replaced(page.read_text(encoding="utf-8"), results, page, brief=brief), encoding="utf-8")
    for group in grouped(committed(results)):
        bars.plot([result for run in group for result in run.content["workloads"]], figure_of(group), title(group), digest(group))
        more = summaries.page(figure_of(group).parent)
        if more:
            figure_of(group).with_name("README.md").write_text(more, encoding="utf-8")


def figure_of(runs: Sequence[Run]) -> Path:
    """Where the plot of a folder lies."""
    return runs[0].path.with_name("throughput.png")


def replaced(text: str, results: Path, page: Path, *, brief: bool = False) -> str:
    """The text of a page with the part that a folder of results gives: all tables, or one short table.

    Raises:
        InputError: the part is not marked, or a folder has runs of several machines.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise InputError(f"{page.name} needs a line {BEGIN!r} and after it a line {END!r}")
    runs = committed(results)
    groups = grouped(runs)
    folders = [figure_of(group) for group in groups]
    for folder in folders:
        if folders.count(folder) > 1:
            raise InputError(f"{folder.parent} holds runs of several machines or numbers of threads: give each a folder of its own")
    figures = [Path(os.path.relpath(figure, page.parent)).as_posix() for figure in folders]
    tables_of_all = [_brief(groups)] if groups else []
    parts = tables_of_all if brief else [section(group, figure=figure) for group, figure in zip(groups, figures, strict=True)]
    on_gpus = proofs(results)
    parts += [gpu_tables.section(folder, brief=brief) for folder in on_gpus]
    measured = {run.kind for run in runs} | ({"cuda"} if on_gpus else set())
    parts += [f"{sentence}\n" for kind, sentence in _UNMEASURED.items() if kind not in measured]
    return "\n".join([f"{before}{BEGIN}\n", *parts, f"{END}{after}"])


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE.json", help="what throughput.py wrote")
    parser.add_argument("--markdown", type=Path, help="write the tables there; default: to the screen")
    parser.add_argument("--plot", type=Path, help="write the plot there, a PNG")
    parser.add_argument("--readme", action="store_true", help="write README.md, docs/speed.md and the plots from benchmarks/results/")
    options = parser.parse_args(arguments)
    if options.readme == bool(options.files) or (options.readme and (options.markdown or options.plot)):
        parser.error("give either files, with --markdown and --plot as you like, or --readme by itself")
    return options


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        sys.exit(f"report.py: {error}")
