"""What a comparison asks of the processes that it runs in. One process alone answers here; several, in ``group``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from descend.compare.tasks.task import Batch


class Outcome(NamedTuple):
    """How a run ended on one rank.

    Args:
        steps: complete steps.
        state_bytes: memory of the optimizer's state on this rank; None if it is not known.
        error: type and text of the exception that ended the run, or None.
        first_step_seconds: time inside the optimizer in the first step; None without steps.
        optimizer_seconds: median time inside the optimizer in the other steps; None without any.
        order: the place among the ranks, the first to end being 1.
    """

    steps: int
    state_bytes: int | None
    error: str | None
    first_step_seconds: float | None = None
    optimizer_seconds: float | None = None
    order: int = 1

    def is_like(self, other: Outcome) -> bool:
        """Whether both ended after the same step, both well or both with the same type of exception."""
        kinds = [outcome.error and outcome.error.partition(":")[0] for outcome in (self, other)]
        return self.steps == other.steps and kinds[0] == kinds[1]


class Ending(NamedTuple):
    """How a run ended on all ranks.

    Args:
        outcomes: by rank; None for a rank that was not heard of.
        is_common: whether it ended alike on all of them, so that they can go on together.
    """

    outcomes: Sequence[Outcome | None]
    is_common: bool

    @property
    def state_bytes(self) -> tuple[int | None, ...]:
        return tuple(outcome and outcome.state_bytes for outcome in self.outcomes)

    @property
    def error(self) -> str | None:
        """The first error; it names its rank unless all ranks have the same."""
        failed = [(got.order, rank, got.error) for rank, got in enumerate(self.outcomes) if got and got.error]
        if not failed:
            return None
        _, rank, error = min(failed)
        return error if self.is_common else f"rank {rank}: {error}"


class Ranks(Protocol):
    """What a comparison asks of the processes that it runs in."""

    rank: int
    world: int

    def share(self, batch: Batch) -> Batch:
        """Return this rank's part of a batch, whose size is a multiple of the number of ranks."""

    def mean(self, loss: float) -> float:
        """Return the mean of the ranks' losses."""

    def tell(self, text: str) -> str:
        """Return what rank 0 passes; the others wait for it."""

    def end(self, name: str, outcome: Outcome) -> Ending:
        """Tell the other ranks how the run called ``name`` ended here, and return how it ended there."""


class Alone:
    """One process."""

    rank = 0
    world = 1

    def share(self, batch: Batch) -> Batch:
        return batch

    def mean(self, loss: float) -> float:
        return loss

    def tell(self, text: str) -> str:
        return text

    def end(self, name: str, outcome: Outcome) -> Ending:
        return Ending([outcome], is_common=True)
