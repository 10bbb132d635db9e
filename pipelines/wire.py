"""Batches between processes: one buffer each, written once and read where it lies.

A plain pickle would copy every pixel when it is written, when it becomes a column of a table and when it is
read.
"""

from __future__ import annotations

import pickle
import struct
import warnings
from dataclasses import fields

import numpy as np
import pyarrow as pa
import torch

from models.outputs import PairBatch

# Arrays begin at multiples of this, as torch and Arrow like them.
_ALIGNMENT = 64
_LENGTH = struct.Struct("<Q")


def pack(batch: PairBatch) -> pa.Array:
    """A batch without scores from outside, as a column of one value."""
    assert batch.scored is None, "scores travel beside the batch"
    arrays = {f.name: v.numpy() for f in fields(batch) if (v := getattr(batch, f.name)) is not None}
    buffers: list[pickle.PickleBuffer] = []
    head = pickle.dumps(arrays, protocol=5, buffer_callback=buffers.append)
    views = [buffer.raw() for buffer in buffers]
    head = pickle.dumps((head, [len(view) for view in views]))
    starts = _starts(len(head), [len(view) for view in views])
    whole = np.empty(starts[-1], np.uint8)
    whole[: _LENGTH.size] = np.frombuffer(_LENGTH.pack(len(head)), np.uint8)
    whole[_LENGTH.size : _LENGTH.size + len(head)] = np.frombuffer(head, np.uint8)
    for start, view in zip(starts, views, strict=False):
        whole[start : start + len(view)] = np.frombuffer(view, np.uint8)
    ends = pa.py_buffer(np.array([0, len(whole)], np.int64))
    return pa.Array.from_buffers(pa.large_binary(), 1, [None, ends, pa.py_buffer(whole)])


def unpack(value: pa.LargeBinaryScalar) -> PairBatch:
    """A batch as `pack` wrote it. Its tensors are views and are not to be written to."""
    view = memoryview(value.as_buffer())
    (length,) = _LENGTH.unpack_from(view)
    head, sizes = pickle.loads(view[_LENGTH.size : _LENGTH.size + length])
    starts = _starts(length, sizes)
    buffers = [view[start : start + size] for start, size in zip(starts, sizes, strict=False)]
    arrays = pickle.loads(head, buffers=buffers)
    with warnings.catch_warnings():
        # torch knows no tensor that cannot be written to, and says so.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return PairBatch(**{name: torch.from_numpy(array) for name, array in arrays.items()})


def _starts(head_length: int, sizes: list[int]) -> list[int]:
    """Where each array begins, and where the last one ends."""
    starts, at = [], _LENGTH.size + head_length
    for size in sizes:
        at += -at % _ALIGNMENT
        starts.append(at)
        at += size
    return [*starts, at]
