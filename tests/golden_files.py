"""Loads stored golden cases; tests/golden/README.md says what made each and how tightly it binds."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

GOLDEN = Path(__file__).parent / "golden"


def load(name: str) -> dict[str, NDArray[Any]]:
    """Every array of tests/golden/<name>.npz, by key."""
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as archive:
        return {key: archive[key] for key in archive.files}
