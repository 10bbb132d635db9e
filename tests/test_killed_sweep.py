"""A sweep whose driver is killed goes on where it was when the same command is given again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.pipeline_fixture import SMALL

pytestmark = [
    pytest.mark.ray,
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc to clean up after a kill"),
]

SWEEP = (
    "sweep.methods=[clip,cloob]",
    "sweep.num_trials=2",
    "sweep.seeds=[5]",
    "sweep.num_default_seeds=0",
    # A second actor would cost more to start than it saves.
    "sweep.max_concurrent=1",
    # Long enough that one is running when two are done.
    "train.steps=20",
    "train.evaluate_every=10",
    "train.checkpoint_every=10",
)
NUM_RUNS = 6
TIMEOUT_S = 240


def command(folder: Path, prepared: str) -> list[str]:
    places = (f"output={folder / 'root'}", f"prepared={Path(prepared).parent}")
    return [sys.executable, "-c", "from pipelines.cli import main; main()", "sweep", *SMALL, *SWEEP, *places]


def own_environment() -> dict[str, str]:
    """Without the address of the tests' Ray: a command starts its own."""
    return {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}


def session_of(pid: int) -> int:
    # The name, in parentheses, may hold spaces: fields are counted from behind it.
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[3])


def members(session: int) -> list[int]:
    """Ids of the live processes of a session."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                is_member = session_of(int(entry.name)) == session
            except (FileNotFoundError, ProcessLookupError):
                continue  # ended in between
            if is_member:
                found.append(int(entry.name))
    return found


@contextmanager
def started(arguments: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A command in a session of its own; whatever it leaves running is ended with it."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            arguments, stdout=output, stderr=output, env=own_environment(), start_new_session=True
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()
            for pid in members(process.pid):
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue


def records(folder: Path) -> dict[str, bytes]:
    """Run records by run id."""
    return {file.parent.name: file.read_bytes() for file in (folder / "root" / "runs").glob("*/run.json")}


def states(found: dict[str, bytes]) -> Counter[str]:
    return Counter(json.loads(record)["state"] for record in found.values())


def wait_for_half(folder: Path, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until two runs are over and another is running."""
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        now = states(records(folder))
        if now["running"] and sum(now.values()) - now["running"] >= 2:
            return
        assert process.poll() is None, log.read_text()
        time.sleep(0.02)
    pytest.fail(f"no two runs were over after {TIMEOUT_S} s: {log.read_text()}")


def test_killed_sweep_continues_and_repeats_nothing(small_prepared: str, tmp_path: Path):
    log = tmp_path / "log"
    with started(command(tmp_path, small_prepared), log) as process:
        wait_for_half(tmp_path, process, log)
        process.send_signal(signal.SIGKILL)
        process.wait()
        before = records(tmp_path)
    over = {run_id: record for run_id, record in before.items() if b'"running"' not in record}
    assert 2 <= len(over) < NUM_RUNS

    with started(command(tmp_path, small_prepared), log) as process:
        code = process.wait(timeout=TIMEOUT_S)
    assert code == 0, log.read_text()
    after = records(tmp_path)
    assert {run_id: after[run_id] for run_id in over} == over
    assert set(before) <= set(after)
    assert len(after) == NUM_RUNS
    assert set(states(after)) <= {"complete", "pruned"}
    finished = [json.loads(record) for record in after.values()]
    kinds = Counter((record["method"], record["kind"], record["number"]) for record in finished)
    assert set(kinds.values()) == {1}
    attempts = {run_id: json.loads(after[run_id])["attempts"] for run_id in set(before) - set(over)}
    assert set(attempts.values()) == {2}
    assert (tmp_path / "root" / "report" / "index.html").exists()
