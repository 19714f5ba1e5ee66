"""Times one optimizer, ours and torch's, on one workload."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from descend.bench.agreement import Disagreement
from descend.bench.bandwidth import Bandwidth, bandwidth_for
from descend.bench.clock import FEWEST_TURNS, Pace, Timing, turns
from descend.bench.contenders import Entry, enter
from descend.bench.methods import METHODS, OURS, bytes_moved
from descend.bench.workload import Workload

ROUNDS = 24


@dataclass
class Row:
    """One contender of a case.

    Args:
        name: ``"ours"``, or one of ``PEERS``.
        moved: bytes that its step has to move.
        limit: seconds in which the memory can move them.
        first: seconds of its first step: new state, kernels compiled or loaded.
        seconds: of each step that counts.
        steps: all that were taken.
        distance: from our result after as many steps, as ``Disagreement`` measures it; None if unknown.
        remark: why it was not measured.
    """

    name: str
    moved: int
    limit: float
    first: float | None = None
    seconds: list[float] = field(default_factory=list)
    steps: int = 0
    distance: float | None = None
    remark: str = ""

    @property
    def timing(self) -> Timing | None:
        """Median and quartiles; None if nothing was measured."""
        return Timing.of(self.seconds) if self.seconds else None

    @property
    def agrees(self) -> bool:
        """False if it has ended elsewhere than ours."""
        return self.distance is None or self.distance <= 1


@dataclass
class Case:
    """One optimizer on one workload, and what was measured of it.

    Args:
        optimizer: its name.
        workload: the parameters.
        max_norm: limit of the gradients' joint norm; None not to clip.
        fresh: whether gradients are allocated anew before each step.
        rows: one per contender; ours is the first.
        interleaved: whether the contenders took turns; else they ran one after the other, as memory is short.
    """

    optimizer: str
    workload: Workload
    max_norm: float | None
    fresh: bool
    rows: list[Row]
    interleaved: bool = True

    @classmethod
    def of(
        cls, optimizer: str, workload: Workload, max_norm: float | None, fresh: bool, bandwidths: Sequence[Bandwidth]
    ) -> Case:
        """Return a case in which nothing has been measured yet.

        Args:
            optimizer: a name in ``METHODS``.
            workload: the parameters.
            max_norm: limit of the gradients' joint norm; None not to clip.
            fresh: whether gradients are allocated anew before each step.
            bandwidths: of the memory.
        """
        method = METHODS[optimizer]
        rows = []
        for name in (OURS, *method.rivals):
            state = workload.state_bytes(method.state, name == OURS)
            moved = bytes_moved(workload.param_bytes, state, max_norm is not None, method.summed)
            rate = bandwidth_for(bandwidths, 2 * workload.param_bytes + state).rate
            rows.append(Row(name, moved, moved / rate))
        return cls(optimizer, workload, max_norm, fresh, rows)

    def memory(self, together: int) -> int:
        """Return about how many bytes it takes when so many contenders are in memory at a time."""
        size = self.workload.param_bytes
        entry = 2 * size + self.workload.state_bytes(METHODS[self.optimizer].state, is_ours=True)
        waiting = len(self.rows) - together  # only their results are kept
        # Beside them: the values, the next gradients, and two temporaries of foreach.
        return size * (1 + waiting + 3) + together * entry

    def time(self, device: str, seconds: float, memory: int, on_turn: Callable[[float], None]) -> None:
        """Time the contenders and compare their results.

        Args:
            device: where the tensors are.
            seconds: shared by the contenders; each takes a few turns, however long they last.
            memory: bytes that may be used, 0 if unknown. If they are too few for all contenders, these run one after
                the other; if they are too few for one, nothing is measured and each row says why.
            on_turn: called with the share that is done.
        """
        self.interleaved = not memory or self.memory(len(self.rows)) <= memory
        if memory and self.memory(1) > memory:
            for row in self.rows:
                row.remark = f"needs {self.memory(1) / 1e9:.1f} GB of memory, {memory / 1e9:.1f} GB are free"
            return
        gc.freeze()  # else each collection, in a timed step too, walks through all of torch's objects
        try:
            values = self.workload.values(device)
            groups = [self.rows] if self.interleaved else [[row] for row in self.rows]
            results: dict[str, Sequence[Tensor]] = {}
            for number, group in enumerate(groups):
                entries = self._first_steps(group, values)
                for done in self._take_turns(entries, seconds / len(groups)):
                    on_turn((number + done) / len(groups))
                results |= _params(entries)
            self._compare(values, results)
        except (MemoryError, RuntimeError) as error:
            for row in self.rows:
                row.remark = row.remark or _said(error)
        finally:
            gc.unfreeze()
            gc.collect()  # gigabytes must not wait for it, should an optimizer be in a reference cycle

    def _first_steps(self, rows: Sequence[Row], values: Sequence[Tensor]) -> dict[str, Entry]:
        entries = {}
        for row in rows:
            try:
                entry = enter(row.name, METHODS[self.optimizer], values, self.max_norm, self.fresh)
                [row.first] = entry.contender.run(1)
            except Exception as error:  # what torch has no way for, it refuses with any exception
                row.remark = _said(error)
            else:
                row.steps = 1
                entries[row.name] = entry
        return entries

    def _take_turns(self, entries: dict[str, Entry], seconds: float) -> Iterator[float]:
        """Keep the times of each turn; yield the share that is done."""
        if not entries:
            return
        rows = {row.name: row for row in self.rows}
        contenders = {name: entry.contender for name, entry in entries.items()}
        share = seconds / len(entries)
        shape = self.workload.shape
        slowest = max(contender.run(1)[0] for contender in contenders.values())
        if slowest * shape.burst * (1 + FEWEST_TURNS) > 2 * share:  # a slow machine: shorter turns, or it takes minutes
            shape = shape._replace(burst=1, uncounted=0)
        for name in entries:
            rows[name].steps += 1
        for turn in turns(contenders, shape, Pace(ROUNDS, share)):
            rows[turn.name].seconds += turn.seconds
            rows[turn.name].steps += shape.burst
            yield turn.done

    def _compare(self, values: Sequence[Tensor], results: dict[str, Sequence[Tensor]]) -> None:
        untimed = Disagreement(METHODS[self.optimizer], values, self.max_norm)
        for row in sorted(self.rows, key=lambda row: row.steps):
            if row.name in results:
                row.distance = untimed.after(row.steps, results[row.name])


def _params(entries: dict[str, Entry]) -> dict[str, Sequence[Tensor]]:
    """Return the parameters, and give the memory of gradients and state back."""
    results: dict[str, Sequence[Tensor]] = {}
    for name, entry in entries.items():
        for param in entry.params:
            param.grad = None
        results[name] = [param.detach() for param in entry.params]
    entries.clear()
    return results


def _said(error: BaseException) -> str:
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"
