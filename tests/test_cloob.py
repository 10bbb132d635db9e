"""CLOOB through its recipe: released values and gradients, rows of workers, closed form, CLOOB with TIER."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.estimators import InfoLOOB
from models.features import PairFeatures
from models.gather import Gather, SingleProcess
from models.methods.cloob import CLOOB
from models.methods.tier import TIER
from models.pair_table import PairTable
from models.recipe import MethodRecipe
from models.retrieval import hopfield_retrieval
from models.table_slots import Temperature, Transform
from models.table_targets import IMAGE_TO_TEXT, TEXT_TO_IMAGE
from models.tables import Scale, table_loss
from models.training_slots import Regularisers, TokenEntropy
from tests.fake_gather import run_workers
from tests.golden_files import GOLDEN, assert_golden, leaf, tensors
from tests.oracles.contrastive import LoopTable, loop_cloob, loop_loob
from tests.pair_fixture import (
    build_objective,
    given_features,
    loss_of_features,
    make_batch,
    tables_of,
    unit,
)

CASES = sorted(path.stem for path in GOLDEN.glob("cloob_*.npz"))
LAMBDAS = {"token_over_patches": 0.2, "patch_over_tokens": 0.1}


def cloob(*, beta: float | Tensor, inverse_temperature: float) -> MethodRecipe:
    return replace(
        CLOOB,
        transform=Transform(kind="hopfield", beta=beta),  # type: ignore[arg-type]  # a tensor for its gradient
        temperature=Temperature(policy="fixed", init=1 / inverse_temperature),
    )


def tables(recipe: MethodRecipe, image: Tensor, text: Tensor, scale: Tensor) -> dict[str, PairTable]:
    return tables_of(recipe, given_features(image, text), inverse_temperature=scale)


def released_loss(recipe: MethodRecipe, image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """The authors' loss: the sum of both directions times the temperature."""
    outputs = given_features(image, text)
    features = PairFeatures(outputs, make_batch([4] * len(text)), None, SingleProcess())
    state = build_objective(recipe, outputs).state_of("main")
    ours = table_loss(recipe, state, features, view=0, scale=Scale(scale, scale.new_zeros(())), max_rows=None)
    return 2 / scale * ours


def test_every_copied_case_is_used():
    assert len(CASES) == 5


@pytest.mark.parametrize("name", CASES)
def test_retrievals_and_terms_equal_the_release(name):
    golden = tensors(name)
    x, y = (F.normalize(golden[key], dim=1) for key in ("x_raw", "y_raw"))
    beta = golden["beta"].item()
    for state, stored, key in ((x, x, "U_x"), (y, x, "U_y"), (y, y, "V_y"), (x, y, "V_x")):
        assert_golden(hopfield_retrieval(state, stored, beta=beta), golden[key])
    recipe = cloob(beta=beta, inverse_temperature=golden["inv_tau"].item())
    found = {
        direction: InfoLOOB().rows(table)[:, 0].mean() / golden["inv_tau"]
        for direction, table in tables(recipe, x, y, golden["inv_tau"]).items()
    }
    assert_golden(found[IMAGE_TO_TEXT], golden["loss_img"])
    assert_golden(found[TEXT_TO_IMAGE], golden["loss_txt"])


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_equal_the_release(name):
    golden = tensors(name)
    x, y, beta, scale = (leaf(golden[key]) for key in ("x_raw", "y_raw", "beta", "inv_tau"))
    recipe = cloob(beta=beta, inverse_temperature=scale.item())
    found = released_loss(recipe, F.normalize(x, dim=1), F.normalize(y, dim=1), scale)
    assert_golden(found, golden["loss"])
    found.backward()
    assert_golden(x.grad, golden["g_x_raw"])
    assert_golden(y.grad, golden["g_y_raw"])
    assert_golden(beta.grad, golden["g_beta"])
    assert_golden(scale.grad, golden["g_inv_tau"])
    swapped = released_loss(recipe, F.normalize(x, dim=1), F.normalize(y, dim=1).roll(1, 0), scale)
    # little, yet far above the tolerance, where the embeddings are collapsed
    assert abs(swapped - golden["loss"]) > 1e-8


@pytest.mark.parametrize("name", CASES)
def test_the_whole_recipe_and_its_unit_gradients_equal_the_release(name):
    golden = tensors(name)
    x, y = (leaf(F.normalize(golden[key], dim=1)) for key in ("x_raw", "y_raw"))
    scale = golden["inv_tau"].item()
    recipe = cloob(beta=golden["beta"].item(), inverse_temperature=scale)
    found = 2 / scale * loss_of_features(recipe, given_features(x, y))
    assert_golden(found, golden["loss"])
    found.backward()
    assert_golden(x.grad, golden["g_x_unit"])
    assert_golden(y.grad, golden["g_y_unit"])


@pytest.mark.parametrize("name", CASES)
def test_float32_loss_equals_the_release_in_float32(name):
    golden = tensors(name)
    x, y = (F.normalize(golden[key].float(), dim=1) for key in ("x_raw", "y_raw"))
    recipe = cloob(beta=golden["beta"].item(), inverse_temperature=golden["inv_tau"].item())
    found = released_loss(recipe, x, y, golden["inv_tau"].float())
    assert found.dtype == torch.float32
    assert_golden(found, golden["loss_float32"], atol=1e-5)


