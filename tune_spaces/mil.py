"""Search spaces of the multiple-instance scores; none of the paper's values is known here."""

from tune_spaces.domains import Choice, LogUniform, Space

SPACE: Space = {
    "method.temperature.init": LogUniform(low=0.03, high=0.3),
    "method.sentence_pool.kind": Choice(("mean", "max", "lse", "sum")),
}

LSE: Space = {**SPACE, "method.region_pool.sharpness": LogUniform(low=2.0, high=30.0)}

ATTENTION: Space = {**SPACE, "method.region_pool.temperature": LogUniform(low=0.03, high=1.0)}

LSE_NL: Space = {**LSE, "method.extra_tables.non_local.weight": LogUniform(low=0.25, high=4.0)}
