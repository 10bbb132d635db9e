"""Search space of A-CLIP and its controls."""

from tune_spaces.domains import Space, Uniform

SPACE: Space = {
    "method.selection.keep_ratio": Uniform(low=0.3, high=0.8),  # paper: 0.5
    "method.heads.simclr.weight": Uniform(low=0.0, high=1.0),  # paper: 1
    "method.heads.byol.weight": Uniform(low=0.0, high=2.0),  # paper: 2
}
