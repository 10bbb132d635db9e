"""Search space of CLIP."""

from tune_spaces.domains import LogUniform, Space

SPACE: Space = {
    "method.temperature.init": LogUniform(low=0.02, high=0.5),  # paper: 0.07, learned from there
}
