"""Search space of TIER."""

from tune_spaces.domains import Choice, Space, Uniform

SPACE: Space = {
    # Authors: both from U(0, 0.5), independently.
    "method.regularisers.token_entropy.token_over_patches": Uniform(low=0.0, high=0.5),
    "method.regularisers.token_entropy.patch_over_tokens": Uniform(low=0.0, high=0.5),
    # Authors: 1, at which the entropy can fall by about 12 % only.
    "method.regularisers.token_entropy.temperature": Choice((1.0, 0.1)),
}
