"""Optional components on CLIP; each is switched on in any recipe by its weight.

`cmimh` (method.heads.hash): binary codes of both modalities for Hamming retrieval, in the spirit of the
paper, whose decoders are not reproduced (arXiv 2112.06489). `radtex` (method.heads.caption): the caption is
written forwards and backwards from the patches (arXiv 2208.03218). `mimkd` (method.heads.distil): mutual
information with the EMA teacher, whole image and patches, one negative each (arXiv 2110.15946).
`coconet` (method.regularisers.sliced_wasserstein): the two modalities' distributions are aligned along
random directions; plain slices, without the paper's complementarity factor (arXiv 2209.07811).
"""

from __future__ import annotations

from dataclasses import replace

from models.methods.clip import CLIP
from models.training_slots import (
    CaptionHead,
    DistilHead,
    HashHead,
    Heads,
    Regularisers,
    SlicedWasserstein,
)

CMIMH = replace(
    CLIP,
    name="cmimh",
    source="Hoang et al. 2023, arXiv 2112.06489",
    evidence="paper-unverified",
    heads=Heads(hash=HashHead(weight=1.0)),
)

RADTEX = replace(
    CLIP,
    name="radtex",
    source="Quigley et al. 2022, arXiv 2208.03218",
    evidence="derived",
    heads=Heads(caption=CaptionHead(weight=1.0)),
)

MIMKD = replace(
    CLIP,
    name="mimkd",
    source="Shrivastava et al. 2021, arXiv 2110.15946",
    evidence="derived",
    heads=Heads(distil=DistilHead(weight=0.5)),
)

COCONET = replace(
    CLIP,
    name="coconet",
    source="Li et al. 2023, arXiv 2209.07811",
    evidence="paper-unverified",
    regularisers=Regularisers(sliced_wasserstein=SlicedWasserstein(weight=1.0)),
)

RECIPES = (CMIMH, RADTEX, MIMKD, COCONET)
