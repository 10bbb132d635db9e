"""Losses of tables by their targets, relaxations and estimators against loops, excluded pairs included."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.bounds import NWJ, TUBA, Interpolated
from models.estimators import DonskerVaradhan, InfoNCE, RelationKL, SoftKL
from models.features import PairFeatures
from models.methods.bounds import BOUND_DV, BOUND_INTERPOLATED, BOUND_JS, BOUND_NWJ, BOUND_TUBA
from models.methods.clip import CLIP
from models.methods.cloob import CLOOB
from models.methods.mil import MIL_NOISY_OR
from models.methods.siglip import SIGLIP
from models.methods.softclip import SOFTCLIP_TAGS
from models.outputs import NUM_TAGS, PairOutputs
from models.recipe import TableRecipe
from models.similarities import pooled_scores
from models.table_slots import (
    Bias,
    Candidates,
    Directions,
    RegionPool,
    Targets,
    Temperature,
    Transform,
)
from models.tables import Scale
from models.targets import bisect_temperature, mean_off_diagonal_mass
from tests.golden_files import assert_golden, leaf, tensors
from tests.oracles.bounds import loop_interpolated, loop_nwj, loop_relax, loop_sigmoid, loop_tuba
from tests.oracles.contrastive import (
    LoopTable,
    loop_ce,
    loop_dv,
    loop_jsd,
    loop_kl,
    loop_relation_kl,
    loop_soft_ce,
)
from tests.oracles.softclip import loop_soft_targets
from tests.pair_fixture import (
    SINGLE,
    build_objective,
    draw,
    given_features,
    loss_of_features,
    make_batch,
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


# Targets


def test_tags_soften_both_directions():
    tags = F.normalize(BATCH.tags.double(), dim=1)
    similarities = (tags @ tags.T).fill_diagonal_(1.0)
    found = bisect_temperature(similarities, torch.arange(B), mass=0.5, num_halvings=24).item()
    soft, pure = (
        torch.tensor(loop_soft_targets(similarities, temperature=found, mixing=mixing), dtype=torch.float64)
        for mixing in (0.3, 1.0)
    )
    expected = both_ways(lambda table: sum(loop_kl(table, soft)) / B, X @ Y.T / 0.07)
    expected += both_ways(lambda table: sum(loop_relation_kl(table, pure)) / B, X @ Y.T / 0.07)
    assert loss(SOFTCLIP_TAGS) == pytest.approx(expected, rel=1e-6)
    changed = replace(BATCH, tags=BATCH.tags.roll(1, 0))
    assert abs(loss_of_features(SOFTCLIP_TAGS, OUTPUTS, changed).item() - expected) > 1e-3


def test_a_row_without_tags_is_like_itself_alone():
    bare = replace(BATCH, tags=BATCH.tags.index_fill(0, torch.tensor([2]), 0.0))
    guided = Targets(kind="soft", mixing=1.0, image_guidance="tags", text_guidance="tags")
    for table in tables_of(TableRecipe(targets=guided), OUTPUTS, bare).values():
        targets = table.log_targets.exp()
        assert targets[2, 2] > 2 * targets[2].masked_fill(torch.arange(B) == 2, 0.0).max()
        others = targets[2, torch.arange(B) != 2]
        torch.testing.assert_close(others, others[0].expand_as(others))


def test_softclip_at_the_stored_temperature_has_its_values_and_gradients():
    """Guidance of images in one patch each, that of texts in the tags; the stored temperature of the targets
    is given as the mass it leaves, which is found again by halving: 1e-6."""
    golden = tensors("softclip_loss_0")
    image, text = leaf(golden["v"]), leaf(golden["t"])
    tags = F.pad(golden["a"], (0, NUM_TAGS - golden["a"].shape[1]))
    batch = replace(make_batch([4] * 4), tags=tags)
    scale = Temperature(policy="fixed", init=1 / golden["scale"].item())
    totals = {"soft": 0.0, "re": 0.0}
    for directions, key, guidance in ((ONE_WAY, "v2t", golden["r"]), (OTHER_WAY, "t2v", golden["a"])):
        rows = F.normalize(guidance, dim=1)
        mass = mean_off_diagonal_mass(rows @ rows.T, torch.arange(4), temperature=golden["tau_intra"].item())
        for name, mixing, estimator in (
            ("soft", golden["beta"].item(), SoftKL()),
            ("re", 1.0, RelationKL()),
        ):
            targets = Targets(kind="soft", mixing=mixing, off_diagonal_mass=mass.item(), text_guidance="tags")
            recipe = replace(
                CLIP, targets=targets, estimator=estimator, directions=directions, temperature=scale
            )
            units = (F.normalize(side, dim=1) for side in (image, text))
            found = loss_of_features(recipe, given_features(*units, patches=golden["r"][:, None]), batch)
            assert_golden(found, golden[f"{name}_{key}"], atol=1e-6)
            totals[name] = totals[name] + 0.5 * found
    (totals["soft"] + totals["re"]).backward()
    assert_golden(image.grad, golden["g_total_v"], atol=1e-6)
    assert_golden(text.grad, golden["g_total_t"], atol=1e-6)
    assert abs(totals["soft"] - golden["soft"]) < 1e-6 < abs(totals["re"] - golden["soft"])


def smoothed_targets(valid: Tensor, *, mixing: float) -> Tensor:
    targets = torch.zeros(B, B, dtype=torch.float64)
    for row in range(B):
        others = [column for column in range(B) if column != row and valid[row, column]]
        for column in others:
            targets[row, column] = mixing / len(others)
        targets[row, row] = 1 - mixing if others else 1.0
    return targets


def group_targets(valid: Tensor, keys: Tensor) -> Tensor:
    targets = torch.zeros(B, B, dtype=torch.float64)
    for row in range(B):
        members = [c for c in range(B) if c == row or (keys[c] == keys[row] and valid[row, c])]
        for column in members:
            targets[row, column] = 1 / len(members)
    return targets


EVERYBODY = torch.ones(B, B, dtype=torch.bool)


@pytest.mark.parametrize("kind", ["smoothed", "same_group"])
@pytest.mark.parametrize("exclude", ["nothing", "same_text"])
@pytest.mark.parametrize("estimator", [InfoNCE(), SoftKL()], ids=["ce", "kl"])
def test_hard_targets_of_several_pairs_keep_to_the_candidates(kind, exclude, estimator):
    keys = replace(
        BATCH, text_keys=torch.tensor([0, 0, 2, 3, 4, 4]), group_keys=torch.tensor([7] * 2 + [2] * 4)
    )
    is_other = (keys.text_keys[:, None] != keys.text_keys) | torch.eye(B, dtype=torch.bool)
    valid = is_other if exclude == "same_text" else EVERYBODY
    wanted = (
        smoothed_targets(valid, mixing=0.3) if kind == "smoothed" else group_targets(valid, keys.group_keys)
    )
    loop = loop_soft_ce if estimator.kind == "ce" else loop_kl
    recipe = replace(
        CLIP,
        temperature=ONE,
        targets=Targets(kind=kind, mixing=0.3),
        candidates=Candidates(exclude=exclude),
        estimator=estimator,
    )
    found = loss_of_features(recipe, OUTPUTS, keys).item()
    expected = both_ways(lambda table: sum(loop(table, wanted)) / B, X @ Y.T, valid)
    assert found == pytest.approx(expected, rel=1e-7)  # log(1 / size) of a group is float32
    hard = loss_of_features(replace(recipe, targets=Targets(), estimator=InfoNCE()), OUTPUTS, keys).item()
    assert abs(hard - expected) > 1e-3


def test_a_row_whose_negatives_are_all_excluded_keeps_its_own_pair_as_its_target():
    alone = replace(BATCH, text_keys=torch.zeros(B, dtype=torch.int64))
    smoothed = Targets(kind="smoothed", mixing=0.3)
    recipe = TableRecipe(targets=smoothed, candidates=Candidates(exclude="same_text"))
    for table in tables_of(recipe, OUTPUTS, alone).values():
        assert torch.equal(table.log_targets.exp(), torch.eye(B, dtype=torch.float64))


# Transforms with excluded candidates


@pytest.mark.parametrize("kind", ["cap", "leaky", "cap_all"])
def test_relaxed_cosines_and_excluded_candidates_go_together(kind):
    close = F.normalize(X + 0.4 * Y, dim=1)
    outputs = given_features(X, close, patches=PATCHES)
    recipe = replace(
        CLIP,
        temperature=Temperature(policy="fixed", init=0.2),
        bias=Bias(policy="fixed", init=0.5),
        transform=Transform(kind=kind, limit=0.4, slope=0.3),
        candidates=Candidates(exclude="same_group"),
    )
    expected = 0.0
    for cosines in (X @ close.T, close @ X.T):
        held = loop_relax(cosines.tolist(), list(range(B)), kind=kind, limit=0.4, slope=0.3)
        scores = torch.tensor(held, dtype=torch.float64) / 0.2
        expected += mean_ce(LoopTable(scores, list(range(B)), OTHER_GROUP)) / 2
    assert loss(recipe, outputs) == pytest.approx(expected, rel=1e-10)
    for less in ({"transform": Transform()}, {"candidates": Candidates()}):
        assert abs(loss(replace(recipe, **less), outputs) - expected) > 1e-3
    # The cosine of a pool is limited as well, whatever the temperature and the bias.
    pooled = replace(recipe, region_pool=RegionPool(kind="max"))
    cosines = torch.einsum("bpd,nd->bpn", F.normalize(PATCHES, dim=2), close).amax(1)
    held_rows = loop_relax(cosines.tolist(), list(range(B)), kind=kind, limit=0.4, slope=0.3)
    held_columns = loop_relax(cosines.T.tolist(), list(range(B)), kind=kind, limit=0.4, slope=0.3)
    expected = sum(
        mean_ce(LoopTable(torch.tensor(held, dtype=torch.float64) / 0.2, list(range(B)), OTHER_GROUP)) / 2
        for held in (held_rows, held_columns)
    )
    assert loss(pooled, outputs) == pytest.approx(expected, rel=1e-10)


def test_capping_every_pair_caps_those_of_the_own_modality():
    recipe = TableRecipe(
        transform=Transform(kind="cap_all", limit=0.2), candidates=Candidates(modality="both"), bias=Bias()
    )
    found = tables_of(recipe, OUTPUTS, BATCH)
    for queries, keys, table in ((X, Y, found["image_to_text"]), (Y, X, found["text_to_image"])):
        cosines = torch.cat([queries @ keys.T, queries @ queries.T], 1)
        torch.testing.assert_close(table.scores, cosines.clamp(max=0.2))
        assert (cosines[table.is_valid] > 0.2).any()


@pytest.mark.parametrize("init", [0.0, -1.5])
def test_a_noisy_or_starts_where_a_bag_of_zeros_is_a_coin_s_toss(init):
    recipe = replace(MIL_NOISY_OR, bias=Bias(policy="learned", init=init))
    at_right_angles = torch.tensor([1.0, 0, 0, 0]).double().expand(B, 9, 4)
    texts = torch.tensor([0, 1.0, 0, 0]).double().expand(2, B, 4)
    outputs = given_features(X, texts, patches=at_right_angles)
    state = build_objective(recipe, outputs).state_of("main")
    assert state.bias.requires_grad
    scores = pooled_scores(
        recipe,
        state,
        PairFeatures(outputs, BATCH, None, SINGLE),
        view=0,
        scale=Scale(torch.tensor(1 / 0.07).double(), state.bias),
    )
    # of nine patches, each with the odds of a coin's ninth root times e^init
    odds = math.exp(init) * (2 ** (1 / 9) - 1)
    expected = math.log((1 + odds) ** 9 - 1)
    torch.testing.assert_close(scores, torch.full((B, B), expected).double(), atol=1e-6, rtol=0)
    assert (abs(expected) < 1e-12) == (init == 0.0)


# Estimators


def test_siglip_asks_every_pair_a_question():
    expected = loop_sigmoid(LoopTable(10 * X @ Y.T - 10, list(range(B))))
    assert loss(SIGLIP) == pytest.approx(expected, rel=1e-6)
    objective = build_objective(SIGLIP, OUTPUTS)
    objective(OUTPUTS, BATCH, None, SINGLE).loss.backward()
    step = 1e-5
    moved = [loop_sigmoid(LoopTable(10 * X @ Y.T - 10 + sign * step, list(range(B)))) for sign in (1, -1)]
    slope = (moved[0] - moved[1]) / (2 * step)
    assert objective.state_of("main").bias.grad.item() == pytest.approx(slope, rel=1e-5)
    assert abs(loop_sigmoid(LoopTable(10 * X @ Y.T, list(range(B)))) - expected) > 1


def test_bounds_on_the_table_are_their_negatives():
    scores, fixed = X @ Y.T / 0.2, Temperature(policy="fixed", init=0.2)
    expected = [
        (BOUND_NWJ, both_ways(loop_nwj, scores)),
        (BOUND_TUBA, both_ways(lambda t: loop_tuba(t, [1.0] * B), scores)),
        (BOUND_DV, -both_ways(loop_dv, scores)),
        (
            BOUND_INTERPOLATED,
            both_ways(lambda t: loop_interpolated(t, [1.0] * B, alpha=1 / (1 + math.exp(2.0))), scores),
        ),
        (BOUND_JS, -both_ways(loop_jsd, scores)),
    ]
    found = {recipe.name: loss(replace(recipe, temperature=fixed)) for recipe, _ in expected}
    assert found == pytest.approx({recipe.name: -bound for recipe, bound in expected}, rel=1e-10)
    assert len({round(value, 3) for value in found.values()}) == 4  # TUBA starts as NWJ


RELEASED = {
    "nwj": NWJ(),
    "dv": DonskerVaradhan(),
    "tuba": TUBA(),
    **{f"interp_{logit:+d}": Interpolated(alpha_logit=logit) for logit in (-20, -2, 0, 2, 20)},
}


@pytest.mark.parametrize("key", RELEASED)
def test_bounds_of_the_released_table_are_their_negatives(key):
    """The scores themselves are the images' features and texts are unit vectors, so the table is theirs."""
    golden = tensors("vbmi_official_bounds")
    recipe = replace(CLIP, temperature=ONE, directions=ONE_WAY, estimator=RELEASED[key])

    def loss_of(scores: Tensor) -> Tensor:
        outputs = given_features(scores, torch.eye(6, dtype=torch.float64))
        objective = build_objective(recipe, outputs)
        if recipe.estimator.kind in ("tuba", "interp"):
            objective.state_of("main").log_baseline = lambda queries: golden["log_baseline"]
        loss: Tensor = objective(outputs, make_batch([4] * 6), None, SINGLE).loss
        return loss

    scores = leaf(golden["scores"])
    found = loss_of(scores)
    assert_golden(-found, golden[key])
    found.backward()
    assert_golden(-scores.grad, golden[f"{key}_grad"])
    assert abs(loss_of(golden["scores"].roll(1, 0)) + golden[key]) > 1e-3


