"""Token scoring as a stage of the Ray Data stream: tasks build batches, actors score them, a worker trains.

The actors hold the EMA vision tower (and BYOL's projector). Between batches they look at the weight board
for a newer version; each row tells the version it was scored with. A killed actor is started again and its
batch scored again: what a batch holds depends on its step alone.
"""

from __future__ import annotations

import copy
import pickle
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pyarrow as pa
import ray
import torch

from models.outputs import PairBatch, ScoredTokens
from models.teacher import TokenScorer
from pipelines.scoring import ScoringPolicy, predicts_teacher
from pipelines.stream_feed import StreamFeed
from pipelines.token_choice import select_views
from pipelines.train_step import Trainer, autocast
from pipelines.weight_board import Board, ScoringError, as_arrays, open_board
from pipelines.wire import unpack

# No more is asked of the executor than that a batch leaves the stage when it is ready.
_ONE_BATCH_PER_BLOCK = 1


@dataclass(frozen=True)
class RoomAhead:
    """Holds back the tasks that build batches when they are too far ahead of their worker."""

    board: Board
    rank: int

    def wait(self, step: int) -> None:
        self.board.wait_for_room(self.rank, step)


@dataclass(frozen=True)
class ScorerSettings:
    """What a scorer must know; small, for it travels with each of them."""

    policy: ScoringPolicy
    board: Board
    precision: str


@dataclass(frozen=True)
class ScoredFeed:
    """Batches of one worker with `scored` filled in; otherwise those of `StreamFeed`.

    Attributes:
        feed: builds the batches, held back by `RoomAhead`.
        scorer: the modules to score with; what the board holds replaces their weights.
    """

    feed: StreamFeed
    scorer: TokenScorer
    settings: ScorerSettings

    def batches(self, start: int, stop: int) -> Iterator[PairBatch]:
        """The batches of steps start..stop-1; each is only built when `Lead.ask` has come near its step.

        Raises:
            ScoringError: a scorer failed, or waited too long.
        """
        if start >= stop:
            return
        rows = self._dataset(start, stop).iter_batches(
            # A batch ahead would be waited for before the one at hand is given out.
            batch_size=None,
            batch_format="pyarrow",
            prefetch_batches=0,
        )
        expected = start
        try:
            for table in rows:
                for step, batch, scored in zip(*(table[name] for name in _COLUMNS), strict=True):
                    assert step.as_py() == expected, f"batch {step} came where {expected} was due"
                    yield replace(unpack(batch), scored=pickle.loads(scored.as_buffer()))
                    expected += 1
        except ray.exceptions.RayError as error:
            raise ScoringError(
                f"the stream of scored batches broke before step {expected}: {error}"
            ) from error
        except ray.data.exceptions.ExecutionTimeoutError as error:
            raise ScoringError(
                f"the batch of step {expected} does not come, nothing moves in the stream of scored batches. "
                "Either no node has room for a scorer (scoring.cpus_per_actor, gpus_per_actor, node_labels) "
                "or for a task that builds batches; or the trainer took none for too long, then raise "
                f"scoring.timeout_s={self.settings.policy.scoring.timeout_s:g}"
            ) from error
        assert expected == stop, f"the stream ended before step {expected} of {stop}"

    def _dataset(self, start: int, stop: int) -> ray.data.Dataset:
        scoring = self.settings.policy.scoring
        # The worker owns the object: it lives as long as the stream, and a restarted actor reads it again.
        modules = ray.put(copy.deepcopy(self.scorer).cpu())
        dataset = self.feed.dataset(start, stop).map_batches(
            _ScoringActor,
            fn_constructor_args=([modules], self.settings),
            batch_size=None,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(
                min_size=min(scoring.min_actors, stop - start),
                max_size=min(scoring.max_actors, stop - start),
                # Calls of an actor that dies may come back in another order. Where scorers wait for weights,
                # a later batch would then hold up the one that those weights wait for.
                max_tasks_in_flight_per_actor=None if scoring.max_staleness is None else 1,
            ),
            num_cpus=scoring.cpus_per_actor,
            num_gpus=scoring.gpus_per_actor,
            label_selector=scoring.node_labels or None,
        )
        if scoring.max_staleness is not None:
            # The pool grows at so many calls in flight for each actor: here there is never more than the one,
            # and Ray's own bound is 1.75.
            dataset.context.autoscaling_config.actor_pool_util_upscaling_threshold = 1.0
        dataset.context.target_max_block_size = _ONE_BATCH_PER_BLOCK
        dataset.context.execution_no_progress_timeout_s = max(
            dataset.context.execution_no_progress_timeout_s, 2 * scoring.timeout_s
        )
        return dataset


_COLUMNS = ("step", "batch", "scored")


