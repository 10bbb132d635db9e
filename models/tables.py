"""Pair tables of one view, as functions of a slice of the local queries.

Both directions of a table are tables of their own. A direction is built slice by slice, so that a large
one need never exist as a whole; nothing inside may call a collective, since a slice can be built twice.
B local pairs, N pairs of all workers, P patches, Q queries, C candidates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from models.chunks import rows_in_chunks, rows_per_chunk
from models.features import PairFeatures
from models.pair_table import PairTable
from models.recipe import TableRecipe
from models.relaxation import relax
from models.remembered import remembered_tables
from models.similarities import Sides, hopfield_sides, pooled_scores, region_similarities, sides_of
from models.table_state import TableState
from models.table_targets import IMAGE_TO_TEXT, TEXT_TO_IMAGE, TargetRows, target_rows


@dataclass(frozen=True)
class Direction:
    """A table of which any rows can be had.

    Attributes:
        rows: the table of a slice of its queries.
        num_queries, num_candidates: Q and C of the whole.
    """

    rows: Callable[[slice], PairTable]
    num_queries: int
    num_candidates: int

    @staticmethod
    def of(table: PairTable) -> Direction:
        """A table that is there already."""
        return Direction(table.slice, *table.scores.shape)


@dataclass(frozen=True)
class Scale:
    """From similarity to score: similarity * inverse temperature + bias."""

    inverse_temperature: Tensor
    bias: Tensor

    def __call__(self, similarity: Tensor) -> Tensor:
        return similarity * self.inverse_temperature + self.bias


def table_loss(
    recipe: TableRecipe,
    state: TableState,
    features: PairFeatures,
    *,
    view: int,
    scale: Scale,
    max_rows: int | None,
) -> Tensor:
    """Loss of one view's table before its weight: directions weighted, rows of all workers reduced.

    Args:
        max_rows: rows of a table that exist at once; None decides by its size.
    """
    total = features.report.new_zeros(())
    found = directions(recipe, state, features, view=view, scale=scale, max_rows=max_rows)
    for name, tables in found.items():
        losses = [estimate(recipe, table, features, max_rows=max_rows) for table in tables]
        if losses:
            total = total + getattr(recipe.directions, name) * torch.stack(losses).mean()
    return total


def estimate(
    recipe: TableRecipe, direction: Direction, features: PairFeatures, *, max_rows: int | None
) -> Tensor:
    """The estimator's loss on the rows of all workers."""
    num_queries = direction.num_queries

    def values(rows: slice) -> Tensor:
        table = direction.rows(rows)
        weights = table.row_weights
        if weights is None:
            weights = table.scores.new_ones(len(table.scores))
        return torch.cat([recipe.estimator.rows(table), weights[:, None]], 1)

    chunk = max_rows or rows_per_chunk(num_queries, direction.num_candidates)
    local = rows_in_chunks(values, num_queries, chunk)
    gathered = features.gather(local)
    return recipe.estimator.reduce(gathered[:, :-1], gathered[:, -1])


def directions(
    recipe: TableRecipe,
    state: TableState,
    features: PairFeatures,
    *,
    view: int,
    scale: Scale,
    max_rows: int | None,
) -> dict[str, list[Direction]]:
    """The directions whose weight is not 0: one table each, or several whose losses are averaged."""
    wanted = [name for name in (IMAGE_TO_TEXT, TEXT_TO_IMAGE) if getattr(recipe.directions, name) != 0]
    if recipe.candidates.kind in ("queue", "memory", "prototypes"):
        tables = remembered_tables(
            recipe, state, features, view=view, inverse_temperature=scale.inverse_temperature
        )
        return {name: [Direction.of(table) for table in tables[name]] for name in wanted}
    if recipe.region_pool.kind == "each":
        single = _region_directions(recipe, state, features, wanted, view=view, scale=scale)
    else:
        builder = _Builder(recipe, state, features, sides_of(recipe, features, view), view, scale)
        if recipe.is_local or recipe.score.kind == "concat":
            single = builder.pooled(wanted)
        else:
            single = builder.compared(wanted, max_rows=max_rows)
    return {name: [direction] for name, direction in single.items()}


