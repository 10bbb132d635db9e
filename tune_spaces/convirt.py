"""Search space of ConVIRT."""

from tune_spaces.domains import LogUniform, Space, Uniform

SPACE: Space = {
    "method.temperature.init": LogUniform(low=0.03, high=0.3),  # paper: 0.1, fixed
    "method.directions.image_to_text": Uniform(low=0.25, high=0.75),  # paper: 0.75 against 0.25
}
