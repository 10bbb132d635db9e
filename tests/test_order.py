"""The order of rows: every row exactly once an epoch, the same batches on any number of workers."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from pipelines.order import SHARDS_PER_SLICE, Cursor, StepOrder

SHARDS = (7, 5, 11, 3, 8)
ORDER = StepOrder(SHARDS, batch_size=8, seed=1)
NUM_ROWS = sum(SHARDS)


def visits(order: StepOrder, num_steps: int, *, worlds: tuple[int, ...] = (1,)) -> Counter[tuple[int, int]]:
    """How often each (epoch, row) is visited, the number of workers changing from step to step."""
    seen: Counter[tuple[int, int]] = Counter()
    for step in range(num_steps):
        world = worlds[step % len(worlds)]
        for rank in range(world):
            rows, epochs = order.batch(step, rank=rank, world=world)
            seen.update(zip(epochs.tolist(), rows.tolist(), strict=True))
    return seen


@pytest.mark.parametrize("batch_size", [1, 4, 8, 17, 34])
@pytest.mark.parametrize("worlds", [(1,), (4, 1, 2)])
def test_every_row_is_visited_exactly_once_an_epoch(batch_size, worlds):
    order = StepOrder(SHARDS, batch_size=batch_size, seed=3)
    worlds = tuple(world for world in worlds if batch_size % world == 0)
    # So many steps that the last one ends an epoch.
    num_epochs = batch_size
    seen = visits(order, num_epochs * NUM_ROWS // batch_size, worlds=worlds)
    assert seen == {(epoch, row): 1 for epoch in range(num_epochs) for row in range(NUM_ROWS)}


def test_a_step_too_few_misses_rows():
    seen = visits(ORDER, 4 * NUM_ROWS // 8 - 1)
    assert len(seen) == 4 * NUM_ROWS - 8


def test_every_kill_and_resume_goes_on_with_the_next_row():
    """Whatever steps were run before: a run killed in step k repeats step k, whole."""
    generator = np.random.default_rng(0)
    seen: Counter[tuple[int, int]] = Counter()
    step, num_steps = 0, 4 * NUM_ROWS // 8
    while step < num_steps:
        order = StepOrder(SHARDS, batch_size=8, seed=1)
        finished = min(step + int(generator.integers(0, 5)), num_steps)
        for done in range(step, finished):
            rows, epochs = order.batch(done)
            seen.update(zip(epochs.tolist(), rows.tolist(), strict=True))
        step = finished
    assert set(seen.values()) == {1}
    assert len(seen) == 4 * NUM_ROWS


@pytest.mark.parametrize("world", [1, 2, 4])
def test_workers_share_the_batch_of_one_process(world):
    for step in range(10):
        parts = [ORDER.batch(step, rank=rank, world=world) for rank in range(world)]
        assert {len(rows) for rows, _ in parts} == {8 // world}
        for found, whole in zip(zip(*parts, strict=True), ORDER.batch(step), strict=True):
            np.testing.assert_array_equal(np.concatenate(found), whole)


def test_a_resume_jumps_to_the_step():
    forwards = [ORDER.rows(step) for step in range(12)]
    # Backwards, from an object of its own: nothing depends on what was asked before.
    other = StepOrder(SHARDS, batch_size=8, seed=1)
    for step in reversed(range(12)):
        np.testing.assert_array_equal(other.rows(step), forwards[step])


def epoch_rows(order: StepOrder, epoch: int) -> np.ndarray:
    """Rows of the batches that begin in an epoch."""
    steps = [step for step in range(200) if order.epoch_of(step) == epoch]
    return np.concatenate([order.rows(step) for step in steps])


def test_epochs_and_seeds_differ():
    assert not np.array_equal(epoch_rows(ORDER, 0)[:16], epoch_rows(ORDER, 1)[:16])
    other = StepOrder(SHARDS, batch_size=8, seed=2)
    assert not np.array_equal(other.rows(0), ORDER.rows(0))
    np.testing.assert_array_equal(StepOrder(SHARDS, batch_size=8, seed=1).rows(5), ORDER.rows(5))


def test_epoch_of_a_step_is_that_of_its_first_row():
    # 34 rows: step 4 begins with the last two of epoch 0.
    assert [ORDER.epoch_of(step) for step in (0, 3, 4, 5, 8, 9)] == [0, 0, 0, 1, 1, 2]
    assert Counter(ORDER.batch(4)[1].tolist()) == {0: 2, 1: 6}


def test_the_cursor_says_where_a_batch_begins():
    order = StepOrder((4,) * (2 * SHARDS_PER_SLICE), batch_size=12, seed=0)
    per_slice = 4 * SHARDS_PER_SLICE
    found = [order.cursor(step) for step in (0, 1, 5, 6, 10, 11)]
    assert found == [
        Cursor(0, 0, 0),
        Cursor(0, 0, 12),
        Cursor(0, 0, 60),
        Cursor(0, 1, 72 - per_slice),
        Cursor(0, 1, 120 - per_slice),
        Cursor(1, 0, 132 - 2 * per_slice),
    ]


def test_a_batch_lists_rows_in_shard_order():
    for step in range(8):
        assert (np.diff(ORDER.rows(step)) > 0).all()


@pytest.mark.parametrize("seed", range(5))
def test_a_batch_over_two_epochs_holds_no_row_twice(seed):
    order = StepOrder((30, 29), batch_size=14, seed=seed)
    spans = [step for step in range(59) if len(set(order.batch(step)[1].tolist())) == 2]
    assert len(spans) > 10
    for step in spans:
        assert len(set(order.rows(step).tolist())) == 14
    # Without moving them apart it happens, as it does where there are too few batches for that.
    few = StepOrder((30, 29), batch_size=20, seed=seed)
    assert any(len(set(few.rows(step).tolist())) < 20 for step in range(59))


def test_rows_are_mixed_across_the_shards_of_a_slice_only():
    order = StepOrder((4,) * (3 * SHARDS_PER_SLICE), batch_size=4, seed=0)
    per_slice = SHARDS_PER_SLICE * 4
    rows = epoch_rows(order, 0)
    shards = [
        set((rows[first : first + per_slice] // 4).tolist()) for first in range(0, len(rows), per_slice)
    ]
    assert [len(found) for found in shards] == [SHARDS_PER_SLICE] * 3
    assert set.union(*shards) == set(range(3 * SHARDS_PER_SLICE))
    # Not shard after shard: a batch of four comes from several.
    assert len(set((order.rows(0) // 4).tolist())) > 1


def test_weights_say_how_often_an_epoch_visits_a_row():
    order = StepOrder((10, 8, 6), batch_size=4, seed=0, shard_weights=(1.0, 2.5, 0.5))
    assert order.epoch_rows == 10 + 20 + 3
    seen = visits(order, 4 * 33 // 4)
    by_row = [[seen[epoch, row] for epoch in range(4)] for row in range(24)]
    assert by_row[:10] == [[1] * 4] * 10
    assert all({*counts} <= {2, 3} for counts in by_row[10:18])
    assert [sum(counts[epoch] for counts in by_row[10:18]) for epoch in range(4)] == [20] * 4
    assert [sum(counts[epoch] for counts in by_row[18:]) for epoch in range(4)] == [3] * 4
    # The half that is drawn changes.
    assert len({tuple(counts[epoch] for counts in by_row[18:]) for epoch in range(4)}) > 1
    assert visits(StepOrder((10, 8, 6), 4, 0, (1.0, 1.0, 1.0)), 6) == visits(StepOrder((10, 8, 6), 4, 0), 6)


def test_order_of_two_data_sets_at_once():
    """Asking for two orders in turn gives each its own."""
    other = StepOrder((40,), batch_size=8, seed=1)
    apart = [other.rows(step).tolist() for step in range(3)]
    for step in range(3):
        ORDER.rows(step)
        assert other.rows(step).tolist() == apart[step]


def test_batch_of_all_rows_is_the_limit():
    assert len(StepOrder((4, 4), batch_size=8, seed=0).rows(3)) == 8
    with pytest.raises(ValueError, match=r"train\.batch_size=9 exceeds the 8 training rows; lower it"):
        StepOrder((4, 4), batch_size=9, seed=0)
    with pytest.raises(ValueError, match=r"the weights \[0\.0, 0\.0\] leave no training row"):
        StepOrder((4, 4), batch_size=8, seed=0, shard_weights=(0.0, 0.0))
