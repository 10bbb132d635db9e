"""Search space of LoVT."""

from tune_spaces.domains import LogUniform, Space, Uniform

SPACE: Space = {
    "method.extra_tables.regions.weight": Uniform(low=0.0, high=1.0),  # authors: 0.375
    "method.extra_tables.sentences.weight": Uniform(low=0.0, high=1.0),  # authors: 0.375
    "method.temperature.init": LogUniform(low=0.03, high=0.3),  # authors: 0.1, fixed
}
