"""Systems of the catalogue that have no recipe, why, and what of them can be reached."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, kw_only=True)
class MissingRecipe:
    """A system that is listed and cannot be run.

    Attributes:
        reason: why there is no recipe.
        residue: which parts of the catalogue come closest.
    """

    name: str
    source: str
    reason: str
    residue: str


WITHOUT_RECIPE: Final[dict[str, MissingRecipe]] = {
    entry.name: entry
    for entry in (
        MissingRecipe(
            name="survey_ssl",
            source="Anand and Garg 2021, arXiv 2111.02042",
            reason="a survey of self-supervised learning: it proposes no system",
            residue="its contrastive side is the estimators of any recipe, its generative side `radtex`",
        ),
        MissingRecipe(
            name="mvmi_ft",
            source="Fan et al. 2023, arXiv 2105.06715",
            reason="needs graphs and graph encoders: its views are topology and feature graphs",
            residue="its local-global bound between two views is `dim` with features.num_views=2; its "
            "disagreement term is models.regularisers.disagreement",
        ),
        MissingRecipe(
            name="domain_private_mi",
            source="Chen et al. 2022, arXiv 2201.03102",
            reason="unsupervised domain adaptation: needs a labelled source domain and a domain-adversarial "
            "loop",
            residue="information between input and latent on unlabelled images is the `image` table of `dim`",
        ),
        MissingRecipe(
            name="ssl_100m",
            source="Ghesu et al. 2022, arXiv 2201.01283",
            reason="its 100 million radiographs, CT, MR and ultrasound images are private, and no code is "
            "released",
            residue="its online clustering is `pcl`, whose clusters are found between epochs",
        ),
        MissingRecipe(
            name="cpl",
            source="He et al. 2022, arXiv 2210.10362",
            reason="tunes prompts of a frozen pair on a few labelled images: it follows pretraining",
            residue="it is a part of evaluation: `clipfleet evaluate RUN evaluation.shots=16` fits its "
            "prompts, with and without counterfactual features, to any trained run and scores them",
        ),
    )
}
