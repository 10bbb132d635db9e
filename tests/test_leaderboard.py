"""Rows of the leaderboard against plain loops over the stored results, and what is never mixed."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pipelines import storage
from pipelines.evaluation.statistics import Bootstrap
from pipelines.leaderboard import Board, Row, leaderboards, main_metric_of
from pipelines.report.console import (
    format_estimate,
    format_p,
    format_seconds,
    leaderboard_csv,
    leaderboard_json,
    print_leaderboard,
    short_params,
)
from pipelines.report.estimates import Estimate, estimate_metric, paired_p, row_matrix
from pipelines.results import Store, publish_result
from tests.report_fixture import result_record, write_root

BOOTSTRAP = Bootstrap(resamples=200)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("sweep"))
    return write_root(folder, sources=("pack/east", "pack/west"))


def boards_of(root: str) -> list[Board]:
    return leaderboards(Store(root), bootstrap=BOOTSTRAP)


def row_of(board: Board, method: str, kind: str = "best") -> Row:
    return next(row for row in board.rows if (row.method, row.kind) == (method, kind))


def loop_mean(root: str, *, dataset: str | None, method: str, kind: str, metric: str) -> float:
    """Mean over seeds, read from the files without the store."""
    total, count = 0.0, 0
    for file in (Path(root) / "results").glob("*.json"):
        result = json.loads(file.read_text())
        block = result["clipfleet"]
        is_wanted = (block["method"], block["kind"], block["keep_rule"]) == (method, kind, "all")
        if is_wanted and metric in result["metrics"] and dataset in (None, result["dataset"]):
            total += result["metrics"][metric]
            count += 1
    return total / count


# Values


def test_every_row_is_the_mean_over_the_seeds_of_its_own_source(root: str) -> None:
    boards = boards_of(root)
    assert [board.dataset for board in boards] == ["pack/east", "pack/west"]
    for board in boards:
        for row in board.rows:
            wanted = loop_mean(root, dataset=board.dataset, method=row.method, kind=row.kind, metric="acc1")
            assert row.estimate.value == pytest.approx(wanted, abs=1e-12)
            assert row.seeds == [101, 102, 103]
            assert row.num_rows == 120


def test_sources_are_never_pooled(tmp_path: Path) -> None:
    root = write_root(str(tmp_path), methods=("clip",), num_trials=1, seeds=(1, 2), sources=("pack/east",))
    result = Store(root).results()[0]
    other = {**result, "dataset": "pack/west", "clipfleet": {**result["clipfleet"], "source": "west"}}
    other["metrics"] = {**result["metrics"], "acc1": 0.0, "main_metric": 0.0}
    publish_result(root, other)
    kind = result["clipfleet"]["kind"]
    east, west = (row_of(board, "clip", kind).estimate.value for board in boards_of(root))
    pooled = loop_mean(root, dataset=None, method="clip", kind=kind, metric="acc1")
    assert west == 0.0
    assert east == loop_mean(root, dataset="pack/east", method="clip", kind=kind, metric="acc1")
    assert east != pytest.approx(pooled, abs=0.05)


def test_rows_are_ranked_and_the_untuned_default_stands_beside(root: str) -> None:
    board = boards_of(root)[0]
    ranked = [row for row in board.rows if row.rank is not None]
    assert [row.rank for row in ranked] == [1, 2, 3, 4, 5, 6]
    values = [row.estimate.value for row in ranked]
    assert values == sorted(values, reverse=True)
    assert {row.kind for row in ranked} == {"best"}
    defaults = [row for row in board.rows if row.kind == "default"]
    assert len(defaults) == 6
    assert all(row.rank is None for row in defaults)
    assert (board.metric, board.chance, board.select_on, board.report_on) == (
        "acc1",
        0.1,
        "selection",
        "test",
    )


def test_intervals_hold_the_mean_and_say_how_they_were_made(root: str) -> None:
    for row in boards_of(root)[0].rows:
        assert row.estimate.low < row.estimate.value < row.estimate.high
        assert row.estimate.level == 0.95
        assert row.estimate.how == "bootstrap over rows, Student t over seeds"


def test_cost_and_trials_count_every_run_of_the_method(root: str) -> None:
    board = boards_of(root)[0]
    seconds, states = 0.0, {"complete": 0, "pruned": 0, "failed": 0, "running": 0}
    for file in Path(root).glob("runs/*/run.json"):
        run = json.loads(file.read_text())
        if run["method"] == "cloob":
            seconds += run["seconds"]
            if run["kind"] == "trial":
                states[run["state"]] += 1
    row = row_of(board, "cloob")
    assert row.trials == states == {"complete": 2, "pruned": 1, "failed": 1, "running": 0}
    assert row.seconds_total == seconds
    assert row.seconds_per_run == 45.0
    assert row.params == json.loads((Path(root) / "runs/cloob-best-s101/run.json").read_text())["params"]


def test_the_paired_test_compares_with_the_first_place(root: str) -> None:
    board = boards_of(root)[0]
    first, *others = [row for row in board.rows if row.rank is not None]
    assert first.p_value is None
    assert all(0 < row.p_value <= 1 for row in others)
    assert "3 seeds, 120 rows" in others[0].p_note
    # local_mi is twenty points behind on the same rows; the second place is not.
    assert row_of(board, "local_mi").p_value < 0.05 < others[0].p_value


def test_kept_tokens_and_other_tasks_stand_beside_not_in_the_ranking(root: str) -> None:
    others = {(o.task, o.metric, o.keep_rule): o.estimate for o in row_of(boards_of(root)[0], "aclip").others}
    assert ("zeroshot_classification", "acc1", "kept") in others
    assert ("zeroshot_classification", "acc1", "all") not in others
    assert not any(metric in ("main_metric", "chance", "num_distinct_texts") for _, metric, _ in others)
    undefined = others["zeroshot_retrieval", "text_retrieval_recall@1", "all"]
    assert (undefined.value, undefined.reason) == (None, "any order of the candidates hits at 1")


# What is missing or must be left out


def test_a_method_without_final_runs_is_shown_as_missing(tmp_path: Path) -> None:
    root = write_root(str(tmp_path), methods=("clip", "tier"), is_finished=False)
    row = row_of(boards_of(root)[0], "tier")
    assert (row.rank, row.estimate.value, row.estimate.reason) == (None, None, "no finished final run")
    assert row.trials["running"] == 1
    assert boards_of(root)[0].rows[-1].method == "tier"


def test_a_sweep_without_any_result_has_a_board_of_missing_rows(tmp_path: Path) -> None:
    root = write_root(str(tmp_path), methods=("clip",), is_finished=False)
    (board,) = boards_of(root)
    assert board.dataset == "scenes-quick"
    assert [(row.method, row.estimate.value) for row in board.rows] == [("clip", None)]


@pytest.mark.parametrize("change", [{"kind": "trial"}, {"split": "selection"}])
def test_trials_and_other_splits_do_not_enter(tmp_path: Path, change: dict[str, str]) -> None:
    root = write_root(str(tmp_path), methods=("clip",), num_trials=1, seeds=(1, 2))
    before = leaderboard_json(boards_of(root))
    added = result_record(
        "clip-x", method="clip", kind="best", seed=9, dataset="scenes-quick", task="zeroshot_classification"
    )
    added["metrics"] = {"acc1": 1.0, "main_metric": 1.0}
    added["clipfleet"] |= change
    publish_result(root, added)
    assert leaderboard_json(boards_of(root)) == before
    added["clipfleet"] |= {"kind": "best", "split": "test"}  # control: a final result does enter
    publish_result(root, {**added, "pretrained": "clip-y"})
    assert leaderboard_json(boards_of(root)) != before


def test_an_undefined_seed_makes_the_mean_undefined_with_its_reason(tmp_path: Path) -> None:
    root = write_root(str(tmp_path), methods=("clip",), num_trials=1, seeds=(1, 2))
    file = next(iter(sorted(Path(root).glob("results/*clip-best-s1*classification.json"))))
    result = json.loads(file.read_text())
    result["metrics"] |= {"acc1": None, "main_metric": None}
    result["clipfleet"]["undefined"] = {"acc1": "no row of any class"}
    storage.write_json(str(file), result)
    estimate = row_of(boards_of(root)[0], "clip").estimate
    assert estimate.value is None
    assert estimate.reason == "undefined for 1 of 2 seeds: no row of any class"


def test_results_on_different_data_are_called_out(tmp_path: Path) -> None:
    root = write_root(str(tmp_path), methods=("clip", "tier"), num_trials=1, seeds=(1, 2))
    assert boards_of(root)[0].notes == []
    file = next(iter(sorted(Path(root).glob("results/*tier-best-s1*classification.json"))))
    result = json.loads(file.read_text())
    result["clipfleet"]["data_sha"] = "other"
    storage.write_json(str(file), result)
    (note,) = boards_of(root)[0].notes
    assert note.startswith("rows differ in data_sha and are not strictly comparable")


# Metrics that are no mean of rows


def test_without_row_values_the_interval_comes_from_the_seeds_own(tmp_path: Path) -> None:
    root = write_root(str(tmp_path), methods=("clip", "tier"), num_trials=1, seeds=(1, 2))
    shutil.rmtree(tmp_path / "results/rows")
    first, second = [row for row in boards_of(root)[0].rows if row.rank is not None]
    assert first.estimate.how == "each seed's own interval taken as normal, Student t over seeds"
    assert first.estimate.low < first.estimate.value < first.estimate.high
    assert (second.p_value, second.p_note) == (None, "the metric is no mean of stored per-row values")


def auroc_result(seed: int, value: float, *, half: float) -> dict[str, Any]:
    result = result_record(
        f"r{seed}", method="clip", kind="best", seed=seed, dataset="cxr", task="zeroshot_multi_label"
    )
    result["metrics"] = {"auroc_macro": value, "main_metric": value}
    result["clipfleet"]["ci"] = {"auroc_macro": {"low": value - half, "high": value + half, "level": 0.95}}
    return result


def test_one_seed_keeps_its_own_interval_and_seeds_widen_it() -> None:
    bootstrap = Bootstrap(resamples=4000)
    one = estimate_metric([auroc_result(1, 0.7, half=0.05)], "auroc_macro", bootstrap=bootstrap)
    # 4000 draws place the 2.5 % quantile of a normal within about 0.03 standard deviations.
    assert (one.low, one.high) == (pytest.approx(0.65, abs=0.004), pytest.approx(0.75, abs=0.004))
    assert "one seed" in one.how
    seeds = [auroc_result(seed, value, half=0.05) for seed, value in ((1, 0.64), (2, 0.7), (3, 0.76))]
    three = estimate_metric(seeds, "auroc_macro", bootstrap=bootstrap)
    assert three.value == pytest.approx(0.7)
    assert three.high - three.low > 1.5 * (one.high - one.low)
    edge = estimate_metric([auroc_result(1, 0.99, half=0.05)], "auroc_macro", bootstrap=bootstrap)
    assert edge.high == 1.0


def test_a_metric_without_any_interval_says_so() -> None:
    result = auroc_result(1, 0.7, half=0.05)
    result["clipfleet"]["ci"] = {}
    estimate = estimate_metric([result], "auroc_macro", bootstrap=BOOTSTRAP)
    assert (estimate.value, estimate.low) == (0.7, None)
    assert estimate.how == "the results carry no interval for this metric"


def test_pairing_uses_common_seeds_and_rows_only(root: str) -> None:
    store = Store(root)
    of = {
        name: [r for r in store.results() if r["pretrained"].startswith(f"{name}-best")]
        for name in ("tier", "local_mi")
    }
    chosen = {
        name: [r for r in found if (r["task"], r["dataset"]) == ("zeroshot_classification", "pack/east")]
        for name, found in of.items()
    }
    a = row_matrix(store, chosen["tier"][:2], "acc1")
    b = row_matrix(store, chosen["local_mi"], "acc1")
    assert a is not None
    assert b is not None
    p_value, note = paired_p(a, b, BOOTSTRAP)
    assert "2 seeds, 120 rows" in note
    assert p_value < 0.1
    assert paired_p(a, a, BOOTSTRAP)[0] == 1.0  # control: no difference
    third = row_matrix(store, chosen["local_mi"][2:], "acc1")
    assert paired_p(a, third, BOOTSTRAP) == (None, "no common seeds")


# Names of metrics


def test_the_wanted_metric_is_found_by_name_or_task() -> None:
    results = [
        {"task": "zeroshot_retrieval", "metrics": {"mean_recall@5": 0.5, "main_metric": 0.5}},
        {"task": "zeroshot_classification", "metrics": {"acc1": 0.5, "main_metric": 0.5}},
    ]
    assert main_metric_of(results, "auto") == ("zeroshot_classification", "acc1")
    assert main_metric_of(results, "mean_recall@5") == ("zeroshot_retrieval", "mean_recall@5")
    wanted = "zeroshot_retrieval.mean_recall@5"
    assert main_metric_of(results, wanted) == ("zeroshot_retrieval", "mean_recall@5")
    assert main_metric_of(results[:1], "acc1") == ("zeroshot_retrieval", "mean_recall@5")


# Output


def test_the_printed_table_fits_eighty_columns(root: str) -> None:
    sink = io.StringIO()
    boards = boards_of(root)
    print_leaderboard(Console(file=sink, width=80, color_system=None), boards)
    text = sink.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    for row in boards[0].rows:
        if row.rank:
            assert f" {row.rank}  {row.method}" in text
            assert format_estimate(row.estimate) in text
            assert f"  {row.method}: " in text
    assert "selected on 'selection', reported on 'test'; chance 0.100" in text
    assert "4/1/1" in text
    assert "…" not in text


def test_nothing_to_print_is_said() -> None:
    sink = io.StringIO()
    print_leaderboard(Console(file=sink, width=80), [])
    assert sink.getvalue().strip() == "no results yet"


def test_csv_and_json_carry_every_metric(root: str) -> None:
    boards = boards_of(root)
    lines = list(csv.DictReader(io.StringIO(leaderboard_csv(boards))))
    assert len(lines) == sum(1 + len(row.others) for board in boards for row in board.rows)
    main = [line for line in lines if line["is_main"] == "True" and line["kind"] == "best"]
    for line in main:
        board = next(board for board in boards if board.dataset == line["dataset"])
        assert float(line["value"]) == row_of(board, line["method"]).estimate.value
    undefined = [line for line in lines if line["metric"] == "text_retrieval_recall@1"]
    assert {(line["value"], line["undefined"]) for line in undefined} == {
        ("", "any order of the candidates hits at 1")
    }
    read = json.loads(leaderboard_json(boards))
    assert read[0]["rows"][0]["estimate"]["value"] == boards[0].rows[0].estimate.value


def test_numbers_are_written_for_people() -> None:
    assert format_estimate(Estimate(value=None, reason="x")) == "–"
    assert format_estimate(Estimate(value=0.5)) == "0.500"
    assert format_estimate(Estimate(value=0.5, low=0.4, high=0.6)) == "0.500 [0.400, 0.600]"
    assert [format_p(p) for p in (None, 0.0004, 0.0123, 1.0)] == ["–", "< .001", ".012", "1.000"]
    assert [format_seconds(s) for s in (None, 3.21, 45.0, 600.0, 9000.0)] == [
        "–",
        "3.2 s",
        "45 s",
        "10.0 min",
        "2.5 h",
    ]
    params = {"method.a.weight": 0.12345, "method.b.weight": 2, "train.lr": 1e-3}
    assert short_params(params) == "a.weight=0.123 b.weight=2 lr=0.001"
