"""From features to similarities: which two sides a table compares, and how patches and texts pool.

B local pairs, N pairs of all workers, M texts of a pair, P patches, D joint width. Local pairs are
queries, everybody's pairs are candidates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from models.attended_pooling import attention_pool, global_mean_pool, gloria_scores, non_local_pool
from models.chunks import rows_in_chunks
from models.features import PairFeatures
from models.recipe import TableRecipe
from models.region_pooling import noisy_or, pool_lse, pool_max, pool_mean, select_regions
from models.retrieval import effective_patterns, hopfield_retrieval
from models.sentence_pooling import pool_sentences
from models.table_slots import RegionPool
from models.table_state import TableState


@dataclass(frozen=True)
class Sides:
    """The two features of a table.

    Attributes:
        first, second: local, unit, [B, D].
        all_first, all_second: of all workers, [N, D].
        is_pair: False at pairs that lack a side, [B] and [N]; None when all have both.
    """

    first: Tensor
    second: Tensor
    all_first: Tensor
    all_second: Tensor
    is_pair: Tensor | None = None
    all_is_pair: Tensor | None = None


def sides_of(recipe: TableRecipe, features: PairFeatures, view: int) -> Sides:
    """Whole features of a table's two sides."""
    if recipe.between == "image_views":
        return Sides(features.image(0), features.image(1), features.all_images(0), features.all_images(1))
    if recipe.between == "image_regions":
        image, all_images = features.image(view), features.all_images(view)
        return Sides(image, image, all_images, all_images)
    if recipe.between == "image_text":
        return Sides(features.image(view), features.report, features.all_images(view), features.all_reports())
    second, all_second = features.text(1), features.all_texts(1)
    is_pair, all_is_pair = features.outputs.is_text[1], features.all_is_text()[:, 1]
    if recipe.between == "texts":
        return Sides(features.text(0), second, features.all_texts(0), all_second, is_pair, all_is_pair)
    return Sides(features.image(view), second, features.all_images(view), all_second, is_pair, all_is_pair)


def hopfield_sides(
    beta: float, sides: Sides, features: PairFeatures, *, rows_per_chunk: int | None
) -> tuple[Sides, Sides]:
    """CLOOB's four retrievals: each direction takes anchors and keys from its own memory.

    Returns:
        Sides of the first-to-second and of the second-to-first direction; only what a direction compares
        (its queries, the other side's keys) is retrieved.
    """

    def retrieved(state: Tensor, stored: Tensor) -> Tensor:
        return rows_in_chunks(
            lambda rows: hopfield_retrieval(state[rows], stored, beta=beta), len(state), rows_per_chunk
        )

    gather = features.gather
    first_from_first = retrieved(sides.first, sides.all_first)
    second_from_first = retrieved(sides.second, sides.all_first)
    second_from_second = retrieved(sides.second, sides.all_second)
    first_from_second = retrieved(sides.first, sides.all_second)
    forward = Sides(first_from_first, second_from_first, sides.all_first, gather(second_from_first))
    backward = Sides(first_from_second, second_from_second, gather(first_from_second), sides.all_second)
    return forward, backward


def pooled_scores(
    recipe: TableRecipe,
    state: TableState,
    features: PairFeatures,
    *,
    view: int,
    scale: Callable[[Tensor], Tensor],
) -> Tensor:
    """Scaled score of every local image with every pair's text side, [B, N].

    Args:
        scale: from similarity to score. Similarities of patches and of sentences are pooled before it, so
            that their sharpness is one of cosines at any temperature; noisy-or makes log-odds of scores.
    """
    if recipe.region_pool.kind == "noisy_or":
        return _pool_sentences(recipe, state, features, view=view, score=scale)
    return scale(_pool_sentences(recipe, state, features, view=view, score=lambda similarity: similarity))


