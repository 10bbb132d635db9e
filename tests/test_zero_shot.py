"""Class embeddings and zero-shot scores against loops and stored values."""

from __future__ import annotations

import pytest
import torch

from models.zero_shot import (
    class_embeddings,
    class_scores,
    difference_score,
    format_prompts,
    multi_label_scores,
    softmax_score,
    unit,
)
from pipelines.evaluation.multi_label import auroc
from tests.golden_files import load
from tests.oracles.evaluation import loop_class_embedding, loop_dot, loop_softmax_score


def random_tensor(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def golden_embeddings(case: dict, kind: str) -> torch.Tensor:
    """Labels differ in their number of prompts, so each is averaged alone."""
    prompts = [torch.from_numpy(case[f"{kind}_{label}"])[None] for label in range(3)]
    return torch.cat([class_embeddings(p) for p in prompts])


def test_prompts_are_class_major():
    found = format_prompts(["cat", "dog"], ["a {}", "two {}s"])
    assert found == ["a cat", "two cats", "a dog", "two dogs"]


def test_a_fixed_sentence_may_stand_among_the_templates():
    assert format_prompts(["edema"], ["No {}.", "Lungs are clear."]) == ["No edema.", "Lungs are clear."]


def test_braces_in_a_name_are_kept():
    assert format_prompts(["{0}"], ["a {}"]) == ["a {0}"]


@pytest.mark.parametrize(
    ("names", "templates", "message"),
    [
        ([], ["{}"], "got 0 and 1"),
        (["cat"], [], "got 1 and 0"),
        (["cat"], ["{} or {}"], "names the class once"),
        (["cat", "dog"], ["a photo"], "no template mentions the class"),
    ],
)
def test_bad_prompts_are_refused(names, templates, message):
    with pytest.raises(ValueError, match=message):
        format_prompts(names, templates)


def test_class_embeddings_equal_the_loop():
    prompts = random_tensor(3, 5, 7)
    expected = torch.tensor([loop_class_embedding(p) for p in prompts.tolist()], dtype=torch.float64)
    torch.testing.assert_close(class_embeddings(prompts), expected)


def test_leaving_out_the_first_normalisation_is_noticed():
    prompts = random_tensor(3, 5, 7)
    expected = torch.tensor([loop_class_embedding(p) for p in prompts.tolist()], dtype=torch.float64)
    assert not torch.allclose(unit(prompts.mean(1)), expected, atol=1e-3)


def test_prompt_order_and_length_are_irrelevant():
    prompts = random_tensor(2, 4, 6)
    stretched = prompts.flip(1) * torch.tensor([1.0, 2.0, 3.0, 0.1], dtype=torch.float64)[None, :, None]
    torch.testing.assert_close(class_embeddings(stretched), class_embeddings(prompts))


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (torch.zeros(1, 2, 3), "2 of 2 embeddings are zero"),
        (torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]]), "1 of 1 embeddings are zero"),
        (torch.full((1, 1, 2), float("nan")), "not finite"),
        (torch.ones(2, 3), r"must be \[C, T, D\], got \[2, 3\]"),
    ],
)
def test_embeddings_without_direction_are_refused(prompts, message):
    with pytest.raises(ValueError, match=message):
        class_embeddings(prompts)


def test_stored_zero_shot_scores():
    case = load("derived_zeroshot_scores")
    images = unit(torch.from_numpy(case["image_emb"]))
    positive, negative = golden_embeddings(case, "pos"), golden_embeddings(case, "neg")
    expected = {name: torch.from_numpy(case[name]) for name in ("cos_pos", "score_tier", "score_chexzero")}
    exact = {"rtol": 0, "atol": 1e-12}
    torch.testing.assert_close(class_scores(images, positive), expected["cos_pos"], **exact)
    for score, name in (("difference", "score_tier"), ("softmax", "score_chexzero")):
        found = multi_label_scores(images, positive, negative, score=score)
        torch.testing.assert_close(found, expected[name], **exact)
        areas = [auroc(found[:, i].numpy(), case["labels"][:, i] == 1) for i in range(3)]
        assert areas == pytest.approx(case["auroc"].tolist(), abs=1e-12)
    # Negative control: the temperature that CLIP's own zero-shot carries is not part of the score.
    scaled = multi_label_scores(images * 100, positive, negative, score="softmax")
    assert not torch.allclose(scaled, expected["score_chexzero"], atol=1e-2)


def test_stored_pair_prompt_probability():
    case = load("mil_derived_eval")
    positive, negative = torch.from_numpy(case["cos_pos"]), torch.from_numpy(case["cos_neg"])
    found = softmax_score(positive, negative)
    torch.testing.assert_close(found, torch.from_numpy(case["prob"]), rtol=0, atol=1e-12)
    areas = [auroc(found[:, i].numpy(), case["y"][:, i] == 1) for i in range(5)]
    assert areas == pytest.approx(case["auroc"].tolist(), abs=1e-12)


def test_scores_equal_the_loops():
    images, classes = unit(random_tensor(4, 6)), unit(random_tensor(3, 6, seed=1))
    other = unit(random_tensor(3, 6, seed=2))
    positive, negative = class_scores(images, classes), class_scores(images, other)
    for i in range(4):
        for c in range(3):
            plus = loop_dot(images[i].tolist(), classes[c].tolist())
            minus = loop_dot(images[i].tolist(), other[c].tolist())
            assert difference_score(positive, negative)[i, c].item() == pytest.approx(plus - minus)
            assert softmax_score(positive, negative)[i, c].item() == pytest.approx(
                loop_softmax_score(plus, minus)
            )


def test_shared_negatives_serve_every_label():
    images, positive = unit(random_tensor(4, 6)), unit(random_tensor(3, 6, seed=1))
    shared = unit(random_tensor(1, 6, seed=2))
    repeated = multi_label_scores(images, positive, shared.expand(3, 6))
    torch.testing.assert_close(multi_label_scores(images, positive, shared), repeated)


def test_unknown_score_and_mismatched_negatives_are_refused():
    images = unit(random_tensor(4, 6))
    with pytest.raises(
        ValueError, match="unknown multi-label score 'ratio'; choose from difference, softmax"
    ):
        multi_label_scores(images, images, images, score="ratio")
    with pytest.raises(ValueError, match="4 labels need 1 or 4 negative embeddings, got 2"):
        multi_label_scores(images, images, images[:2])
