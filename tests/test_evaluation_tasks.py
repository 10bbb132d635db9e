"""The four tasks end to end with encoders that know the answers, and with one that does not."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest

from pipelines.evaluation.main_metric import main_metric_value, resolve_main_metric, tasks_for_metric
from pipelines.evaluation.task_result import (
    MAIN_METRICS,
    ResultContext,
    TaskResult,
    result_record,
    rows_table,
    with_main_metric,
)
from pipelines.evaluation.tasks import Evaluation, evaluate
from pipelines.results import result_stem
from tests.evaluation_fixture import (
    CONCEPTS,
    SIZE,
    BlindEncoder,
    DroppedPatchEncoder,
    OracleEncoder,
    PartialEncoder,
    Settings,
    make_rows,
    make_table,
)

CONTEXT = ResultContext(
    dataset="pack",
    model="vit-tiny",
    sweep="demo",
    run_id="clip-best-0",
    kind="best",
    method="clip",
    seed=0,
    params={"method.temperature.init": 0.07},
    step=100,
    samples_seen=6400,
    select_on="selection",
    report_on="test",
    split="test",
    keep_rule="all",
    data_sha="abc",
    device="cpu",
    code="0.1.0",
)


def run(rows: list[dict], *, encoder=None, settings=None, **options) -> Evaluation:
    counts = Counter(label for row in rows for label in row["labels"])
    return evaluate(
        encoder or OracleEncoder(),
        make_table(rows),
        image_size=SIZE,
        settings=settings or Settings(),
        **{"class_names": CONCEPTS, "label_counts": counts, **options},
    )


def by_task(found: Evaluation) -> dict[str, TaskResult]:
    return {result.task: result for result in found.results}


def test_an_encoder_that_knows_scores_one_everywhere():
    found = run(make_rows())
    assert [result.task for result in found.results] == list(MAIN_METRICS)
    assert found.skipped == []
    for result in found.results:
        assert result.metrics["main_metric"] == 1.0, result.task
    assert by_task(found)["zeroshot_retrieval"].metrics["image_retrieval_recall@1"] == 1.0
    assert by_task(found)["zeroshot_retrieval"].metrics["text_retrieval_median_rank"] == 1.0


def test_an_encoder_that_does_not_know_is_at_chance():
    for result in run(make_rows(480), encoder=BlindEncoder()).results:
        chance = result.metrics["chance"]
        assert result.metrics["main_metric"] == pytest.approx(chance, abs=0.1), result.task
        assert result.metrics["main_metric"] < 0.7


def test_every_image_and_text_is_encoded_once():
    encoder = OracleEncoder()
    run(make_rows(300, "alpha") + make_rows(100, "beta"), encoder=encoder)
    assert encoder.image_batches == [256, 144]
    assert len(encoder.texts) == len(set(encoder.texts))


def test_sources_are_never_pooled():
    rows = make_rows(150, "alpha") + make_rows(30, "beta", seed=1)
    found = run(rows, encoder=PartialEncoder(), tasks=["zeroshot_classification"])
    assert [(result.source, result.n) for result in found.results] == [("alpha", 50), ("beta", 10)]
    assert [result.metrics["acc1"] for result in found.results] == [1.0, 0.0]
    # The mean over sources; pooled rows would give 50 / 60.
    assert main_metric_value(found.results, "auto") == 0.5


def test_source_order_and_row_order_do_not_matter():
    rows = make_rows(90, "alpha") + make_rows(60, "beta", seed=1)
    order = np.random.default_rng(0).permutation(len(rows))
    moved = run([rows[i] for i in order], encoder=PartialEncoder())
    for one, other in zip(run(rows, encoder=PartialEncoder()).results, moved.results, strict=True):
        assert (one.task, one.source) == (other.task, other.source)
        # Retrieval breaks ties by row; here equal images have equal texts, except where it is blind.
        if one.task != "zeroshot_retrieval" or one.source == "alpha":
            assert other.metrics == pytest.approx(one.metrics)


def test_each_source_may_have_its_own_classes():
    rows = make_rows(30, "alpha") + make_rows(30, "beta", seed=1)
    found = run(
        rows, class_names={"alpha": CONCEPTS, "beta": [*CONCEPTS, "bus"]}, tasks=["zeroshot_classification"]
    )
    assert [len(result.labels) for result in found.results] == [7, 8]


def test_metrics_of_each_task():
    found = by_task(run(make_rows()))
    assert set(found["zeroshot_classification"].metrics) == {
        *("acc1", "acc5", "mean_per_class_recall", "chance", "main_metric")
    }
    assert set(found["zeroshot_multi_label"].metrics) == {
        *("auroc_macro", "num_labels_scored", "num_labels", "chance", "main_metric")
    }
    assert {f"{way}_retrieval_recall@{k}" for way in ("image", "text") for k in (1, 5, 10)} <= set(
        found["zeroshot_retrieval"].metrics
    )
    pointing = found["pointing_game"].metrics
    assert pointing["pointing_any_object"] == 1.0
    assert pointing["pointing_chance"] == pytest.approx(1 / 16)
    assert 1 / 16 < pointing["pointing_any_object_chance"] < 3 / 16


def test_row_values_average_to_the_metric():
    for result in run(make_rows(), encoder=BlindEncoder()).results:
        assert result.metrics["main_metric"] == result.metrics[MAIN_METRICS[result.task]]
        table = rows_table(result)
        assert MAIN_METRICS[result.task] in result.row_values
        for name in result.row_values:
            own = [
                value
                for metric, value in zip(*table.select([1, 2]).to_pydict().values(), strict=True)
                if metric == name
            ]
            assert len(own) == len(result.row_ids)
            assert np.mean(own) == pytest.approx(result.metrics[name])


def test_intervals_hold_the_point_and_can_be_left_out():
    found = run(make_rows(), encoder=BlindEncoder())
    for result in found.results:
        assert "main_metric" in result.ci
        for name, interval in result.ci.items():
            assert interval["low"] <= result.metrics[name] <= interval["high"], name
            assert interval["method"] == "bootstrap"
    for result in run(make_rows(), settings=Settings(resamples=0)).results:
        assert result.ci == {}
    other = run(make_rows(), encoder=BlindEncoder(), seed=1)
    assert other.results[0].ci != found.results[0].ci
    assert other.results[0].metrics == found.results[0].metrics


def test_patients_are_resampled_together():
    rows = make_rows()
    for i, row in enumerate(rows):
        row["group_id"] = f"patient {i // 30}"
    found = run(rows, encoder=BlindEncoder())
    for result in found.results:
        assert "only 4 groups were resampled" in result.ci["main_metric"]["note"]


def test_questions_about_one_image_are_resampled_together():
    found = by_task(run(make_rows(9)))["pointing_game"]
    assert found.n == len(found.row_ids) == 18
    assert found.row_ids[1].startswith("alpha-1#")
    assert found.group_ids[1] == found.group_ids[2] == "alpha-1"


def test_tasks_without_data_are_left_out_with_a_reason():
    rows = make_rows(30)
    for row in rows:
        row |= {"class_name": None, "labels": [], "captions": ["same"], "boxes": None}
    found = run(rows, label_counts={"cat": 3})
    assert found.results == []
    assert {task.task: task.reason for task in found.skipped} == {
        "zeroshot_classification": "no row has a class",
        "zeroshot_multi_label": "no row has labels",
        "zeroshot_retrieval": "retrieval needs at least 2 different texts, found 1",
        "pointing_game": "no row has a box of a scored label",
    }


def test_dropped_patches_leave_the_pointing_game_out():
    found = run(make_rows(30), encoder=DroppedPatchEncoder())
    assert "pointing_game" not in by_task(found)
    assert [task.reason for task in found.skipped] == ["the encoder gives no complete patch grid"]


def test_only_the_asked_tasks_run():
    encoder = OracleEncoder()
    found = run(make_rows(30), encoder=encoder, tasks=["zeroshot_classification"])
    assert [result.task for result in found.results] == ["zeroshot_classification"]
    assert sorted(encoder.texts) == sorted([*CONCEPTS, *(f"a photo of a {name}" for name in CONCEPTS)])


def test_a_label_without_positives_is_null_with_a_reason():
    found = by_task(run(make_rows(), label_counts=dict.fromkeys([*CONCEPTS, "yak"], 5)))[
        "zeroshot_multi_label"
    ]
    assert found.metrics["num_labels"] == 8
    assert found.metrics["num_labels_scored"] == 7
    yak = found.labels[-1]
    assert (yak["name"], yak["auroc"], yak["reason"]) == ("yak", None, "no positives among 120 rows")
    assert found.ci["auroc_macro"]["note"] == "7 of 8 labels have both positives and negatives"


def test_undefined_main_metric_is_none_with_a_reason():
    rows = make_rows(30)
    result = by_task(run(rows, settings=Settings(labels=["yak"]), label_counts={"yak": 2}))[
        "zeroshot_multi_label"
    ]
    assert result.metrics["main_metric"] is None
    assert result.undefined["main_metric"] == "0 of 1 labels have both positives and negatives"
    assert main_metric_value([result], "auto") is None
    with pytest.raises(ValueError, match="metric 'acc1' is undefined without a reason"):
        with_main_metric("zeroshot_classification", {"acc1": None}, {}, {})
    with pytest.raises(ValueError, match="metric 'acc1' is nan"):
        with_main_metric("zeroshot_classification", {"acc1": float("nan")}, {}, {})


def test_recall_that_cannot_miss_is_undefined():
    result = by_task(run(make_rows(6)))["zeroshot_retrieval"]
    assert result.metrics["text_retrieval_recall@10"] is None
    assert result.undefined["text_retrieval_recall@10"] == "any order of the candidates hits at 10"
    assert result.metrics["text_retrieval_recall@1"] == 1.0


def test_labels_follow_the_training_counts_and_the_settings():
    def labels(**options) -> list[str]:
        found = run(make_rows(60), tasks=["zeroshot_multi_label"], **options)
        return [entry["name"] for entry in found.results[0].labels]

    assert labels(label_counts={"cat": 3, "dog": 0}) == ["cat"]
    assert labels(settings=Settings(ignore_labels=["cat"])) == sorted(set(CONCEPTS) - {"cat"})
    assert labels(settings=Settings(labels=["sun", "cat", "sun"])) == ["sun", "cat"]


def test_negative_texts_replace_the_negative_templates():
    encoder = OracleEncoder()
    settings = Settings(negative_texts=["nothing here", "all clear"])
    found = run(make_rows(60), encoder=encoder, settings=settings, tasks=["zeroshot_multi_label"])
    assert found.results[0].metrics["auroc_macro"] == 1.0
    assert not any(text.startswith("no ") for text in encoder.texts)
    plain = run(make_rows(60), tasks=["zeroshot_multi_label"])
    assert plain.results[0].prompts_sha != found.results[0].prompts_sha


def test_both_multi_label_scores_rank_alike():
    values = [
        run(make_rows(60), encoder=BlindEncoder(), settings=Settings(multi_label_score=score))
        for score in ("difference", "softmax")
    ]
    areas = [by_task(found)["zeroshot_multi_label"].metrics["auroc_macro"] for found in values]
    assert areas[0] == pytest.approx(areas[1], abs=1e-6)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("auto", ("zeroshot_classification", "acc1")),
        ("acc1", ("zeroshot_classification", "acc1")),
        ("zeroshot_multi_label.auroc_macro", ("zeroshot_multi_label", "auroc_macro")),
        ("image_retrieval_recall@10", ("zeroshot_retrieval", "image_retrieval_recall@10")),
    ],
)
def test_main_metric_names(name, expected):
    results = run(make_rows(30), settings=Settings(resamples=0)).results
    assert resolve_main_metric(results, name) == expected
    assert main_metric_value(results, name) == 1.0


def test_auto_falls_back_from_classes_to_labels_to_texts():
    results = run(make_rows(30), settings=Settings(resamples=0)).results
    assert [resolve_main_metric(results[i:], "auto")[1] for i in range(4)] == list(MAIN_METRICS.values())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("acc_1", "unknown main metric 'acc_1'; did you mean 'acc1'.*offers: auto, pointing_game.chance"),
        ("chance", "'chance' is ambiguous; write one of pointing_game.chance"),
    ],
)
def test_unknown_main_metrics_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        main_metric_value(run(make_rows(30), settings=Settings(resamples=0)).results, name)


def test_no_results_have_no_main_metric():
    with pytest.raises(ValueError, match="no task could be evaluated"):
        main_metric_value([], "auto")


def test_tasks_needed_for_a_metric():
    rows = make_rows(10)
    assert tasks_for_metric("auto", make_table(rows)) == ("zeroshot_classification",)
    assert tasks_for_metric("pointing_game.pointing_accuracy", make_table(rows)) == ("pointing_game",)
    assert tasks_for_metric("auroc_macro", make_table(rows)) == ("zeroshot_multi_label",)
    assert tasks_for_metric("text_retrieval_recall@1", make_table(rows)) is None
    for row in rows:
        row["class_name"] = None
    assert tasks_for_metric("auto", make_table(rows)) == ("zeroshot_multi_label",)
    for row in rows:
        row["labels"] = []
    assert tasks_for_metric("auto", make_table(rows)) == ("zeroshot_retrieval",)


def test_stored_form_is_plain_json_with_the_benchmark_keys():
    found = run(make_rows(60, "alpha") + make_rows(60, "beta", seed=1), encoder=BlindEncoder())
    stems = set()
    for result in found.results:
        record = json.loads(json.dumps(result_record(result, CONTEXT), allow_nan=False))
        assert set(record) == {
            *("dataset", "model", "pretrained", "task", "language", "metrics", "clipfleet")
        }
        assert record["dataset"] == f"pack/{result.source}"
        assert all(value is None or isinstance(value, float) for value in record["metrics"].values())
        assert record["clipfleet"]["select_on"] == "selection"
        assert record["clipfleet"]["params"] == CONTEXT.params
        assert record["clipfleet"]["n"] == result.n
        stems.add(result_stem(record))
    assert len(stems) == len(found.results)
    assert not any("/" in stem for stem in stems)
    own_name = result_record(run(make_rows(30, "pack")).results[0], CONTEXT)
    assert own_name["dataset"] == "pack"


class LongEncoder(OracleEncoder):
    def encode_texts(self, texts: list[str]) -> np.ndarray:
        return super().encode_texts(texts) * 2


def break_image(rows: list[dict]) -> list[dict]:
    rows[3]["image"] = b"12"
    return rows


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": []}, "at least one row"),
        ({"tasks": ["zeroshot_clasification"]}, "did you mean 'zeroshot_classification'"),
        ({"settings": Settings(labels=["caat"])}, "unknown label 'caat'; did you mean 'cat'"),
        ({"class_names": ["dog", "sun"]}, r"unknown class '\w+'.* Known: dog, sun"),
        ({"encoder": LongEncoder()}, r"of texts are not unit length \(the first has length 2\)"),
        ({"rows": break_image(make_rows(9))}, "row 3: image holds 2 bytes, 8 x 8 x 3 needs 192"),
        ({"settings": Settings(resamples=10)}, "needs at least 40 resamples"),
    ],
)
def test_bad_input_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        run(**{"rows": make_rows(30), **change})


def test_a_table_without_a_column_is_refused():
    with pytest.raises(ValueError, match="evaluation: column 'boxes' is missing"):
        evaluate(
            OracleEncoder(),
            make_table(make_rows(3)).drop_columns(["boxes"]),
            image_size=SIZE,
            settings=Settings(),
            class_names=CONCEPTS,
            label_counts={},
        )
