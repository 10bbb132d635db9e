"""The pair model: losses of whole methods against loops, padding, patch order, precision, temperatures."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F

from models.encoder import encode_pairs
from models.estimators import DonskerVaradhan, InfoNCE, JensenShannon
from models.guidance import hashed_words, mean_unit_tokens
from models.methods.aclip import ACLIP
from models.methods.catalogue import METHODS
from models.methods.clip import CLIP
from models.methods.local_mi import LOCAL_MI
from models.methods.softclip import SOFTCLIP
from models.methods.tier import TIER
from models.outputs import at_least_float32
from models.recipe import TableRecipe
from models.table_slots import Candidates, Directions, RegionPool, Temperature
from models.targets import bisect_temperature
from models.training_slots import Features, Regularisers, TokenEntropy
from tests.golden_files import leaf
from tests.oracles.contrastive import (
    LoopTable,
    loop_ce,
    loop_dv,
    loop_jsd,
    loop_kl,
    loop_pool,
    loop_relation_kl,
)
from tests.oracles.softclip import loop_soft_targets
from tests.oracles.tier import loop_entropies, loop_means
from tests.pair_fixture import (
    SINGLE,
    TEXT,
    build_model,
    build_objective,
    draw,
    forward,
    given_features,
    loss_of_features,
    make_batch,
    padded,
    remember_something,
    report_of_features,
    rows_of,
    unit,
)

B = 6
X, Y, PATCHES = unit(B, 4), unit(B, 4, seed=1), draw(B, 5, 4, seed=2)
BATCH = make_batch([5] * B)


def loss(recipe, *, image=X, text=Y, patches=PATCHES, words=None, batch=BATCH):
    return loss_of_features(recipe, given_features(image, text, patches=patches, words=words), batch)


def both_directions(loop, cosines, valid=None) -> float:
    """Mean of a loop's value with rows and with columns as queries, at CLIP's first temperature."""
    tables = (cosines / 0.07, cosines.T / 0.07)
    return 0.5 * sum(loop(LoopTable(table, list(range(B)), valid)) for table in tables)


def mean_ce(table: LoopTable) -> float:
    return sum(loop_ce(table)) / B


def test_clip_equals_the_loop():
    assert loss(CLIP).item() == pytest.approx(both_directions(mean_ce, X @ Y.T), rel=1e-6)
    assert abs(loss(CLIP, text=Y.roll(1, 0)) - loss(CLIP)) > 0.1


def test_direction_weights_weigh_the_directions():
    uneven = replace(CLIP, directions=Directions(image_to_text=0.75, text_to_image=0.25))
    rows, columns = (mean_ce(LoopTable(t / 0.07, list(range(B)))) for t in (X @ Y.T, Y @ X.T))
    assert loss(uneven).item() == pytest.approx(0.75 * rows + 0.25 * columns, rel=1e-6)


@pytest.mark.parametrize("kind", ["max", "mean", "lse"])
@pytest.mark.parametrize(
    ("estimator", "loop"),
    [(InfoNCE(), mean_ce), (JensenShannon(), loop_jsd), (DonskerVaradhan(), loop_dv)],
    ids=["ce", "jsd", "dv"],
)
def test_local_mutual_information_equals_the_loops(kind, estimator, loop):
    recipe = replace(LOCAL_MI, region_pool=RegionPool(kind=kind), estimator=estimator, extra_tables={})
    cosines = torch.einsum("bpd,nd->bpn", F.normalize(PATCHES, dim=2), Y)
    pooled = torch.tensor(loop_pool(cosines, kind=kind, sharpness=10.0), dtype=torch.float64)
    assert loss(recipe).item() == pytest.approx(both_directions(loop, pooled), rel=1e-6)
    assert abs(loss(recipe, text=Y.roll(1, 0)) - loss(recipe)) > 1e-2


def test_softclip_equals_the_loops():
    """Images guide the first direction, words the second, each at a temperature of its own."""
    words = hashed_words(BATCH.token_ids[0], BATCH.is_real_token[0]).double()
    expected = 0.0
    for guidance, cosines in ((mean_unit_tokens(PATCHES), X @ Y.T), (words, Y @ X.T)):
        similarities = guidance @ guidance.T
        found = bisect_temperature(similarities, torch.arange(B), mass=0.5, num_halvings=24).item()
        soft, pure = (
            torch.tensor(loop_soft_targets(similarities, temperature=found, mixing=mixing))
            for mixing in (0.3, 1.0)
        )
        table = LoopTable(cosines / 0.07, list(range(B)))
        expected += 0.5 * sum(loop_kl(table, soft) + loop_relation_kl(table, pure)) / B
    assert loss(SOFTCLIP).item() == pytest.approx(expected, rel=1e-6)
    assert abs(loss(SOFTCLIP, patches=PATCHES.roll(1, 0)) - loss(SOFTCLIP)) > 1e-3


def test_tier_adds_the_entropies_of_real_words():
    words = draw(B, 4, 4, seed=3)
    is_word = torch.arange(4) < torch.tensor([4, 3, 2, 4, 1, 3])[:, None]
    outputs = given_features(X, Y, patches=PATCHES, words=words, is_word=is_word)
    masked = report_of_features(TIER, outputs, BATCH)
    cosines = torch.einsum("btd,bpd->btp", F.normalize(words, dim=2), F.normalize(PATCHES, dim=2))
    loops = loop_entropies(cosines, is_real_token=outputs.is_real_token)
    for name, weight, loop in zip(
        ("token_over_patches", "patch_over_tokens"), (0.1, 0.2), loops, strict=True
    ):
        assert masked.terms[name].item() == pytest.approx(weight * loop_means(loop)[0])
    assert masked.loss.item() == pytest.approx(sum(term.item() for term in masked.terms.values()))
    entropy = TokenEntropy(padding="counted", patch_over_tokens=0.2)
    counted = replace(TIER, regularisers=Regularisers(token_entropy=entropy))
    other = report_of_features(counted, outputs, BATCH)
    assert abs(other.terms["patch_over_tokens"] - masked.terms["patch_over_tokens"]) > 0.01


def test_the_loss_is_the_sum_of_its_terms_and_tables_have_weights():
    report = report_of_features(LOCAL_MI, given_features(X, Y, patches=PATCHES), BATCH)
    assert set(report.terms) == {"main", "global"}
    assert report.loss.item() == pytest.approx(report.terms["main"].item() + report.terms["global"].item())
    assert report.terms["global"].item() == pytest.approx(loss(CLIP).item())
    doubled = replace(LOCAL_MI, weight=2.0, extra_tables={"global": TableRecipe(weight=0.5)})
    found = report_of_features(doubled, given_features(X, Y, patches=PATCHES), BATCH)
    assert found.terms["main"].item() == pytest.approx(2 * report.terms["main"].item())
    assert found.terms["global"].item() == pytest.approx(0.5 * report.terms["global"].item())


def test_views_are_averaged():
    two = replace(CLIP, features=Features(num_views=2))
    views = torch.stack([X, unit(B, 4, seed=5)])
    expected = 0.5 * sum(loss(CLIP, image=view) for view in views)
    torch.testing.assert_close(loss_of_features(two, given_features(views, Y)), expected)
    first = loss_of_features(replace(two, views="first"), given_features(views, Y))
    torch.testing.assert_close(first, loss(CLIP))
    assert abs(first - expected) > 0.01


@pytest.mark.parametrize("name", ["local_mi", "tier", "softclip"])
def test_the_order_of_patches_is_irrelevant(name):
    words = draw(B, 3, 4, seed=3)
    whole = loss(METHODS[name], words=words)
    torch.testing.assert_close(loss(METHODS[name], patches=PATCHES[:, [4, 0, 3, 1, 2]], words=words), whole)
    assert not torch.isclose(loss(METHODS[name], patches=PATCHES.roll(1, 0), words=words), whole)


def model_and_batch(recipe):
    """A model that remembers earlier batches where its method does, and a batch for it."""
    model = build_model(recipe)
    remember_something(model.objective)
    return model, make_batch(num_views=recipe.features.num_views, num_texts=recipe.features.num_texts)


@pytest.mark.parametrize("name", METHODS)
def test_the_order_of_pairs_is_irrelevant(name):
    model, batch = model_and_batch(METHODS[name])
    shuffled = rows_of(batch, torch.tensor([3, 1, 4, 0, 6, 2, 7, 5]))
    whole = forward(model, batch).loss
    torch.testing.assert_close(forward(model, shuffled).loss, whole)
    broken = replace(shuffled, images=batch.images)
    assert not torch.isclose(forward(model, broken).loss, whole)


COUNT_PADDING = {n for n, r in METHODS.items() if r.regularisers.token_entropy.padding == "counted"}


@pytest.mark.parametrize("name", [name for name in METHODS if name not in COUNT_PADDING])
def test_padding_has_no_say_and_gets_no_gradient(name):
    model, batch = model_and_batch(METHODS[name])
    filler, padding = TEXT.vocab_size - 1, TEXT.pad_id
    batch = replace(batch, token_ids=batch.token_ids.masked_fill(batch.token_ids == filler, 5))
    short = forward(model, batch).loss
    report = forward(model, padded(batch, 4, filler))
    torch.testing.assert_close(report.loss, short, atol=1e-13, rtol=1e-13)
    report.loss.backward()
    embeddings = model.encoder.text.text.embeddings
    tokens = embeddings.token_embedding.weight.grad
    if not model.recipe.heads.masked_tokens.weight:  # it replaces some words by any token
        assert tokens[filler].abs().max() == 0
    # where padding stands for a masked word it does learn
    assert (tokens[padding].abs().max() > 0) == (model.recipe.heads.masked_tokens.weight > 0)
    assert embeddings.position_embedding.weight.grad[batch.token_ids.shape[2] :].abs().max() == 0
    assert tokens[5].abs().max() > 0


def test_counted_padding_does_change_the_loss():
    """The control: what TIER's released code does."""
    assert {"tier_release"} == COUNT_PADDING
    model, batch = model_and_batch(METHODS["tier_release"])
    assert (forward(model, padded(batch, 4, 9)).loss - forward(model, batch).loss).abs() > 1e-3


