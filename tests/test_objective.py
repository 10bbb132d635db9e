"""Losses of whole recipes from given features, against stored values and gradients of whole systems."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.cross_attention import CrossAttended
from models.estimators import DonskerVaradhan, InfoNCE
from models.gather import SingleProcess
from models.methods.cmc import CMC_CORE, CMC_GRAPH
from models.methods.convirt import CONVIRT
from models.methods.gloria import GLORIA
from models.methods.local_mi import LOCAL_MI_CRITIC, LOCAL_MI_GLOBAL
from models.methods.lovt import LOVT
from models.methods.mil import (
    LSE_NL,
    MIL_ATTENTION,
    MIL_GLOBAL,
    MIL_LSE,
    MIL_MAX,
    MIL_MEAN,
    MIL_NOISY_OR,
    MIL_NON_LOCAL,
)
from models.methods.relaxed import RELAXED, RELAXED_ALL, RELAXED_HINGE, RELAXED_LEAKY
from models.objective import Objective
from models.outputs import PairOutputs
from models.recipe import MethodRecipe
from models.table_slots import Bias, Candidates, Directions, SentencePool, Temperature
from tests.golden_files import assert_golden, leaf, tensors
from tests.oracles.contrastive import LoopTable, loop_ce, loop_dv
from tests.oracles.critics import loop_concat_scores
from tests.oracles.tables import loop_region_rule, loop_view_graph
from tests.pair_fixture import (
    build_objective,
    draw,
    given_features,
    loss_of_features,
    make_batch,
    report_of_features,
    unit,
)

ONE_WAY = Directions(image_to_text=1.0, text_to_image=0.0)
OTHER_WAY = Directions(image_to_text=0.0, text_to_image=1.0)


def fixed(temperature: float) -> Temperature:
    return Temperature(policy="fixed", init=temperature)


def test_gloria_is_the_releases_four_terms():
    golden = tensors("mil_gloria_official")
    keys = ("img_local", "words", "img_global", "txt_global")
    local, words, image, text = (leaf(golden[key]) for key in keys)
    is_word = torch.arange(words.shape[2]) < golden["lens"][:, None]

    def features(is_word: Tensor) -> PairOutputs:
        return given_features(
            F.normalize(image, dim=1),
            F.normalize(text, dim=1),
            patches=local.flatten(2).mT,
            words=words.mT,
            is_word=is_word,
        )

    found = loss_of_features(GLORIA, features(is_word))
    stored = sum(golden[f"{kind}_{way}"] for kind in ("local", "global") for way in ("i2t", "t2i"))
    assert_golden(found, stored)
    found.backward()
    for key, value in zip(keys, (local, words, image, text), strict=True):
        assert_golden(value.grad, golden[f"grad_{key}"])
    assert abs(loss_of_features(GLORIA, features(torch.ones_like(is_word))) - stored) > 1e-2


MIL = {
    "max": MIL_MAX,
    "mean": MIL_MEAN,
    "lse": MIL_LSE,
    "nor": MIL_NOISY_OR,
    "att": MIL_ATTENTION,
    "nl": MIL_NON_LOCAL,
    "globalmean": MIL_GLOBAL,
    "lse_nl": LSE_NL,
}
# Pools of vectors mix them as they are, so the stored values have texts of any length.
MIXES_VECTORS = ("att", "nl", "globalmean")


def at_stored_settings(recipe: MethodRecipe, golden: dict[str, Tensor]) -> MethodRecipe:
    tau = fixed(golden["tau"].item())
    pool = replace(recipe.region_pool, sharpness=golden["gamma"].item(), temperature=tau.init)
    extra = {name: replace(table, temperature=tau) for name, table in recipe.extra_tables.items()}
    return replace(recipe, region_pool=pool, temperature=tau, extra_tables=extra, bias=Bias())


def mil_loss(how: str, golden: dict[str, Tensor], regions: Tensor, sentences: Tensor) -> Tensor:
    texts = sentences if how in MIXES_VECTORS else F.normalize(sentences, dim=2)
    outputs = given_features(
        F.normalize(regions.mean(1), dim=1),
        texts.transpose(0, 1),
        patches=regions,
        is_text=golden["sent_mask"].T,
    )
    recipe = at_stored_settings(MIL[how], golden)
    objective = build_objective(recipe, outputs)
    for name, table in recipe.tables.items():
        state = objective.state_of(name)
        state.fixed_bias = 0.0  # without the noisy-or's, which starts a bag at a coin's toss
        if table.region_pool.kind == "non_local":
            state.non_local.data.copy_(golden["A"])
    batch = make_batch([4] * len(regions))
    loss: Tensor = objective(outputs, batch, None, SingleProcess()).loss
    return loss


@pytest.mark.parametrize("how", MIL)
def test_bags_of_regions_and_sentences_equal_the_derived_losses(how):
    golden = tensors("mil_derived_pooling")
    regions, sentences = leaf(golden["V"]), leaf(golden["U"])
    found = mil_loss(how, golden, regions, sentences)
    assert_golden(found, golden[f"{how}_loss"])
    found.backward()
    assert_golden(regions.grad, golden[f"{how}_gradV"])
    assert_golden(sentences.grad, golden[f"{how}_gradU"])
    with_pads = {**golden, "sent_mask": torch.ones_like(golden["sent_mask"])}
    assert abs(mil_loss(how, with_pads, regions, sentences) - golden[f"{how}_loss"]) > 1e-3


@pytest.mark.parametrize("kind", ["mean", "sum", "max", "lse"])
def test_sentence_pools_equal_the_derived_scores(kind):
    """Sentences are pooled before the temperature, like patches: a sharpness is one of cosines."""
    golden = tensors("mil_derived_pooling")
    recipe = replace(
        at_stored_settings(MIL_LSE, golden), sentence_pool=SentencePool(kind=kind, sharpness=1.0)
    )
    texts = F.normalize(golden["U"], dim=2).transpose(0, 1)
    outputs = given_features(texts[0], texts, patches=golden["V"], is_text=golden["sent_mask"].T)
    scores = golden[f"docpool_{kind}"] / golden["tau"]
    expected = 0.5 * sum(sum(loop_ce(LoopTable(table, [0, 1, 2, 3]))) / 4 for table in (scores, scores.T))
    assert loss_of_features(recipe, outputs).item() == pytest.approx(expected, abs=1e-10)
    everything = replace(outputs, is_text=torch.ones_like(outputs.is_text))
    assert abs(loss_of_features(recipe, everything).item() - expected) > 1e-3


@pytest.mark.parametrize(("modality", "key"), [("cross", "cross"), ("both", "same")])
def test_convirt_equals_lovts_global_loss_with_and_without_its_own_modality(modality, key):
    golden = tensors("lovt_official_global")
    assert golden["convirt_pytorch_loss"] == golden["cross_loss"]
    image, text = leaf(golden["za"]), leaf(golden["zb"])
    outputs = given_features(F.normalize(image, dim=1), F.normalize(text, dim=1))
    recipe = replace(CONVIRT, candidates=Candidates(modality=modality))
    found = loss_of_features(recipe, outputs)
    assert_golden(found, golden[f"{key}_loss"])
    found.backward()
    assert_golden(image.grad, golden[f"{key}_grad_a"])
    assert_golden(text.grad, golden[f"{key}_grad_b"])
    for directions, name in ((ONE_WAY, "a2b"), (OTHER_WAY, "b2a")):
        one = loss_of_features(replace(recipe, directions=directions), outputs)
        assert_golden(one, golden[f"{key}_{name}"])
    assert abs(golden["cross_loss"] - golden["same_loss"]) > 0.1


class StoredAttention(torch.nn.Module):
    """Stands for the cross-attention: hands out what the release attended to."""

    def __init__(self, attended: Tensor) -> None:
        super().__init__()
        self.attended = attended

    def forward(self, *inputs: Tensor) -> CrossAttended:
        return CrossAttended(self.attended, self.attended, *inputs[:2])


def local_term(name: str, outputs: PairOutputs, attended: Tensor, **slots: object) -> Tensor:
    """LoVT's term of one local table, the global table switched off."""
    table = replace(LOVT.extra_tables[name], **slots)
    objective = build_objective(replace(LOVT, weight=0.0, extra_tables={name: table}), outputs)
    objective.cross_attention = StoredAttention(attended)
    batch = make_batch([4] * outputs.image_embeds.shape[1])
    loss: Tensor = objective(outputs, batch, None, SingleProcess()).loss
    return loss


