"""The order of rows: every row once an epoch, the same batches on any number of workers."""

from __future__ import annotations

import numpy as np
import pytest

from pipelines.order import SHARDS_PER_SLICE, StepOrder

SHARDS = (7, 5, 11, 3, 8)
ORDER = StepOrder(SHARDS, batch_size=8, seed=1)


def epoch_of(order: StepOrder, epoch: int) -> np.ndarray:
    """Rows of an epoch's batches, one after the other."""
    first = epoch * order.steps_per_epoch
    return np.concatenate([order.rows(step) for step in range(first, first + order.steps_per_epoch)])


def test_each_row_at_most_once_an_epoch_and_only_the_remainder_left_out():
    assert ORDER.steps_per_epoch == 34 // 8
    for epoch in range(5):
        rows = epoch_of(ORDER, epoch)
        assert len(rows) == len(set(rows.tolist())) == 32
        assert set(rows.tolist()) <= set(range(34))


def test_the_remainder_changes_so_every_row_is_seen():
    seen = set(np.concatenate([epoch_of(ORDER, epoch) for epoch in range(8)]).tolist())
    assert seen == set(range(34))
    assert set(epoch_of(ORDER, 0).tolist()) != set(epoch_of(ORDER, 1).tolist())


@pytest.mark.parametrize("world", [1, 2, 4])
def test_workers_share_the_batch_of_one_process(world):
    for step in range(10):
        parts = [ORDER.rows(step, rank=rank, world=world) for rank in range(world)]
        assert {len(part) for part in parts} == {8 // world}
        np.testing.assert_array_equal(np.concatenate(parts), ORDER.rows(step))


def test_a_resume_jumps_to_the_step():
    forwards = [ORDER.rows(step) for step in range(12)]
    # Backwards, from an object of its own: nothing depends on what was asked before.
    other = StepOrder(SHARDS, batch_size=8, seed=1)
    for step in reversed(range(12)):
        np.testing.assert_array_equal(other.rows(step), forwards[step])


def test_epochs_and_seeds_differ():
    assert not np.array_equal(epoch_of(ORDER, 0), epoch_of(ORDER, 1))
    other = StepOrder(SHARDS, batch_size=8, seed=2)
    assert not np.array_equal(epoch_of(other, 0), epoch_of(ORDER, 0))
    np.testing.assert_array_equal(epoch_of(StepOrder(SHARDS, batch_size=8, seed=1), 0), epoch_of(ORDER, 0))


def test_epoch_of_a_step():
    assert [ORDER.epoch_of(step) for step in (0, 3, 4, 7, 8)] == [0, 0, 1, 1, 2]


def test_a_batch_lists_rows_in_shard_order():
    for step in range(8):
        assert (np.diff(ORDER.rows(step)) > 0).all()


def test_rows_are_mixed_across_the_shards_of_a_slice_only():
    order = StepOrder((4,) * (3 * SHARDS_PER_SLICE), batch_size=4, seed=0)
    per_slice = SHARDS_PER_SLICE * 4
    rows = epoch_of(order, 0)
    shards = [
        set((rows[first : first + per_slice] // 4).tolist()) for first in range(0, len(rows), per_slice)
    ]
    assert [len(found) for found in shards] == [SHARDS_PER_SLICE] * 3
    assert set.union(*shards) == set(range(3 * SHARDS_PER_SLICE))
    # Not shard after shard: a batch of four comes from several.
    assert len(set((order.rows(0) // 4).tolist())) > 1


def test_order_of_two_data_sets_at_once():
    """Asking for two orders in turn gives each its own."""
    other = StepOrder((40,), batch_size=8, seed=1)
    apart = [other.rows(step).tolist() for step in range(3)]
    for step in range(3):
        ORDER.rows(step)
        assert other.rows(step).tolist() == apart[step]


def test_batch_of_all_rows_is_the_limit():
    assert StepOrder((4, 4), batch_size=8, seed=0).steps_per_epoch == 1
    with pytest.raises(ValueError, match=r"train\.batch_size=9 exceeds the 8 training rows; lower it"):
        StepOrder((4, 4), batch_size=9, seed=0)
