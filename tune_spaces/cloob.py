"""Search space of CLOOB."""

from tune_spaces.domains import LogUniform, Space

SPACE: Space = {
    # Authors: 5 to 20 at global batches of 512 and 1024; the useful range moves with the batch.
    "method.transform.beta": LogUniform(low=2.0, high=32.0),
    # Authors: inverse temperatures 14.3 to 70, fixed. Small batches want less.
    "method.temperature.init": LogUniform(low=0.014, high=0.3),
}

WITHOUT_RETRIEVAL: Space = {"method.temperature.init": SPACE["method.temperature.init"]}
