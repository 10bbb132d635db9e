"""SoftCLIP: targets softened by intra-modal self-similarity, negatives also aligned on their own.

No official code exists and the paper's coefficients are not known here, so all of them are searched.
The detector's region and tag features are replaced by the mean of the unit patch tokens and a hashed
bag of words. The temperature of the targets comes from a wanted off-diagonal mass: sharing the learned
one would collapse the targets to one-hot.
"""

from __future__ import annotations

from models.estimators import RelationKL, SoftKL
from models.recipe import MethodRecipe, TableRecipe, Targets, Temperature

_SOFT = Targets(kind="soft")

SOFTCLIP = MethodRecipe(
    name="softclip",
    source="Gao et al. 2024, arXiv 2303.17561",
    evidence="derived",
    targets=_SOFT,
    estimator=SoftKL(),
    extra_tables={
        "relation": TableRecipe(
            weight=1.0,
            targets=_SOFT,
            estimator=RelationKL(),
            temperature=Temperature(policy="shared"),
        )
    },
)