def test_pairs_of_one_group_do_not_repel_each_other():
    recipe = replace(CLIP, candidates=Candidates(exclude="same_group"))
    batch = replace(BATCH, group_keys=torch.tensor([1, 1, 2, 3, 4, 5]))
    valid = torch.ones(B, B, dtype=torch.bool)
    valid[0, 1] = valid[1, 0] = False
    expected = both_directions(mean_ce, X @ Y.T, valid)
    assert loss(recipe, batch=batch).item() == pytest.approx(expected, rel=1e-6)
    assert abs(loss(CLIP, batch=batch).item() - expected) > 1e-3
    image, text = leaf(X[:2]), leaf(Y[:2])
    alone = loss(recipe, image=image, text=text, patches=PATCHES[:2], batch=rows_of(batch, slice(0, 2)))
    alone.backward()
    assert alone.item() == 0.0
    assert image.grad.abs().max() == 0


@dataclass(frozen=True, kw_only=True)
class TypeSpy(InfoNCE):
    """InfoNCE that insists on float32 scores."""

    def rows(self, table):
        assert table.scores.dtype == torch.float32
        return super().rows(table)


@pytest.mark.parametrize("name", METHODS)
def test_tables_are_float32_under_bf16_autocast(name):
    recipe = METHODS[name]
    extra = {key: replace(table, estimator=TypeSpy()) for key, table in recipe.extra_tables.items()}
    model = build_model(replace(recipe, estimator=TypeSpy(), extra_tables=extra)).float()
    remember_something(model.objective)
    batch = make_batch(num_views=recipe.features.num_views, num_texts=recipe.features.num_texts)
    with torch.autocast("cpu", torch.bfloat16):
        assert encode_pairs(model.encoder, recipe, batch, None).image_tokens.dtype == torch.bfloat16
        report = forward(model, batch)
    assert report.loss.dtype == torch.float32
    assert all(term.dtype == torch.float32 for term in report.terms.values())
    report.loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)


