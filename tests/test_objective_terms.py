"""Heads and regularisers inside an objective: each term is its weight times an independent value."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.distillation import removed_patches
from models.features import PairFeatures
from models.heads import byol_loss
from models.keyed_noise import Draw, keyed_uniform
from models.methods.aclip import ACLIP
from models.methods.clip import CLIP
from models.methods.slip import SLIP
from models.objective import LossReport, Objective
from models.outputs import MaskedImage, MaskedText, TeacherOutputs
from models.prior import prior_rows
from models.regularisers import projection_directions
from models.table_slots import Temperature
from models.training_slots import (
    BYOLHead,
    CaptionHead,
    DistilHead,
    Features,
    HashHead,
    Heads,
    MaskedDistillationHead,
    MaskedTokensHead,
    Prior,
    Regularisers,
    SimCLRHead,
    SlicedWasserstein,
    TokenEntropy,
    Uniformity,
)
from tests.given_outputs import batch_for, outputs_for, teacher_for
from tests.golden_files import assert_golden, leaf, tensors
from tests.oracles.aclip import loop_byol, loop_simclr
from tests.oracles.heads import (
    loop_caption_rows,
    loop_code_rows,
    loop_distil_rows,
    loop_hash_terms,
    loop_sliced_wasserstein,
    loop_token_rows,
)
from tests.oracles.tables import loop_uniformity
from tests.oracles.tier import loop_entropies, loop_means
from tests.pair_fixture import SINGLE, build_objective, given_features, make_batch

RECIPE = replace(
    CLIP,
    features=Features(num_views=2, text_attention="full"),
    regularisers=Regularisers(
        token_entropy=TokenEntropy(token_over_patches=0.3, patch_over_tokens=0.7, temperature=0.5),
        uniformity=Uniformity(weight=0.2, scale=3.0),
        sliced_wasserstein=SlicedWasserstein(weight=1.5, num_directions=7),
        prior=Prior(weight=0.4, penalty=2.0),
    ),
    heads=Heads(
        simclr=SimCLRHead(weight=1.1, temperature=0.3),
        byol=BYOLHead(weight=1.2),
        masked_tokens=MaskedTokensHead(weight=1.3),
        caption=CaptionHead(weight=1.4),
        distil=DistilHead(weight=1.6, global_share=0.3),
        masked_distillation=MaskedDistillationHead(weight=1.7, num_codes=6),
        hash=HashHead(weight=1.8, num_bits=5, balance=0.3, certainty=0.2, gap=0.1),
    ),
)
BATCH = batch_for(RECIPE)
NUM_PAIRS = len(BATCH.images)
OUTPUTS, TEACHER = outputs_for(RECIPE, BATCH), teacher_for(BATCH)
TEXTS = [ids[real].tolist() for ids, real in zip(BATCH.token_ids[0], BATCH.is_real_token[0], strict=True)]


@pytest.fixture(scope="module")
def objective() -> Objective:
    return build_objective(RECIPE, OUTPUTS).requires_grad_(False)


@pytest.fixture(scope="module")
def report(objective) -> LossReport:
    return objective(OUTPUTS, BATCH, TEACHER, SINGLE)


@pytest.fixture(scope="module")
def elsewhere(objective) -> LossReport:
    """The control: other features, the same weights."""
    other = batch_for(RECIPE, seed=1)
    return objective(outputs_for(RECIPE, other, seed=1), other, teacher_for(other, seed=1), SINGLE)


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def mean_of_counted(rows: list[tuple[float, int]]) -> float:
    return sum(total for total, _ in rows) / sum(count for _, count in rows)


def entropies(name: str) -> float:
    """Of the matched words and patches of each view, averaged over views."""
    words = F.normalize(OUTPUTS.text_tokens, dim=2)
    found = []
    for patches in F.normalize(OUTPUTS.image_tokens, dim=3):
        cosines = torch.einsum("btd,bpd->btp", words, patches)
        both = loop_entropies(cosines, temperature=0.5, is_real_token=OUTPUTS.is_real_token)
        found.append(loop_means(both[name == "patch_over_tokens"])[0])
    return mean(found)


def uniformity(objective: Objective) -> float:
    sides = OUTPUTS.image_embeds[0], OUTPUTS.report_embeds
    return mean([loop_uniformity(side, scale=3.0) for side in sides])


def sliced_wasserstein(objective: Objective) -> float:
    directions = projection_directions(BATCH.draw_keys.sum(), step=0, num_directions=7, width=8).double()
    return loop_sliced_wasserstein(OUTPUTS.image_embeds[0], OUTPUTS.report_embeds, directions)


def prior(objective: Objective, which: int) -> float:
    """The rows have their own loops, which are slow at this width."""
    features = OUTPUTS.image_features[0]
    noise = keyed_uniform(BATCH.draw_keys, Draw.PRIOR, features.shape[1])
    rows = prior_rows(objective.penalties.discriminator, features, noise, gradient_penalty=2.0)
    return rows[which].mean().item()


def simclr(objective: Objective) -> float:
    first, second = (objective.heads.simclr(view) for view in OUTPUTS.image_features)
    return loop_simclr(first, second, temperature=0.3)


def byol(objective: Objective) -> float:
    heads = objective.heads
    predictions = [heads.byol_predictor(heads.byol_projector(view)) for view in OUTPUTS.image_features]
    return mean([loop_byol(prediction, TEACHER.features) for prediction in predictions])


def masked_tokens(objective: Objective) -> float:
    masked = OUTPUTS.masked_text
    assert isinstance(masked, MaskedText)
    positions = [row.nonzero()[:, 0].tolist() for row in masked.is_target]
    return mean_of_counted(loop_token_rows(objective.heads.masked_tokens(masked.states), TEXTS, positions))


def caption(objective: Objective) -> float:
    ids, is_real = BATCH.token_ids[0], BATCH.is_real_token[0]
    rows = loop_caption_rows(*objective.heads.caption(OUTPUTS.image_tokens[0], ids, is_real), TEXTS)
    return sum(sum(row[k] for row in rows) / sum(row[k + 1] for row in rows) for k in (0, 2))


def distil(objective: Objective) -> float:
    partner = PairFeatures(OUTPUTS, BATCH, TEACHER, SINGLE).rolled().tolist()
    teacher = [[row] for row in TEACHER.features.tolist()]
    negatives = [teacher[other] for other in partner]
    image = [[row] for row in OUTPUTS.image_features[0].tolist()]
    patches = OUTPUTS.patch_features[0].tolist()
    whole = mean(loop_distil_rows(image, teacher, negatives, objective.heads.distil_global))
    local = mean(loop_distil_rows(patches, teacher, negatives, objective.heads.distil_local))
    return 0.3 * whole + 0.7 * local


def masked_distillation(objective: Objective) -> float:
    masked, head = OUTPUTS.masked_image, objective.heads.masked_distillation
    assert isinstance(masked, MaskedImage)
    removed = [row.nonzero()[:, 0].tolist() for row in removed_patches(masked.kept, head.num_patches)]
    predicted = head(masked.patches, masked.kept)
    return mean_of_counted(
        loop_code_rows(predicted, TEACHER.patches, head.codes, removed=removed, temperatures=(0.1, 0.04))
    )


def hash_codes(objective: Objective) -> float:
    terms = loop_hash_terms(
        *objective.heads.hash(OUTPUTS.image_embeds[0], OUTPUTS.report_embeds), temperature=0.2
    )
    return terms["contrast"] - 0.3 * terms["balance"] + 0.2 * terms["certainty"] + 0.1 * terms["gap"]


TERMS = {
    "token_over_patches": (0.3, lambda objective: entropies("token_over_patches")),
    "patch_over_tokens": (0.7, lambda objective: entropies("patch_over_tokens")),
    "uniformity": (0.2, uniformity),
    "sliced_wasserstein": (1.5, sliced_wasserstein),
    "prior": (0.4, lambda objective: prior(objective, 0)),
    "prior_discriminator": (1.0, lambda objective: prior(objective, 1)),
    "simclr": (1.1, simclr),
    "byol": (1.2, byol),
    "masked_tokens": (1.3, masked_tokens),
    "caption": (1.4, caption),
    "distil": (1.6, distil),
    "masked_distillation": (1.7, masked_distillation),
    "hash": (1.8, hash_codes),
}


@pytest.mark.parametrize("name", TERMS)
def test_each_term_is_its_weight_times_the_loop(name, objective, report, elsewhere):
    weight, loop = TERMS[name]
    assert report.terms[name].item() == pytest.approx(weight * loop(objective), rel=1e-9)
    assert abs(elsewhere.terms[name] / report.terms[name] - 1) > 1e-4


class Same(torch.nn.Identity):
    """A head that leaves its input as it is: stored values are those after the heads."""


def test_slip_contrasts_its_text_with_the_first_view_and_the_other_two_with_each_other():
    golden = tensors("slip_total_0")
    image, text, first, second = (leaf(golden[key]) for key in ("image", "text", "aug1", "aug2"))
    views = F.normalize(torch.stack([image, second, first]), dim=2)  # whatever the others' embeddings are
    outputs = replace(
        given_features(views, F.normalize(text, dim=1)),
        image_features=torch.stack([first.detach(), first, second]),
    )
    fixed = Temperature(policy="fixed", init=1 / golden["logit_scale"].item())
    objective = build_objective(replace(SLIP, temperature=fixed), outputs)
    objective.heads.simclr = Same()
    report = objective(outputs, make_batch([4] * 4), None, SINGLE)
    assert_golden(report.terms["main"], golden["clip_loss"])
    assert_golden(report.terms["simclr"], golden["ssl_loss"])
    assert_golden(report.loss, golden["loss"])
    report.loss.backward()
    for key, value in {"image": image, "text": text, "aug1": first, "aug2": second}.items():
        assert_golden(value.grad, golden[f"g_{key}"])
    all_views = replace(SLIP, temperature=fixed, views="all", heads=Heads())
    assert abs(build_objective(all_views, outputs)(outputs, make_batch([4] * 4), None, SINGLE).loss) > 1


def test_aclip_adds_its_heads_at_the_released_weights():
    """But for SimCLR, which the release feeds with one view twice; the stored mended value has two."""
    golden = tensors("aclip_loss_0")
    image, text, ssl, byol = (
        leaf(golden[key]) for key in ("image_embed", "text_embed", "image_ssl_embed", "byol_feats")
    )
    views = F.normalize(image.view(2, 4, -1), dim=2)
    outputs = given_features(views, F.normalize(text, dim=1))
    scale = golden["logit_scale"].item()
    recipe = replace(ACLIP, temperature=Temperature(policy="fixed", init=1 / scale))

    def terms_of(features: Tensor) -> LossReport:
        given = replace(outputs, image_features=features.view(2, 4, -1))
        objective = build_objective(recipe, given)
        for head in ("simclr", "byol_projector", "byol_predictor"):
            setattr(objective.heads, head, Same())
        teacher = TeacherOutputs(torch.zeros(1), golden["byol_feats_e"])
        found: LossReport = objective(given, make_batch([4] * 4), teacher, SINGLE)
        return found

    contrastive, prediction = terms_of(ssl), terms_of(byol)
    assert_golden(contrastive.terms["main"], 0.5 * (golden["contra1"] + golden["contra2"]))
    assert_golden(contrastive.terms["simclr"], golden["simclr_fixed"])
    assert_golden(prediction.terms["byol"], 2 * golden["byol"])
    (contrastive.loss - 2 * byol_loss(ssl, golden["byol_feats_e"].repeat(2, 1))).backward()
    assert_golden(ssl.grad, golden["g_ssl_fixed"])
    assert_golden(image.grad, golden["g_image_embed"])
    assert_golden(text.grad, golden["g_text_embed"])
    released = golden["loss"] - golden["simclr"] + golden["simclr_fixed"]
    assert_golden(
        contrastive.terms["main"] + contrastive.terms["simclr"] + prediction.terms["byol"], released
    )
    assert abs(released - golden["loss"]) > 1


def test_terms_add_up(report):
    assert report.terms.keys() == TERMS.keys() | {"main"}
    assert report.loss.item() == pytest.approx(sum(term.item() for term in report.terms.values()))


def test_every_parameter_of_every_head_takes_part():
    objective = build_objective(RECIPE, OUTPUTS)
    objective(OUTPUTS, BATCH, TEACHER, SINGLE).loss.backward()
    for name, parameter in objective.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_the_prior_s_two_losses_do_not_mix():
    """The weight is the encoder's: the discriminator learns as fast at any weight."""

    def gradients(weight: float) -> tuple[Tensor, Tensor]:
        recipe = replace(CLIP, regularisers=Regularisers(prior=Prior(weight=weight)))
        outputs = outputs_for(recipe, batch_for(recipe))
        features = outputs.image_features.clone().requires_grad_()
        objective = build_objective(recipe, outputs)
        objective(replace(outputs, image_features=features), batch_for(recipe), None, SINGLE).loss.backward()
        weights = [p.grad.flatten() for p in objective.penalties.discriminator.parameters()]
        return features.grad, torch.cat(weights)

    (image, discriminator), (other_image, other_discriminator) = gradients(0.1), gradients(0.3)
    torch.testing.assert_close(other_image, 3 * image)
    torch.testing.assert_close(other_discriminator, discriminator)


def test_watched_values_are_no_terms(report):
    assert {"temperature/main", "modality_gap", "entropy_over_patches", "entropy_over_tokens"} <= set(
        report.diagnostics
    )
    gap = (OUTPUTS.image_embeds[0].mean(0) - OUTPUTS.report_embeds.mean(0)).norm()
    assert report.diagnostics["modality_gap"].item() == pytest.approx(gap.item())
    assert not any(value.requires_grad for value in report.diagnostics.values())
    assert all(math.isfinite(value.item()) for value in report.diagnostics.values())


@pytest.mark.parametrize("head", ["byol", "distil", "masked_distillation"])
def test_heads_of_a_teacher_refuse_to_do_without(head):
    heads = replace(Heads(), **{head: getattr(RECIPE.heads, head)})
    recipe = replace(CLIP, heads=heads)
    outputs = outputs_for(recipe, batch_for(recipe))
    with pytest.raises(ValueError, match=f"heads.{head} needs the EMA teacher's features, got none"):
        build_objective(recipe, outputs)(outputs, batch_for(recipe), None, SINGLE)
