"""SoftCLIP: targets softened by intra-modal self-similarity, negatives also aligned on their own.

No official code exists and the paper's coefficients are not known here, so all of them are searched.
`softclip` replaces the detector's region and tag features by the mean of the unit patch tokens and a
hashed bag of words; `softclip_tags` takes the rows' labels as tags for both sides (rows without labels are
like themselves alone). The temperature of the targets comes from a wanted off-diagonal mass: sharing the
learned one would collapse the targets to one-hot. The `relation` table holds the disentangled negatives.
"""

from __future__ import annotations

from dataclasses import replace

from models.estimators import RelationKL, SoftKL
from models.recipe import MethodRecipe, TableRecipe
from models.table_slots import Targets, Temperature

_SOFT = Targets(kind="soft")
_TAGS = Targets(kind="soft", image_guidance="tags", text_guidance="tags")


def _relation(targets: Targets) -> dict[str, TableRecipe]:
    shared = Temperature(policy="shared")
    return {"relation": TableRecipe(targets=targets, estimator=RelationKL(), temperature=shared)}


SOFTCLIP = MethodRecipe(
    name="softclip",
    source="Gao et al. 2024, arXiv 2303.17561",
    evidence="derived",
    targets=_SOFT,
    estimator=SoftKL(),
    extra_tables=_relation(_SOFT),
)

SOFTCLIP_TAGS = replace(SOFTCLIP, name="softclip_tags", targets=_TAGS, extra_tables=_relation(_TAGS))

RECIPES = (SOFTCLIP, SOFTCLIP_TAGS)
