"""How a training loop talks to whatever runs it: Ray Train, Ray Tune or a plain process."""

from __future__ import annotations

from typing import Any, Protocol


class Port(Protocol):
    """`ray.train.report` raises inside a Tune function, so the loop is given one of these."""

    @property
    def rank(self) -> int: ...

    @property
    def world(self) -> int: ...

    def report(self, metrics: dict[str, Any]) -> None:
        """Called by every worker, equally often; may end the process of a run that is stopped early."""
        ...


class LocalPort:
    """A plain process: nobody listens."""

    rank = 0
    world = 1

    def report(self, metrics: dict[str, Any]) -> None:
        return


class TunePort:
    """A trial that trains inside its Tune actor."""

    rank = 0
    world = 1

    def report(self, metrics: dict[str, Any]) -> None:
        from ray import tune

        tune.report(metrics)


class TrainPort:
    """A worker of a Ray Train group; reporting is a barrier."""

    def __init__(self) -> None:
        from ray import train

        context = train.get_context()
        self.rank = int(context.get_world_rank())
        self.world = int(context.get_world_size())

    def report(self, metrics: dict[str, Any]) -> None:
        from ray import train

        train.report(metrics)
