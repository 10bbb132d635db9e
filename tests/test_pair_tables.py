"""Pair tables and how features become one: region pools, excluded candidates, soft targets."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from models.features import PairFeatures
from models.guidance import mean_unit_tokens
from models.methods.clip import CLIP
from models.methods.cloob import CLOOB
from models.pair_table import PairTable
from models.recipe import TableRecipe
from models.similarities import pool_region_scores, retrieval_diagnostics
from models.table_slots import Candidates, Directions, RegionPool, Targets
from models.table_targets import IMAGE_TO_TEXT, TEXT_TO_IMAGE
from models.targets import mean_off_diagonal_mass
from tests.oracles.contrastive import loop_pool
from tests.pair_fixture import SINGLE, draw, given_features, make_batch, tables_of, unit

B = 5
X, Y, PATCHES = unit(B, 4), unit(B, 4, seed=1), draw(B, 6, 4, seed=2)
BATCH = make_batch([4] * B)
LSE = RegionPool(kind="lse", sharpness=7.0)
POOLS = [RegionPool(kind="max"), RegionPool(kind="mean"), LSE]


def tables(recipe: TableRecipe, batch=BATCH) -> dict[str, PairTable]:
    return tables_of(recipe, given_features(X, Y, patches=PATCHES), batch, inverse_temperature=3.0)


def test_a_square_table_has_its_pairs_on_the_diagonal():
    table = PairTable.square(draw(4, 4))
    assert torch.equal(table.positive_scores, table.scores.diagonal())
    assert torch.equal(table.is_positive, torch.eye(4, dtype=torch.bool))
    assert torch.equal(table.is_negative, ~table.is_positive)
    assert table.masked_scores() is table.scores


def test_the_own_pair_is_a_candidate_whatever_the_mask_says():
    table = PairTable(draw(2, 4), torch.tensor([3, 1]), is_valid=torch.zeros(2, 4, dtype=torch.bool))
    assert not table.is_negative.any()
    assert torch.equal(table.masked_scores().isfinite(), table.is_positive)


def test_global_tables_are_scaled_cosines():
    found = tables(TableRecipe())
    torch.testing.assert_close(found[IMAGE_TO_TEXT].scores, 3.0 * X @ Y.T)
    torch.testing.assert_close(found[TEXT_TO_IMAGE].scores, 3.0 * Y @ X.T)
    for table in found.values():
        assert torch.equal(table.positive, torch.arange(B))
        assert table.is_valid is None
        assert table.log_targets is None


def test_a_direction_of_weight_zero_has_no_table():
    one_way = TableRecipe(directions=Directions(image_to_text=1.0, text_to_image=0.0))
    assert list(tables(one_way)) == [IMAGE_TO_TEXT]


@pytest.mark.parametrize("pool", POOLS, ids=lambda p: p.kind)
def test_region_pools_equal_the_loop(pool):
    similarities = draw(3, 6, 4).tanh()
    expected = torch.tensor(
        loop_pool(similarities, kind=pool.kind, sharpness=pool.sharpness), dtype=torch.float64
    )
    torch.testing.assert_close(pool_region_scores(similarities, pool), expected)
    assert not torch.allclose(pool_region_scores(-similarities, pool), expected)


@pytest.mark.parametrize("pool", POOLS, ids=lambda p: p.kind)
def test_region_tables_score_unit_patches_and_transpose_each_other(pool):
    found = tables(TableRecipe(region_pool=pool))
    cosines = torch.einsum("bpd,nd->bpn", F.normalize(PATCHES, dim=2), Y)
    torch.testing.assert_close(found[IMAGE_TO_TEXT].scores, 3.0 * pool_region_scores(cosines, pool))
    torch.testing.assert_close(found[TEXT_TO_IMAGE].scores, found[IMAGE_TO_TEXT].scores.T)


@pytest.mark.parametrize("pool", POOLS, ids=lambda p: p.kind)
def test_the_order_of_patches_is_irrelevant(pool):
    similarities = draw(3, 6, 4)
    shuffled = similarities[:, [5, 3, 1, 0, 2, 4]]
    torch.testing.assert_close(pool_region_scores(shuffled, pool), pool_region_scores(similarities, pool))


def test_log_sum_exp_lies_between_mean_and_maximum():
    similarities = draw(3, 6, 4).tanh()
    lowest = pool_region_scores(similarities, RegionPool(kind="lse", sharpness=1e-6))
    torch.testing.assert_close(lowest, similarities.mean(1), atol=1e-6, rtol=0)
    highest = pool_region_scores(similarities, RegionPool(kind="lse", sharpness=1e5))
    torch.testing.assert_close(highest, similarities.amax(1), atol=1e-4, rtol=0)
    between = pool_region_scores(similarities, LSE)
    assert ((similarities.mean(1) < between) & (between < similarities.amax(1))).all()


@pytest.mark.parametrize(("exclude", "key"), [("same_group", "group_keys"), ("same_text", "text_keys")])
def test_pairs_that_share_a_key_are_no_candidates(exclude, key):
    batch = replace(BATCH, **{key: torch.tensor([7, 8, 7, 9, 7])})
    expected = torch.ones(B, B, dtype=torch.bool)
    for i, j in ((0, 2), (0, 4), (2, 4)):
        expected[i, j] = expected[j, i] = False
    for table in tables(TableRecipe(candidates=Candidates(exclude=exclude)), batch).values():
        assert torch.equal(table.is_valid, expected)


def test_soft_targets_have_the_wanted_mass_off_the_own_pair():
    soft = Targets(kind="soft", mixing=1.0, off_diagonal_mass=0.4)
    for direction, table in tables(TableRecipe(targets=soft)).items():
        off = 1 - table.log_targets.exp().diagonal().mean()
        # the bracket is halved 24 times: a relative error of about 1e-6 in the temperature
        assert off.item() == pytest.approx(0.4, abs=1e-5), direction
        assert not table.log_targets.requires_grad


@pytest.mark.parametrize(
    ("chosen", "direction", "guidance"),
    [
        ({"image_guidance": "patches"}, IMAGE_TO_TEXT, mean_unit_tokens(PATCHES)),
        ({"image_guidance": "embeds"}, IMAGE_TO_TEXT, X),
        ({"text_guidance": "embeds"}, TEXT_TO_IMAGE, Y),
    ],
)
def test_guidance_of_each_direction(chosen, direction, guidance):
    table = tables(TableRecipe(targets=Targets(kind="soft", mixing=1.0, **chosen)))[direction]
    similarities = guidance @ guidance.T
    # log-targets are the similarities over one temperature, up to a constant per row
    found = table.log_targets - table.log_targets.diagonal()[:, None]
    expected = similarities - similarities.diagonal()[:, None]
    ratio = (found / expected)[~torch.eye(B, dtype=torch.bool)]
    torch.testing.assert_close(ratio, ratio[0].expand_as(ratio))
    mass = mean_off_diagonal_mass(similarities, torch.arange(B), temperature=1 / ratio[0])
    assert mass.item() == pytest.approx(0.5, abs=1e-5)


def test_texts_with_the_same_words_share_their_target():
    batch = replace(BATCH, token_ids=BATCH.token_ids[:, [0, 1, 2, 3, 0]])
    table = tables(TableRecipe(targets=Targets(kind="soft", mixing=1.0)), batch)[TEXT_TO_IMAGE]
    targets = table.log_targets.exp()
    torch.testing.assert_close(targets[0], targets[4])
    assert targets[0, 0].item() == pytest.approx(targets[0, 4].item())
    assert targets[0, 0] > 2 * targets[0, 1]


def test_retrieval_is_watched_only_where_it_happens():
    features = PairFeatures(given_features(X, Y), BATCH, None, SINGLE)
    assert retrieval_diagnostics(CLIP, features) == {}
    found = retrieval_diagnostics(CLOOB, features)
    assert set(found) == {"retrieved_images", "retrieved_texts"}
    assert all(1 < value < B for value in found.values())


def test_a_pool_that_pools_no_scores_is_refused():
    with pytest.raises(ValueError, match=r"region_pool.kind=global pools no scores of patches"):
        pool_region_scores(draw(1, 2, 3), RegionPool())
