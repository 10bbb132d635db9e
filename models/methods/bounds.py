"""Variational bounds of mutual information as objectives on CLIP's table.

`bound_nwj`, `bound_tuba` (with a learned baseline per query), `bound_dv`, `bound_interpolated` (between TUBA
and InfoNCE; alpha_logit towards -infinity is TUBA, the released notebook says the reverse) and `bound_js`
(trained by Jensen-Shannon, whose critic NWJ then reads). arXiv 1905.06922.

Bounds with an exponential of the scores leave float32 below a temperature of 1 / 80, so these recipes clamp
at .02 and lower settings are refused. DV and NWJ have high variance: they are diagnostics first, and `ce`,
`jsd` or `interp` the ones to train with.
"""

from __future__ import annotations

from dataclasses import replace

from models.bounds import NWJ, TUBA, Interpolated
from models.estimators import DonskerVaradhan, JensenShannon
from models.recipe import MethodRecipe
from models.table_slots import Baseline, Temperature

BOUND_NWJ = MethodRecipe(
    name="bound_nwj",
    source="Poole et al. 2019, arXiv 1905.06922",
    evidence="official",
    estimator=NWJ(),
    temperature=Temperature(init=0.2, minimum=0.02),
)

BOUND_TUBA = replace(
    BOUND_NWJ, name="bound_tuba", estimator=TUBA(), baseline=Baseline(kind="learned", value=1.0)
)

BOUND_DV = replace(BOUND_NWJ, name="bound_dv", estimator=DonskerVaradhan())

BOUND_INTERPOLATED = replace(BOUND_NWJ, name="bound_interpolated", estimator=Interpolated(alpha_logit=-2.0))

BOUND_JS = replace(BOUND_NWJ, name="bound_js", estimator=JensenShannon())

RECIPES = (BOUND_NWJ, BOUND_TUBA, BOUND_DV, BOUND_INTERPOLATED, BOUND_JS)
