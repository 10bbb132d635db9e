"""From features to pair tables: instance score, region pool, transform, candidates, targets.

B local pairs, N pairs of all workers, V views, P patches, D joint width. Local pairs are queries,
everybody's pairs are candidates; the two directions of a table are two tables.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from models.gather import Gather, own_columns
from models.guidance import hashed_words, mean_unit_tokens
from models.outputs import PairBatch, PairOutputs
from models.pair_table import PairTable
from models.recipe import RegionPool, TableRecipe, Targets
from models.retrieval import effective_patterns, hopfield_retrieval
from models.targets import bisect_temperature, soft_targets

# The mean off-diagonal mass over this many rows of the global batch sets the targets' temperature; a
# float32 mean resolves no more than these halvings.
_TEMPERATURE_ROWS = 512
_TEMPERATURE_HALVINGS = 24

IMAGE_TO_TEXT = "image_to_text"
TEXT_TO_IMAGE = "text_to_image"


@dataclass(frozen=True)
class PairFeatures:
    """One view's local features and everybody's, gathered once for all tables.

    Attributes:
        image, text: unit, [B, D]. patches: unit, [B, P, D].
        all_image, all_text: the same of all workers in rank order, [N, D].
    """

    image: Tensor
    text: Tensor
    patches: Tensor
    all_image: Tensor
    all_text: Tensor


def gather_features(outputs: PairOutputs, gather: Gather) -> list[PairFeatures]:
    """Features of every view; embeddings cross workers here and nowhere else."""
    all_text = gather(outputs.text_embeds)
    return [
        PairFeatures(
            image=image,
            text=outputs.text_embeds,
            patches=F.normalize(tokens, dim=2),
            all_image=gather(image),
            all_text=all_text,
        )
        for image, tokens in zip(outputs.image_embeds, outputs.image_tokens, strict=True)
    ]


def pair_tables(
    recipe: TableRecipe,
    features: PairFeatures,
    batch: PairBatch,
    *,
    gather: Gather,
    inverse_temperature: Tensor,
) -> dict[str, PairTable]:
    """The tables of the directions whose weight is not 0."""
    similarities = _similarities(recipe, features, gather)
    positive = own_columns(gather, len(features.text), features.text.device)
    is_valid = _valid_candidates(recipe.candidates.exclude, batch, positive, gather)
    return {
        direction: PairTable(
            scores=similarity_BN * inverse_temperature,
            positive=positive,
            log_targets=_log_targets(recipe.targets, direction, features, batch, positive, is_valid, gather),
            is_valid=is_valid,
        )
        for direction, similarity_BN in similarities.items()
        if getattr(recipe.directions, direction) != 0
    }


def _similarities(recipe: TableRecipe, features: PairFeatures, gather: Gather) -> dict[str, Tensor]:
    if recipe.region_pool.kind != "global":
        pooled_BN = pool_regions(
            torch.einsum("bpd,nd->bpn", features.patches, features.all_text), recipe.region_pool
        )
        # A text needs its score with everybody's images, whose patches stay where they are: the pooled
        # scores are gathered instead, N floats per pair.
        own = own_columns(gather, len(pooled_BN), pooled_BN.device)
        return {IMAGE_TO_TEXT: pooled_BN, TEXT_TO_IMAGE: gather(pooled_BN)[:, own].T}
    if recipe.transform.kind == "hopfield":
        return _hopfield_similarities(recipe.transform.beta, features, gather)
    return {
        IMAGE_TO_TEXT: features.image @ features.all_text.T,
        TEXT_TO_IMAGE: features.text @ features.all_image.T,
    }


def _hopfield_similarities(beta: float, features: PairFeatures, gather: Gather) -> dict[str, Tensor]:
    """CLOOB's four retrievals: each direction takes anchors and keys from its own memory."""
    image_from_images = hopfield_retrieval(features.image, features.all_image, beta=beta)
    text_from_images = hopfield_retrieval(features.text, features.all_image, beta=beta)
    text_from_texts = hopfield_retrieval(features.text, features.all_text, beta=beta)
    image_from_texts = hopfield_retrieval(features.image, features.all_text, beta=beta)
    return {
        IMAGE_TO_TEXT: image_from_images @ gather(text_from_images).T,
        TEXT_TO_IMAGE: text_from_texts @ gather(image_from_texts).T,
    }


def pool_regions(similarity_BPN: Tensor, pool: RegionPool) -> Tensor:
    """Patch-text similarities [B, P, N] -> image-text similarities [B, N]."""
    if pool.kind == "max":
        return similarity_BPN.amax(1)
    if pool.kind == "mean":
        return similarity_BPN.mean(1)
    if pool.kind == "lse":
        log_patches = math.log(similarity_BPN.shape[1])
        return ((pool.sharpness * similarity_BPN).logsumexp(1) - log_patches) / pool.sharpness
    raise ValueError(f"region_pool.kind={pool.kind} pools no regions")


def _valid_candidates(exclude: str, batch: PairBatch, positive: Tensor, gather: Gather) -> Tensor | None:
    if exclude == "nothing":
        return None
    keys = batch.group_keys if exclude == "same_group" else batch.text_keys
    differs = keys[:, None] != gather(keys)[None, :]
    return differs.scatter(1, positive[:, None], True)


def _log_targets(
    targets: Targets,
    direction: str,
    features: PairFeatures,
    batch: PairBatch,
    positive: Tensor,
    is_valid: Tensor | None,
    gather: Gather,
) -> Tensor | None:
    if targets.kind == "identity":
        return None
    # Targets say what the table should be; no gradient may move them towards what it is.
    with torch.no_grad():
        local = _guidance(targets, direction, features, batch)
        everyone = gather(local)
        # Everybody sets the temperature on the same gathered rows, so all workers agree on it.
        probe = everyone[:_TEMPERATURE_ROWS]
        temperature = bisect_temperature(
            probe @ everyone.T,
            torch.arange(len(probe), device=probe.device),
            mass=targets.off_diagonal_mass,
            num_halvings=_TEMPERATURE_HALVINGS,
        )
        return soft_targets(
            local @ everyone.T, positive, temperature=temperature, mixing=targets.mixing, is_valid=is_valid
        )


def _guidance(targets: Targets, direction: str, features: PairFeatures, batch: PairBatch) -> Tensor:
    """Unit rows whose self-similarity softens the targets of a direction, [B, G]."""
    if direction == IMAGE_TO_TEXT:
        if targets.image_guidance == "patches":
            return mean_unit_tokens(features.patches)
        return features.image
    if targets.text_guidance == "words":
        return hashed_words(batch.token_ids, batch.is_real_token).to(features.text.dtype)
    return features.text


def retrieval_diagnostics(recipe: TableRecipe, features: PairFeatures) -> dict[str, Tensor]:
    """Effective number of retrieved patterns, to be read whenever the global batch changes."""
    if recipe.transform.kind != "hopfield":
        return {}
    with torch.no_grad():
        beta = recipe.transform.beta
        return {
            "retrieved_images": effective_patterns(features.image, features.all_image, beta=beta),
            "retrieved_texts": effective_patterns(features.text, features.all_text, beta=beta),
        }
