"""Tables and losses of single slots from given features: loops, what the mask leaves out, workers."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.bounds import TUBA
from models.estimators import JensenShannon
from models.features import PairFeatures
from models.gather import Gather
from models.keyed_noise import Draw, keyed_uniform
from models.methods.clip import CLIP
from models.methods.clip_lite import CLIP_LITE
from models.methods.dim import DIM
from models.methods.local_mi import LOCAL_MI_PMI, LOCAL_MI_SELECT
from models.outputs import PairOutputs
from models.recipe import TableRecipe
from models.retrieval import hopfield_retrieval
from models.table_slots import (
    Baseline,
    Candidates,
    Directions,
    RegionPool,
    Temperature,
    Transform,
)
from models.table_targets import IMAGE_TO_TEXT, TEXT_TO_IMAGE
from tests.fake_gather import run_workers
from tests.oracles.bounds import loop_tuba
from tests.oracles.contrastive import (
    LoopTable,
    loop_ce,
    loop_jsd,
)
from tests.oracles.divergences import loop_f_divergence, loop_local_info_nce
from tests.oracles.tables import loop_region_rule
from tests.pair_fixture import (
    SINGLE,
    build_objective,
    draw,
    given_features,
    loss_of_features,
    make_batch,
    rows_of,
    tables_of,
    unit,
)

B = 6
X, Y, PATCHES = unit(B, 4), unit(B, 4, seed=1), draw(B, 5, 4, seed=2)
OUTPUTS = given_features(X, Y, patches=PATCHES)
GROUPS = torch.tensor([7, 7, 2, 3, 2, 5])
BATCH = replace(make_batch([4] * B), group_keys=GROUPS, text_keys=torch.tensor([0, 1, 2, 2, 4, 5]))
OTHER_GROUP = (GROUPS[:, None] != GROUPS) | torch.eye(B, dtype=torch.bool)
ONE = Temperature(policy="fixed", init=1.0)
ONE_WAY = Directions(image_to_text=1.0, text_to_image=0.0)
OTHER_WAY = Directions(image_to_text=0.0, text_to_image=1.0)


def both_ways(loop, scores: Tensor, valid: Tensor | None = None) -> float:
    """Mean of a loop's value with rows and with columns as queries."""
    tables = [LoopTable(table, list(range(len(scores))), valid) for table in (scores, scores.T)]
    return sum(loop(table) for table in tables) / 2


def mean_ce(table: LoopTable) -> float:
    return sum(loop_ce(table)) / len(table.positive)


def loss(recipe, outputs: PairOutputs = OUTPUTS) -> float:
    return loss_of_features(recipe, outputs, BATCH).item()


# Candidates


@pytest.mark.parametrize("kind", ["none", "hopfield"])
def test_the_own_modality_adds_everybody_but_oneself(kind):
    recipe = TableRecipe(candidates=Candidates(modality="both"), transform=Transform(kind=kind, beta=3.0))
    found = tables_of(recipe, OUTPUTS, BATCH, inverse_temperature=2.0)
    for name, queries, keys in ((IMAGE_TO_TEXT, X, Y), (TEXT_TO_IMAGE, Y, X)):
        memory = queries
        if kind == "hopfield":  # both sides of a direction come from the queries' memory
            queries, keys = (hopfield_retrieval(side, memory, beta=3.0) for side in (queries, keys))
        expected = 2.0 * torch.cat([queries @ keys.T, queries @ queries.T], 1)
        torch.testing.assert_close(found[name].scores, expected)
        assert torch.equal(found[name].is_valid[:, B:], ~torch.eye(B, dtype=torch.bool))
        assert found[name].is_valid[:, :B].all()


def test_an_excluded_pair_is_no_negative_in_either_modality():
    candidates = Candidates(modality="both", exclude="same_group")
    for table in tables_of(TableRecipe(candidates=candidates), OUTPUTS, BATCH).values():
        assert torch.equal(table.is_valid[:, :B], OTHER_GROUP)
        assert torch.equal(table.is_valid[:, B:], OTHER_GROUP & ~torch.eye(B, dtype=torch.bool))


