"""Search space of SLIP."""

from tune_spaces.domains import LogUniform, Space, Uniform

SPACE: Space = {
    "method.heads.simclr.weight": Uniform(low=0.0, high=1.0),  # paper: 1
    "method.heads.simclr.temperature": LogUniform(low=0.05, high=0.5),  # paper: 0.1
}
