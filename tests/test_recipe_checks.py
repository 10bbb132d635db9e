"""Every refused combination of slots, and that less is allowed."""

import math
import re
from dataclasses import replace

import pytest

from models.bounds import NWJ, TUBA, Interpolated, SigmoidPairs
from models.estimators import InfoLOOB, InfoNCE, JensenShannon, RelationKL, SoftKL
from models.methods.aclip import ACLIP
from models.methods.biovil import BIOVIL
from models.methods.catalogue import METHODS
from models.methods.clip import CLIP
from models.methods.cloob import CLOOB
from models.methods.cmc import CMC_CORE, CMC_GRAPH
from models.methods.lovt import LOVT
from models.methods.mil import MIL_LSE
from models.recipe import MethodRecipe, TableRecipe
from models.recipe_checks import _TERMS
from models.table_slots import (
    Bias,
    Candidates,
    RegionPool,
    Score,
    SentencePool,
    Targets,
    Temperature,
    Transform,
)
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
    TokenSelection,
    Uniformity,
)
from tests.pair_fixture import build_model, forward, make_batch

EACH, WORDS, SOFT = RegionPool(kind="each"), RegionPool(kind="words"), Targets(kind="soft")
FIXED = Temperature(policy="fixed", init=0.2)
CAP, HOPFIELD = Transform(kind="cap"), Transform(kind="hopfield")
QUEUE, BOTH = Candidates(kind="queue"), Candidates(modality="both")
PROTOTYPES = Candidates(kind="prototypes")
MEAN_SENTENCE, SUM_SENTENCE = SentencePool(kind="mean"), SentencePool(kind="sum")
REGIONS = {"between": "regions", "targets": Targets(kind="spatial")}

