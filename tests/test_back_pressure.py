"""What is built ahead of a trainer that takes its time, and how much memory that is.

Builds are counted where they begin, in the tasks, and the trainer waits until none has begun for a while: a
slow machine can make a count too low for a moment, never too high.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from ray.data import DataContext, ExecutionResources
from ray.data.exceptions import ExecutionTimeoutError

from models.outputs import PairBatch
from pipelines.collate import BatchSettings
from pipelines.feed import train_order
from pipelines.launch import run_here
from pipelines.object_store import StoreGauge
from pipelines.prepared import Prepared
from pipelines.results import Store
from pipelines.score_tokens import RoomAhead
from pipelines.step_meter import StepMeter
from pipelines.stream_feed import StreamFeed
from pipelines.train_step import Trainer
from tests.pipeline_fixture import small_config, small_job

pytestmark = pytest.mark.ray

SETTINGS = BatchSettings(
    seed=3, text="sentence", num_views=1, min_crop_area=0.5, num_patches=4, max_tokens=8, num_texts=1
)
NUM_STEPS = 48
QUIET_S, LONGEST_WAIT_S = 1.0, 120.0


@dataclass(frozen=True)
class Tally:
    """Steps whose batch a task has begun to build: a file each, for a task may be tried again."""

    folder: Path

    def add(self, step: int) -> None:
        (self.folder / str(step)).touch()

    def count(self) -> int:
        return sum(1 for _ in self.folder.iterdir())

    def wait_for(self, at_least: int) -> int:
        """The count when it has reached a number and then stood still."""
        deadline, found, since = time.monotonic() + LONGEST_WAIT_S, -1, 0.0
        while True:
            now = time.monotonic()
            assert now < deadline, f"{found} batches begun, expected {at_least}"
            if (count := self.count()) != found:
                found, since = count, now
            elif found >= at_least and now - since >= QUIET_S:
                return found
            time.sleep(0.05)


@dataclass(frozen=True)
class CountingGate:
    """Counts and holds nothing back."""

    tally: Tally

    def wait(self, step: int) -> None:
        self.tally.add(step)


def tally_in(folder: Path) -> Tally:
    folder.mkdir()
    return Tally(folder)


def batches(prepared: str, tally: Tally) -> Iterator[PairBatch]:
    order = train_order(Prepared.open(prepared), batch_size=96, seed=7)
    return StreamFeed(prepared, order, SETTINGS, gate=CountingGate(tally)).batches(0, NUM_STEPS)


@pytest.fixture
def batch_bytes(small_prepared: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Size of a batch; each goes into a block of its own, as batches of a useful size do anyway."""
    monkeypatch.setattr(DataContext.get_current(), "target_max_block_size", 1)
    size = Prepared.open(small_prepared).image_size
    return 96 * size * size * 3


def test_a_slow_trainer_holds_back_the_tasks_that_build_its_batches(
    tmp_path: Path, small_prepared: str, batch_bytes: int, monkeypatch: pytest.MonkeyPatch
):
    room = 8
    options = DataContext.get_current().execution_options
    limits = ExecutionResources.for_limits(object_store_memory=room * batch_bytes)
    monkeypatch.setattr(options, "resource_limits", limits)
    tally = tally_in(tmp_path / "limited")
    ahead = []
    with closing(batches(small_prepared, tally)) as stream:
        for taken in range(1, 5):
            next(stream)
            ahead.append(tally.wait_for(taken + 1) - taken)
        ahead += [tally.count() - taken for taken, _ in enumerate(stream, 5)]
    # Ray Data reckons with the mean size of what came so far, and finds out when a batch is there: some more
    # than there is room for are begun, but nowhere near all.
    assert max(ahead) <= 2 * room
    # It went on as batches were taken, to the last.
    assert len(ahead) == tally.count() == NUM_STEPS


@dataclass(frozen=True)
class StuckGate:
    """Lets one step wait for longer than anybody should."""

    step: int
    seconds: float

    def wait(self, step: int) -> None:
        if step == self.step:
            time.sleep(self.seconds)