def test_missing_second_texts_are_neither_queries_nor_candidates():
    texts = torch.stack([Y, unit(B, 4, seed=7)])
    there = torch.tensor([True, False, True, True, False, True])
    outputs = given_features(X, texts, is_text=torch.stack([torch.ones_like(there), there]))
    for between, first in (("texts", Y), ("image_text2", X)):
        found = tables_of(TableRecipe(between=between), outputs, BATCH)
        torch.testing.assert_close(found[IMAGE_TO_TEXT].scores, first @ texts[1].T)
        torch.testing.assert_close(found[TEXT_TO_IMAGE].scores, texts[1] @ first.T)
        for table in found.values():
            assert torch.equal(table.row_weights, there.double())
            assert torch.equal(table.is_valid, there | torch.eye(B, dtype=torch.bool))
        apart = TableRecipe(between=between, candidates=Candidates(exclude="same_group"))
        for table in tables_of(apart, outputs, BATCH).values():
            assert torch.equal(table.is_valid, (there & OTHER_GROUP) | torch.eye(B, dtype=torch.bool))
    views = given_features(torch.stack([X, Y]), texts)
    found = tables_of(TableRecipe(between="image_views"), views, BATCH)
    torch.testing.assert_close(found[IMAGE_TO_TEXT].scores, X @ Y.T)
    assert found[IMAGE_TO_TEXT].row_weights is None


def rolled(gather: Gather, batch) -> Tensor:
    return PairFeatures(OUTPUTS, batch, None, gather).rolled()


def test_rolled_partners_are_a_permutation_without_fixed_points():
    orders = set()
    for seed in range(20):
        found = rolled(SINGLE, replace(BATCH, draw_keys=make_batch([4] * B, seed=seed).draw_keys))
        assert sorted(found.tolist()) == list(range(B))
        assert (found != torch.arange(B)).all()
        orders.add(tuple(found.tolist()))
    assert len(orders) > 15


@pytest.mark.parametrize("world", [2, 3, 6])
def test_rolled_partners_do_not_depend_on_the_workers(world):
    size = B // world
    shares = [rows_of(BATCH, slice(rank * size, (rank + 1) * size)) for rank in range(world)]
    found = run_workers(world, lambda gather: rolled(gather, shares[gather.rank]))
    assert torch.equal(torch.cat(found), rolled(SINGLE, BATCH))
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    # The partner goes with the pair: position i holds pair order[i].
    assert torch.equal(order[rolled(SINGLE, rows_of(BATCH, order))], rolled(SINGLE, BATCH)[order])


def test_clip_lite_has_one_rolled_negative():
    order = sorted(range(B), key=lambda i: keyed_uniform(BATCH.draw_keys, Draw.ROLL, 1)[i].item())
    partner = {order[i]: order[(i + 1) % B] for i in range(B)}
    valid = torch.zeros(B, B, dtype=torch.bool)
    for own, other in partner.items():
        valid[own, other] = True
    expected = loop_jsd(LoopTable(X @ Y.T / 0.07, list(range(B)), valid))
    assert loss(CLIP_LITE) == pytest.approx(expected, rel=1e-6)  # a learned temperature is float32 first
    both = replace(CLIP_LITE, directions=Directions(), temperature=ONE)
    assert loss(both) == pytest.approx(both_ways(loop_jsd, X @ Y.T, valid), rel=1e-12)
    everybody = loop_jsd(LoopTable(X @ Y.T / 0.07, list(range(B))))
    assert abs(everybody - expected) > 0.1


# Pools


PATCH_LOCALS = F.normalize(PATCHES, dim=2).mT
EACH = TableRecipe(region_pool=RegionPool(kind="each"), temperature=ONE, directions=ONE_WAY)


