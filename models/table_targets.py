"""Target rows of a pair table, computed for any slice of the local queries.

B local pairs, N pairs of all workers, G guidance width.
"""

from __future__ import annotations

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
            return smoothed_over_negatives(like, own[rows], smoothing=targets.mixing)

        return smoothed
    if targets.kind == "same_group":
        local, everyone = features.batch.group_keys, features.all_keys("group_keys")

        def grouped(rows: slice, is_valid: Tensor | None) -> Tensor:
            return same_group_log_targets(local[rows], everyone, own[rows]).to(features.report)

        return grouped
    return lambda rows, is_valid: None


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
