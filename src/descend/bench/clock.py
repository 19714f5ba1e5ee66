"""The interleaved clock: how several optimizers are timed so that their times can be compared.

- **Interleaved.** All contenders of a case live in one process and take turns in rounds, so that a
  slow minute of the machine hits each of them. Who goes first rotates from round to round.
- **Bursts.** A turn is several steps in a row. An optimizer that trains alone finds in the caches
  what its last step left there, and its worker threads awake; right after another contender it
  finds neither. So the first steps of a turn are not counted. The huge shapes take one step a turn,
  and it counts: no cache holds them.
- **Pacing.** Everyone has the same share of wall time. A contender too slow for a turn in every
  round has fewer turns, at even distances over all rounds, but no fewer than ``FEWEST_TURNS``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from descend.bench.shapes import Shape

FEWEST_TURNS = 3


class Timing(NamedTuple):
    """Seconds: median and quartiles, and how many steps they come from."""

    median: float
    quartile1: float
    quartile3: float
    steps: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        """Return median and quartiles of ``seconds``, of which there must be at least one."""
        quartile1, median, quartile3 = np.percentile(seconds, (25, 50, 75)).tolist()
        return cls(median, quartile1, quartile3, len(seconds))


class Pace(NamedTuple):
    """How long a case runs: rounds, and each contender's share of wall time in seconds."""

    rounds: int
    share: float


def keep_gradients() -> None:
    """Prepare a step that needs no preparation."""


class Contender(NamedTuple):
    """``step`` is timed; ``prepare`` runs before each step, outside the clock."""

    step: Callable[[], object]
    prepare: Callable[[], None] = keep_gradients

    def run(self, steps: int) -> list[float]:
        """Take so many steps; return the seconds of each."""
        seconds = []
        for _ in range(steps):
            self.prepare()
            begin = time.perf_counter()
            self.step()
            seconds.append(time.perf_counter() - begin)
        return seconds

    def turn(self, shape: Shape) -> list[float]:
        """Run one burst; return the seconds of the steps that count."""
        return self.run(shape.burst)[shape.uncounted :]


class Turn(NamedTuple):
    """What one turn brought.

    Attributes:
        name: the contender's.
        seconds: of the steps that count; none in the turn that only tells how long a turn is.
        done: share of all turns that have been taken, between 0 and 1.
    """

    name: str
    seconds: list[float]
    done: float


def turns(contenders: Mapping[str, Contender], shape: Shape, pace: Pace) -> Iterator[Turn]:
    """Let the contenders take turns; yield each turn as it ends.

    Each begins with a turn that does not count, and tells how long a turn is.
    """
    names = list(contenders)
    allowed: dict[str, int] = {}
    for name, contender in contenders.items():
        begin = time.perf_counter()
        contender.turn(shape)
        affordable = int(pace.share / (time.perf_counter() - begin))
        allowed[name] = min(max(affordable, FEWEST_TURNS), pace.rounds)
        yield Turn(name, [], 0.0)

    taken = dict.fromkeys(names, 0)
    for number in range(pace.rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            if taken[name] * pace.rounds <= number * allowed[name]:
                seconds = contenders[name].turn(shape)
                taken[name] += 1
                yield Turn(name, seconds, sum(taken.values()) / sum(allowed.values()))


def interleave(contenders: Mapping[str, Contender], shape: Shape, pace: Pace) -> dict[str, Timing]:
    """Time the contenders in turns, after a turn of each that makes its state and its kernels."""
    for contender in contenders.values():
        contender.turn(shape)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in turns(contenders, shape, pace):
        seconds[turn.name] += turn.seconds
    return {name: Timing.of(times) for name, times in seconds.items()}