@pytest.mark.parametrize("estimator", [TUBA(), Interpolated(alpha_logit=0.5)], ids=["tuba", "interp"])
def test_a_learned_baseline_is_a_linear_function_of_the_query(estimator):
    recipe = replace(BOUND_TUBA, temperature=Temperature(policy="fixed", init=0.5), estimator=estimator)
    objective = build_objective(recipe, OUTPUTS)
    weight = draw(4, seed=5)
    with torch.no_grad():
        objective.state_of("main").baseline.weight.copy_(weight[None])
    expected = 0.0
    for queries, scores in ((X, X @ Y.T), (Y, Y @ X.T)):
        baseline = (queries @ weight + 1.0).tolist()
        table = LoopTable(scores / 0.5, list(range(B)))
        if estimator.kind == "tuba":
            expected -= loop_tuba(table, baseline) / 2
        else:
            expected -= loop_interpolated(table, baseline, alpha=1 / (1 + math.exp(-0.5))) / 2
    report = objective(OUTPUTS, BATCH, None, SINGLE)
    assert report.loss.item() == pytest.approx(expected, rel=1e-10)
    assert abs(loss(recipe) - expected) > 1e-2
    report.loss.backward()
    assert objective.state_of("main").baseline.weight.grad.abs().max() > 1e-4


def test_cloob_with_candidates_of_both_modalities_equals_its_tables():
    recipe = replace(CLOOB, candidates=Candidates(modality="both", exclude="same_group"))
    tables = tables_of(recipe, OUTPUTS, BATCH, inverse_temperature=30.0)
    expected = 0.0
    for table in tables.values():
        for own, row in enumerate(table.scores.tolist()):
            others = [s for c, s in enumerate(row) if c % B != own and OTHER_GROUP[own, c % B]]
            expected += (math.log(sum(math.exp(s) for s in others)) - row[own]) / (2 * B)
    assert loss(recipe) == pytest.approx(expected, rel=1e-10)
    assert abs(loss(CLOOB) - expected) > 1e-2


def test_donsker_varadhan_pools_all_negatives_of_excluded_pairs():
    recipe = replace(
        CLIP, temperature=ONE, estimator=DonskerVaradhan(), candidates=Candidates(exclude="same_group")
    )
    expected = both_ways(loop_dv, X @ Y.T, OTHER_GROUP)
    assert loss(recipe) == pytest.approx(expected, rel=1e-12)
    assert abs(loss(replace(recipe, candidates=Candidates())) - expected) > 1e-3
