"""Stand-ins for detector regions and tags: stored values, empty rows, refusals."""

import pytest
import torch
import torch.nn.functional as F

from models.guidance import (
    centred,
    hashed_words,
    late_patch_guidance,
    late_similarity,
    mean_patch_guidance,
    self_similarity,
    tag_cosine,
    tag_jaccard,
    top_patches,
    weighted_patch_guidance,
)
from models.targets import soft_targets
from tests.golden_files import assert_golden, tensors


def draw(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_patch_guidance_equals_the_stored_substitutes():
    golden = tensors("softclip_patch_substitute")
    kept = top_patches(golden["score"], golden["kept"].shape[1])
    assert torch.equal(kept, golden["kept"])
    mean = mean_patch_guidance(golden["tokens"], kept)
    weighted = weighted_patch_guidance(golden["tokens"], golden["score"], kept)
    chosen = late_patch_guidance(golden["tokens"], kept)
    assert_golden(mean, golden["r_mean"])
    assert_golden(weighted, golden["r_weighted"])
    assert_golden(self_similarity(mean, mean), golden["sim_mean"])
    assert_golden(self_similarity(weighted, weighted), golden["sim_weighted"])
    assert_golden(late_similarity(chosen, chosen), golden["sim_late"])
    assert not torch.allclose(golden["sim_mean"], golden["sim_weighted"])


def test_tag_guidance_equals_the_stored_substitutes():
    golden = tensors("softclip_tag_substitute")
    labels, own = golden["labels"], torch.arange(len(golden["labels"]))
    cosine, jaccard = tag_cosine(labels, labels, own), tag_jaccard(labels, labels)
    assert_golden(cosine, golden["cosine"])
    assert_golden(jaccard, golden["jaccard"])
    assert_golden(soft_targets(cosine, own, temperature=0.1, mixing=1.0).exp(), golden["q_cosine"])
    assert_golden(soft_targets(jaccard, own, temperature=0.1, mixing=1.0).exp(), golden["q_jaccard"])
    empty = torch.zeros(2, 3, dtype=torch.float64)
    assert torch.equal(tag_cosine(empty, empty, torch.arange(2)), torch.eye(2, dtype=torch.float64))
    assert torch.equal(tag_jaccard(empty, empty), torch.ones(2, 2, dtype=torch.float64))


def test_centring_spreads_guidance_that_is_all_alike():
    guidance = F.normalize(draw(16, 8) + 5.0, dim=1)
    spread = centred(guidance, guidance)
    off = ~torch.eye(16, dtype=torch.bool)
    assert self_similarity(guidance, guidance)[off].min() > 0.8
    assert self_similarity(spread, spread)[off].abs().mean() < 0.4


def test_a_slice_of_rows_has_the_similarities_of_the_whole_batch():
    labels, part = (draw(6, 4) > 0).double(), slice(2, 5)
    own = torch.arange(6)
    assert torch.equal(tag_cosine(labels[part], labels, own[part]), tag_cosine(labels, labels, own)[part])
    assert torch.equal(tag_jaccard(labels[part], labels), tag_jaccard(labels, labels)[part])
    assert not torch.equal(tag_jaccard(labels[part], labels), tag_jaccard(labels, labels)[:3])


def test_ties_of_patch_scores_go_to_the_lower_index():
    assert top_patches(torch.zeros(1, 5), 2).tolist() == [[0, 1]]


@pytest.mark.parametrize("count", [0, 4])
def test_a_count_that_does_not_fit_is_refused(count):
    with pytest.raises(ValueError, match=rf"count must be in \[1, 3\], got {count}"):
        top_patches(torch.zeros(1, 3), count)


def test_hashed_words_ignore_padding_order_repeats_and_the_ends():
    ids = torch.tensor([[1, 5, 6, 2, 0], [1, 6, 5, 5, 2], [3, 6, 5, 4, 9], [1, 7, 8, 2, 0], [1, 2, 0, 0, 0]])
    real = torch.arange(5) < torch.tensor([4, 5, 4, 4, 2])[:, None]
    rows = hashed_words(ids, real)
    table = rows @ rows.T
    torch.testing.assert_close(table[:3, :3], torch.ones(3, 3))
    assert table[0, 3] == 0
    assert rows[4].abs().sum() == 0  # no word at all
    assert not torch.equal(hashed_words(ids, torch.ones_like(real))[0], rows[0])
