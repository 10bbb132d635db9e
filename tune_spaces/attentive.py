"""Search space of token removal alone, by the teacher or at random."""

from tune_spaces.domains import LogUniform, Space, Uniform

SPACE: Space = {
    "method.selection.keep_ratio": Uniform(low=0.3, high=0.8),  # paper: 0.5
    "method.temperature.init": LogUniform(low=0.02, high=0.5),  # paper: 0.07, learned from there
}
