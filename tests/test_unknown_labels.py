"""Labels that data leaves open: kept from the source to the shards, and not scored where nobody knows."""

from __future__ import annotations

import numpy as np
import pytest

from pipelines.evaluation.multi_label import (
    auroc,
    auroc_intervals,
    auroc_replicates,
    auroc_row_values,
    score_labels,
)
from pipelines.evaluation.planning import make_plan, plan_tasks
from pipelines.evaluation.statistics import Bootstrap
from pipelines.evaluation.task_result import MULTI_LABEL
from pipelines.prepare import prepare
from pipelines.prepared import Prepared
from tests.evaluation_fixture import Settings
from tests.medical_fixtures import chexpert_row, write_chexpert
from tests.source_fixtures import data_config, rows_of

BOOTSTRAP = Bootstrap(resamples=40, confidence=0.95, seed=0)


def problem(num_rows: int = 60, num_labels: int = 3):
    generator = np.random.default_rng(0)
    truth = generator.random((num_rows, num_labels)) < 0.4
    known = generator.random(truth.shape) < 0.6
    return (generator.normal(size=truth.shape) + truth).round(1), truth, known


def test_a_label_is_scored_on_the_rows_that_know_it():
    scores, truth, known = problem()
    found = score_labels(scores, truth, ["a", "b", "c"], is_known_NL=known)
    for i, label in enumerate(found.labels):
        rows = known[:, i]
        assert label.auroc == auroc(scores[rows, i], truth[rows, i])
        assert label.num_positive == (truth & known)[:, i].sum()
    # What is not known may say anything.
    assert score_labels(
        scores, truth | ~known, ["a", "b", "c"], is_known_NL=known
    ).auroc_macro == pytest.approx(found.auroc_macro)
    assert score_labels(scores, truth, ["a", "b", "c"]).auroc_macro != pytest.approx(
        found.auroc_macro, abs=1e-3
    )
    assert found.row_values.mean() == pytest.approx(found.auroc_macro)


def test_knowing_everything_changes_nothing():
    scores, truth, known = problem()
    everywhere = np.ones_like(known)
    plain, told = auroc_row_values(scores, truth), auroc_row_values(scores, truth, is_known_NL=everywhere)
    np.testing.assert_array_equal(plain, told)
    np.testing.assert_array_equal(
        auroc_replicates(scores, truth, BOOTSTRAP),
        auroc_replicates(scores, truth, BOOTSTRAP, is_known_NL=everywhere),
    )


def test_resamples_leave_the_same_rows_out():
    scores, truth, known = problem()
    found = auroc_replicates(scores, truth, BOOTSTRAP, is_known_NL=known)
    changed = auroc_replicates(scores + ~known * 9.0, truth | ~known, BOOTSTRAP, is_known_NL=known)
    np.testing.assert_array_equal(found, changed)
    labels = score_labels(scores, truth, ["a", "b", "c"], is_known_NL=known)
    per_label, macro = auroc_intervals(scores, truth, labels, BOOTSTRAP, is_known_NL=known)
    assert all(
        per_label[label.name].low <= label.auroc <= per_label[label.name].high for label in labels.labels
    )
    assert macro.low <= labels.auroc_macro <= macro.high


def test_a_label_that_nobody_knows_has_no_value():
    scores, truth, known = problem()
    known[:, 0] = False
    known[1:, 1] = False
    found = score_labels(scores, truth, ["a", "b", "c"], is_known_NL=known)
    assert [label.auroc is None for label in found.labels] == [True, True, False]
    assert found.labels[0].reason == "no positives among 0 rows"
    assert found.reason == "1 of 3 labels have both positives and negatives"


@pytest.fixture
def rows():
    labels = [{"Edema": "1.0"}, {"Edema": "-1.0", "Fracture": "1.0"}, {"Edema": "0.0"}, {"No_Finding": "1.0"}]
    return [
        chexpert_row(f"train/patient{number:05d}/study1/view1_frontal.jpg", **labels[number % 4])
        for number in range(8)
    ]


@pytest.mark.ray
def test_open_labels_reach_the_evaluation(tmp_path, rows, ray_session):
    held = [{**row, "Path": row["Path"].replace("train/", "valid/")} for row in rows]
    root = write_chexpert(tmp_path / "tree", {"train.csv": rows, "valid.csv": held})
    config = data_config(f"chexpert:{root}", image_size=16, rows_per_shard=3, vocab_size=300)
    assert [row["unknown_labels"] for row in rows_of(config)][:3] == [[], ["Edema"], []]
    prepare(config, str(tmp_path / "prepared"))
    prepared = Prepared.open(str(tmp_path / "prepared"))
    table = prepared.table("test")
    assert table["unknown_labels"].to_pylist() == [[], ["Edema"], [], []] * 2
    assert prepared.table("test", columns=["row_id"]).column_names == ["row_id"]
    counts = prepared.manifest["label_counts"]["train"]
    plan = make_plan(table, [MULTI_LABEL], Settings(), class_names=[], label_counts=counts)
    [task], _ = plan_tasks(plan, [MULTI_LABEL])
    edema = task.names.index("Edema")
    assert task.is_positive[:, edema].tolist() == [True, False, False, False] * 2
    assert task.is_known[:, edema].tolist() == [True, False, True, True] * 2
    assert task.is_known[:, task.names.index("Fracture")].all()


def test_a_policy_that_ignores_nothing_leaves_nothing_open(tmp_path, rows):
    root = write_chexpert(tmp_path, {"train.csv": rows})
    found = rows_of(data_config(f"chexpert:{root}", uncertain="negative"))
    assert all("unknown_labels" not in row for row in found)
    found = rows_of(data_config(f"chexpert:{root}", uncertain="negative", blank="ignore"))
    # Whether there is no finding is never left open.
    assert "No Finding" not in found[0]["unknown_labels"]
    assert len(found[0]["unknown_labels"]) == 12
