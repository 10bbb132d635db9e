"""Deep InfoMax for image-text pairs: every patch tells its text and its image from others.

Jensen-Shannon bound over all patches and pairs (`method.estimator.kind=ce` or `dv` for the others), in
three tables: patches against texts, patches against whole images, whole images against texts. Features
pass Deep InfoMax's blocks (two layers beside a shortcut); the adversarial prior pushes the image feature
towards uniform noise with the sign mended, weight .1 as in the paper's local settings.

Deviations: image-text pairs in place of image-image ones alone, cosines with a learned temperature in place
of dot products, LayerNorm. The released Donsker-Varadhan loss cannot run; ours is used.
"""

from __future__ import annotations

from models.estimators import JensenShannon
from models.recipe import MethodRecipe, TableRecipe
from models.table_slots import Directions, RegionPool
from models.training_slots import Features, Prior, Regularisers

_ONE_WAY = Directions(image_to_text=1.0, text_to_image=0.0)
_EACH = RegionPool(kind="each")

DIM = MethodRecipe(
    name="dim",
    source="Hjelm et al. 2019, Deep InfoMax, arXiv 1808.06670",
    evidence="derived",
    features=Features(text="sentence", projection="mi_block"),
    region_pool=_EACH,
    estimator=JensenShannon(),
    directions=_ONE_WAY,
    extra_tables={
        "image": TableRecipe(
            between="image_regions", region_pool=_EACH, estimator=JensenShannon(), directions=_ONE_WAY
        ),
        "global": TableRecipe(estimator=JensenShannon()),
    },
    regularisers=Regularisers(prior=Prior(weight=0.1)),
)

RECIPES = (DIM,)