def test_a_trainer_may_pause_for_as_long_as_it_likes(
    small_prepared: str, batch_bytes: int, monkeypatch: pytest.MonkeyPatch
):
    """A full queue does not move, and Ray Data takes that for a stream that hangs."""
    context = DataContext.get_current()
    # Longer than a busy machine may take to start a task.
    monkeypatch.setattr(context, "execution_no_progress_timeout_s", 20)
    limits = ExecutionResources.for_limits(object_store_memory=8 * batch_bytes)
    monkeypatch.setattr(context.execution_options, "resource_limits", limits)
    started: list[int] = []
    plain = StreamFeed.dataset
    monkeypatch.setattr(
        StreamFeed,
        "dataset",
        lambda feed, start, stop: started.append(start) or plain(feed, start, stop),
    )
    order = train_order(Prepared.open(small_prepared), batch_size=96, seed=7)
    feed = StreamFeed(small_prepared, order, SETTINGS)
    with closing(feed.batches(0, NUM_STEPS)) as stream:
        found = [next(stream)]
        time.sleep(26)
        found += stream
    assert [batch.row_index.tolist() for batch in found] == [
        order.rows(step).tolist() for step in range(NUM_STEPS)
    ]
    # It had to be started again, behind what had been given out.
    assert len(started) == 2
    assert 0 < started[1] < NUM_STEPS
    stuck = replace(feed, gate=StuckGate(step=4, seconds=26)).batches(0, 8)
    with pytest.raises(ExecutionTimeoutError):
        list(stuck)


def test_without_a_limit_everything_is_built_ahead(tmp_path: Path, small_prepared: str, batch_bytes: int):
    """Control of the test above: all of it fits half of the object store, Ray Data's own limit."""
    tally = tally_in(tmp_path / "unlimited")
    with closing(batches(small_prepared, tally)) as stream:
        next(stream)
        assert tally.wait_for(NUM_STEPS) == NUM_STEPS


def test_rows_in_flight_are_bounded_to_the_row(
    tmp_path: Path, small_prepared: str, monkeypatch: pytest.MonkeyPatch
):
    """Three batches of 32 rows: the one that is trained on, and two more."""
    tally, ahead = tally_in(tmp_path / "tally"), []
    monkeypatch.setattr("pipelines.score_tokens.RoomAhead", counting_room(tally))
    plain = Trainer.run_step

    def slow_step(trainer: Trainer, batch: PairBatch) -> Any:
        if trainer.step in (0, 1, 5):
            ahead.append((tally.wait_for(trainer.step + 3) - trainer.step) * len(batch.images))
        return plain(trainer, batch)

    monkeypatch.setattr(Trainer, "run_step", slow_step)
    scored = ("method=aclip", "scoring.mode=stream", "scoring.max_rows_in_flight=96", "train.steps=12")
    config = small_config(tmp_path, *scored, "scoring.max_staleness=0", "train.evaluate_every=12")
    run_here(small_job(config, small_prepared, "run"))
    assert ahead == [96, 96, 96]
    assert tally.count() == 12
    found = [line["diagnostics"] for line in Store(config.output).curve("run") if "loss" in line]
    # The log counts what is left when the next one is asked for.
    assert max(line["feed/rows_in_flight"] for line in found) == 64
    # The first batch is taken when the weights it was scored with lie in the store.
    assert 0 < found[0]["feed/object_store_mib"] < 1024


def counting_room(tally: Tally) -> Callable[..., RoomAhead]:
    """What `RoomAhead` is made with, counting what it lets through."""
    return lambda board, rank: CountingRoom(board, rank, tally)


@dataclass(frozen=True)
class CountingRoom(RoomAhead):
    tally: Tally

    def wait(self, step: int) -> None:
        super().wait(step)
        self.tally.add(step)


def test_the_gauge_shows_what_lies_in_the_store(ray_session: None):
    gauge = StoreGauge(every_s=0.0)
    before = gauge.look()
    assert before is not None
    held = ray.put(np.zeros(64 << 20, np.uint8))
    deadline = time.monotonic() + LONGEST_WAIT_S
    while (found := gauge.look()) is not None and found < before + 60:
        assert time.monotonic() < deadline, f"{before} MiB before, {found} now"
        time.sleep(0.05)
    del held


def test_looks_are_rare_and_the_meter_keeps_the_highest(ray_session: None):
    gauge, meter = StoreGauge(every_s=1e6), StepMeter()
    for mib in (gauge.look(), gauge.look(), None):
        meter.add_store(mib)
    first = meter.take()[0]["feed/object_store_mib"]
    for mib in (3.0, 5.0, None, 4.0):
        meter.add_store(mib)
    assert (first >= 0, meter.take()[0]["feed/object_store_mib"]) == (True, 5.0)
    assert "feed/object_store_mib" not in meter.take()[0]
    assert gauge.look() is None
