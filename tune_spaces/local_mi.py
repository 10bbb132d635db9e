"""Search space of local mutual information."""

from tune_spaces.domains import Choice, LogUniform, Space

SPACE: Space = {
    "method.estimator.kind": Choice(("ce", "jsd", "dv")),
    "method.temperature.init": LogUniform(low=0.03, high=0.3),
    "method.extra_tables.global.weight": LogUniform(low=0.25, high=4.0),
}
