"""Search spaces of contrastive multiview coding."""

from tune_spaces.domains import LogUniform, Space, Uniform

SPACE: Space = {
    "method.temperature.init": LogUniform(low=0.03, high=0.3),  # paper: 0.07, fixed
    "method.extra_tables.image_views.weight": Uniform(low=0.0, high=2.0),  # paper: 1
}

MEMORY: Space = {
    "method.temperature.init": LogUniform(low=0.03, high=0.3),  # paper: 0.07, fixed
    "method.candidates.momentum": Uniform(low=0.0, high=0.9),  # paper: 0.5
}
