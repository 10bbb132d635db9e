"""Few-shot classification without a model: which rows are shown, what is made of scores, refusals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from pipelines.evaluation.few_shot_task import (
    FewShotScores,
    Shots,
    choose_shots,
    few_shot_fields,
    short_classes,
)
from pipelines.evaluation.statistics import Bootstrap
from pipelines.evaluation.zero_shot_tasks import ClassificationTask, Rows

ROW_IDS = [f"row{i}" for i in range(60)]
CLASSES = ["cat", "dog", "sun"]
ROW_CLASSES = [[*CLASSES, None][i % 4] for i in range(60)]


def chosen(num_shots: int = 4, *, seed: int = 0, order: Sequence[int] = range(60)) -> list[tuple[str, str]]:
    """Row ids and classes of the shots, in their order."""
    ids, classes = [ROW_IDS[i] for i in order], [ROW_CLASSES[i] for i in order]
    shots = choose_shots(ids, classes, classes=CLASSES, num_shots=num_shots, seed=seed)
    assert [classes[i] for i in shots.at] == [CLASSES[label] for label in shots.labels]
    return [(ids[i], CLASSES[label]) for i, label in zip(shots.at, shots.labels, strict=True)]


def test_each_class_gets_its_shots_and_rows_without_a_class_none():
    found = chosen(4)
    assert [sum(name == own for _, own in found) for name in CLASSES] == [4, 4, 4]
    assert len({row_id for row_id, _ in found}) == 12


def test_shots_depend_on_seed_and_row_id_alone():
    backwards = range(59, -1, -1)
    assert chosen(order=backwards) == chosen()
    assert set(chosen(seed=1)) != set(chosen())
    # More shots contain the fewer, so a curve over shots is not one of draws.
    assert set(chosen(2)) < set(chosen(4))
    # Not by class: a batch of the first rows must not be of one class.
    assert len({name for _, name in chosen()[:4]}) > 1


def test_a_class_with_fewer_rows_gives_all_and_is_counted():
    shots = choose_shots(["a", "b", "c"], ["cat", "dog", "cat"], classes=["cat", "dog"], num_shots=2, seed=0)
    assert shots.num_per_class.tolist() == [2, 1]
    assert short_classes(shots, ["cat", "dog"]) == (
        "evaluation.shots=2, but 1 classes have fewer training rows: dog 1"
    )
    enough = choose_shots(["a", "b"], ["cat", "dog"], classes=["cat", "dog"], num_shots=1, seed=0)
    assert short_classes(enough, ["cat", "dog"]) is None


@pytest.mark.parametrize(
    ("row_classes", "classes", "message"),
    [
        (
            [None, None],
            [],
            r"evaluation\.shots=4 needs rows of at least 2 classes, this data has 0: data",
        ),
        (["cat", None], ["cat"], "at least 2 classes, this data has 1"),
        (
            ["cat", "cat"],
            ["cat", "dog", "sun"],
            r"evaluation\.shots=4 needs a training row of every class, 2 of 3 have none: dog, sun; set",
        ),
    ],
)
def test_training_rows_that_cannot_be_fitted_on_are_refused(row_classes, classes, message):
    with pytest.raises(ValueError, match=message):
        choose_shots(["a", "b"], row_classes, classes=classes, num_shots=4, seed=0)


# What is made of the scores


def test_fields_of_planted_scores():
    """Three rows, two right by the fit, one without its extra term, all by the zero-shot prompts."""
    target = np.array([0, 1, 0])
    task = ClassificationTask(
        rows=Rows(source="s", at=np.arange(3), row_ids=["a", "b", "c"], group_ids=["p", "p", "q"]),
        class_names=["cat", "dog"],
        target=target,
        templates=["{}"],
    )
    right = np.eye(2)[target]
    swapped = right[:, ::-1]
    rows = {2: [right[0], right[1], swapped[2]], 1: [right[0], swapped[1], swapped[2]]}
    scores = FewShotScores(fitted=np.stack(rows[2]), no_counterfactual=np.stack(rows[1]), zero_shot=right)
    shots = Shots(at=np.arange(3), labels=target, num_per_class=np.array([2, 1]), asked=2)
    found = few_shot_fields(task, scores, shots, Bootstrap(resamples=50))
    assert found["metrics"] == pytest.approx(
        {
            "main_metric": 2 / 3,
            "acc1": 2 / 3,
            "mean_per_class_recall": (1 / 2 + 1) / 2,
            "acc1_no_counterfactual": 1 / 3,
            "acc1_zero_shot": 1.0,
            "num_shots": 2,
            "num_short_classes": 1,
            "chance": 1 / 2,
        }
    )
    assert found["row_values"]["acc1"].tolist() == [1, 1, 0]
    assert found["labels"] == [
        {"name": "cat", "n": 2, "recall": 0.5, "num_shots": 2},
        {"name": "dog", "n": 1, "recall": 1.0, "num_shots": 1},
    ]
    assert found["group_ids"] == ["p", "p", "q"]
    # Groups are resampled, not rows.
    assert "only 2 groups were resampled" in found["ci"]["acc1"]["note"]
    assert few_shot_fields(task, scores, shots, None)["ci"] == {}
