"""Search spaces of the optional components."""

from tune_spaces.domains import Choice, LogUniform, Space, Uniform

UNIFORMITY: Space = {
    "method.regularisers.uniformity.weight": LogUniform(low=0.01, high=1.0),
}

HASH: Space = {
    "method.heads.hash.num_bits": Choice((16, 32, 64, 128)),  # papers: 16 to 128
    "method.heads.hash.weight": LogUniform(low=0.1, high=4.0),
    "method.heads.hash.gap": LogUniform(low=0.001, high=0.1),
}

CAPTION: Space = {"method.heads.caption.weight": LogUniform(low=0.1, high=4.0)}

DISTIL: Space = {
    "method.heads.distil.weight": LogUniform(low=0.1, high=4.0),
    "method.heads.distil.global_share": Uniform(low=0.0, high=1.0),
    "method.teacher.decay": Uniform(low=0.95, high=0.999),
}

SLICED_WASSERSTEIN: Space = {
    "method.regularisers.sliced_wasserstein.weight": LogUniform(low=0.1, high=10.0),
}
