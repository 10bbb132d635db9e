"""Search spaces of relaxed positive pairs; the paper's values are not known here."""

from tune_spaces.domains import Choice, LogUniform, Space, Uniform

_SAMPLING: Space = {"method.features.sentences_per_text": Choice((1, 2, 4))}

SPACE: Space = {**_SAMPLING, "method.transform.limit": Uniform(low=0.5, high=0.95)}

LEAKY: Space = {**SPACE, "method.transform.slope": Choice((0.0, 0.1, 0.3))}

HINGE: Space = {**_SAMPLING, "method.estimator.slack": LogUniform(low=0.01, high=1.0)}