TABLES = [
    (
        {"between": "image_regions"},
        "compares an image with patches; set region_pool.kind=each or a pool",
    ),
    ({"between": "image_regions", "region_pool": WORDS}, "set region_pool.kind=each or a pool, got words"),
    (
        {
            "between": "image_regions",
            "region_pool": RegionPool(kind="max"),
            "sentence_pool": MEAN_SENTENCE,
        },
        "between=image_regions has no texts; set sentence_pool.kind=none, got mean",
    ),
    ({"between": "texts", "region_pool": EACH}, "between=texts compares whole features by cosine"),
    ({"between": "image_views", "sentence_pool": MEAN_SENTENCE}, "whole features by cosine, got"),
    ({"between": "image_text2", "score": Score(kind="concat")}, "and score.kind=concat"),
    ({"between": "texts", "candidates": QUEUE}, "candidates.kind=queue needs between=image_text, got texts"),
    (
        {"between": "image_text2", "candidates": Candidates(kind="roll")},
        "candidates.kind=roll needs between=image_text, got image_text2",
    ),
    (
        {"targets": Targets(kind="spatial")},
        "targets.kind=spatial goes with between=regions, got spatial",
    ),
    ({"between": "regions"}, "targets.kind=spatial goes with between=regions, got identity with regions"),
    ({**REGIONS, "estimator": InfoLOOB()}, "between=regions takes estimator.kind=ce, got loob"),
    (
        {"between": "sentences", "estimator": JensenShannon()},
        "between=sentences takes estimator.kind=ce, got jsd: a text alone in its report has no negatives",
    ),
    (
        {"between": "sentences", "candidates": Candidates(exclude="same_text")},
        "contrasts the parts of one sample without a bias, got candidates.exclude=same_text",
    ),
    (
        {"between": "sentences", "candidates": BOTH},
        "got candidates.exclude=nothing, candidates.modality=both",
    ),
    ({"between": "sentences", "bias": Bias(policy="learned")}, "modality=cross and bias.policy=learned"),
    (
        {"between": "sentences", "targets": SOFT},
        "between=sentences has the own position as its target, got soft",
    ),
    *(
        (
            {"region_pool": RegionPool(kind=kind), "sentence_pool": MEAN_SENTENCE},
            f"region_pool.kind={kind} speaks of one text of a pair; set sentence_pool.kind=none, got mean",
        )
        for kind in ("words", "each", "select", "pmi")
    ),
    *(
        (
            {"score": Score(kind="concat"), "region_pool": RegionPool(kind=kind)},
            f"score.kind=concat scores pairs of features: .* got region_pool.kind={kind},",
        )
        for kind in ("mean_region", "attention", "non_local", "words", "noisy_or", "each")
    ),
    ({"score": Score(kind="concat"), "transform": CAP}, "transform.kind=cap and candidates.kind=batch"),
    ({"score": Score(kind="concat"), "candidates": QUEUE}, "transform.kind=none and candidates.kind=queue"),
    (
        {"transform": CAP, "candidates": QUEUE},
        "transform.kind=cap works on the batch's pairs, got candidates.kind=queue",
    ),
    ({**REGIONS, "transform": CAP}, "got candidates.kind=batch and between=regions"),
    (
        {"transform": HOPFIELD, "region_pool": RegionPool(kind="mean")},
        "Hopfield retrieval works on global features; with region_pool.kind=mean and sentence_pool.kind=none",
    ),
    (
        {"transform": HOPFIELD, "sentence_pool": MEAN_SENTENCE},
        "sentence_pool.kind=mean set transform.kind=none",
    ),
    ({"transform": HOPFIELD, "between": "texts"}, "second texts that are not there; with between=texts set"),
    *(
        (
            {"transform": CAP, "region_pool": RegionPool(kind=kind)},
            f"transform.kind=cap limits the cosine of a pair, and region_pool.kind={kind} with",
        )
        for kind in ("noisy_or", "words", "each")
    ),
    ({"transform": CAP, "sentence_pool": SUM_SENTENCE}, "with sentence_pool.kind=sum has none"),
    (
        {"candidates": BOTH, "region_pool": RegionPool(kind="max")},
        "modality=both compares whole features; set",
    ),
    ({"candidates": BOTH, "score": Score(kind="concat")}, "candidates.modality=both compares whole features"),
    (
        {"candidates": QUEUE, "region_pool": RegionPool(kind="max")},
        "candidates.kind=queue holds whole features; set region_pool.kind=global and sentence_pool.kind=none",
    ),
    ({"candidates": PROTOTYPES}, "whose mean is temperature.init; set temperature.policy=fixed, got learned"),
    (
        {"candidates": QUEUE, "targets": SOFT},
        "candidates.kind=queue has one positive, no bias and no baseline",
    ),
    ({"candidates": QUEUE, "bias": Bias(policy="learned")}, "bias.policy=learned and estimator.kind=ce"),
    ({"candidates": QUEUE, "estimator": TUBA(), "temperature": FIXED}, "and estimator.kind=tuba"),
    (
        {"candidates": Candidates(kind="memory"), "estimator": Interpolated(), "temperature": FIXED},
        "candidates.kind=memory has one positive, no bias and no baseline",
    ),
    (
        {"targets": SOFT, "estimator": InfoLOOB()},
        "estimator.kind=loob knows pairs and negatives only and would ignore targets.kind=soft",
    ),
    (
        {"targets": SOFT, "region_pool": EACH},
        "kind=each has one positive for each patch; set targets.kind=identity",
    ),
    (
        {"estimator": SoftKL()},
        "estimator.kind=kl compares distributions and needs targets.kind=soft or smoothed",
    ),
    (
        {"estimator": RelationKL()},
        "estimator.kind=relation_kl compares distributions and needs targets.kind=soft",
    ),
    (
        {"estimator": RelationKL(), "targets": Targets(kind="same_group")},
        "direction=forward needs targets that give every candidate a share, got targets.kind=same_group",
    ),
    ({"estimator": RelationKL(), "targets": Targets(kind="soft", mixing=0.0)}, "kind=soft with mixing=0"),
    (
        {"estimator": SoftKL(direction="symmetric"), "targets": Targets(kind="smoothed", mixing=0.0)},
        "estimator.kind=kl, direction=symmetric needs targets that give every candidate a share",
    ),
    (
        {"estimator": SoftKL(direction="symmetric"), "targets": SOFT, "candidates": BOTH},
        "direction=symmetric needs targets for every candidate, and candidates.modality=both adds some",
    ),
    (
        {"estimator": NWJ(), "region_pool": RegionPool(kind="noisy_or"), "temperature": FIXED},
        "estimator.kind=nwj takes exp(score), and a sum over patches or sentences makes it leave float32",
    ),
    (
        {"estimator": NWJ(), "sentence_pool": SUM_SENTENCE, "temperature": FIXED},
        "takes exp(score), and a sum",
    ),
    (
        {"estimator": NWJ()},
        "leaves float32 below a temperature of 0.0125; got 0.01. Raise temperature.minimum",
    ),
    (
        {"estimator": NWJ(), "temperature": Temperature(policy="fixed", init=0.012)},
        "got 0.012. Raise temperature.minimum",
    ),
]


