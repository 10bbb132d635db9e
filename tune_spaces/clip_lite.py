"""Search space of CLIP-Lite."""

from tune_spaces.domains import Choice, LogUniform, Space

SPACE: Space = {
    "method.temperature.init": LogUniform(low=0.02, high=0.5),  # paper: 0.07, learned from there
    "method.candidates.kind": Choice(("roll", "batch")),  # paper: one negative
}
