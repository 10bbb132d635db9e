"""A-CLIP: patches the EMA teacher does not attend to are removed; two views, SimCLR and BYOL heads.

Defaults of the paper: keep ratio .5, SimCLR weight 1, BYOL weight 2, EMA decay .996 (arXiv 2212.08653).
Deviations from the released code: the teacher's crop covers both views (the released box has two
defects), SimCLR contrasts view 1 with view 2 (released: view 1 with itself), heads use LayerNorm
(BatchNorm would depend on the per-worker batch), the patch projection is trained. The teacher is
trusted only after `selection.warmup_share` of the steps; before that, patches are removed at random.

`aclip_random`, `aclip_high` and `aclip_mixed` are controls that differ in the choice of patches alone.
`aclip_eff` scores at half resolution, a quarter of the teacher's work; it is not in the released code:
positions are resized bicubically, the coarse map is carried to each view's grid.
"""

from __future__ import annotations

from dataclasses import replace

from models.recipe import MethodRecipe
from models.training_slots import BYOLHead, Features, Heads, SimCLRHead, Teacher, TokenSelection

ACLIP = MethodRecipe(
    name="aclip",
    source="Yang et al. 2023, Attentive Mask CLIP, arXiv 2212.08653",
    evidence="official",
    features=Features(num_views=2),
    selection=TokenSelection(kind="attentive", keep_ratio=0.5),
    heads=Heads(simclr=SimCLRHead(weight=1.0), byol=BYOLHead(weight=2.0)),
)

ACLIP_RANDOM = replace(ACLIP, name="aclip_random", selection=replace(ACLIP.selection, kind="random"))

ACLIP_HIGH = replace(ACLIP, name="aclip_high", selection=replace(ACLIP.selection, kind="high"))

ACLIP_MIXED = replace(
    ACLIP, name="aclip_mixed", evidence="derived", selection=replace(ACLIP.selection, kind="mixed")
)

ACLIP_EFF = replace(ACLIP, name="aclip_eff", evidence="derived", teacher=Teacher(image_scale=0.5))

RECIPES = (ACLIP, ACLIP_RANDOM, ACLIP_HIGH, ACLIP_MIXED, ACLIP_EFF)