def test_tables_and_loss_equal_the_loops():
    x, y = unit(5, 4), unit(5, 4, seed=1)
    recipe = cloob(beta=3.0, inverse_temperature=12.0)
    found = tables(recipe, x, y, torch.tensor(12.0, dtype=torch.float64))
    loops = loop_cloob(x, y, beta=3.0, inverse_temperature=12.0)
    terms = []
    for direction, rows in zip((IMAGE_TO_TEXT, TEXT_TO_IMAGE), loops, strict=True):
        expected = torch.tensor(rows, dtype=torch.float64)
        torch.testing.assert_close(found[direction].scores, expected)
        terms.append(sum(loop_loob(LoopTable(expected, list(range(5))))) / 5)
    loss = loss_of_features(recipe, given_features(x, y))
    assert loss.item() == pytest.approx(0.5 * sum(terms))
    # each direction has its own memory: one table is not the other transposed
    assert not torch.allclose(found[IMAGE_TO_TEXT].scores, found[TEXT_TO_IMAGE].scores.T)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_local_losses_equal_the_derived_rows(world):
    golden = tensors("derived_cloob_rows_B16")
    x, y, scale = golden["x_unit"], golden["y_unit"], golden["inv_tau"]
    recipe = cloob(beta=golden["beta"].item(), inverse_temperature=scale.item())
    size = 16 // world

    def rows_of(gather: Gather) -> dict[str, Tensor]:
        mine = slice(gather.rank * size, (gather.rank + 1) * size)
        found = tables_of(recipe, given_features(x[mine], y[mine]), inverse_temperature=scale, gather=gather)
        return {name: InfoLOOB().rows(table)[:, 0] / scale for name, table in found.items()}

    found = run_workers(world, rows_of)
    local = [rows[IMAGE_TO_TEXT].mean() + rows[TEXT_TO_IMAGE].mean() for rows in found]
    assert_golden(torch.cat([rows[IMAGE_TO_TEXT] for rows in found]), golden["img_rows"])
    assert_golden(torch.cat([rows[TEXT_TO_IMAGE] for rows in found]), golden["txt_rows"])
    assert_golden(torch.stack(local).mean(), golden["loss"])
    if world > 1:
        assert_golden(torch.stack(local), golden[f"local_loss_W{world}"])
        assert abs(local[0] - golden["loss"]) > 1e-4


def test_orthonormal_pairs_have_the_closed_value():
    golden = tensors("derived_orthonormal_closed_form")
    rows = torch.eye(int(golden["B"]), dtype=torch.float64)
    recipe = cloob(beta=golden["beta"].item(), inverse_temperature=golden["inv_tau"].item())
    assert_golden(released_loss(recipe, rows, rows, golden["inv_tau"]), golden["cloob"])


def test_the_order_of_pairs_is_irrelevant():
    x, y, order = unit(6, 4), unit(6, 4, seed=1), torch.tensor([4, 2, 0, 5, 3, 1])
    whole = loss_of_features(CLOOB, given_features(x, y))
    torch.testing.assert_close(loss_of_features(CLOOB, given_features(x[order], y[order])), whole)
    assert not torch.isclose(loss_of_features(CLOOB, given_features(x[order], y)), whole)


def compose(recipe: MethodRecipe, golden: dict[str, Tensor]) -> Tensor:
    patches = golden["patches"].transpose(1, 2)
    image = F.normalize(patches.mean(1), dim=1)
    text = F.normalize(golden["text_emb"], dim=1)
    return loss_of_features(recipe, given_features(image, text, patches=patches, words=golden["words"]))


def test_recombinations_with_token_entropies_equal_the_derived_totals():
    golden = tensors("derived_compose_totals")
    scale = golden["inv_tau_cloob"].item()
    plain = cloob(beta=golden["beta"].item(), inverse_temperature=scale)
    clip = replace(
        TIER,
        temperature=Temperature(policy="fixed", init=1 / golden["inv_tau_clip"].item()),
        regularisers=Regularisers(),
    )
    entropies = Regularisers(token_entropy=TokenEntropy(**LAMBDAS))
    assert_golden(compose(clip, golden), golden["clip"])
    assert_golden(compose(replace(clip, regularisers=entropies), golden), golden["clip_plus_tier"])
    assert_golden(compose(plain, golden), golden["cloob_logodds"])
    combined = replace(plain, regularisers=entropies)
    assert_golden(compose(combined, golden), golden["cloob_logodds_plus_tier"])
    # the release's scale: a table weight of 2 * temperature, the entropies' weights as they are
    assert_golden(compose(replace(combined, weight=2 / scale), golden), golden["cloob_plus_tier"])
    assert_golden(compose(replace(plain, weight=2 / scale), golden), golden["cloob"])
    turned = Regularisers(token_entropy=TokenEntropy(token_over_patches=0.1, patch_over_tokens=0.2))
    assert (
        abs(compose(replace(plain, regularisers=turned), golden) - golden["cloob_logodds_plus_tier"]) > 1e-2
    )


def test_refuses_one_pair_and_retrieval_of_regions():
    x = unit(1, 4)
    with pytest.raises(ValueError, match="at least 2 candidates, got 1; raise the global batch size"):
        loss_of_features(CLOOB, given_features(x, x))
    with pytest.raises(ValueError, match=r"works on global features; with region_pool.kind=max and"):
        replace(CLOOB, region_pool=replace(CLOOB.region_pool, kind="max"))
