"""Search space of SigLIP."""

from tune_spaces.domains import LogUniform, Space, Uniform

SPACE: Space = {
    "method.temperature.init": LogUniform(low=0.03, high=0.5),  # paper: 0.1
    # Paper: -10 at 32,768 pairs; the log-odds of a match at 64 pairs are -4.
    "method.bias.init": Uniform(low=-12.0, high=0.0),
}