def recipe(**slots: object) -> MethodRecipe:
    return MethodRecipe(name="x", source="x", evidence="derived", **slots)


def with_table(table: TableRecipe, *, base: MethodRecipe = CLIP, name: str = "extra") -> MethodRecipe:
    return replace(base, extra_tables={name: table})


SENTENCES = Features(text="sentence", num_texts=2)
RECIPES = [
    (lambda: recipe(temperature=Temperature(policy="shared")), "policy=shared is for extra tables; the main"),
    (
        lambda: recipe(between="texts", features=SENTENCES),
        "the main table is between image and text; between=texts",
    ),
    (
        lambda: with_table(TableRecipe(between="image_views")),
        "'extra' compares two views, got features.num_views=1",
    ),
    (
        lambda: with_table(TableRecipe(between="texts")),
        "'extra' needs several texts of a pair, got features.num_texts=1",
    ),
    (
        lambda: with_table(TableRecipe(between="image_text2")),
        "several texts of a pair, got features.num_texts=1",
    ),
    (
        lambda: with_table(TableRecipe(between="sentences")),
        "several texts of a pair, got features.num_texts=1",
    ),
    (
        lambda: recipe(sentence_pool=MEAN_SENTENCE),
        "table 'main' pools the sentences of a report; set features",
    ),
    (
        lambda: with_table(TableRecipe(**REGIONS), base=replace(CLIP, selection=ACLIP.selection)),
        "'extra' knows the place of every patch; set selection.kind=none, got attentive",
    ),
    (lambda: replace(ACLIP, features=Features()), "heads.simclr contrasts 2 views, got features.num_views=1"),
    (
        lambda: replace(BIOVIL, features=Features()),
        "predicts from both sides of a word; set features.text_attention=full",
    ),
    (
        lambda: with_table(TableRecipe(estimator=NWJ(), temperature=Temperature(policy="shared"))),
        "leaves float32 below a temperature of 0.0125; got 0.01",
    ),
    *(
        (
            lambda name=name: with_table(TableRecipe(), name=name),
            f"a name of letters, digits and underscores that no other term has, got '{name}'",
        )
        for name in ("main", "simclr", "uniformity", "a.b", "")
    ),
]


