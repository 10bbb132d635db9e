"""Search spaces of the variational bounds."""

from tune_spaces.domains import LogUniform, Space, Uniform

# Bounds with an exponential of the scores leave float32 below 1 / 80.
SPACE: Space = {"method.temperature.init": LogUniform(low=0.05, high=1.0)}

INTERPOLATED: Space = {
    **SPACE,
    # From nearly TUBA to nearly InfoNCE.
    "method.estimator.alpha_logit": Uniform(low=-4.0, high=4.0),
}