def test_regions_among_their_own_image_are_lovts():
    """1e-7: the release's spatial targets are float32."""
    golden = tensors("lovt_official_local_scan")
    regions, attended = leaf(golden["zl"]), leaf(golden["z_attended"])
    outputs = given_features(unit(2, 4), unit(2, 4, seed=1), patches=regions)
    weighted = replace(outputs, patch_weights=golden["weights"][None])
    found = local_term("regions", weighted, attended)
    stored = 0.375 * (golden["l2att"] + golden["att2l"])
    assert_golden(found, stored, atol=1e-7)
    found.backward()
    assert_golden(regions.grad, golden["grad_zl"], atol=1e-7)
    assert_golden(attended.grad, golden["grad_att"], atol=1e-7)
    assert abs(local_term("regions", outputs, attended) - stored) > 1e-3
    wider = replace(LOVT.extra_tables["regions"].targets, radius=0.6)
    assert abs(local_term("regions", weighted, attended, targets=wider) - stored) > 1e-3


def test_sentences_among_their_own_report_are_lovts():
    golden = tensors("lovt_official_local_report")
    sentences, attended = leaf(golden["zs"]), leaf(golden["z_attended"])
    texts, is_text = sentences.transpose(0, 1), golden["mask"].T
    outputs = given_features(unit(3, 4), texts, report=unit(3, 4, seed=1), is_text=is_text)
    weighted = replace(outputs, text_weights=golden["weights"])
    found = local_term("sentences", weighted, attended)
    stored = 0.375 * (golden["l2att"] + golden["att2l"])
    assert_golden(found, stored)
    found.backward()
    assert_golden(sentences.grad, golden["grad_zs"])
    assert_golden(attended.grad, golden["grad_att"])
    everything = replace(weighted, is_text=torch.ones_like(is_text))
    assert abs(local_term("sentences", everything, attended) - stored) > 1e-2


