"""Target rows of a pair table, computed for any slice of the local queries.

B local pairs, N pairs of all workers, G guidance width.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from models.features import PairFeatures
from models.guidance import hashed_words, mean_unit_tokens
from models.table_slots import Targets
from models.targets import bisect_temperature, same_group_log_targets, smoothed_over_negatives, soft_targets

# The mean off-diagonal mass over this many rows of the global batch sets the targets' temperature; a
# float32 mean resolves no more than these halvings.
_TEMPERATURE_ROWS = 512
_TEMPERATURE_HALVINGS = 24

IMAGE_TO_TEXT = "image_to_text"
TEXT_TO_IMAGE = "text_to_image"

# From a slice of local queries and what is valid among the columns to log-targets [q, N].
TargetRows = Callable[[slice, Tensor | None], Tensor | None]


@torch.no_grad()
def target_rows(targets: Targets, direction: str, features: PairFeatures, *, view: int) -> TargetRows:
    """What `targets` asks of a direction's queries; no gradient moves them towards what the table is."""
    if targets.kind == "soft":
        return _soft_rows(targets, direction, features, view=view)
    own, num_pairs = features.own, features.num_pairs
    if targets.kind == "smoothed":

        def smoothed(rows: slice, is_valid: Tensor | None) -> Tensor:
            like = features.report.new_empty(len(own[rows]), num_pairs)
            wanted = smoothed_over_negatives(like, own[rows], smoothing=targets.mixing)
            return wanted if is_valid is None else _smoothed_among_valid(wanted, own[rows], is_valid)

        return smoothed
    if targets.kind == "same_group":
        local, everyone = features.batch.group_keys, features.all_keys("group_keys")

        def grouped(rows: slice, is_valid: Tensor | None) -> Tensor:
            wanted = same_group_log_targets(local[rows], everyone, own[rows]).to(features.report)
            if is_valid is None:
                return wanted
            return wanted.masked_fill(~is_valid.scatter(1, own[rows, None], True), -torch.inf).log_softmax(1)

        return grouped
    return lambda rows, is_valid: None


def _smoothed_among_valid(log_targets: Tensor, own: Tensor, is_valid: Tensor) -> Tensor:
    """The negatives' share spread over those that are candidates; all to the own pair if there are none.

    Args:
        log_targets: with an equal share for every negative, [q, N].
        own: column of each query's own pair, [q].
        is_valid: [q, N].
    """
    is_negative = is_valid.scatter(1, own[:, None], False)
    num_left = is_negative.sum(1, keepdim=True).to(log_targets)
    more = math.log(log_targets.shape[1] - 1) - num_left.clamp(min=1).log()
    at_own = log_targets.gather(1, own[:, None]).masked_fill(num_left == 0, 0.0)
    return (log_targets + more).masked_fill(~is_negative, -torch.inf).scatter(1, own[:, None], at_own)


def _soft_rows(targets: Targets, direction: str, features: PairFeatures, *, view: int) -> TargetRows:
    local = _guidance(targets, direction, features, view=view)
    everyone = features.gather(local)
    # Everybody sets the temperature on the same gathered rows, so all workers agree on it.
    probe = everyone[:_TEMPERATURE_ROWS]
    diagonal = torch.arange(len(probe), device=probe.device)
    temperature = bisect_temperature(
        _similarity(probe, everyone, diagonal),
        diagonal,
        mass=targets.off_diagonal_mass,
        num_halvings=_TEMPERATURE_HALVINGS,
    )

    def soft(rows: slice, is_valid: Tensor | None) -> Tensor:
        with torch.no_grad():
            own = features.own[rows]
            return soft_targets(
                _similarity(local[rows], everyone, own),
                own,
                temperature=temperature,
                mixing=targets.mixing,
                is_valid=is_valid,
            )

    return soft


def _similarity(rows: Tensor, everyone: Tensor, own: Tensor) -> Tensor:
    # A row without tags or words is a zero vector, and yet like itself.
    return (rows @ everyone.T).scatter(1, own[:, None], 1.0)


def _guidance(targets: Targets, direction: str, features: PairFeatures, *, view: int) -> Tensor:
    """Unit rows whose self-similarity softens the targets of a direction, [B, G]."""
    kind = targets.image_guidance if direction == IMAGE_TO_TEXT else targets.text_guidance
    if kind == "patches":
        return mean_unit_tokens(features.patches(view)).detach()
    if kind == "words":
        batch = features.batch
        return hashed_words(batch.token_ids[0], batch.is_real_token[0]).to(features.report.dtype)
    if kind == "tags":
        return F.normalize(features.batch.tags.to(features.report.dtype), dim=1)
    return (features.image(view) if direction == IMAGE_TO_TEXT else features.report).detach()
