"""Random bags and their gradients, for tests of pools."""

from collections.abc import Callable

import torch
from torch import Tensor

from tests.golden_files import leaf


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal, float64."""
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def weights(*shape: int) -> Tensor:
    """What `gradient` multiplies the outputs by."""
    return draw(*shape, seed=9)


def gradient(pool: Callable[[Tensor], Tensor], bag: Tensor) -> Tensor:
    """Of a sum in which every output has another weight."""
    variable = leaf(bag)
    pooled = pool(variable)
    (pooled * weights(*pooled.shape)).sum().backward()
    assert variable.grad is not None
    return variable.grad
