"""What a look at the machine returns, and the two helpers every look shares."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

GIB = 1 << 30

# A child that imports torch takes 2 to 3 s on a laptop, longer on a cold or busy disk.
_IMPORT_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Check:
    """What was looked at, what was found and, unless all is well, what to do."""

    name: str
    status: Literal["ok", "warn", "fail"]
    found: str
    fix: str = ""


def level(name: str, amount: int, *, needed: int, wanted: int, what: str, fix: str) -> Check:
    """A check of an amount in bytes: fails below `needed`, warns below `wanted`."""
    text = f"{amount / GIB:.1f} GiB {what}"
    if amount < needed:
        return Check(name, "fail", f"{text}, needs {needed / GIB:g} GiB", fix)
    if amount < wanted:
        return Check(name, "warn", f"{text}, {wanted / GIB:g} GiB or more is better", fix)
    return Check(name, "ok", text)


def run_python(code: str, *, timeout_s: float = _IMPORT_TIMEOUT_S) -> tuple[int, str]:
    """Exit status of a child interpreter with our import path, and the last line that it wrote."""
    path = os.pathsep.join([str(Path(__file__).resolve().parents[2]), *filter(None, sys.path)])
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
            env={**os.environ, "PYTHONPATH": path},
        )
    except subprocess.TimeoutExpired:
        return 1, f"no answer within {timeout_s:g} s"
    lines = (done.stderr if done.returncode else done.stdout).strip().splitlines()
    return done.returncode, lines[-1] if lines else f"exit status {done.returncode}"


def local_path(place: str) -> str | None:
    """A place as a path of this machine (a mounted share reads file:///...); None for an object store."""
    path = place.removeprefix("file://")
    return None if "://" in path else path


def existing_folder(path: str) -> Path:
    """The nearest folder at or above a path that is there already."""
    place = Path(path).expanduser().absolute()
    return next(folder for folder in (place, *place.parents) if folder.is_dir())
