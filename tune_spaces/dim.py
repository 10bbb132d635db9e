"""Search space of Deep InfoMax."""

from tune_spaces.domains import Choice, LogUniform, Space, Uniform

SPACE: Space = {
    "method.estimator.kind": Choice(("jsd", "ce", "dv")),  # paper: jsd, and the two others
    "method.regularisers.prior.weight": Uniform(low=0.0, high=1.0),  # paper: 0.1 local, 1 global
    "method.extra_tables.global.weight": LogUniform(low=0.25, high=4.0),
}