def test_lovt_adds_its_three_tables_at_the_stated_weights():
    outputs = given_features(unit(3, 4), unit(2, 3, 4, seed=1), patches=draw(3, 9, 4, seed=2))
    report = report_of_features(LOVT, outputs)
    assert set(report.terms) == {"main", "regions", "sentences"}
    assert report.loss.item() == pytest.approx(sum(term.item() for term in report.terms.values()))
    heavier = {name: replace(t, weight=0.75) for name, t in LOVT.extra_tables.items()}
    doubled = report_of_features(replace(LOVT, extra_tables=heavier), outputs).terms
    for name in heavier:
        assert doubled[name].item() == pytest.approx(2 * report.terms[name].item())
    assert doubled["main"] == report.terms["main"]


def test_views_of_images_and_texts_are_cmcs_graphs():
    """Three views: two of the image and one text; nobody has a second text, whose edges drop out."""
    golden = tensors("cmc_derived_graph")
    for kind, recipe in (("core", CMC_CORE), ("full", CMC_GRAPH)):
        image, text, other = views = [leaf(golden[f"v{number}"]) for number in range(3)]
        both_views = F.normalize(torch.stack([image, other]), dim=2)
        texts = F.normalize(torch.stack([text, draw(5, 6)]), dim=2)
        is_text = torch.tensor([True, False])[:, None].expand(2, 5)
        recipe = replace(recipe, temperature=fixed(golden["T"].item()))
        found = loss_of_features(recipe, given_features(both_views, texts, is_text=is_text))
        assert_golden(found, golden[kind])
        found.backward()
        for number, view in enumerate(views):
            assert_golden(view.grad, golden[f"{kind}_g{number}"])
        assert abs(loss_of_features(recipe, given_features(both_views, texts)) - golden[kind]) > 1


@pytest.mark.parametrize("is_core", [True, False])
def test_graphs_leave_out_the_texts_that_are_not_there(is_core):
    recipe = CMC_CORE if is_core else CMC_GRAPH
    images, texts = unit(2, 5, 6), unit(2, 5, 6, seed=1)
    is_text = torch.tensor([[True] * 5, [True, False, True, True, False]])
    views = {"image": images[0], "other": images[1], "text": texts[0], "second": texts[1]}
    edges = [("image", "text"), ("image", "second"), ("image", "other")]
    if not is_core:
        edges += [("other", "text"), ("other", "second"), ("text", "second")]
    expected = loop_view_graph(views, edges, is_there={"second": is_text[1]}, temperature=0.07)
    found = loss_of_features(recipe, given_features(images, texts, is_text=is_text)).item()
    assert found == pytest.approx(expected, rel=1e-12)
    changed = torch.where(is_text[1][:, None], texts[1], unit(5, 6, seed=9))
    junk = given_features(images, torch.stack([texts[0], changed]), is_text=is_text)
    assert loss_of_features(recipe, junk).item() == pytest.approx(expected, rel=1e-12)
    assert abs(loss_of_features(recipe, given_features(images, texts)).item() - expected) > 0.1


RELAXED_BY = {"cap": RELAXED, "leaky": RELAXED_LEAKY, "capall": RELAXED_ALL, "hinge": RELAXED_HINGE}