@dataclass(frozen=True)
class _Builder:
    """What the directions of one table share."""

    recipe: TableRecipe
    state: TableState
    features: PairFeatures
    sides: Sides
    view: int
    scale: Scale

    def pooled(self, wanted: list[str]) -> dict[str, Direction]:
        """Directions from one [B, N] matrix of pooled scores."""
        scores_BN = pooled_scores(self.recipe, self.state, self.features, view=self.view, scale=self.scale)
        # A text needs its score with everybody's images, whose patches stay where they are: the pooled
        # scores are gathered instead, N floats per pair.
        matrices = {IMAGE_TO_TEXT: lambda: scores_BN}
        matrices[TEXT_TO_IMAGE] = lambda: self.features.gather(scores_BN)[:, self.features.own].T
        return {name: self._matrix_direction(matrices[name](), name) for name in wanted}

    def _matrix_direction(self, scores_BN: Tensor, name: str) -> Direction:
        # Pooled scores are scaled already; a relaxation speaks of cosines.
        finish = self._finish(name)
        relaxes, scale = self.recipe.transform.relaxes, self.scale

        def rows_of(rows: slice) -> PairTable:
            scores = scores_BN[rows]
            if relaxes:
                similarity = (scores - scale.bias) / scale.inverse_temperature
                scores = scale(self._relaxed(similarity, rows))
            return finish(scores, rows)

        return Direction(rows_of, len(scores_BN), scores_BN.shape[1])

    def compared(self, wanted: list[str], *, max_rows: int | None) -> dict[str, Direction]:
        """Directions between whole features."""
        forward = backward = self.sides
        if self.recipe.transform.kind == "hopfield":
            forward, backward = hopfield_sides(
                self.recipe.transform.beta,
                self.sides,
                self.features,
                rows_per_chunk=max_rows or rows_per_chunk(len(self.features.own), self.features.num_pairs),
            )
        sides = {IMAGE_TO_TEXT: forward, TEXT_TO_IMAGE: backward}
        return {name: self._compared_direction(sides[name], name) for name in wanted}

    def _compared_direction(self, sides: Sides, name: str) -> Direction:
        first_to_second = name == IMAGE_TO_TEXT
        queries = sides.first if first_to_second else sides.second
        keys = sides.all_second if first_to_second else sides.all_first
        adds_own_modality = self.recipe.candidates.modality == "both"
        own_modality = self.features.gather(queries) if adds_own_modality else None
        finish = self._finish(name)

        def rows_of(rows: slice) -> PairTable:
            similarity = self._relaxed(queries[rows] @ keys.T, rows)
            table = finish(self.scale(similarity), rows)
            if own_modality is None:
                return table
            # Everybody of the own modality is a negative but the query itself.
            is_other = torch.ones_like(similarity, dtype=torch.bool)
            if table.is_valid is not None:
                is_other = table.is_valid
            is_other = is_other.scatter(1, self.features.own[rows][:, None], False)
            own_similarity = self._relaxed(queries[rows] @ own_modality.T, rows)
            return table.with_columns(self.scale(own_similarity), is_other)

        return Direction(rows_of, len(queries), len(keys))

    def _relaxed(self, similarity: Tensor, rows: slice) -> Tensor:
        transform = self.recipe.transform
        if transform.kind == "none" or transform.kind == "hopfield":
            return similarity
        return relax(
            similarity,
            self.features.own[rows],
            kind=transform.kind,
            limit=transform.limit,
            slope=transform.slope,
        )

    def _finish(self, name: str) -> Callable[[Tensor, slice], PairTable]:
        """From scores of a slice of queries to their table."""
        features, sides = self.features, self.sides
        targets: TargetRows = target_rows(self.recipe.targets, name, features, view=self.view)
        is_candidate = _candidate_rows(self.recipe, features, sides)
        queries = sides.first if name == IMAGE_TO_TEXT else sides.second

        def finish(scores: Tensor, rows: slice) -> PairTable:
            is_valid = is_candidate(rows)
            return PairTable(
                scores=scores,
                positive=features.own[rows],
                log_targets=targets(rows, is_valid),
                is_valid=is_valid,
                row_weights=None if sides.is_pair is None else sides.is_pair[rows].to(scores.dtype),
                log_baseline=self.state.log_baseline(queries[rows]),
            )

        return finish


