"""Search space of SoftCLIP; none of the paper's coefficients is published."""

from tune_spaces.domains import Space, Uniform

SPACE: Space = {
    "method.targets.mixing": Uniform(low=0.05, high=0.6),
    "method.targets.off_diagonal_mass": Uniform(low=0.1, high=0.8),
    "method.extra_tables.relation.weight": Uniform(low=0.0, high=2.0),
}