class _ScoringActor:
    """Ray Data actor: holds one version of the scorer."""

    def __init__(self, modules: list[ray.ObjectRef[TokenScorer]], settings: ScorerSettings) -> None:
        scoring = settings.policy.scoring
        torch.set_num_threads(max(1, int(scoring.cpus_per_actor)))
        # Ray shows all GPUs to an actor that asked for none.
        self._device = torch.device("cuda" if scoring.gpus_per_actor and torch.cuda.is_available() else "cpu")
        self._scorer: TokenScorer = settings.board.result(modules[0]).to(self._device)
        self._settings, self._version = settings, -1

    def __call__(self, table: pa.Table) -> pa.Table:
        scored = [
            pickle.dumps(self._score(step.as_py(), batch), protocol=5)
            for step, batch in zip(table["step"], table["batch"], strict=True)
        ]
        return table.append_column("scored", pa.array(scored, pa.binary()))

    def _score(self, step: int, packed: pa.LargeBinaryScalar) -> ScoredTokens:
        policy = self._settings.policy
        batch = unpack(packed)
        if not policy.needs_scorer(step):
            return ScoredTokens(ema_version=torch.full((len(batch.images),), -1))
        self._refresh(policy.oldest_version(step))
        started = time.perf_counter()
        found = score_batch(
            self._scorer, batch.to(self._device), policy, step=step, precision=self._settings.precision
        )
        versions = torch.full((len(batch.images),), self._version)
        return replace(
            found.to(torch.device("cpu")), ema_version=versions, seconds=time.perf_counter() - started
        )

    def _refresh(self, at_least: int) -> None:
        """Take the newest weights; older ones than `at_least` are waited for."""
        version, weights = self._settings.board.newest(known=self._version, at_least=at_least)
        if weights is not None:
            self._scorer.load_state_dict({name: torch.tensor(array) for name, array in weights.items()})
            self._version = version


def score_batch(
    scorer: TokenScorer, batch: PairBatch, policy: ScoringPolicy, *, step: int, precision: str
) -> ScoredTokens:
    """What a trainer's own teacher would give for a batch; on the scorer's device, without a version."""
    with autocast(batch.images.device, precision):
        scores, features = scorer(batch)
    kept = None
    if policy.phase(step) == "scored":
        kept = select_views(policy, batch, scores, grid=scorer.vision.grid).to(torch.int16)
    return ScoredTokens(
        ema_version=torch.full((len(batch.images),), -1),
        kept=kept,
        features=features if predicts_teacher(policy.recipe) else None,
    )


class Lead:
    """The trainer's side: its teacher goes ahead of the batches, and the board hears of every step."""

    def __init__(self, trainer: Trainer, board: Board) -> None:
        self._trainer, self._board = trainer, board
        self._last: int | None = None
        self._pending: list[ray.ObjectRef] = []
        self._asked: ray.ObjectRef[int] | None = None

    def ask(self) -> None:
        """Before the next batch is taken: the teacher reaches this step, is published if due, and the board
        lets as many batches be built as the step allows.

        Raises:
            ScoringError: the board is gone.
        """
        started = time.perf_counter()
        trainer, policy = self._trainer, self._trainer.policy
        step = trainer.step
        trainer.follow_teacher()
        if trainer.gather.rank == 0 and policy.publishes(step, last=self._last):
            self._publish(step)
        # The answer is for the meter alone, so no step waits for it; a board that is gone answers at once.
        if self._asked is not None and ray.wait([self._asked], timeout=0)[0]:
            in_flight = self._board.result(self._asked)
            trainer.meter.add_in_flight(in_flight * policy.local_rows)
        until = step + policy.steps_ahead(step)
        self._asked = self._board.ask(trainer.gather.rank, step, until=until)
        trainer.meter.add_publishing(time.perf_counter() - started)

    def close(self) -> None:
        """End what waits for this trainer: tasks that would build batches, scorers that want weights."""
        if self._trainer.gather.rank == 0:
            self._board.close()

    def _publish(self, step: int) -> None:
        assert self._trainer.teacher is not None
        # One at a time: a board that is slower than the trainer must not pile up weights.
        for ref in self._pending:
            self._board.result(ref)
        weights = as_arrays(self._trainer.teacher.scorer().state_dict())
        self._pending, self._last = [self._board.publish(step, weights)], step


def score_stream(trainer: Trainer, feed: StreamFeed, *, run_id: str) -> tuple[ScoredFeed, Lead]:
    """A worker's batches with scores from outside, and its side of the matter; every worker calls this.

    Args:
        feed: what it would be fed with otherwise.
    """
    assert trainer.teacher is not None
    policy, precision = trainer.policy, trainer.train.precision
    board = open_board(run_id, trainer.gather, timeout_s=policy.scoring.timeout_s)
    settings = ScorerSettings(policy, board, precision)
    gated = replace(feed, gate=RoomAhead(board, feed.rank))
    return ScoredFeed(gated, trainer.teacher.scorer(), settings), Lead(trainer, board)
