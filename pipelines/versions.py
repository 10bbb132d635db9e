"""Versions of what decides a run's numbers."""

from __future__ import annotations

import importlib.metadata
from functools import cache
from typing import Final

PACKAGES: Final = ("clipfleet", "ray", "torch", "transformers", "optuna", "pyarrow", "numpy")


@cache
def versions() -> dict[str, str]:
    """Installed version of each package."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}
