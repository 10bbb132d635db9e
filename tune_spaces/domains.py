"""Value domains of search spaces; standard library only."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Value = float | int | str | bool


@dataclass(frozen=True, kw_only=True)
class Uniform:
    """Real numbers in [low, high], all equally likely."""

    low: float
    high: float

    def __post_init__(self) -> None:
        _check_bounds(self.low, self.high)

    def corners(self) -> tuple[Value, ...]:
        """Values every one of which must give a valid config."""
        return (self.low, self.high)


@dataclass(frozen=True, kw_only=True)
class LogUniform:
    """Positive real numbers in [low, high], equally likely on a log scale."""

    low: float
    high: float

    def __post_init__(self) -> None:
        _check_bounds(self.low, self.high)
        if self.low <= 0:
            raise ValueError(f"low of a log domain must be > 0, got {self.low}")

    def corners(self) -> tuple[Value, ...]:
        return (self.low, self.high)


@dataclass(frozen=True)
class Choice:
    """One of a few values."""

    options: tuple[Value, ...]

    def __post_init__(self) -> None:
        if len(self.options) < 2:
            raise ValueError(f"a choice needs at least 2 options, got {list(self.options)}")

    def corners(self) -> tuple[Value, ...]:
        return self.options


Domain = Uniform | LogUniform | Choice
Space = Mapping[str, Domain]


def _check_bounds(low: float, high: float) -> None:
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"a domain needs finite low < high, got low={low} and high={high}")


def parse_domain(spec: Mapping[str, Any]) -> Domain:
    """A domain from its config form: `{uniform: [0, 1]}`, `{log_uniform: [a, b]}`, `{choice: [...]}`.

    Raises:
        ValueError: another form.
    """
    if len(spec) == 1:
        ((kind, values),) = spec.items()
        if kind == "choice" and isinstance(values, list):
            return Choice(tuple(values))
        if kind in ("uniform", "log_uniform") and isinstance(values, list) and len(values) == 2:
            low, high = float(values[0]), float(values[1])
            return Uniform(low=low, high=high) if kind == "uniform" else LogUniform(low=low, high=high)
    raise ValueError(
        "a domain reads {uniform: [low, high]}, {log_uniform: [low, high]} or {choice: [...]}, got "
        f"{dict(spec)}"
    )


def describe(domain: Domain) -> str:
    """Short text for tables."""
    if isinstance(domain, Choice):
        return "{" + ", ".join(map(str, domain.options)) + "}"
    scale = "log " if isinstance(domain, LogUniform) else ""
    return f"{scale}[{domain.low:g}, {domain.high:g}]"
