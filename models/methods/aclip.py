"""A-CLIP: patches the EMA teacher does not attend to are removed; two views, SimCLR and BYOL heads.

Deviations from the released code: the teacher's crop covers both views (the released box has two
defects), SimCLR contrasts view 1 with view 2 (released: view 1 with itself), heads use LayerNorm
(BatchNorm would depend on the per-worker batch), the patch projection is trained. The teacher is
trusted only after `selection.warmup_share` of the steps; before that, patches are removed at random.
`aclip_random` and `aclip_high` are its controls.
"""

from __future__ import annotations

from dataclasses import replace

from models.recipe import BYOLHead, Features, Heads, MethodRecipe, SimCLRHead, TokenSelection

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
