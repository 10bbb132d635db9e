"""Recall at k and ranks, both ways, against sorted lists."""

from __future__ import annotations

import numpy as np
import pytest

from pipelines.evaluation import retrieval
from pipelines.evaluation.retrieval import (
    chance_image_recall,
    chance_text_recall,
    distinct,
    first_hit_ranks,
    retrieve,
)
from tests.golden_files import load
from tests.oracles.evaluation import loop_chance_image_recall, loop_image_ranks, loop_text_ranks


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def problem(num_rows: int = 30, num_texts: int = 30, seed: int = 0):
    """Rows that share `num_texts` texts, images near their text; coarse values make ties."""
    generator = np.random.default_rng(seed)
    words = [f"text {i}" for i in generator.integers(0, num_texts, size=num_rows)]
    unique, index = distinct(words)
    texts = generator.integers(-2, 3, size=(len(unique), 3)).astype(float) + 0.5
    images = generator.integers(-2, 3, size=(num_rows, 3)) + 0.5 + texts[index]
    return images, texts, index, words


@pytest.mark.parametrize(("num_texts", "seed"), [(30, 0), (6, 1), (2, 2)])
def test_ranks_equal_the_sorted_lists(num_texts, seed):
    images, texts, index, words = problem(num_texts=num_texts, seed=seed)
    found = retrieve(images, texts, index)
    rows = images.tolist(), texts[index].tolist()
    assert found.text_rank.tolist() == loop_text_ranks(*rows, words)
    assert found.image_rank.tolist() == loop_image_ranks(*rows, words)
    # Negative control: counting only the row's own text as a hit gives other ranks.
    alone = [str(i) for i in range(len(words))]
    assert found.image_rank.tolist() != loop_image_ranks(*rows, alone)


def test_small_chunks_give_the_same_ranks(monkeypatch):
    images, texts, index, _ = problem(num_texts=12)
    expected = retrieve(images, texts, index)
    monkeypatch.setattr(retrieval, "_CHUNK", 7)
    found = retrieve(images, texts, index)
    assert found.text_rank.tolist() == expected.text_rank.tolist()
    assert found.image_rank.tolist() == expected.image_rank.tolist()


def test_stored_recalls_and_median_rank():
    case = load("mil_derived_eval")
    images, texts = unit(case["ret_img"]), unit(case["ret_txt"])
    found = retrieve(images, texts, np.arange(12))
    for k in (1, 5, 10):
        assert (found.text_rank < k).mean() == case[f"r_at_{k}"]
    assert np.median(found.text_rank) + 1 == case["med_rank"]
    # Negative control: without unit length the first recall is another.
    assert (retrieve(case["ret_img"], case["ret_txt"], np.arange(12)).text_rank < 1).mean() != case["r_at_1"]


def test_equal_embeddings_rank_in_row_order():
    found = retrieve(np.ones((6, 2)), np.ones((6, 2)), np.arange(6))
    assert found.text_rank.tolist() == found.image_rank.tolist() == list(range(6))


def test_any_row_with_the_same_text_is_a_hit():
    images = np.array([[1.0, 0.0], [0.0, 1.0], [0.1, 1.0]])
    texts = np.array([[1.0, 0.0], [0.0, 1.0]])
    found = retrieve(images, texts, np.array([0, 1, 1]))
    assert found.image_rank.tolist() == [0, 0, 0]
    assert found.num_targets.tolist() == [1, 2, 2]
    assert found.num_texts == 2


def test_copies_of_a_wrong_text_take_one_place():
    images = np.array([[1.0, 0.8, 0.0], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    texts = np.array([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    assert retrieve(images, texts, np.array([0, 1, 1])).text_rank.tolist() == [1, 0, 0]


def test_row_order_is_irrelevant_without_ties():
    generator = np.random.default_rng(0)
    images, texts = generator.normal(size=(40, 5)), generator.normal(size=(40, 5))
    order = generator.permutation(40)
    found = retrieve(images, texts, np.arange(40))
    moved = retrieve(images[order], texts[order], np.arange(40))
    assert moved.text_rank.tolist() == found.text_rank[order].tolist()
    assert moved.image_rank.tolist() == found.image_rank[order].tolist()


def test_the_two_directions_differ():
    images = np.array([[1.0, 0.2], [0.9, 0.3], [0.0, 1.0]])
    texts = np.array([[1.0, 0.0], [0.0, 1.0], [0.5, 0.9]])
    found = retrieve(images, texts, np.arange(3))
    assert found.text_rank.tolist() != found.image_rank.tolist()


@pytest.mark.parametrize("k", [1, 3, 10])
def test_chance_equals_the_binomials(k):
    num_targets = np.array([1, 2, 2, 5, 5, 5, 5, 5, 1, 1, 1, 1])
    expected = loop_chance_image_recall(num_targets.tolist(), k)
    assert chance_image_recall(num_targets, k) == pytest.approx(expected)


def test_random_embeddings_are_at_chance():
    generator = np.random.default_rng(0)
    index = generator.integers(0, 100, size=400)
    found = retrieve(unit(generator.normal(size=(400, 64))), unit(generator.normal(size=(100, 64))), index)
    by_image, by_text = chance_image_recall(found.num_targets, 10), chance_text_recall(found, 10)
    assert (found.image_rank < 10).mean() == pytest.approx(by_image, abs=0.04)
    assert (found.text_rank < 10).mean() == pytest.approx(by_text, abs=0.04)


def test_distinct_keeps_the_order_of_appearance():
    unique, index = distinct(["b", "a", "b"])
    assert unique == ["b", "a"]
    assert index.tolist() == [0, 1, 0]


def test_first_hit_takes_the_best_of_several_targets():
    scores = np.array([[0.5, 0.9, 0.7, 0.7]])
    assert first_hit_ranks(scores, np.array([[True, False, False, True]])).tolist() == [2]


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="retrieval needs rows with texts, got 0 images"):
        retrieve(np.zeros((0, 2)), np.zeros((0, 2)), np.zeros(0, dtype=int))
    with pytest.raises(ValueError, match="finite embeddings"):
        retrieve(np.full((2, 2), np.nan), np.ones((2, 2)), np.arange(2))
