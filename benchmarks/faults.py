"""What is lost when a run is killed, stopped, starved or damaged at random moments: a table, counted over many small runs.

python benchmarks/faults.py --times 20 --json benchmark-output/faults.json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import machine

from dwa_fast.sets.store import BATCH_FILES
from tests.files import contents
from tests.processes import Bench, agent_store, launcher, make_bench

COLUMNS = ("what was done", "times", "before the end", "images finished by then", "of those lost", "bytes equal in the end")
IMAGES = 30  # of the small set

Fault = Callable[[Bench, Path, random.Random], None]


@dataclass
class Outcome:
    """Of one fault, and the run that went on after it."""

    finished: int  # images that the batch files or the manifest named after the fault
    made: int  # images that the next run of the same command made
    equal: bool  # whether every file is that of an undisturbed run

    @property
    def lost(self) -> int:
        """Finished images that were made again."""
        return self.made + self.finished - IMAGES


def main(arguments: Sequence[str] | None = None) -> int:
    """Count and print; 1 where a set did not come to the bytes of an undisturbed run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20, help="how often each thing is done")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--json", type=Path, help="also write everything there")
    options = parser.parse_args(arguments)
    rows = []
    with tempfile.TemporaryDirectory() as name, make_bench(Path(name)) as bench:
        for what, fault in FAULTS.items():
            draw = random.Random(f"{options.seed} {what}")
            outcomes = [suffer(bench, Path(name) / f"{number}", fault, draw) for number in range(options.times)]
            rows.append({"what": what, "outcomes": [{**vars(outcome), "lost": outcome.lost} for outcome in outcomes]})
    table = Table(title=f"a set of {IMAGES} images in 6 batches; the same command again after each fault")
    for column in COLUMNS:
        table.add_column(column)
    for row in rows:
        table.add_row(*summary(row["what"], row["outcomes"]))
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(
            json.dumps({**machine.facts(torch.device("cpu"), sys.argv), "images": IMAGES, "rows": rows}, indent=1) + "\n"
        )
    return 0 if all(outcome["equal"] for row in rows for outcome in row["outcomes"]) else 1


def summary(what: str, outcomes: Sequence[dict[str, int]]) -> tuple[str, ...]:
    """A row of the table."""
    finished = [outcome["finished"] for outcome in outcomes]
    return (
        what,
        str(len(outcomes)),
        str(sum(count < IMAGES for count in finished)),
        f"{sum(finished)} of {IMAGES * len(outcomes)}",
        str(sum(outcome["lost"] for outcome in outcomes)),
        f"{sum(outcome['equal'] for outcome in outcomes)} of {len(outcomes)}",
    )


def suffer(bench: Bench, folder: Path, fault: Fault, draw: random.Random) -> Outcome:
    """One fault, and the same command again."""
    fault(bench, folder, draw)
    finished = len(names_of_finished(folder))
    code, process = bench.run(folder)
    if code != 0:
        raise RuntimeError(process.output)
    made = re.search(rf"{IMAGES} images(?:, (\d+) of them made now)?", process.output)
    assert made
    outcome = Outcome(finished, int(made[1] or IMAGES), contents(folder) == bench.whole)
    shutil.rmtree(folder)
    return outcome


def names_of_finished(folder: Path) -> set[str]:
    """Images that the set knows as finished."""
    manifest = folder / "manifest.json"
    found = set(json.loads(manifest.read_text())["images"]) if manifest.exists() else set()
    for path in folder.glob(BATCH_FILES):
        with contextlib.suppress(ValueError):  # cut
            found |= set(json.loads(path.read_text(errors="replace"))["images"])
    return found


def signalled(sends: signal.Signals) -> Fault:
    """A signal at a random one of the run's operations on files."""
    return lambda bench, folder, draw: bench.run(folder, at_operation=draw.randint(1, bench.operations), sends=sends) and None


def killed_at_a_time(bench: Bench, folder: Path, draw: random.Random) -> None:
    """Killed at a random moment of the time that the run takes."""
    bench.run(folder, after_seconds=draw.uniform(0.01, bench.seconds))


def one_of_two(bench: Bench, folder: Path, draw: random.Random) -> None:
    """Two workers share the set; one is killed at a random operation, unless the other leaves it too little to do."""
    store = agent_store()
    at = draw.randint(1, bench.operations // 2)
    workers = [bench.start(folder, environment=launcher(store, 2, rank), at_operation=(at, None)[rank]) for rank in (0, 1)]
    for worker in workers:
        worker.wait()


def full(bench: Bench, folder: Path, draw: random.Random) -> None:
    """No file can grow beyond a random size."""
    bench.run(folder, largest_file=draw.randint(500, 4500))


def torn(bench: Bench, folder: Path, draw: random.Random) -> None:
    """Killed, and one of its batch files cut anywhere."""
    bench.run(folder, at_operation=draw.randint(bench.operations // 3, bench.operations - 20), sends=signal.SIGKILL)
    if files := sorted(folder.glob(BATCH_FILES)):
        cut(draw.choice(files), draw)


def damaged(damage: Callable[[Path, random.Random], None]) -> Fault:
    """A random file of a complete set is damaged."""

    def fault(bench: Bench, folder: Path, draw: random.Random) -> None:
        for name, content in bench.whole.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        damage(folder / draw.choice([name for name in sorted(bench.whole) if name.endswith(".png")]), draw)

    return fault


def flip(path: Path, draw: random.Random) -> None:
    """Change one bit."""
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def cut(path: Path, draw: random.Random) -> None:
    """Keep only the beginning of a file."""
    path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size)])


FAULTS: dict[str, Fault] = {
    "SIGKILL at a random file operation": signalled(signal.SIGKILL),
    "killed at a random time": killed_at_a_time,
    "Ctrl-C at a random file operation": signalled(signal.SIGINT),
    "SIGTERM at a random file operation": signalled(signal.SIGTERM),
    "one of two workers killed": one_of_two,
    "disk full at a random size of a file": full,
    "killed, and the record of a batch cut": torn,
    "an image deleted": damaged(lambda path, draw: path.unlink()),
    "an image cut": damaged(cut),
    "a bit of an image flipped": damaged(flip),
}


if __name__ == "__main__":
    sys.exit(main())
