"""MaskCLIP: CLIP beside masked self-distillation of patches and masked language modelling.

An extra pass sees a quarter of the patches; a one-layer decoder predicts the EMA teacher's soft codes of
the others. From memory of the paper (Dong et al., CVPR 2023), no code was released: both weights .05, EMA
.999. The cosine code book is ours. The text tower attends both ways, as masked words need.
"""

from __future__ import annotations

from models.recipe import MethodRecipe
from models.training_slots import Features, Heads, MaskedDistillationHead, MaskedTokensHead, Teacher

MASKCLIP = MethodRecipe(
    name="maskclip",
    source="Dong et al. 2023, MaskCLIP, CVPR",
    evidence="paper-unverified",
    features=Features(text_attention="full"),
    teacher=Teacher(decay=0.999),
    heads=Heads(
        masked_distillation=MaskedDistillationHead(weight=0.05, keep_ratio=0.25),
        masked_tokens=MaskedTokensHead(weight=0.05),
    ),
)

RECIPES = (MASKCLIP,)
