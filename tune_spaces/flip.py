"""Search space of FLIP."""

from tune_spaces.domains import Space, Uniform

SPACE: Space = {
    "method.selection.keep_ratio": Uniform(low=0.25, high=0.75),  # paper: 0.5, and 0.25
    "method.selection.unmasked_share": Uniform(low=0.0, high=0.2),  # paper: 0.01 of its samples
}
