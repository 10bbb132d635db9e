"""Loads stored golden cases; tests/golden/README.md says what made each and how tightly it binds."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"


def load(name: str) -> dict[str, NDArray[Any]]:
    """Every array of tests/golden/<name>.npz, by key."""
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as archive:
        return {key: archive[key] for key in archive.files}


def tensors(name: str) -> dict[str, Tensor]:
    """`load` as tensors of the stored types."""
    return {key: torch.from_numpy(np.array(array)) for key, array in load(name).items()}


def leaf(value: Tensor) -> Tensor:
    """A float64 copy that collects a gradient."""
    return value.detach().double().clone().requires_grad_()


def assert_golden(actual: Tensor | float | None, stored: Tensor, *, atol: float = 1e-10) -> None:
    """Equal to a stored value within an absolute error; a shape of () and a float are the same."""
    if actual is None:
        actual = torch.zeros_like(stored)  # an input without influence has no gradient
    found = torch.as_tensor(actual).detach().to(torch.float64)
    torch.testing.assert_close(found, stored.to(torch.float64), atol=atol, rtol=0)
