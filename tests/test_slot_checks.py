"""Every refusal of a slot on its own; combinations are in test_recipe_checks.py."""

import re

import pytest

from models.table_slots import (
    Candidates,
    Directions,
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
    SimCLRHead,
    SlicedWasserstein,
    Teacher,
    TokenEntropy,
    TokenSelection,
    Uniformity,
)

SLOTS = [
    (lambda: Score(hidden=(0.0, 1.0)), "hidden_first must be > 0, got 0.0"),
    (lambda: Score(hidden=(1.0, -1.0)), "hidden_second must be > 0, got -1.0"),
    (lambda: RegionPool(sharpness=-1.0), "sharpness must be > 0, got -1.0"),
    (lambda: RegionPool(temperature=0.0), "temperature must be > 0, got 0.0"),
    (lambda: SentencePool(sharpness=0.0), "sharpness must be > 0, got 0.0"),
    (lambda: Transform(beta=0.0), "beta must be > 0, got 0.0"),
    (lambda: Transform(slope=1.1), "slope must be between 0 and 1, got 1.1"),
    (lambda: Transform(limit=-1.0), "limit is a cosine and must be in (-1, 1], got -1.0"),
    (lambda: Transform(limit=1.1), "limit is a cosine and must be in (-1, 1], got 1.1"),
    (lambda: Candidates(size=0), "size must be > 0, got 0"),
    (lambda: Candidates(momentum=1.1), "momentum must be between 0 and 1, got 1.1"),
    (lambda: Candidates(first_epoch=-1), "first_epoch must be >= 0, got -1"),
    (lambda: Candidates(num_clusters=()), "num_clusters must name at least one count >= 2, got ()"),
    (lambda: Candidates(num_clusters=(8, 1)), "num_clusters must name at least one count >= 2, got (8, 1)"),
    *(
        (
            lambda kind=kind: Candidates(kind=kind, exclude="same_group"),
            f"candidates.kind={kind} knows neither exclude=same_group nor modality=cross",
        )
        for kind in ("roll", "queue", "memory", "prototypes")
    ),
    (lambda: Candidates(kind="queue", modality="both"), "neither exclude=nothing nor modality=both"),
    (lambda: Targets(mixing=2.0), "mixing must be between 0 and 1, got 2.0"),
    (lambda: Targets(kind="smoothed", mixing=1.0), "smoothed with mixing=1 leaves the own pair nothing"),
    (lambda: Targets(radius=0.0), "radius must be > 0, got 0.0"),
    (lambda: Targets(off_diagonal_mass=1.0), "off_diagonal_mass must be strictly between 0 and 1, got 1.0"),
    (lambda: Directions(image_to_text=-1.0), ">= 0 and not both 0, got image_to_text=-1.0"),
    (
        lambda: Directions(image_to_text=0, text_to_image=0),
        "not both 0, got image_to_text=0, text_to_image=0",
    ),
    (lambda: Temperature(init=0.0), "init must be > 0, got 0.0"),
    (lambda: Temperature(minimum=0.0), "minimum must be > 0, got 0.0"),
    (lambda: Temperature(init=0.001), "must start between minimum=0.01 and 1, got 0.001"),
    (lambda: Temperature(policy="learned", init=2.0), "must start between minimum=0.01 and 1, got 2.0"),
    (lambda: Features(num_views=0), "num_views must be > 0, got 0"),
    (lambda: Features(num_texts=0), "num_texts must be > 0, got 0"),
    (lambda: Features(sentences_per_text=0), "sentences_per_text must be > 0, got 0"),
    (lambda: Features(num_texts=2), "num_texts=2 and sentences_per_text=1 choose sentences"),
    (lambda: Features(sentences_per_text=3), "set features.text=sentence"),
    (lambda: TokenSelection(keep_ratio=1.5), "keep_ratio must be between 0 and 1, got 1.5"),
    (lambda: TokenSelection(keep_ratio=0.0), "keep_ratio must be > 0, got 0.0"),
    (lambda: TokenSelection(mixed_share=-0.1), "mixed_share must be between 0 and 1, got -0.1"),
    (lambda: TokenSelection(warmup_share=2.0), "warmup_share must be between 0 and 1, got 2.0"),
    (lambda: TokenSelection(unmasked_share=2.0), "unmasked_share must be between 0 and 1, got 2.0"),
    (lambda: Teacher(decay=-0.1), "decay must be between 0 and 1, got -0.1"),
    (lambda: Teacher(image_scale=0.0), "image_scale must be > 0, got 0.0"),
    (lambda: Teacher(image_scale=2.0), "image_scale must be between 0 and 1, got 2.0"),
    (lambda: TokenEntropy(temperature=0.0), "temperature must be > 0, got 0.0"),
    (lambda: Uniformity(scale=0.0), "scale must be > 0, got 0.0"),
    (lambda: SlicedWasserstein(num_directions=0), "num_directions must be > 0, got 0"),
    (lambda: Prior(penalty=-1.0), "penalty must be >= 0, got -1.0"),
    (lambda: SimCLRHead(temperature=0.0), "temperature must be > 0, got 0.0"),
    (lambda: BYOLHead(hidden_ratio=0.0), "hidden_ratio must be > 0, got 0.0"),
    (lambda: MaskedTokensHead(share=0.0), "share must be > 0, got 0.0"),
    (lambda: MaskedTokensHead(share=1.5), "share must be between 0 and 1, got 1.5"),
    (lambda: CaptionHead(num_layers=0), "num_layers must be > 0, got 0"),
    (lambda: DistilHead(global_share=1.5), "global_share must be between 0 and 1, got 1.5"),
    (lambda: MaskedDistillationHead(num_codes=0), "num_codes must be > 0, got 0"),
    (lambda: MaskedDistillationHead(keep_ratio=1.5), "keep_ratio must be between 0 and 1, got 1.5"),
    (lambda: HashHead(num_bits=0), "num_bits must be > 0, got 0"),
    (lambda: HashHead(gap=-1.0), "gap must be >= 0, got -1.0"),
    (lambda: Heads(caption=CaptionHead(weight=-1.0)), "heads.caption.weight must be >= 0, got -1.0"),
]


@pytest.mark.parametrize(("call", "message"), SLOTS)
def test_slots_refuse(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_edges_are_allowed():
    assert Temperature(policy="fixed", init=2.0).init == 2.0
    assert Temperature(init=1.0).init == 1.0
    assert Transform(limit=1.0, slope=0.0).limit == 1.0
    assert Targets(kind="soft", mixing=1.0).mixing == 1.0
    assert Candidates(num_clusters=(2,), first_epoch=0).num_clusters == (2,)
    assert TokenSelection(keep_ratio=1.0, unmasked_share=1.0).keep_ratio == 1.0
    assert Features(text="sentence", num_texts=8, sentences_per_text=2).num_texts == 8
