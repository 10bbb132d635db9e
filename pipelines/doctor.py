"""What `clipfleet doctor` does: is this machine fit to run, and if not, which command mends it?

Nothing but the standard library is imported here, and torch only in child processes: a doctor that dies
of the disease it should name is of no use.
"""

from __future__ import annotations

import dataclasses
import json as json_format
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

from pipelines.health import machine, output, packages
from pipelines.health.check import Check

if TYPE_CHECKING:
    from rich.table import Table

_COLOURS = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def checks(run_root: str) -> list[Check]:
    """Every check in the order shown; the slow ones run side by side, 3 s in all.

    Args:
        run_root: where runs would be written, a local path or a URI.
    """
    looks: list[Callable[[], list[Check]]] = [
        packages.check_python,
        packages.check_packages,
        packages.check_torch,
        packages.check_torchvision,
        packages.check_digits,
        machine.check_memory,
        machine.check_shared_memory,
        partial(machine.check_disk, run_root),
        machine.check_ray_temp,
        machine.check_loopback,
        machine.check_environment,
        partial(output.check_output, run_root),
    ]
    with ThreadPoolExecutor(max_workers=len(looks)) as pool:
        running = [pool.submit(look) for look in looks]
        return [check for future in running for check in future.result()]


def run_doctor(run_root: str, *, json: bool = False) -> int:
    """Print every check and return the exit code: 1 when any fails.

    Args:
        run_root: where runs would be written.
        json: print one object for machines instead of a table.
    """
    found = checks(run_root)
    has_failed = any(check.status == "fail" for check in found)
    if json:
        listed = [dataclasses.asdict(check) for check in found]
        print(json_format.dumps({"ok": not has_failed, "checks": listed}, indent=1))
    else:
        from rich.console import Console

        Console().print(as_table(found))
    return int(has_failed)


def as_table(found: Sequence[Check]) -> Table:
    """The checks as a table; each fix stands below what it mends."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table("check", "", "found", box=box.SIMPLE)
    for check in found:
        text = Text(check.found, overflow="fold")
        if check.fix:
            text.append(f"\n→ {check.fix}", style="bold")
        table.add_row(check.name, Text(check.status, style=_COLOURS[check.status]), text)
    return table
