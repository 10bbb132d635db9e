"""The store: what writers publish, what readers make of it, and what both refuse."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines import storage
from pipelines.results import Store, publish_result, query, result_stem
from pipelines.run_record import RunRecord
from tests.report_fixture import interval, result_record, rows_table, sample_table, write_root

HITS = np.array([1.0, 0.0, 1.0, 1.0])


def started(root: Path, run_id: str = "clip-t0000", **changes: Any) -> RunRecord:
    record = RunRecord(str(root), run_id)
    settings: dict[str, Any] = {
        "method": "clip",
        "kind": "trial",
        "seed": 0,
        "params": {"lr": 0.1},
        "number": 0,
    }
    record.start(config={"seed": 0}, **{**settings, **changes})
    return record


def finish(record: RunRecord, state: str = "complete", **changes: Any) -> None:
    record.finish(state, **{"seconds": 2.0, "steps": 4, "samples_seen": 40, **changes})


def a_result(**block: Any) -> dict[str, Any]:
    result = result_record(
        "clip-best-s1",
        method="clip",
        kind="best",
        seed=1,
        dataset="cxr/nih256",
        task="zeroshot_classification",
    )
    result["metrics"] = {"acc1": float(HITS.mean()), "main_metric": float(HITS.mean())}
    result["clipfleet"] |= {"ci": {"acc1": interval(HITS)}, **block}
    return result


def parts(root: Path) -> list[str]:
    return storage.list_files(str(root / "runs" / "clip-t0000" / "metrics"))


# Run records


def test_a_record_runs_then_is_final(tmp_path: Path) -> None:
    record = started(tmp_path)
    (running,) = Store(str(tmp_path)).runs()
    assert (running["state"], running["finished"], running["params"]) == ("running", None, {"lr": 0.1})
    finish(record, selection={"metric": "acc1", "value": np.float32(0.5), "step": 4})
    (final,) = Store(str(tmp_path)).runs()
    assert (final["state"], final["seconds"], final["steps"]) == ("complete", 2.0, 4)
    assert final["selection"] == {"metric": "acc1", "value": 0.5, "step": 4}
    assert final["started"] == running["started"]
    assert final["finished"] is not None


def test_a_final_record_is_never_changed(tmp_path: Path) -> None:
    record = started(tmp_path)
    finish(record, "pruned")
    before = storage.read_bytes(str(tmp_path / "runs/clip-t0000/run.json"))
    for change in (lambda: finish(record), lambda: finish(record, "pruned"), lambda: started(tmp_path)):
        with pytest.raises(storage.AlreadyExistsError, match="already 'pruned'"):
            change()
    assert storage.read_bytes(str(tmp_path / "runs/clip-t0000/run.json")) == before


def test_a_running_record_is_taken_up_again_only_as_the_same_run(tmp_path: Path) -> None:
    started(tmp_path)
    started(tmp_path)
    assert Store(str(tmp_path)).runs()[0]["attempts"] == 2
    with pytest.raises(ValueError, match=r"started as something else: params \{'lr': 0.1\} -> \{'lr': 0.2\}"):
        started(tmp_path, params={"lr": 0.2})


def test_a_record_refuses_what_it_cannot_mean(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="kind must be one of trial, best, default, single"):
        started(tmp_path, kind="final")
    with pytest.raises(ValueError, match="run_id must be"):
        RunRecord(str(tmp_path), "a/b")
    with pytest.raises(ValueError, match="call start\\(\\) first"):
        finish(RunRecord(str(tmp_path), "clip-t0000"))
    record = started(tmp_path)
    with pytest.raises(ValueError, match="state must be one of complete, pruned, failed"):
        finish(record, "running")
    with pytest.raises(ValueError, match="a failed run needs its error"):
        finish(record, "failed")
    with pytest.raises(ValueError, match="a failed run needs its error and only that, state 'complete'"):
        finish(record, error="boom")
    with pytest.raises(ValueError, match="selection, value: must be finite, got nan; write null"):
        finish(record, selection={"metric": "acc1", "value": float("nan"), "step": 1})


# The metric log


def test_lines_are_written_as_parts_named_by_their_first_step(tmp_path: Path) -> None:
    record = started(tmp_path)
    for step in (1, 2):
        record.log({"step": step, "loss": 1.0 / step})
    assert parts(tmp_path) == []
    record.flush()
    record.flush()
    record.log({"step": 3, "loss": 0.3})
    finish(record)
    assert parts(tmp_path) == ["000000001.jsonl", "000000003.jsonl"]
    assert [(x["step"], x["loss"]) for x in Store(str(tmp_path)).curve("clip-t0000")] == [
        (1, 1.0),
        (2, 0.5),
        (3, 0.3),
    ]


def test_a_part_of_this_attempt_is_never_rewritten(tmp_path: Path) -> None:
    record = started(tmp_path)
    record.log({"step": 5, "loss": 1.0})
    record.flush()
    record.log({"step": 5, "selection": {"metric": "acc1", "value": 0.2}})
    record.flush()
    assert parts(tmp_path) == ["000000005-001.jsonl", "000000005.jsonl"]
    lines = Store(str(tmp_path)).curve("clip-t0000")
    assert [sorted(set(line) - {"attempt"}) for line in lines] == [["loss", "step"], ["selection", "step"]]


def test_a_resume_replaces_what_the_killed_attempt_logged_beyond_its_checkpoint(tmp_path: Path) -> None:
    first = started(tmp_path)
    for low, high in ((1, 3), (3, 5), (5, 7)):
        for step in range(low, high):
            first.log({"step": step, "loss": 100.0 + step})
        first.flush()
    second = started(tmp_path)  # from a checkpoint at step 2, and stopped before the old end
    for step in (3, 4, 5):
        second.log({"step": step, "loss": 200.0 + step})
    finish(second, "pruned")
    losses = [line["loss"] for line in Store(str(tmp_path)).curve("clip-t0000")]
    assert losses == [101.0, 102.0, 203.0, 204.0, 205.0]


def test_without_attempts_the_later_part_wins(tmp_path: Path) -> None:
    started(tmp_path)
    folder = tmp_path / "runs/clip-t0000/metrics"
    folder.mkdir()
    (folder / "000000001.jsonl").write_text('{"step": 1, "loss": 1}\n{"step": 2, "loss": 1}\n')
    (folder / "000000002.jsonl").write_text('{"step": 2, "loss": 9}\n')
    assert [line["loss"] for line in Store(str(tmp_path)).curve("clip-t0000")] == [1, 9]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"loss": 1.0}, "needs an integer step"),
        ({"step": 1.5}, "needs an integer step"),
        ({"step": 7, "loss": float("inf")}, "step 7, loss: must be finite, got inf"),
        ({"step": 7, "terms": {"entropy": float("nan")}}, "step 7, terms, entropy: must be finite"),
        ({"step": 7, "loss": object()}, "step 7, loss: must be a number, a text or null, got object"),
    ],
)
def test_a_bad_line_is_refused(tmp_path: Path, line: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        started(tmp_path).log(line)


# Results


def test_a_result_has_the_file_name_of_clip_benchmark(tmp_path: Path) -> None:
    result = a_result()
    uri = publish_result(str(tmp_path), result, rows_table("acc1", HITS))
    assert uri.endswith("/results/cxr-nih256_clip-best-s1_vit-tiny_en_zeroshot_classification.json")
    assert json.loads(Path(uri).read_text()) == result
    assert result_stem(a_result(keep_rule="kept")).endswith("_classification_kept")
    assert result_stem(a_result(split="selection")).endswith("_classification_selection")
    long = {**result, "dataset": "d" * 400}
    assert len(result_stem(long)) <= 180
    assert result_stem(long) != result_stem({**result, "dataset": "d" * 401})


def test_a_result_is_never_overwritten_but_may_be_repeated(tmp_path: Path) -> None:
    uri = publish_result(str(tmp_path), a_result())
    before = Path(uri).read_bytes()
    assert publish_result(str(tmp_path), a_result(seconds=99.0)) == uri
    other = a_result()
    other["metrics"]["acc1"] = 0.1
    with pytest.raises(storage.AlreadyExistsError, match="never overwritten"):
        publish_result(str(tmp_path), other)
    assert Path(uri).read_bytes() == before


def test_row_values_left_by_a_killed_evaluation_are_replaced(tmp_path: Path) -> None:
    result = a_result()
    stale = rows_table("acc1", 1 - HITS)
    storage.write_table(str(tmp_path / "results/rows" / f"{result_stem(result)}.parquet"), stale)
    publish_result(str(tmp_path), result, rows_table("acc1", HITS))
    started(tmp_path)
    table = Store(str(tmp_path)).row_values(result)
    assert table is not None
    assert table["value"].to_pylist() == HITS.tolist()
    assert Store(str(tmp_path)).row_values(a_result(keep_rule="kept")) is None


def change_of(path: str, value: Any) -> dict[str, Any]:
    result = copy.deepcopy(a_result())
    *folders, last = path.split(".")
    target = result
    for folder in folders:
        target = target[folder]
    if value is KeyError:
        del target[last]
    else:
        target[last] = value
    return result


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("task", KeyError, "needs the keys task"),
        ("clipfleet.seed", KeyError, "needs the keys clipfleet.seed"),
        ("metrics.main_metric", KeyError, "must hold 'main_metric'"),
        ("metrics.acc1", float("nan"), "metrics, acc1: must be finite, got nan; write null"),
        ("metrics.acc1", None, "metric 'acc1' is null, so clipfleet.undefined must give its reason"),
        ("metrics.acc1", True, "metric 'acc1' must be a number"),
        ("metrics.acc1", [0.5], "metric 'acc1' must be a number"),
    ],
)
def test_a_bad_result_is_refused(tmp_path: Path, path: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        publish_result(str(tmp_path), change_of(path, value))
    assert storage.list_files(str(tmp_path)) == []


def test_bad_row_values_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"row values .* must be finite"):
        publish_result(str(tmp_path), a_result(), rows_table("acc1", np.array([1.0, np.nan])))
    with pytest.raises(ValueError, match="column 'metric' is missing"):
        publish_result(str(tmp_path), a_result(), rows_table("acc1", HITS).drop_columns("metric"))


# Reading


def test_a_folder_that_is_no_run_root_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"not a run root: found neither sweep.json nor runs/"):
        Store(str(tmp_path))


def test_single_runs_need_no_sweep_record(tmp_path: Path) -> None:
    finish(started(tmp_path, kind="single"))
    sweep = Store(str(tmp_path)).sweep()
    assert (sweep["name"], sweep["methods"], sweep["seeds"]) == (tmp_path.name, ["clip"], [0])


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    record = started(tmp_path)
    record.log({"step": 1, "loss": 1.0})
    finish(record)
    (tmp_path / "runs/clip-t0000/metrics/000000001.jsonl").write_text('{"step": 1}\n{"st')
    with pytest.raises(ValueError, match=r"000000001.jsonl', line 2 is not readable JSON"):
        Store(str(tmp_path)).curve("clip-t0000")
    (tmp_path / "sweep.json").write_text("{")
    with pytest.raises(ValueError, match=r"sweep.json' is not readable JSON"):
        Store(str(tmp_path)).sweep()
    (tmp_path / "sweep.json").write_text('{"schema_version": 2}')
    with pytest.raises(ValueError, match=r"sweep.json has schema_version 2; this version reads 1"):
        Store(str(tmp_path)).sweep()
    (tmp_path / "results").mkdir()
    (tmp_path / "results/foreign.json").write_text('{"dataset": "x"}')
    with pytest.raises(ValueError, match=r"results/foreign.json' is not a result"):
        Store(str(tmp_path)).results()


def test_samples_are_checked(tmp_path: Path) -> None:
    started(tmp_path)
    uri = str(tmp_path / "runs/clip-t0000/samples.parquet")
    assert Store(str(tmp_path)).samples("clip-t0000") is None
    storage.write_table(uri, sample_table(0, keeps_all=False))
    assert Store(str(tmp_path)).samples("clip-t0000").num_rows == 6
    storage.write_table(uri, sample_table(0, keeps_all=False).drop_columns("grid"))
    with pytest.raises(ValueError, match="column 'grid' is missing"):
        Store(str(tmp_path)).samples("clip-t0000")


def test_query_flattens_and_filters(tmp_path: Path) -> None:
    root = write_root(str(tmp_path), methods=("clip", "aclip"), num_trials=1, seeds=(1, 2))
    store = Store(root)
    table = query(store)
    assert table.num_rows == sum(len(result["metrics"]) for result in store.results())
    rows = query(store, method="clip", kind="best", metric="acc1").to_pylist()
    assert [row["seed"] for row in rows] == [1, 2]
    assert all(row["low"] < row["value"] < row["high"] for row in rows)
    undefined = query(store, metric="text_retrieval_recall@1").to_pylist()
    assert {(row["value"], row["undefined"]) for row in undefined} == {
        (None, "any order of the candidates hits at 1")
    }
    with pytest.raises(ValueError, match="cannot filter results by nope; choose from dataset"):
        query(store, nope="x")
