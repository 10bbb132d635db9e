"""PCL for image-text pairs: a queue of the EMA teacher's embeddings, and prototypes found between epochs.

Between epochs the teacher embeds every training pair, both embeddings are clustered together at several
granularities, and each modality is contrasted with the other's cluster means, every mean with a temperature
from how tight its cluster is. Defaults: temperature .2, EMA .999, prototypes after the first epoch (arXiv
2005.04966: .2, .999, after 20 of 200 epochs, 25,000 to 100,000 clusters, queue of 16,384).

Deviations: images and texts in place of two image crops; pairs of a batch that share a cluster share a
column (the release makes a positive its own negative); the first steps see a queue that is not yet full.
"""

from __future__ import annotations

from models.recipe import MethodRecipe, TableRecipe
from models.table_slots import Candidates, Temperature
from models.training_slots import Teacher

_TAU = Temperature(policy="fixed", init=0.2)

PCL = MethodRecipe(
    name="pcl",
    source="Li et al. 2021, arXiv 2005.04966",
    evidence="official",
    teacher=Teacher(decay=0.999),
    candidates=Candidates(kind="queue", size=1024),
    temperature=_TAU,
    extra_tables={
        "prototypes": TableRecipe(
            candidates=Candidates(kind="prototypes", size=64, num_clusters=(16, 32, 64), first_epoch=1),
            temperature=_TAU,
        )
    },
)

RECIPES = (PCL,)
