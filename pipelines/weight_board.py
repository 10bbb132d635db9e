"""The board on which rank 0 publishes its teacher's weights and every worker says how far it has come.

Scorers look at it between batches. It owns the published weights: they outlive the process that made them,
and a scorer that is started anew finds the newest. One board serves one attempt of one run.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch.distributed as dist
from numpy.typing import NDArray
from ray.actor import ActorHandle

from models.gather import Gather, ProcessGroupGather

Weights = Mapping[str, NDArray[Any]]

_NAMESPACE = "clipfleet"
# Label that Ray gives each node.
_NODE_ID = "ray.io/node-id"
# A board that does not even answer within this long after its own limit is gone.
_GRACE_S = 30.0


class ScoringError(RuntimeError):
    """Trainer and scorers have lost each other."""


class _Board:
    """Ray actor; asynchronous, so that one call may wait for what another brings."""

    def __init__(self, world: int) -> None:
        self._version = -1
        self._weights: ray.ObjectRef[Weights] | None = None
        self._published_at = 0.0
        # By worker: no batch of this step or later may be built yet; the first one not built yet.
        self._until = [0] * world
        self._built = [0] * world
        self._changed = asyncio.Condition()

    async def publish(self, version: int, weights: Weights) -> None:
        # Put here, so that this process owns them.
        self._weights = ray.put(weights)
        self._version, self._published_at = version, time.time()
        await self._tell()

    async def ask(self, rank: int, step: int, until: int) -> int:
        """A worker asks for its batch of `step`; returns how many it has in flight from there on."""
        # Before this call lets more be built, which would count or not as the tasks happen to be quick.
        in_flight = max(0, self._built[rank] - step)
        self._until[rank] = until
        await self._tell()
        return in_flight

    async def wait_for_room(self, rank: int, step: int, timeout_s: float) -> bool:
        """Wait until the batch of a step may be built; False when that takes too long."""
        if not await self._wait(lambda: step < self._until[rank], timeout_s):
            return False
        self._built[rank] = max(self._built[rank], step + 1)
        return True

    async def newest(
        self, known: int, at_least: int, timeout_s: float
    ) -> tuple[int, list[ray.ObjectRef[Weights]]]:
        """The newest version, with its weights unless they are known, once it is no older than `at_least`.

        An older version comes back when that takes too long.
        """
        await self._wait(lambda: self._version >= max(at_least, 0), timeout_s)
        refs = [self._weights] if self._weights is not None and self._version != known else []
        return self._version, refs

    async def published(self) -> tuple[int, float]:
        """The newest version and when it was published, in seconds since 1970."""
        return self._version, self._published_at

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def _wait(self, is_so: Callable[[], bool], timeout_s: float) -> bool:
        async with self._changed:
            try:
                await asyncio.wait_for(self._changed.wait_for(is_so), timeout_s)
            except TimeoutError:
                return False
        return True


@dataclass(frozen=True)
class Board:
    """A board as everybody else sees it; travels to tasks and actors.

    Attributes:
        timeout_s: longest wait of any call.
    """

    actor: ActorHandle[Any]
    timeout_s: float

    def publish(self, version: int, weights: Weights) -> ray.ObjectRef[None]:
        """Make a version the newest; the weights are copied before this returns."""
        return self._call("publish", version, weights)

    def ask(self, rank: int, step: int, *, until: int) -> ray.ObjectRef[int]:
        """Say that a worker asks for its batch of `step`, and that those before `until` may be built.

        Returns:
            A reference to the number of batches in flight, that of `step` among them.
        """
        return self._call("ask", rank, step, until)

    def wait_for_room(self, rank: int, step: int) -> None:
        """Wait until a worker has come so far that its batch of `step` may be built.

        Raises:
            ScoringError: it does not, or the board is gone.
        """
        if not self.result(self._call("wait_for_room", rank, step, self.timeout_s)):
            raise ScoringError(
                f"worker {rank} did not come near step {step} within scoring.timeout_s={self.timeout_s:g}; "
                "raise scoring.timeout_s if it was merely busy"
            )

    def newest(self, *, known: int, at_least: int) -> tuple[int, Weights | None]:
        """The newest version and its weights, None if it is the one that is known.

        Args:
            at_least: oldest version that will do; waited for.

        Raises:
            ScoringError: it does not come, or the board is gone.
        """
        version, refs = self.result(self._call("newest", known, at_least, self.timeout_s))
        if version < max(at_least, 0):
            raise ScoringError(
                f"scorers need the teacher of step {max(at_least, 0)} or later, the newest published within "
                f"scoring.timeout_s={self.timeout_s:g} is {version if version >= 0 else 'none'}; raise "
                "scoring.timeout_s if the trainer was merely busy"
            )
        return version, self.result(refs[0]) if refs else None

    def close(self) -> None:
        """End the board; whoever waits at it gets an error."""
        ray.kill(self.actor)

    def result(self, ref: ray.ObjectRef[Any]) -> Any:
        """What a call returned.

        Raises:
            ScoringError: nothing comes within `timeout_s`, or the board is gone.
        """
        try:
            return ray.get(ref, timeout=self.timeout_s + _GRACE_S)
        except (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError) as error:
            raise ScoringError(f"the weight board is gone; the run must be started again: {error}") from error
        except ray.exceptions.GetTimeoutError as error:
            raise ScoringError(
                f"the weight board did not answer within {self.timeout_s + _GRACE_S:g} s"
            ) from error

    def _call(self, method: str, *args: Any) -> Any:
        return getattr(self.actor, method).remote(*args)


def open_board(run_id: str, gather: Gather, *, timeout_s: float) -> Board:
    """The board of this attempt of a run; rank 0 makes it and the other workers find it.

    It ends with the process of rank 0. Every worker calls this.

    Raises:
        ScoringError: it does not start.
    """
    name = [f"weight-board/{run_id}/{uuid.uuid4().hex[:12]}"]
    if gather.rank == 0:
        actor = _start(name[0], gather.world)
        board = Board(actor, timeout_s)
        # Others look it up by name: it must be there before they hear of it.
        board.result(board.actor.published.remote())
    if isinstance(gather, ProcessGroupGather) and gather.world > 1:
        dist.broadcast_object_list(name, group=gather.group, group_src=0)
    return board if gather.rank == 0 else Board(ray.get_actor(name[0], namespace=_NAMESPACE), timeout_s)


def _start(name: str, world: int) -> ActorHandle[Any]:
    here = ray.get_runtime_context().get_node_id()
    # Without resources it would be placed anywhere; beside rank 0 it dies only when the run does.
    options = {"num_cpus": 0, "name": name, "namespace": _NAMESPACE, "label_selector": {_NODE_ID: here}}
    return ray.remote(_Board).options(**options).remote(world)


def as_arrays(state: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    """A module's state as arrays, which processes share without a copy."""
    return {name: np.asarray(tensor.detach().cpu()) for name, tensor in state.items()}