def _pool_sentences(
    recipe: TableRecipe,
    state: TableState,
    features: PairFeatures,
    *,
    view: int,
    score: Callable[[Tensor], Tensor],
) -> Tensor:
    """Every local image with every pair's text side, [B, N]."""
    if recipe.region_pool.kind == "words":
        words, is_word = features.all_words()
        sharpness = recipe.region_pool.sharpness
        return gloria_scores(features.outputs.image_tokens[view], words, is_word, word_sharpness=sharpness)
    pool = recipe.sentence_pool
    if pool.kind == "none":
        texts = features.all_images(view) if recipe.between == "image_regions" else features.all_reports()
        return _pool_patches(recipe, state, features, texts, view=view, score=score)
    sentences_NMD, is_sentence_NM = features.all_sentences(), features.all_is_text()
    per_sentence = _pool_patches(recipe, state, features, sentences_NMD.flatten(0, 1), view=view, score=score)
    per_sentence_BNM = per_sentence.view(len(per_sentence), *is_sentence_NM.shape)
    return pool_sentences(per_sentence_BNM, is_sentence_NM, kind=pool.kind, sharpness=pool.sharpness)


def _pool_patches(
    recipe: TableRecipe,
    state: TableState,
    features: PairFeatures,
    texts: Tensor,
    *,
    view: int,
    score: Callable[[Tensor], Tensor],
) -> Tensor:
    """Every local image with every text [K, D], [B, K]; `score` is what noisy-or takes its log-odds of."""
    pool = recipe.region_pool
    if pool.kind == "global":
        image = features.image(view)
        return state.critic.scores(image, texts) if recipe.score.kind == "concat" else image @ texts.T
    # Pools of vectors mix them with their lengths; pools of scores take cosines.
    tokens = features.outputs.image_tokens[view]
    if pool.kind == "mean_region":
        return global_mean_pool(tokens, texts)
    if pool.kind == "attention":
        return attention_pool(tokens, texts, temperature=pool.temperature)
    if pool.kind == "non_local":
        return non_local_pool(tokens, texts, state.non_local)
    if recipe.score.kind == "concat" and pool.kind == "max":
        return state.critic.max_scores(features.patches(view), texts)
    similarity_BPK = region_similarities(recipe, state, features, texts, view=view)
    if pool.kind == "noisy_or":
        return noisy_or(score(similarity_BPK))
    if pool.kind in ("select", "pmi"):
        return select_regions(similarity_BPK, features.own, rule=pool.kind)
    return pool_region_scores(similarity_BPK, pool)


def region_similarities(
    recipe: TableRecipe, state: TableState, features: PairFeatures, texts: Tensor, *, view: int
) -> Tensor:
    """Similarity of every local patch with every text [K, D], [B, P, K]."""
    patches = features.patches(view)
    if recipe.score.kind == "concat":
        return state.critic.region_scores(patches, texts)
    return torch.einsum("bpd,kd->bpk", patches, texts)


def pool_region_scores(similarity_BPN: Tensor, pool: RegionPool) -> Tensor:
    """Patch-text similarities [B, P, N] -> image-text similarities [B, N], for pools of scores."""
    if pool.kind == "max":
        return pool_max(similarity_BPN)
    if pool.kind == "mean":
        return pool_mean(similarity_BPN)
    if pool.kind == "lse":
        return pool_lse(similarity_BPN, pool.sharpness)
    raise ValueError(f"region_pool.kind={pool.kind} pools no scores of patches")


def retrieval_diagnostics(recipe: TableRecipe, features: PairFeatures) -> dict[str, Tensor]:
    """Effective number of retrieved patterns, to be read whenever the global batch changes."""
    if recipe.transform.kind != "hopfield":
        return {}
    with torch.no_grad():
        beta, sides = recipe.transform.beta, sides_of(recipe, features, 0)
        return {
            "retrieved_images": effective_patterns(sides.first, sides.all_first, beta=beta),
            "retrieved_texts": effective_patterns(sides.second, sides.all_second, beta=beta),
        }