@pytest.mark.parametrize(("call", "message"), RECIPES)
def test_recipes_refuse(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


@pytest.mark.parametrize(("slots", "message"), TABLES)
def test_tables_refuse(slots, message):
    with pytest.raises(ValueError, match=message.replace("(score)", r"\(score\)")):
        TableRecipe(**slots)


@pytest.mark.parametrize("slots", [slots for slots, _ in TABLES if len(slots) > 1])
def test_no_refusal_has_more_slots_than_it_needs(slots):
    """The control: each refused combination is allowed without one of its slots, or refused for less."""
    fewer = [{key: value for key, value in slots.items() if key != dropped} for dropped in slots]

    def is_allowed(some: dict[str, object]) -> bool:
        try:
            TableRecipe(**some)
        except ValueError:
            return False
        return True

    assert any(is_allowed(some) for some in fewer)


@pytest.mark.parametrize(
    "allowed",
    [
        lambda: TableRecipe(transform=CAP, region_pool=RegionPool(kind="max")),
        lambda: TableRecipe(transform=HOPFIELD, candidates=BOTH),
        lambda: TableRecipe(candidates=PROTOTYPES, temperature=FIXED),
        lambda: TableRecipe(candidates=Candidates(kind="memory"), estimator=SigmoidPairs()),
        lambda: TableRecipe(estimator=SoftKL(), targets=Targets(kind="same_group")),
        lambda: TableRecipe(estimator=RelationKL(), targets=Targets(kind="smoothed")),
        lambda: TableRecipe(estimator=NWJ(), temperature=Temperature(init=0.2, minimum=0.0125)),
        lambda: TableRecipe(estimator=NWJ(), score=Score(kind="concat"), temperature=Temperature(init=1.0)),
        lambda: TableRecipe(region_pool=EACH, candidates=Candidates(kind="roll"), estimator=JensenShannon()),
        lambda: with_table(TableRecipe(estimator=NWJ(), temperature=FIXED)),
        lambda: with_table(TableRecipe(between="image_text2"), base=CMC_CORE),
    ],
)
def test_what_makes_sense_is_allowed(allowed):
    allowed()


def test_every_term_of_a_loss_but_the_tables_has_a_reserved_name():
    everything = replace(
        CLIP,
        features=Features(num_views=2, text_attention="full"),
        regularisers=Regularisers(
            token_entropy=TokenEntropy(token_over_patches=1.0, patch_over_tokens=1.0),
            uniformity=Uniformity(weight=1.0),
            sliced_wasserstein=SlicedWasserstein(weight=1.0),
            prior=Prior(weight=1.0),
        ),
        heads=Heads(
            simclr=SimCLRHead(weight=1.0),
            byol=BYOLHead(weight=1.0),
            masked_tokens=MaskedTokensHead(weight=1.0),
            caption=CaptionHead(weight=1.0),
            distil=DistilHead(weight=1.0),
            masked_distillation=MaskedDistillationHead(weight=1.0),
            hash=HashHead(weight=1.0),
        ),
    )
    terms = forward(build_model(everything), make_batch(num_views=2)).terms
    assert terms.keys() == _TERMS | {"main"}


def test_needs_of_recipes():
    needs_joint = {name for name, method in METHODS.items() if method.needs_joint_teacher}
    assert needs_joint == {"pcl"}
    for head in ("byol", "distil", "masked_distillation"):
        heads = replace(Heads(), **{head: replace(getattr(Heads(), head), weight=0.1)})
        assert replace(CLIP, heads=heads).needs_teacher, head
    for head in ("simclr", "masked_tokens", "caption", "hash"):
        features = Features(num_views=2, text_attention="full")
        heads = replace(Heads(), **{head: replace(getattr(Heads(), head), weight=0.1)})
        assert not replace(CLIP, features=features, heads=heads).needs_teacher, head
    for kind in ("attentive", "high", "mixed"):
        assert replace(CLIP, selection=TokenSelection(kind=kind)).needs_teacher
    for kind in ("none", "random", "tokens"):
        assert not replace(CLIP, selection=TokenSelection(kind=kind)).needs_teacher
    assert list(CMC_GRAPH.tables) == ["main", "second_text", "image_views", "texts"]
    assert [name for name, table in LOVT.tables.items() if table.is_within_sample] == ["regions", "sentences"]
    assert MIL_LSE.is_local
    assert not CLOOB.is_local
    assert math.isclose(CLOOB.temperature.smallest, 1 / 30)
    assert CLIP.temperature.smallest == 0.01
    assert InfoNCE().kind == "ce"
