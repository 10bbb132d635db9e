"""The append-only results store of one run root, on local disk or S3, and its queries.

Result files use the keys and the file name of CLIP_benchmark, so scripts written for it read them
unchanged; what it has no place for stands in the block `clipfleet`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any, Final

import pyarrow as pa

from pipelines import storage
from pipelines.evaluation.task_result import ROWS
from pipelines.run_record import SCHEMA_VERSION, plain_json, storage_safe
from pipelines.schemas import SAMPLES, check_schema

Json = dict[str, Any]

_TOP_KEYS: Final = ("dataset", "model", "pretrained", "task", "language", "metrics", "clipfleet")
_BLOCK_KEYS: Final = (
    "schema_version", "run_id", "kind", "method", "seed", "select_on", "report_on", "split", "source",
    "keep_rule", "n",
)  # fmt: skip
_MAX_STEM: Final = 180  # file systems allow 255 bytes; suffixes and partial names need room


def result_stem(result: Mapping[str, Any]) -> str:
    """File name of a result without its suffix: CLIP_benchmark's template, made safe for any store.

    `_kept` marks the keep rule of token-dropping methods and `_<split>` a split that is not the reported one.
    """
    block = result["clipfleet"]
    parts = [str(result[key]) for key in ("dataset", "pretrained", "model", "language", "task")]
    if block["keep_rule"] != "all":
        parts.append(block["keep_rule"])
    if block["split"] != block["report_on"]:
        parts.append(block["split"])
    stem = "_".join(storage_safe(part) for part in parts)
    if len(stem) <= _MAX_STEM:
        return stem
    return f"{stem[: _MAX_STEM - 13]}-{hashlib.sha256(stem.encode()).hexdigest()[:12]}"


def publish_result(root_uri: str, result: Mapping[str, Any], rows: pa.Table | None = None) -> str:
    """Add one result and its per-row values to the store; returns the file's URI.

    Publishing the same result again does nothing, so an interrupted evaluation can be repeated;
    `clipfleet.seconds`, which no repetition reproduces, is left out of that comparison.

    Args:
        result: CLIP_benchmark keys plus the block `clipfleet`; metrics are finite scalars or null, and a
            null has its reason in `clipfleet.undefined`.
        rows: per-row values with schema `task_result.ROWS`, or None where the metric has none.

    Raises:
        ValueError: a key is missing, or a metric is not a finite scalar, or null without reason.
        AlreadyExistsError: another result has that name.
    """
    result = _checked(plain_json(result, where="result"))
    stem = result_stem(result)
    uri = storage.join(root_uri, "results", f"{stem}.json")
    if storage.exists(uri):
        if _comparable(read_json(uri)) != _comparable(result):
            storage.refuse_existing(uri)
        return uri
    if rows is not None:
        check_schema(rows.schema, ROWS, where=f"row values of '{stem}'")
        if len(rows) and not all(math.isfinite(value) for value in rows["value"].to_pylist()):
            raise ValueError(f"row values of '{stem}' must be finite")
        # Not published before the JSON below exists, so a leftover of a killed evaluation is replaced.
        storage.write_table(storage.join(root_uri, "results", "rows", f"{stem}.parquet"), rows)
    storage.publish_json(uri, result)
    return uri


def read_json(uri: str) -> Any:
    """Parse a JSON file.

    Raises:
        ValueError: the content is not JSON; the message names the file.
    """
    try:
        return storage.read_json(uri)
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors without the file
        raise ValueError(f"'{uri}' is not readable JSON: {error}") from error


def read_curve(root_uri: str, run_id: str) -> list[Json]:
    """The metric log of a run by step; a step that was repeated after a resume appears once.

    A training line and a selection line of the same step stay two lines. Lines that a killed attempt
    wrote at or beyond the step where the next attempt began are dropped. Empty when there is no log yet.
    """
    folder = storage.join(root_uri, "runs", run_id, "metrics")
    names = sorted(storage.list_files(folder), key=lambda name: name.removesuffix(".jsonl"))
    lines = [line for name in names for line in _read_lines(storage.join(folder, name))]
    began: dict[int, int] = {}
    for line in lines:
        attempt = line.get("attempt", 1)
        began[attempt] = min(began.get(attempt, line["step"]), line["step"])
    unique: dict[tuple[int, bool], Json] = {}
    for line in sorted(lines, key=lambda line: line.get("attempt", 1)):
        attempt = line.get("attempt", 1)
        if all(line["step"] < step for later, step in began.items() if later > attempt):
            unique[line["step"], "selection" in line] = line
    return [unique[key] for key in sorted(unique)]


def _read_lines(uri: str) -> Iterator[Json]:
    for number, text in enumerate(storage.read_bytes(uri).decode("utf-8").splitlines(), start=1):
        try:
            yield json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"'{uri}', line {number} is not readable JSON: {error}") from error


class Store:
    """Reader of one run root; it reads files only, so it works during, after and without a cluster."""

    def __init__(self, root_uri: str) -> None:
        self.root_uri = root_uri
        self._run_files = [name for name in self._list("runs") if name.endswith("/run.json")]
        self._has_sweep = storage.exists(storage.join(root_uri, "sweep.json"))
        if not self._has_sweep and not self._run_files:
            raise ValueError(
                f"'{root_uri}' is not a run root: found neither sweep.json nor runs/<run id>/run.json there"
            )

    def sweep(self) -> Json:
        """`sweep.json`, or a stand-in derived from the runs when the root holds single runs only."""
        if self._has_sweep:
            return _versioned(read_json(storage.join(self.root_uri, "sweep.json")), "sweep.json")
        runs = self.runs()
        return {
            "name": self.root_uri.partition("?")[0].rstrip("/").rpartition("/")[2],
            "methods": list(dict.fromkeys(run["method"] for run in runs)),
            "main_metric": "auto",
            "seeds": sorted({run["seed"] for run in runs}),
            "num_trials": 0,
            "config": {},
        }

    def runs(self) -> list[Json]:
        """Every run record, by method, kind, number and seed."""
        return sorted(self._runs, key=_run_order)

    def results(self) -> list[Json]:
        """Every result object, by file name."""
        return list(self._results)

    def curve(self, run_id: str) -> list[Json]:
        """`read_curve` of a run of this root."""
        return read_curve(self.root_uri, run_id)

    def samples(self, run_id: str) -> pa.Table | None:
        """The sample images of a run, schema `schemas.SAMPLES`; None when it has none."""
        uri = storage.join(self.root_uri, "runs", run_id, "samples.parquet")
        if not storage.exists(uri):
            return None
        table = storage.read_table(uri)
        check_schema(table.schema, SAMPLES, where=uri)
        return table

    def row_values(self, result: Mapping[str, Any]) -> pa.Table | None:
        """Per-row values behind a result, schema `task_result.ROWS`; None when the metric has none."""
        uri = storage.join(self.root_uri, "results", "rows", f"{result_stem(result)}.parquet")
        if not storage.exists(uri):
            return None
        table = storage.read_table(uri)
        check_schema(table.schema, ROWS, where=uri)
        return table

    @cached_property
    def _runs(self) -> list[Json]:
        return self._read_all([f"runs/{name}" for name in self._run_files])

    @cached_property
    def _results(self) -> list[Json]:
        names = [name for name in self._list("results") if name.endswith(".json") and "/" not in name]
        results = self._read_all([f"results/{name}" for name in names])
        for name, result in zip(names, results, strict=True):
            if "clipfleet" not in result or "metrics" not in result:
                raise ValueError(
                    f"'{self.root_uri}/results/{name}' is not a result: no 'metrics' or 'clipfleet'"
                )
        return results

    def _read_all(self, names: list[str]) -> list[Json]:
        # Hundreds of small files: on an object store the round trips, not the bytes, take the time.
        with ThreadPoolExecutor(max_workers=16) as pool:
            return list(pool.map(self._read_one, names))

    def _read_one(self, name: str) -> Json:
        value = read_json(storage.join(self.root_uri, name))
        return _versioned(value, name) if name.startswith("runs/") else value

    def _list(self, folder: str) -> list[str]:
        return storage.list_files(storage.join(self.root_uri, folder))


QUERY: Final = pa.schema(
    [
        *((name, pa.string()) for name in ("dataset", "task", "metric", "method", "kind", "run_id")),
        *((name, pa.string()) for name in ("keep_rule", "split", "select_on", "report_on", "source")),
        *((name, pa.int64()) for name in ("seed", "n", "step", "samples_seen")),
        *((name, pa.float64()) for name in ("value", "low", "high", "level")),
        ("undefined", pa.string()),
    ]
)


def query(store: Store, **only: str) -> pa.Table:
    """Results as a table: one row per run, dataset, task, keep rule and metric.

    Args:
        only: keep rows whose text column has this value, for example `method="clip"`.

    Raises:
        ValueError: `only` names a column that does not exist or holds no text.
    """
    texts = [field.name for field in QUERY if field.type == pa.string()]
    unknown = sorted(set(only) - set(texts))
    if unknown:
        raise ValueError(f"cannot filter results by {', '.join(unknown)}; choose from {', '.join(texts)}")
    rows = [row for result in store.results() for row in _query_rows(result)]
    kept = [row for row in rows if all(row[key] == value for key, value in only.items())]
    return pa.Table.from_pylist(kept, schema=QUERY)


def _query_rows(result: Json) -> Iterator[Json]:
    block = result["clipfleet"]
    for metric, value in result["metrics"].items():
        ci = (block.get("ci") or {}).get(metric) or {}
        yield {
            **{key: block.get(key) for key in QUERY.names if key in block},
            "dataset": result["dataset"],
            "task": result["task"],
            "metric": metric,
            "value": value,
            **{key: ci.get(key) for key in ("low", "high", "level")},
            "undefined": (block.get("undefined") or {}).get(metric),
        }


def _checked(result: Json) -> Json:
    block = result.get("clipfleet", {})
    missing = [key for key in _TOP_KEYS if key not in result]
    missing += [f"clipfleet.{key}" for key in _BLOCK_KEYS if key not in block]
    if missing:
        raise ValueError(f"a result needs the keys {', '.join(missing)}")
    if "main_metric" not in result["metrics"]:
        raise ValueError("a result's metrics must hold 'main_metric'")
    reasons = block.get("undefined") or {}
    for name, value in result["metrics"].items():
        # `main_metric` repeats another metric, whose reason is its own.
        if value is None and not (reasons.get(name) or (name == "main_metric" and reasons)):
            raise ValueError(f"metric '{name}' is null, so clipfleet.undefined must give its reason")
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(f"metric '{name}' must be a number, or null with a reason, got {value!r}")
    return result


def _comparable(result: Json) -> Json:
    return {**result, "clipfleet": {k: v for k, v in result["clipfleet"].items() if k != "seconds"}}


def _versioned(value: Json, name: str) -> Json:
    found = value.get("schema_version")
    if found != SCHEMA_VERSION:
        raise ValueError(f"{name} has schema_version {found!r}; this version reads {SCHEMA_VERSION}")
    return value


def _run_order(run: Json) -> tuple[Any, ...]:
    number = run.get("number")
    return run["method"], run["kind"], math.inf if number is None else number, run["seed"], run["run_id"]
