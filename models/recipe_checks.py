"""Which combinations of a table's slots make sense; what would be ignored is refused.

Each check raises ValueError and names what was set, so that a recipe fails before any worker starts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from models.bounds import smallest_safe_temperature

if TYPE_CHECKING:
    from models.recipe import TableRecipe
    from models.table_slots import Temperature

# Estimators that know pairs and negatives only: a target distribution would be ignored.
_BINARY: Final = ("loob", "jsd", "dv", "sigmoid", "nwj", "tuba", "interp")
_REMEMBERED: Final = ("queue", "memory", "prototypes")

# Names under which other parts of a loss are reported.
_TERMS: Final = frozenset(
    {
        "token_over_patches",
        "patch_over_tokens",
        "uniformity",
        "sliced_wasserstein",
        "prior",
        "prior_discriminator",
        "simclr",
        "byol",
        "masked_tokens",
        "caption",
        "distil",
        "masked_distillation",
        "hash",
    }
)


def check_name(name: str) -> None:
    """Refuse a name of an extra table that stands for something else."""
    if name == "main" or name in _TERMS or not name.isidentifier():
        raise ValueError(
            "an extra table needs a name of letters, digits and underscores that no other term has, "
            f"got '{name}'"
        )


def check_table(table: TableRecipe) -> None:
    """Refuse combinations that make no sense."""
    _check_sides(table)
    if table.is_within_sample:
        _check_within_sample(table)
    _check_pools(table)
    _check_transform(table)
    _check_candidates(table)
    _check_targets(table)
    _check_estimator(table)


def _check_sides(table: TableRecipe) -> None:
    between, region, sentence = table.between, table.region_pool.kind, table.sentence_pool.kind
    if between == "image_regions" and region in ("global", "words"):
        raise ValueError(
            "between=image_regions compares an image with patches; set region_pool.kind=each or a pool, "
            f"got {region}"
        )
    if between == "image_regions" and sentence != "none":
        raise ValueError(f"between=image_regions has no texts; set sentence_pool.kind=none, got {sentence}")
    if between not in ("image_text", "image_regions") and (table.is_local or table.score.kind != "cosine"):
        raise ValueError(
            f"between={between} compares whole features by cosine, got region_pool.kind={region}, "
            f"sentence_pool.kind={sentence} and score.kind={table.score.kind}"
        )
    if between != "image_text" and table.candidates.kind != "batch":
        raise ValueError(f"candidates.kind={table.candidates.kind} needs between=image_text, got {between}")
    if (table.targets.kind == "spatial") != (between == "regions"):
        raise ValueError(
            f"targets.kind=spatial goes with between=regions, got {table.targets.kind} with {between}"
        )


def _check_within_sample(table: TableRecipe) -> None:
    if table.estimator.kind != "ce":
        raise ValueError(
            f"between={table.between} takes estimator.kind=ce, got {table.estimator.kind}: a text alone in "
            "its report has no negatives"
        )
    if table.between == "sentences" and table.targets.kind != "identity":
        raise ValueError(
            f"between=sentences has the own position as its target, got {table.targets.kind}; set "
            "targets.kind=identity"
        )
    candidates = table.candidates
    if candidates.exclude != "nothing" or candidates.modality != "cross" or table.bias.policy != "none":
        raise ValueError(
            f"between={table.between} contrasts the parts of one sample without a bias, got "
            f"candidates.exclude={candidates.exclude}, candidates.modality={candidates.modality} and "
            f"bias.policy={table.bias.policy}"
        )


def _check_pools(table: TableRecipe) -> None:
    region, sentence = table.region_pool.kind, table.sentence_pool.kind
    if sentence != "none" and region in ("words", "each", "select", "pmi"):
        raise ValueError(
            f"region_pool.kind={region} speaks of one text of a pair; set sentence_pool.kind=none, got "
            f"{sentence}"
        )
    if table.score.kind == "concat" and (
        table.transform.kind != "none"
        or table.candidates.kind not in ("batch", "roll")
        or region in ("mean_region", "attention", "non_local", "words", "noisy_or", "each")
    ):
        raise ValueError(
            "score.kind=concat scores pairs of features: it goes with region_pool.kind=global, max, "
            f"mean, lse, select or pmi and no transform, got region_pool.kind={region}, "
            f"transform.kind={table.transform.kind} and candidates.kind={table.candidates.kind}"
        )


def _check_transform(table: TableRecipe) -> None:
    transform, region, sentence = table.transform, table.region_pool.kind, table.sentence_pool.kind
    if transform.kind == "none":
        return
    if table.candidates.kind != "batch" or table.is_within_sample:
        raise ValueError(
            f"transform.kind={transform.kind} works on the batch's pairs, got "
            f"candidates.kind={table.candidates.kind} and between={table.between}"
        )
    if transform.kind == "hopfield" and table.is_local:
        raise ValueError(
            f"Hopfield retrieval works on global features; with region_pool.kind={region} and "
            f"sentence_pool.kind={sentence} set transform.kind=none"
        )
    if transform.kind == "hopfield" and table.between in ("texts", "image_text2"):
        raise ValueError(
            "Hopfield retrieval would retrieve second texts that are not there; with "
            f"between={table.between} set transform.kind=none"
        )
    if transform.relaxes and (region in ("noisy_or", "words", "each") or sentence == "sum"):
        raise ValueError(
            f"transform.kind={transform.kind} limits the cosine of a pair, and region_pool.kind={region} "
            f"with sentence_pool.kind={sentence} has none"
        )


def _check_candidates(table: TableRecipe) -> None:
    candidates = table.candidates
    if candidates.modality == "both" and (table.is_local or table.score.kind != "cosine"):
        raise ValueError("candidates.modality=both compares whole features; set region_pool.kind=global")
    if candidates.kind not in _REMEMBERED:
        return
    if table.is_local:
        raise ValueError(
            f"candidates.kind={candidates.kind} holds whole features; set region_pool.kind=global "
            "and sentence_pool.kind=none"
        )
    if candidates.kind == "prototypes" and table.temperature.policy != "fixed":
        raise ValueError(
            "candidates.kind=prototypes scales each prototype by its own concentration, whose mean is "
            f"temperature.init; set temperature.policy=fixed, got {table.temperature.policy}"
        )
    if (
        table.targets.kind != "identity"
        or table.bias.policy != "none"
        or table.estimator.kind in ("tuba", "interp")
    ):
        raise ValueError(
            f"candidates.kind={candidates.kind} has one positive, no bias and no baseline, got "
            f"targets.kind={table.targets.kind}, bias.policy={table.bias.policy} and "
            f"estimator.kind={table.estimator.kind}"
        )


def _check_targets(table: TableRecipe) -> None:
    targets, estimator = table.targets, table.estimator
    if targets.kind != "identity" and estimator.kind in _BINARY:
        raise ValueError(
            f"estimator.kind={estimator.kind} knows pairs and negatives only and would ignore "
            f"targets.kind={targets.kind}; set targets.kind=identity or estimator.kind=ce, kl or "
            "relation_kl"
        )
    if targets.kind != "identity" and table.region_pool.kind == "each":
        raise ValueError(
            "region_pool.kind=each has one positive for each patch; set targets.kind=identity, got "
            f"{targets.kind}"
        )
    if estimator.kind not in ("kl", "relation_kl"):
        return
    if targets.kind == "identity":
        raise ValueError(
            f"estimator.kind={estimator.kind} compares distributions and needs targets.kind=soft or "
            "smoothed, got identity"
        )
    is_symmetric = estimator.direction == "symmetric"
    if not is_symmetric and estimator.kind == "kl":
        return
    if targets.kind == "same_group" or targets.mixing == 0:
        raise ValueError(
            f"estimator.kind={estimator.kind}, direction={estimator.direction} needs targets that give every "
            f"candidate a share, got targets.kind={targets.kind} with mixing={targets.mixing:g}"
        )
    if is_symmetric and table.candidates.modality == "both":
        raise ValueError(
            "estimator.direction=symmetric needs targets for every candidate, and candidates.modality=both "
            "adds some without"
        )


def _check_estimator(table: TableRecipe) -> None:
    kind = table.estimator.kind
    safe = smallest_safe_temperature(kind)
    if safe > 0 and (table.region_pool.kind == "noisy_or" or table.sentence_pool.kind == "sum"):
        raise ValueError(
            f"estimator.kind={kind} takes exp(score), and a sum over patches or sentences makes it leave "
            "float32; choose another region_pool.kind or sentence_pool.kind"
        )
    if table.temperature.policy != "shared":
        check_temperature(table, table.temperature)


def check_temperature(table: TableRecipe, temperature: Temperature) -> None:
    """Refuse a temperature, the table's own or the one it shares, too low for its estimator."""
    kind = table.estimator.kind
    safe = smallest_safe_temperature(kind)
    if table.score.kind == "cosine" and temperature.smallest < safe:
        raise ValueError(
            f"estimator.kind={kind} takes exp(similarity / temperature), which leaves float32 below a "
            f"temperature of {safe:g}; got {temperature.smallest:g}. Raise temperature.minimum, or "
            "temperature.init of a fixed one"
        )
