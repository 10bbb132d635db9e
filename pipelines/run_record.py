"""What one run writes about itself: `run.json` and the parts of its metric log.

A run's result is this record, not the trainer's return value: `ray.train.report` drops metrics that
come without a checkpoint and forgets everything when the cluster goes away.
"""

from __future__ import annotations

import json
import math
import numbers
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final

from pipelines import storage

SCHEMA_VERSION: Final = 1
RECORD_FILE: Final = "run.json"
KINDS: Final = ("trial", "best", "default", "single")
FINAL_STATES: Final = ("complete", "pruned", "failed")
# What a resume must find unchanged; the rest of the resolved tree (workers, paths) may differ.
_IDENTITY: Final = ("method", "kind", "seed", "params", "number")


def read_record(root_uri: str, run_id: str) -> dict[str, Any] | None:
    """A run's record as it is now; None when the run has none yet."""
    uri = storage.join(root_uri, "runs", run_id, RECORD_FILE)
    record: dict[str, Any] | None = storage.read_json(uri) if storage.exists(uri) else None
    return record


class RunRecord:
    """Writer of one run's record; rank 0 holds the only one.

    Log lines are buffered and written as whole parts, because an object store cannot append. Each line
    carries the attempt (1, 2, ... per `start`) so that a reader can drop what a killed attempt logged
    beyond the checkpoint it was resumed from.
    """

    def __init__(self, root_uri: str, run_id: str) -> None:
        if not run_id or run_id != storage_safe(run_id):
            raise ValueError(
                f"run_id must be non-empty and hold only letters, digits and . _ @ + = -, got '{run_id}'"
            )
        self.run_id = run_id
        self._folder = storage.join(root_uri, "runs", run_id)
        self._record_uri = storage.join(self._folder, RECORD_FILE)
        self._attempt: int | None = None
        self._buffer: list[dict[str, Any]] = []
        self._written: set[str] = set()

    def start(
        self,
        *,
        method: str,
        kind: str,
        seed: int,
        params: Mapping[str, Any],
        config: Mapping[str, Any],
        number: int | None = None,
        versions: Mapping[str, str] | None = None,
    ) -> None:
        """Write `run.json` in state running, or take up a running record again after a kill.

        Raises:
            ValueError: unknown kind, or a resume whose method, kind, number, seed or params differ.
            AlreadyExistsError: the record is final.
        """
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got '{kind}'")
        record: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "run_id": self.run_id,
            "method": method,
            "kind": kind,
            "number": number,
            "state": "running",
            "seed": seed,
            "params": plain_json(params, where=f"run '{self.run_id}', params"),
            "config": plain_json(config, where=f"run '{self.run_id}', config"),
            "started": _now(),
            "finished": None,
            "seconds": 0.0,
            "steps": 0,
            "samples_seen": 0,
            "selection": None,
            "error": None,
            "versions": dict(versions or {}),
            "attempts": 1,
        }
        if storage.exists(self._record_uri):
            before = self._read_running()
            _check_same_run(before, record)
            record["started"] = before["started"]
            record["attempts"] = int(before.get("attempts", 1)) + 1
        self._attempt = record["attempts"]
        storage.write_json(self._record_uri, record)

    def log(self, line: Mapping[str, Any]) -> None:
        """Buffer one line of the metric log; it must hold an integer `step`.

        Raises:
            ValueError: no step, or a value that is not finite.
        """
        step = line.get("step")
        if not isinstance(step, numbers.Integral) or step < 0:
            raise ValueError(f"a metric line needs an integer step >= 0, got {step!r} in {dict(line)}")
        self._buffer.append(plain_json(line, where=f"run '{self.run_id}', step {step}"))

    def flush(self) -> None:
        """Write the buffered lines as the next part; nothing happens when there are none."""
        if not self._buffer:
            return
        if self._attempt is None:  # a record object made beside the one that called start()
            self._attempt = int(self._read_running().get("attempts", 1))
        name = self._part_name(self._buffer[0]["step"])
        lines = [json.dumps({**line, "attempt": self._attempt}, allow_nan=False) for line in self._buffer]
        storage.write_bytes(
            storage.join(self._folder, "metrics", name), ("\n".join(lines) + "\n").encode("utf-8")
        )
        self._written.add(name)
        self._buffer.clear()

    def finish(
        self,
        state: str,
        *,
        seconds: float,
        steps: int,
        samples_seen: int,
        selection: Mapping[str, Any] | None = None,
        error: str | None = None,
    ) -> None:
        """Write the remaining lines, then the final record.

        Args:
            state: "complete", "pruned" or "failed".
            seconds: training wall seconds, summed over attempts.
            selection: {"metric", "value" (float or null), "step"} on the selection split.
            error: what went wrong; required for "failed".

        Raises:
            ValueError: unknown state, a failure without error, no started record, non-finite numbers.
            AlreadyExistsError: the record is final already.
        """
        if state not in FINAL_STATES:
            raise ValueError(f"state must be one of {', '.join(FINAL_STATES)}, got '{state}'")
        if (state == "failed") != (error is not None):
            raise ValueError(
                f"run '{self.run_id}': a failed run needs its error and only that, state '{state}'"
            )
        record = self._read_running()
        final = {"seconds": seconds, "steps": steps, "samples_seen": samples_seen, "selection": selection}
        record |= plain_json(final, where=f"run '{self.run_id}'")
        record |= {"state": state, "error": error, "finished": _now()}
        self.flush()
        storage.write_json(self._record_uri, record)

    def _read_running(self) -> dict[str, Any]:
        if not storage.exists(self._record_uri):
            raise ValueError(f"run '{self.run_id}' has no record at '{self._record_uri}'; call start() first")
        record: dict[str, Any] = storage.read_json(self._record_uri)
        if record["state"] != "running":
            raise storage.AlreadyExistsError(
                f"run '{self.run_id}' is already '{record['state']}'; a finished record is never changed"
            )
        return record

    def _part_name(self, first_step: int) -> str:
        """A free name; a part of an earlier attempt that began at the same step is replaced."""
        name, again = f"{first_step:09d}.jsonl", 0
        while name in self._written:
            again += 1
            name = f"{first_step:09d}-{again:03d}.jsonl"
        return name


def storage_safe(text: str) -> str:
    """`text` with every character that is not safe in a file name or an S3 key replaced by '-'."""
    return "".join(c if c.isascii() and (c.isalnum() or c in "._@+=-") else "-" for c in text)


def _check_same_run(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    changed = [
        f"{key} {before.get(key)!r} -> {now[key]!r}" for key in _IDENTITY if before.get(key) != now[key]
    ]
    if changed:
        raise ValueError(f"run '{now['run_id']}' was started as something else: {'; '.join(changed)}")


def plain_json(value: Any, *, where: str) -> Any:
    """JSON types of a nested value: numpy scalars become numbers, a non-finite one is refused.

    Raises:
        ValueError: not finite, or of a type JSON has no place for; the message says where.
    """
    if isinstance(value, Mapping):
        return {str(key): plain_json(item, where=f"{where}, {key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_json(item, where=where) for item in value]
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        if not math.isfinite(value):
            raise ValueError(f"{where}: must be finite, got {value}; write null and say why")
        return float(value)
    raise ValueError(f"{where}: must be a number, a text or null, got {type(value).__name__}")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
