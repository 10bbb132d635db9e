"""Search space of local mutual information with a learned critic."""

from tune_spaces.domains import Choice, LogUniform, Space

SPACE: Space = {
    "method.estimator.kind": Choice(("dv", "jsd", "ce")),  # paper: dv and row-wise InfoNCE
    "method.extra_tables.global.weight": LogUniform(low=0.25, high=4.0),
}