def _candidate_rows(
    recipe: TableRecipe, features: PairFeatures, sides: Sides
) -> Callable[[slice | Tensor], Tensor | None]:
    """Which columns are candidates of some local pairs' queries, [q, N]; None means all."""
    candidates, own, batch = recipe.candidates, features.own, features.batch
    if candidates.kind == "roll":
        rolled = features.rolled()
        everyone = torch.arange(features.num_pairs, device=own.device)
        return lambda rows: (everyone == rolled[rows, None]) | (everyone == own[rows, None])
    if candidates.exclude == "nothing":
        present = sides.all_is_pair
        if present is None:
            return lambda rows: None
        return lambda rows: present.expand(len(own[rows]), -1).scatter(1, own[rows, None], True)
    name = "group_keys" if candidates.exclude == "same_group" else "text_keys"
    local, everyone = getattr(batch, name), features.all_keys(name)

    def differs(rows: slice | Tensor) -> Tensor:
        is_other: Tensor = local[rows, None] != everyone[None, :]
        if sides.all_is_pair is not None:
            is_other = is_other & sides.all_is_pair
        return is_other.scatter(1, own[rows, None], True)

    return differs


def _region_directions(
    recipe: TableRecipe,
    state: TableState,
    features: PairFeatures,
    wanted: list[str],
    *,
    view: int,
    scale: Scale,
) -> dict[str, Direction]:
    """Every patch is a query, or a text looks for each of its own patches among all other images'.

    Source: Deep InfoMax, arXiv 1808.06670, local objective; patches of the own image other than the one
        sought are no candidates.
    """
    sides = sides_of(recipe, features, view)
    others = sides.all_first if recipe.between == "image_regions" else sides.all_second
    scores_BPN = scale(region_similarities(recipe, state, features, others, view=view))
    num_pairs, num_patches, num_all = scores_BPN.shape
    own, found = features.own, {}
    query_pair = torch.arange(num_pairs, device=own.device).repeat_interleave(num_patches)
    is_candidate = _candidate_rows(recipe, features, sides)
    if IMAGE_TO_TEXT in wanted:
        flat_QN, patches_QD = scores_BPN.flatten(0, 1), features.patches(view).flatten(0, 1)

        def patch_rows(rows: slice) -> PairTable:
            return PairTable(
                flat_QN[rows],
                own[query_pair[rows]],
                is_valid=is_candidate(query_pair[rows]),
                log_baseline=state.log_baseline(patches_QD[rows]),
            )

        found[IMAGE_TO_TEXT] = Direction(patch_rows, len(query_pair), num_all)
    if TEXT_TO_IMAGE in wanted:
        # [N, P, N] of all images, of which a worker keeps the columns of its own texts.
        by_text_BC: Tensor = features.gather(scores_BPN)[:, :, own].permute(2, 0, 1).flatten(1)
        image_of_column = torch.arange(num_all, device=own.device).repeat_interleave(num_patches)

        def text_rows(rows: slice) -> PairTable:
            text = query_pair[rows]
            patch = torch.arange(len(query_pair), device=own.device)[rows] % num_patches
            is_other = image_of_column != own[text][:, None]
            allowed = is_candidate(text)
            return PairTable(
                by_text_BC[text],
                own[text] * num_patches + patch,
                is_valid=is_other if allowed is None else is_other & allowed[:, image_of_column],
                log_baseline=state.log_baseline(sides.second[text]),
            )

        found[TEXT_TO_IMAGE] = Direction(text_rows, len(query_pair), by_text_BC.shape[1])
    return found
