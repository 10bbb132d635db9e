"""Region, word and sentence pools against stored values and gradients."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.attended_pooling import (
    attention_pool,
    global_mean_pool,
    gloria_attention,
    gloria_scores,
    non_local_pool,
)
from models.region_pooling import noisy_or, pool_lse, pool_max, pool_mean, select_regions
from models.sentence_pooling import pool_sentences
from tests.golden_files import assert_golden, leaf, tensors

DERIVED = tensors("mil_derived_pooling")
TAU, GAMMA = DERIVED["tau"].item(), DERIVED["gamma"].item()
MASK = DERIVED["sent_mask"]


def cross_entropy(logits: Tensor) -> Tensor:
    """Rows as queries, the pair on the diagonal."""
    return F.cross_entropy(logits, torch.arange(len(logits)))


def donsker_varadhan(table: Tensor) -> Tensor:
    negatives = table[~torch.eye(len(table), dtype=torch.bool)]
    return negatives.logsumexp(0) - math.log(len(negatives)) - table.diagonal().mean()


def cosines(regions: Tensor, sentences: Tensor) -> Tensor:
    return torch.einsum("bpd,nd->bpn", F.normalize(regions, dim=2), F.normalize(sentences, dim=1))


# Regions and sentences -> scores [B, N]; the noisy-or is in log-odds, all others are divided by TAU.
POOLS = {
    "max": lambda regions, sentences: pool_max(cosines(regions, sentences)),
    "mean": lambda regions, sentences: pool_mean(cosines(regions, sentences)),
    "lse": lambda regions, sentences: pool_lse(cosines(regions, sentences), GAMMA),
    "nor": lambda regions, sentences: noisy_or(cosines(regions, sentences) / TAU),
    "att": lambda regions, sentences: attention_pool(regions, sentences, temperature=TAU),
    "nl": lambda regions, sentences: non_local_pool(regions, sentences, DERIVED["A"]),
    "globalmean": global_mean_pool,
}


def sentence_scores(how: str, regions: Tensor, sentences: Tensor) -> Tensor:
    """All sentences of all reports as texts, [B, N, M]."""
    pooled = POOLS[how](regions, sentences.flatten(0, 1))
    return pooled.unflatten(1, sentences.shape[:2])


def symmetric_loss(how: str, regions: Tensor, sentences: Tensor) -> tuple[Tensor, Tensor]:
    table = pool_sentences(sentence_scores(how, regions, sentences), MASK, kind="mean")
    logits = table if how == "nor" else table / TAU
    return table, 0.5 * (cross_entropy(logits) + cross_entropy(logits.T))


@pytest.mark.parametrize("how", POOLS)
def test_region_pools_equal_the_derived_values(how):
    regions, sentences = leaf(DERIVED["V"]), leaf(DERIVED["U"])
    table, found = symmetric_loss(how, regions, sentences)
    assert_golden(table, DERIVED[f"{how}_doc"])
    assert_golden(found, DERIVED[f"{how}_loss"])
    found.backward()
    assert_golden(regions.grad, DERIVED[f"{how}_gradV"])
    assert_golden(sentences.grad, DERIVED[f"{how}_gradU"])
    others = [DERIVED[f"{other}_loss"] for other in POOLS if other != how]
    assert all(abs(found - other) > 1e-2 for other in others)


def test_instance_scores_are_cosines():
    found = cosines(DERIVED["V"], DERIVED["U"].flatten(0, 1)).unflatten(2, DERIVED["U"].shape[:2])
    assert_golden(found.permute(0, 2, 3, 1), DERIVED["inst_scores"])


def test_the_sum_of_two_pools_equals_the_derived_value():
    regions, sentences = leaf(DERIVED["V"]), leaf(DERIVED["U"])
    found = symmetric_loss("lse", regions, sentences)[1] + symmetric_loss("nl", regions, sentences)[1]
    assert_golden(found, DERIVED["lse_nl_loss"])
    found.backward()
    assert_golden(regions.grad, DERIVED["lse_nl_gradV"])
    assert_golden(sentences.grad, DERIVED["lse_nl_gradU"])


@pytest.mark.parametrize("kind", ["mean", "sum", "max", "lse"])
def test_sentence_pools_equal_the_derived_values(kind):
    scores = sentence_scores("lse", DERIVED["V"], DERIVED["U"])
    assert_golden(pool_sentences(scores, MASK, kind=kind), DERIVED[f"docpool_{kind}"])
    with_pads = pool_sentences(scores, torch.ones_like(MASK), kind=kind)
    assert (with_pads - DERIVED[f"docpool_{kind}"]).abs().max() > 1e-2


def gloria_inputs() -> tuple[dict[str, Tensor], Tensor]:
    golden = tensors("mil_gloria_official")
    is_word = torch.arange(golden["words"].shape[2]) < golden["lens"][:, None]
    return golden, is_word


def test_gloria_equals_the_release():
    """The release multiplies by 10 and adds both directions; its words are [N, D, T]."""
    golden, is_word = gloria_inputs()
    image, words = leaf(golden["img_local"]), leaf(golden["words"])
    regions, word_rows = image.flatten(2).mT, words.mT
    scores = gloria_scores(regions, word_rows, is_word)
    assert_golden(scores, golden["local_scores"])
    image_to_text, text_to_image = cross_entropy(10 * scores), cross_entropy(10 * scores.T)
    assert_golden(image_to_text, golden["local_i2t"])
    assert_golden(text_to_image, golden["local_t2i"])
    (image_to_text + text_to_image).backward()
    assert_golden(image.grad, golden["grad_img_local"])
    assert_golden(words.grad, golden["grad_words"])
    with_pads = gloria_scores(regions, word_rows, torch.ones_like(is_word))
    assert (with_pads - golden["local_scores"]).abs().max() > 1e-2


def test_gloria_mean_over_words_equals_the_release():
    golden, is_word = gloria_inputs()
    scores = gloria_scores(golden["img_local"].flatten(2).mT, golden["words"].mT, is_word, aggregation="mean")
    assert_golden(cross_entropy(10 * scores), golden["local_i2t_mean"])
    assert_golden(cross_entropy(10 * scores.T), golden["local_t2i_mean"])
    assert abs(cross_entropy(10 * scores) - golden["local_i2t"]) > 0.1


def test_gloria_attention_equals_the_release():
    golden, is_word = gloria_inputs()
    found = gloria_attention(golden["img_local"].flatten(2).mT, golden["words"].mT, is_word)
    num_words = int(golden["lens"][0])
    assert_golden(found[0, 0, :num_words].reshape(1, num_words, 3, 3), golden["attn0"])
    assert (found[1, 0, :num_words].reshape(1, num_words, 3, 3) - golden["attn0"]).abs().max() > 1e-2


def test_gloria_global_term_equals_the_release():
    golden, _ = gloria_inputs()
    image, text = leaf(golden["img_global"]), leaf(golden["txt_global"])
    logits = 10 * global_mean_pool(image[:, None], text)
    assert_golden(cross_entropy(logits), golden["global_i2t"])
    assert_golden(cross_entropy(logits.T), golden["global_t2i"])
    (cross_entropy(logits) + cross_entropy(logits.T)).backward()
    assert_golden(image.grad, golden["grad_img_global"])
    assert_golden(text.grad, golden["grad_txt_global"])
    assert abs(cross_entropy(logits.roll(1, 0)) - golden["global_i2t"]) > 1e-2


LOCAL = tensors("localmi_derived_regions")
OWN = torch.arange(len(LOCAL["U"]))
RULES = {
    "max": pool_max,
    "sel": lambda scores: select_regions(scores, OWN, rule="select"),
    "pmi": lambda scores: select_regions(scores, OWN, rule="pmi"),
}
OBJECTIVES = {
    "dv": donsker_varadhan,
    "nce_row": cross_entropy,
    "nce_col": lambda table: cross_entropy(table.T),
}


def critic_scores(patches: Tensor, sentences: Tensor) -> Tensor:
    """The stored critic on every patch of every image and every sentence, [B, P, N]."""
    both = torch.cat(
        [
            patches[:, :, None].expand(-1, -1, len(sentences), -1),
            sentences.expand(*patches.shape[:2], -1, -1),
        ],
        3,
    )
    hidden = F.relu(both @ LOCAL["W1"].T + LOCAL["b1"])
    hidden = F.relu(hidden @ LOCAL["W2"].T + LOCAL["b2"])
    return (hidden @ LOCAL["W3"].T + LOCAL["b3"])[..., 0]


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("rule", RULES)
def test_region_rules_equal_the_derived_values(rule, objective):
    patches, sentences = leaf(LOCAL["V"]), leaf(LOCAL["U"])
    found = OBJECTIVES[objective](RULES[rule](critic_scores(patches, sentences)))
    key = f"{rule}_{objective}"
    assert_golden(found, LOCAL[key])
    found.backward()
    assert_golden(patches.grad, LOCAL[f"{key}_gradV"])
    assert_golden(sentences.grad, LOCAL[f"{key}_gradU"])
    others = [LOCAL[f"{other}_{objective}"] for other in RULES if other != rule]
    assert all(abs(found - other) > 1e-3 for other in others)


def test_regions_chosen_by_each_rule_are_the_derived_ones():
    scores = critic_scores(LOCAL["V"], LOCAL["U"])
    assert_golden(scores, LOCAL["S"].mT)
    assert_golden(pool_max(scores), LOCAL["score_max"])
    for rule, key in (("sel", "idx_sel"), ("pmi", "idx_pmi")):
        assert_golden(RULES[rule](scores), LOCAL["S"].mT[OWN, LOCAL[key]])
    assert not torch.equal(LOCAL["idx_sel"], LOCAL["idx_pmi"])
