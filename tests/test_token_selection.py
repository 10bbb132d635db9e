"""Keep rules: released masks, constant counts, ties, controls."""

import pytest
import torch

from models.token_selection import (
    block_scores,
    expand_blocks,
    is_kept,
    keep_attentive,
    keep_least_attentive,
    keep_mixed,
    keep_random,
    keep_random_blocks,
    num_kept_blocks,
    num_kept_random,
    spread_block_scores,
)
from tests.golden_files import assert_golden, tensors
from tests.oracles.aclip import loop_kept

RATIOS = [("r25", 0.25), ("r50", 0.5), ("r75", 0.75)]


def uniform(*shape, seed=0):
    return torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ["aclip_att_mask_b1", "aclip_att_mask_b2"])
def test_attentive_equals_the_aclip_release(name):
    golden = tensors(name)
    assert_golden(block_scores(golden["score"]), golden["block_score"])
    for key, ratio in RATIOS:
        kept = keep_attentive(golden["score"], keep_ratio=ratio)
        assert torch.equal(kept, golden[f"kept_{key}"])
        assert torch.equal(~is_kept(kept, 196), golden[f"mask_removed_{key}"])
        assert not torch.equal(keep_least_attentive(golden["score"], keep_ratio=ratio), kept)


def test_attentive_equals_the_release_in_the_end_to_end_case():
    golden = tensors("aclip_e2e_tiny")
    scores = torch.cat([golden["score_view1"], golden["score_view2"]])
    assert torch.equal(~is_kept(keep_attentive(scores, keep_ratio=0.5), 196), golden["mask_removed"])


@pytest.mark.parametrize(("name", "ratio"), [("r50", 0.5), ("r75", 0.25)])
def test_random_equals_the_aclip_release(name, ratio):
    golden = tensors(f"aclip_random_masking_{name}")
    kept = keep_random(golden["noise"], keep_ratio=ratio)
    assert torch.equal(kept, golden["ids_keep"].sort(dim=1).values)
    assert torch.equal(~is_kept(kept, 196), golden["mask_removed"].bool())
    tokens = golden["x"].gather(1, kept[:, :, None].expand(-1, -1, 4))
    released_order = golden["ids_keep"].argsort(dim=1)[:, :, None].expand(-1, -1, 4)
    assert torch.equal(tokens, golden["x_kept"].gather(1, released_order))
    assert not torch.equal(keep_random(-golden["noise"], keep_ratio=ratio), kept)


@pytest.mark.parametrize(("num_patches", "block"), [(196, 2), (16, 1), (16, 2), (36, 1), (36, 3), (9, 1)])
@pytest.mark.parametrize("ratio", [0.1, 0.5])
def test_attentive_equals_the_loop(num_patches, block, ratio):
    scores = uniform(5, num_patches)
    kept = keep_attentive(scores, keep_ratio=ratio, block=block)
    assert kept.tolist() == loop_kept(scores, keep_ratio=ratio, block=block)
    other = uniform(5, num_patches, seed=1)
    assert kept.tolist() != loop_kept(other, keep_ratio=ratio, block=block)


def test_a_ratio_of_one_keeps_everything():
    assert keep_attentive(uniform(1, 16), keep_ratio=1.0).tolist() == [list(range(16))]
    assert keep_random(uniform(1, 16), keep_ratio=1.0).tolist() == [list(range(16))]


def test_published_counts():
    assert [num_kept_blocks(49, r) for r in (0.25, 0.5, 0.75, 1.0)] == [13, 25, 37, 49]
    assert [num_kept_random(196, r) for r in (0.25, 0.5)] == [49, 98]
    assert num_kept_random(4, 0.1) == 1


