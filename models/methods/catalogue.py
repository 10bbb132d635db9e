"""The methods, by name. Adding one: a recipe file, a space file, a line here and one in the spaces."""

from __future__ import annotations

from typing import Final

from models.methods.aclip import ACLIP, ACLIP_HIGH, ACLIP_RANDOM
from models.methods.clip import CLIP
from models.methods.cloob import CLOOB
from models.methods.local_mi import LOCAL_MI
from models.methods.softclip import SOFTCLIP
from models.methods.tier import TIER
from models.recipe import MethodRecipe

METHODS: Final[dict[str, MethodRecipe]] = {
    "clip": CLIP,
    "tier": TIER,
    "cloob": CLOOB,
    "aclip": ACLIP,
    "softclip": SOFTCLIP,
    "local_mi": LOCAL_MI,
    "aclip_random": ACLIP_RANDOM,
    "aclip_high": ACLIP_HIGH,
}
