"""Search space of the BioViL-style recipe; the paper's values are from memory."""

from tune_spaces.domains import LogUniform, Space

SPACE: Space = {
    "method.temperature.init": LogUniform(low=0.05, high=1.0),  # from memory: 0.5
    "method.heads.masked_tokens.weight": LogUniform(low=0.01, high=1.0),  # from memory: 0.1
}
