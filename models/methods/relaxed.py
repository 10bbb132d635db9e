"""Sentence sampling with relaxed positive pairs: fine-tuning of a trained image-text model on reports.

Each step's text is one sampled sentence (`features.sentences_per_text` joins several), and a pair is not
pulled beyond a limit, because reports share findings. The paper's equation is not readable here; four forms
meet its words: `relaxed` caps the positive's cosine, `relaxed_leaky` lets it rise slowly above, `relaxed_all`
caps every pair, `relaxed_hinge` gives each query's loss a slack. The cap acts in numerator and denominator;
in the numerator alone it would push pairs apart.

Meant to start from a checkpoint: `train.start_from=<run>` and a small `train.lr` (1e-6 to 1e-4); the
temperature stays where that run left it (.07 without one).
"""

from __future__ import annotations

from dataclasses import replace

from models.estimators import InfoNCE
from models.recipe import MethodRecipe
from models.table_slots import Temperature, Transform
from models.training_slots import Features

RELAXED = MethodRecipe(
    name="relaxed",
    source="Jang et al. 2022, arXiv 2212.07050",
    evidence="derived",
    features=Features(text="sentence"),
    transform=Transform(kind="cap", limit=0.8),
    temperature=Temperature(policy="kept", init=0.07),
)

RELAXED_LEAKY = replace(RELAXED, name="relaxed_leaky", transform=Transform(kind="leaky", limit=0.8))

RELAXED_ALL = replace(RELAXED, name="relaxed_all", transform=Transform(kind="cap_all", limit=0.8))

RELAXED_HINGE = replace(RELAXED, name="relaxed_hinge", transform=Transform(), estimator=InfoNCE(slack=0.1))

RECIPES = (RELAXED, RELAXED_LEAKY, RELAXED_ALL, RELAXED_HINGE)
