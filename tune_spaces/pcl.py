"""Search space of prototypical contrastive learning."""

from tune_spaces.domains import LogUniform, Space, Uniform

SPACE: Space = {
    "method.temperature.init": LogUniform(low=0.05, high=0.5),  # authors: 0.2, fixed
    "method.extra_tables.prototypes.weight": Uniform(low=0.0, high=2.0),  # paper: 1
    "method.extra_tables.prototypes.temperature.init": LogUniform(low=0.05, high=0.5),  # authors: 0.2
}
