"""Search space of GLoRIA."""

from tune_spaces.domains import LogUniform, Space

SPACE: Space = {
    "method.region_pool.sharpness": LogUniform(low=1.0, high=20.0),  # authors: 5
    "method.temperature.init": LogUniform(low=0.03, high=0.3),  # authors: 0.1, fixed
    "method.extra_tables.global.weight": LogUniform(low=0.25, high=4.0),  # authors: 1
}