def rules(scores, noise, *, keep_ratio, block):
    same = {"keep_ratio": keep_ratio, "block": block}
    return [
        keep_attentive(scores, **same),
        keep_least_attentive(scores, **same),
        keep_mixed(scores, noise, best_share=0.5, **same),
        keep_random_blocks(noise, **same),
    ]


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("block", [1, 2])
def test_every_rule_keeps_the_same_number_of_distinct_ascending_tokens(ratio, block):
    scores, noise = uniform(6, 36), uniform(6, 36, seed=1)
    scores[0] = 0.0  # nothing to tell apart
    num_kept = num_kept_blocks(36 // block**2, ratio) * block**2
    for kept in rules(scores, noise, keep_ratio=ratio, block=block):
        assert kept.dtype == torch.int64
        assert kept.shape == (6, num_kept)
        assert (kept.diff(dim=1) > 0).all()
        assert is_kept(kept, 36).sum(dim=1).tolist() == [num_kept] * 6


def test_ties_go_to_the_lower_index():
    scores = torch.zeros(1, 16)
    scores[0, 9] = 1.0
    assert keep_attentive(scores, keep_ratio=0.25, block=1).tolist() == [[0, 1, 2, 3, 9]]
    assert keep_least_attentive(scores, keep_ratio=0.25, block=1).tolist() == [[0, 1, 2, 3, 4]]
    assert keep_random(torch.zeros(1, 16), keep_ratio=0.25).tolist() == [[0, 1, 2, 3]]


def test_each_sample_is_selected_on_its_own():
    scores, order = uniform(6, 36), torch.tensor([3, 1, 5, 0, 2, 4])
    kept = keep_attentive(scores, keep_ratio=0.5, block=1)
    assert torch.equal(keep_attentive(scores[order], keep_ratio=0.5, block=1), kept[order])
    assert not torch.equal(kept[order], kept)


def test_low_and_high_meet_only_in_the_middle_block():
    scores = uniform(4, 196)
    low, high = (is_kept(f(scores, keep_ratio=0.5), 196) for f in (keep_attentive, keep_least_attentive))
    assert (low & high).sum(dim=1).tolist() == [4] * 4  # 25 + 25 of 49 blocks
    assert (low | high).all()


def test_mixed_runs_from_random_to_attentive():
    scores, noise = uniform(4, 196), uniform(4, 196, seed=1)
    mixed = {share: keep_mixed(scores, noise, keep_ratio=0.5, best_share=share) for share in (0.0, 0.4, 1.0)}
    attentive = keep_attentive(scores, keep_ratio=0.5)
    assert torch.equal(mixed[1.0], attentive)
    assert torch.equal(mixed[0.0], keep_random_blocks(noise, keep_ratio=0.5))
    best = keep_attentive(scores, keep_ratio=0.4 / 2 - 1e-9)  # 10 of 49 blocks
    assert best.shape[1] == 40
    assert (is_kept(mixed[0.4], 196) | ~is_kept(best, 196)).all()
    assert not torch.equal(mixed[0.4], attentive)


def test_random_rules_use_nothing_but_the_noise():
    noise, other = uniform(4, 36), uniform(4, 36, seed=1)
    for rule in (keep_random, keep_random_blocks):
        assert torch.equal(rule(noise, keep_ratio=0.5), rule(noise.clone(), keep_ratio=0.5))
        assert not torch.equal(rule(noise, keep_ratio=0.5), rule(other, keep_ratio=0.5))


def test_half_precision_scores_are_averaged_in_float32():
    scores = uniform(2, 196).bfloat16()
    assert block_scores(scores).dtype == torch.float32
    assert torch.equal(block_scores(scores), block_scores(scores.float()))


def test_inputs_are_not_changed():
    scores, noise = uniform(2, 36), uniform(2, 36, seed=1)
    before = scores.clone(), noise.clone()
    rules(scores, noise, keep_ratio=0.5, block=2)
    keep_random(noise, keep_ratio=0.5)
    assert torch.equal(scores, before[0])
    assert torch.equal(noise, before[1])


def test_expanded_blocks_are_squares():
    assert expand_blocks(torch.tensor([[0, 3]]), num_patches=16).tolist() == [[0, 1, 4, 5, 10, 11, 14, 15]]


@pytest.mark.parametrize(("side", "grid"), [(7, 14), (4, 4), (2, 6)])
def test_block_scores_of_spread_scores_are_the_scores(side, grid):
    coarse = uniform(3, side * side)
    spread = spread_block_scores(coarse, num_patches=grid * grid)
    assert spread.shape == (3, grid * grid)
    torch.testing.assert_close(block_scores(spread, block=grid // side), coarse, rtol=1e-15, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_half_resolution_map_keeps_its_own_best_blocks(dtype):
    coarse = uniform(5, 49).to(dtype)
    kept = keep_attentive(spread_block_scores(coarse, num_patches=196), keep_ratio=0.5)
    best = coarse.argsort(dim=1, descending=True, stable=True)[:, :25]
    assert torch.equal(kept, expand_blocks(best, num_patches=196))
    assert kept.shape[1] == 100
    other = keep_attentive(spread_block_scores(coarse.flip(1), num_patches=196), keep_ratio=0.5)
    assert not torch.equal(kept, other)


def test_a_map_of_2x2_means_and_its_full_map_keep_the_same_tokens():
    golden = tensors("aclip_att_mask_b2")
    spread = spread_block_scores(block_scores(golden["score"]), num_patches=196)
    for key, ratio in RATIOS:
        assert torch.equal(keep_attentive(spread, keep_ratio=ratio), golden[f"kept_{key}"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: spread_block_scores(torch.ones(1, 49), num_patches=144), "a 7x7 score map does not divide"),
        (
            lambda: spread_block_scores(torch.ones(1, 16), num_patches=4),
            "a 4x4 score map does not divide the",
        ),
        (lambda: spread_block_scores(torch.ones(1, 15), num_patches=16), "square grid, got 15"),
        (lambda: keep_attentive(torch.ones(1, 16), keep_ratio=0.0), r"keep_ratio must be in \(0, 1\], got 0"),
        (lambda: keep_random(torch.ones(1, 16), keep_ratio=1.5), r"keep_ratio must be in \(0, 1\], got 1.5"),
        (lambda: keep_attentive(torch.ones(1, 15), keep_ratio=0.5), "square grid, got 15"),
        (lambda: keep_attentive(torch.ones(1, 9), keep_ratio=0.5), "block=2 does not divide the 3x3"),
        (lambda: block_scores(torch.ones(1, 9), block=0), "block=0 does not divide"),
        (
            lambda: keep_mixed(torch.ones(1, 4), torch.ones(1, 9), keep_ratio=0.5, best_share=0.5),
            r"noise has shape \(1, 9\), scores \(1, 4\)",
        ),
        (
            lambda: keep_mixed(torch.ones(1, 4), torch.ones(1, 4), keep_ratio=0.5, best_share=2),
            r"best_share must be in \[0, 1\], got 2",
        ),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
