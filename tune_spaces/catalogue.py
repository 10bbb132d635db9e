"""Search space of each method, by the name it has in the method catalogue."""

from typing import Final

from tune_spaces import aclip, clip, cloob, local_mi, softclip, tier
from tune_spaces.domains import Space

SPACES: Final[dict[str, Space]] = {
    "clip": clip.SPACE,
    "tier": tier.SPACE,
    "cloob": cloob.SPACE,
    "aclip": aclip.SPACE,
    "softclip": softclip.SPACE,
    "local_mi": local_mi.SPACE,
    "aclip_random": aclip.SPACE,
    "aclip_high": aclip.SPACE,
}
