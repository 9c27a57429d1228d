"""Whether this checkout is installed, editable, with an extension compiled from its sources as they are: then `make gpu` builds nothing.

python benchmarks/built.py                exit status 0 if so, else 1
python benchmarks/built.py --remember     after a build: of these sources

What the sources hold is compared, not when they were written: a copy of the checkout may have new times.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "build" / "built-from"


def digest() -> str:
    """SHA-256 of all that a build depends on: sources, its script and settings, Python and PyTorch."""
    import torch

    found = hashlib.sha256(f"{sys.version} {torch.__version__}".encode())
    for path in [ROOT / "setup.py", ROOT / "pyproject.toml", *sorted(path for path in (ROOT / "csrc").rglob("*") if path.is_file())]:
        found.update(f"{path.relative_to(ROOT)} {path.stat().st_size}\n".encode() + path.read_bytes())
    return found.hexdigest()


def is_built() -> bool:
    """Nothing has to be built, and what was built can be imported."""
    if not RECORD.exists() or RECORD.read_text() != digest():
        return False
    try:
        import dwa_fast
        from dwa_fast import ops
    except ImportError:
        return False
    here = Path(dwa_fast.__file__).resolve().parent.parent == ROOT
    return here and ops.cause() is None and importlib.util.find_spec("dwa_fast.kernels") is not None


def remember() -> None:
    """What is there now was built from these sources."""
    RECORD.parent.mkdir(exist_ok=True)
    RECORD.write_text(digest())


if __name__ == "__main__":
    if sys.argv[1:] == ["--remember"]:
        remember()
    else:
        sys.exit(not is_built())
