"""What steps cost beside the optimiser's work: waiting for batches, memory, old scores, busy scorers."""

from __future__ import annotations

import time
from collections import Counter

from torch import Tensor


class StepMeter:
    """Sums over the steps since they were last taken; of this worker's rows alone."""

    def __init__(self) -> None:
        self._since = time.monotonic()
        self._clear()

    def add_wait(self, seconds: float) -> None:
        """Time a step waited for its batch."""
        self._waited_s += seconds

    def add_step(self, seconds: float) -> None:
        """Time of the optimiser step itself."""
        self._step_s += seconds

    def add_publishing(self, seconds: float) -> None:
        """Time a step spent on publishing weights and asking for its batch."""
        self._published_s += seconds

    def add_scored(self, seconds: float, *, actors: int) -> None:
        """Time a scorer spent on a batch, and the most scorers there can be.

        It counts when the batch is taken, so that single steps may show more than there was time for.
        """
        self._busy_s += seconds
        self._actors = actors

    def add_ages(self, ages: Tensor, is_fallback: Tensor) -> None:
        """Ages in steps of the scores of a batch, int64 [B], and rows whose score was not used, bool [B]."""
        self._ages.update(ages.tolist())
        self._fallbacks += int(is_fallback.sum())

    def add_in_flight(self, rows: int) -> None:
        """Rows that were built and not yet taken when a batch was asked for."""
        self._in_flight = max(self._in_flight, rows)

    def add_store(self, mib: float | None) -> None:
        """Object store memory that is in use, None when nobody looked."""
        if mib is not None:
            self._store_mib = max(self._store_mib or 0.0, mib)

    def add_overlap(self, iou: float) -> None:
        """Intersection over union of the kept sets with those of the trainer's own teacher, on one batch."""
        self._iou = iou

    def take(self) -> tuple[dict[str, float], dict[int, int]]:
        """Diagnostics for a metric line, and rows by the age of their scores; both since the last call."""
        now = time.monotonic()
        wall_s = max(now - self._since, 1e-9)
        # Evaluations and checkpoints between steps count for nobody.
        loop_s = max(self._waited_s + self._published_s + self._step_s, 1e-9)
        found = {"feed/wait_share": self._waited_s / loop_s}
        if self._actors:
            found |= {
                "scoring/utilisation": self._busy_s / (wall_s * self._actors),
                "scoring/publish_share": self._published_s / loop_s,
                "feed/rows_in_flight": float(self._in_flight),
            }
        if self._ages:
            rows = self._ages.total()
            found |= {
                "scoring/staleness_mean": sum(age * count for age, count in self._ages.items()) / rows,
                "scoring/staleness_max": float(max(self._ages)),
                "scoring/fallback_share": self._fallbacks / rows,
                "scoring/fallback_rows": float(self._fallbacks),
            }
        if self._store_mib is not None:
            found["feed/object_store_mib"] = self._store_mib
        if self._iou is not None:
            found["scoring/iou_with_sync"] = self._iou
        ages = dict(sorted(self._ages.items()))
        self._since = now
        self._clear()
        return found, ages

    def _clear(self) -> None:
        self._waited_s = self._published_s = self._step_s = self._busy_s = 0.0
        self._actors = self._fallbacks = self._in_flight = 0
        self._ages: Counter[int] = Counter()
        self._store_mib: float | None = None
        self._iou: float | None = None