def test_only_half_precision_is_raised():
    raised = {torch.bfloat16: torch.float32, torch.float16: torch.float32}
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        assert at_least_float32(torch.zeros(1, dtype=dtype)).dtype == raised.get(dtype, dtype)
    outputs = given_features(X, Y).float()
    assert outputs.image_embeds.dtype == torch.float64
    assert outputs.is_real_token.dtype == torch.bool


def test_temperatures_follow_their_policy():
    tables = {
        "own": TableRecipe(temperature=Temperature(init=0.2)),
        "fixed": TableRecipe(temperature=Temperature(policy="fixed", init=0.5)),
        "kept": TableRecipe(temperature=Temperature(policy="kept", init=0.4)),
        "shared": TableRecipe(temperature=Temperature(policy="shared")),
    }
    outputs = given_features(X, Y)
    objective = build_objective(replace(CLIP, extra_tables=tables), outputs)
    learned = {"tables.main.log_inverse_temperature", "tables.own.log_inverse_temperature"}
    assert {name for name, _ in objective.named_parameters()} == learned
    report = objective(outputs, BATCH, None, SINGLE)
    found = {name: report.diagnostics[f"temperature/{name}"].item() for name in ("main", *tables)}
    assert found == pytest.approx(
        {"main": 0.07, "own": 0.2, "fixed": 0.5, "kept": 0.4, "shared": 0.07}, rel=1e-6
    )
    with torch.no_grad():
        objective.state_of("main").log_inverse_temperature.fill_(9.0)
        objective.state_of("own").log_inverse_temperature.fill_(-1.0)
        for name in ("fixed", "kept"):  # as a checkpoint would; a fixed one is what its recipe says
            objective.state_of(name).log_inverse_temperature.fill_(-1.0)
    objective.finish_step()
    found = {name: objective.scale(name, X).inverse_temperature.item() for name in ("main", *tables)}
    assert found == pytest.approx(
        {"main": 100.0, "own": 1.0, "fixed": 2.0, "kept": math.exp(-1.0), "shared": 100.0}
    )