@pytest.mark.parametrize("exclude", ["nothing", "same_group"])
@pytest.mark.parametrize("between", ["image_text", "image_regions"])
def test_each_patch_tells_its_text_or_image_from_others(between, exclude):
    """Deep InfoMax: Jensen-Shannon but for 2 log 2, and InfoNCE over the patches of other images."""
    valid = OTHER_GROUP.tolist() if exclude == "same_group" else None
    globals_ = (Y if between == "image_text" else X)[:, :, None]
    each = replace(EACH, between=between, candidates=Candidates(exclude=exclude))
    expected = loop_f_divergence(PATCH_LOCALS, globals_, measure="jsd", valid=valid) + 2 * math.log(2)
    jsd = replace(each, estimator=JensenShannon())
    for directions in (ONE_WAY, OTHER_WAY):
        assert table_loss(replace(jsd, directions=directions)) == pytest.approx(expected, rel=1e-12)
    info_nce = replace(each, directions=OTHER_WAY)
    sought = loop_local_info_nce(PATCH_LOCALS, globals_, own_image_score=None, valid=valid)
    assert table_loss(info_nce) == pytest.approx(sought, rel=1e-12)
    others = replace(OUTPUTS, image_tokens=OUTPUTS.image_tokens.roll(1, 1))
    assert abs(table_loss(jsd, others) - expected) > 1e-3
    assert abs(table_loss(info_nce, others) - sought) > 1e-2


def test_a_pool_of_patches_is_told_whole_images_from_one_another():
    recipe = TableRecipe(between="image_regions", region_pool=RegionPool(kind="max"))
    found = tables_of(recipe, OUTPUTS, BATCH)
    expected = torch.einsum("bpd,nd->bpn", F.normalize(PATCHES, dim=2), X).amax(1)
    torch.testing.assert_close(found[IMAGE_TO_TEXT].scores, expected)
    torch.testing.assert_close(found[TEXT_TO_IMAGE].scores, expected.T)
    assert (expected - expected.T).abs().max() > 0.1


def table_loss(table: TableRecipe, outputs: PairOutputs = OUTPUTS) -> float:
    """Of a table alone."""
    recipe = replace(CLIP, weight=0.0, extra_tables={"extra": table})
    return loss_of_features(recipe, outputs, BATCH).item()


def test_each_patch_takes_a_baseline_and_a_rolled_partner():
    tuba = replace(EACH, estimator=TUBA(), baseline=Baseline(value=0.3))
    scores = torch.einsum("bpd,nd->bpn", F.normalize(PATCHES, dim=2), Y).flatten(0, 1)
    own = [pair for pair in range(B) for _ in range(5)]
    assert table_loss(tuba) == pytest.approx(-loop_tuba(LoopTable(scores, own), [0.3] * 30), rel=1e-12)
    partner = rolled(SINGLE, BATCH)
    valid = torch.zeros(30, B, dtype=torch.bool).scatter(1, partner[own][:, None], True)
    roll = replace(EACH, candidates=Candidates(kind="roll"), estimator=JensenShannon())
    assert table_loss(roll) == pytest.approx(loop_jsd(LoopTable(scores, own, valid)), rel=1e-12)
    assert abs(table_loss(replace(roll, candidates=Candidates())) - table_loss(roll)) > 1e-3


def test_deep_infomax_adds_three_tables_and_the_prior():
    objective = build_objective(DIM, OUTPUTS)
    terms = objective(OUTPUTS, BATCH, None, SINGLE).terms
    assert set(terms) == {"main", "image", "global", "prior", "prior_discriminator"}
    temperature = 0.07
    for name, globals_ in (("main", Y), ("image", X)):
        scaled = globals_[:, :, None] / temperature
        expected = loop_f_divergence(PATCH_LOCALS, scaled, measure="jsd") + 2 * math.log(2)
        assert terms[name].item() == pytest.approx(expected, rel=1e-6)
    assert terms["global"].item() == pytest.approx(both_ways(loop_jsd, X @ Y.T / temperature), rel=1e-6)


@pytest.mark.parametrize(("rule", "recipe"), [("select", LOCAL_MI_SELECT), ("pmi", LOCAL_MI_PMI)])
def test_a_patch_chosen_on_the_own_pair_speaks_to_all(rule, recipe):
    cosines = torch.einsum("bpd,nd->bpn", F.normalize(PATCHES, dim=2), Y)
    table = torch.tensor(loop_region_rule(cosines, rule=rule), dtype=torch.float64)
    recipe = replace(recipe, temperature=ONE, extra_tables={})
    assert loss(recipe) == pytest.approx(both_ways(mean_ce, table), rel=1e-12)
    best = torch.tensor(loop_region_rule(cosines, rule="max"), dtype=torch.float64)
    assert abs(both_ways(mean_ce, best) - loss(recipe)) > 1e-2
