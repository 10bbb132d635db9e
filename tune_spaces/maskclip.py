"""Search space of masked distillation; the paper's weights are from memory."""

from tune_spaces.domains import LogUniform, Space, Uniform

SPACE: Space = {
    "method.heads.masked_distillation.weight": LogUniform(low=0.01, high=1.0),  # from memory: 0.05
    "method.heads.masked_distillation.keep_ratio": Uniform(low=0.2, high=0.6),  # from memory: 0.25
    "method.heads.masked_tokens.weight": LogUniform(low=0.01, high=1.0),  # from memory: 0.05
}