def test_embeddings_of_both_towers_have_unit_length():
    for recipe in (CLIP, TIER):
        outputs = encode_pairs(build_model(recipe).encoder, recipe, make_batch(), None)
        for embeds in (outputs.image_embeds[0], outputs.text_embeds[0]):
            torch.testing.assert_close(embeds.norm(dim=1), torch.ones(8, dtype=torch.float64))
    mean = F.normalize(outputs.image_tokens[0].mean(1), dim=1)
    torch.testing.assert_close(outputs.image_embeds[0], mean)


# Earlier batches give them candidates.
REMEMBERING = {name for name, recipe in METHODS.items() if recipe.candidates.kind in ("queue", "memory")}


@pytest.mark.parametrize("name", METHODS)
def test_a_batch_of_one_pair_is_refused(name):
    recipe = METHODS[name]
    model = build_model(recipe)
    remember_something(model.objective)
    batch = make_batch([5], num_views=recipe.features.num_views, num_texts=recipe.features.num_texts)
    if name in REMEMBERING:
        assert forward(model, batch).loss > 0
        return
    with pytest.raises(ValueError, match=r"at least 2 candidates, got 1|for 1 candidates"):
        forward(model, batch)


def test_refusals():
    with pytest.raises(ValueError, match="byol needs the EMA teacher's features, got none"):
        build_model(ACLIP)(make_batch(num_views=2), None, None, SINGLE)
    with pytest.raises(ValueError, match=r"kind=kl compares distributions and needs targets.kind=soft"):
        replace(SOFTCLIP, targets=CLIP.targets)
    assert loss(replace(SOFTCLIP, targets=CLIP.targets, estimator=InfoNCE())).isfinite()