@pytest.mark.parametrize("kind", ["cap", "leaky", "capall"])
def test_relaxed_pairs_equal_the_derived_values(kind):
    golden = tensors("relax_derived")
    image, text = leaf(golden["E"]), leaf(golden["G"])
    recipe = replace(RELAXED_BY[kind], temperature=fixed(golden["tau"].item()))
    assert recipe.transform.limit == golden["lam"]
    outputs = given_features(F.normalize(image, dim=1), F.normalize(text, dim=1))
    found = loss_of_features(recipe, outputs)
    assert_golden(found, golden[f"{kind}_loss"])
    found.backward()
    assert_golden(image.grad, golden[f"{kind}_gradE"])
    assert_golden(text.grad, golden[f"{kind}_gradG"])
    unlimited = replace(recipe, transform=replace(recipe.transform, limit=1.0))
    assert_golden(loss_of_features(unlimited, outputs), golden["none_loss"])
    assert abs(golden["none_loss"] - golden[f"{kind}_loss"]) > 1e-2


def test_the_relaxed_hinge_gives_each_query_its_slack():
    golden = tensors("relax_derived")
    slack = golden["delta"].item()
    recipe = replace(RELAXED_HINGE, estimator=InfoNCE(slack=slack), temperature=fixed(golden["tau"].item()))
    outputs = given_features(*(F.normalize(golden[key], dim=1) for key in "EG"))
    logits = golden["cos"] / golden["tau"]
    rows = [*loop_ce(LoopTable(logits, list(range(6)))), *loop_ce(LoopTable(logits.T, list(range(6))))]
    expected = sum(max(row - slack, 0.0) for row in rows) / 12
    assert loss_of_features(recipe, outputs).item() == pytest.approx(expected, rel=1e-12)
    assert abs(loss_of_features(RELAXED_HINGE, outputs).item() - expected) > 1e-2


def load_critic(objective: Objective, weights: list[Tensor], biases: list[Tensor]) -> None:
    state = {}
    for name, weight, bias in zip(("first", "second", "last"), weights, biases, strict=True):
        state |= {f"{name}.weight": weight, f"{name}.bias": bias}
    objective.state_of("main").critic.load_state_dict(state)


def critic_loss(objective: Objective, outputs: PairOutputs, studies: list[int]) -> Tensor:
    batch = replace(make_batch([4] * len(studies)), group_keys=torch.tensor(studies))
    loss: Tensor = objective(outputs, batch, None, SingleProcess()).loss
    return loss


def test_the_released_critic_leaves_out_pairs_of_one_study():
    golden = tensors("localmi_official_global")
    image, text, studies = leaf(golden["img"]), leaf(golden["txt"]), golden["study_id"].tolist()
    outputs = given_features(image, text)
    objective = build_objective(replace(LOCAL_MI_GLOBAL, extra_tables={}), outputs)
    load_critic(objective, *([golden[f"w_{k}_{kind}"] for k in (0, 2, 4)] for kind in ("weight", "bias")))
    found = critic_loss(objective, outputs, studies)
    assert_golden(found, golden["dv_loss"], atol=2e-7)  # the release rounds log(count) to float32
    found.backward()
    assert_golden(image.grad, golden["grad_img_dv"])
    assert_golden(text.grad, golden["grad_txt_dv"])
    assert abs(critic_loss(objective, outputs, list(range(6))) - golden["dv_loss"]) > 1e-4


@pytest.mark.parametrize("rule", ["max", "select", "pmi"])
@pytest.mark.parametrize("estimator", [DonskerVaradhan(), InfoNCE()], ids=["dv", "ce"])
def test_critics_of_regions_equal_the_loop(rule, estimator):
    patches, texts = draw(5, 9, 6, seed=1), unit(5, 6, seed=2)
    outputs = given_features(unit(5, 6), texts, patches=patches)
    pool = replace(LOCAL_MI_CRITIC.region_pool, kind=rule)
    recipe = replace(LOCAL_MI_CRITIC, region_pool=pool, estimator=estimator, extra_tables={})
    objective = build_objective(recipe, outputs)
    critic = objective.state_of("main").critic
    with torch.no_grad():  # of the default weights all scores are much alike
        critic.last.weight.mul_(10)
    layers = [(layer.weight.detach(), layer.bias.detach()) for layer in critic.children()]
    units = F.normalize(patches, dim=2)
    scores = torch.tensor([loop_concat_scores(one, texts, layers) for one in units], dtype=torch.float64)
    table = torch.tensor(loop_region_rule(scores, rule=rule), dtype=torch.float64)
    apart = torch.ones(5, 5, dtype=torch.bool)
    apart[0, 1] = apart[1, 0] = False

    def expected(valid: Tensor | None) -> float:
        both = [LoopTable(scores_QC, list(range(5)), valid) for scores_QC in (table, table.T)]
        return sum(loop_dv(t) if estimator.kind == "dv" else sum(loop_ce(t)) / 5 for t in both) / 2

    found = critic_loss(objective, outputs, [1, 1, 2, 3, 4]).item()
    assert found == pytest.approx(expected(apart), rel=1e-10)
    assert abs(found - expected(None)) > 1e-3
