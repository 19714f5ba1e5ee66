"""Which runs a request asks for, and which of them choose a learning rate first."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

from descend.compare import specs
from descend.compare.contestant import Contestant
from descend.compare.records import Run
from descend.compare.sweep import combinations
from descend.reporting.errors import UsageError
from descend.reporting.text import joined

FACTORS = tuple(10 ** (half / 2) for half in (-2, -1, 0, 1, 2))  # of the learning rates that --tune tries
TUNING_SEEDS = 2
TUNING_OFFSET = 10_000  # from the reported seeds

Key = tuple[str, float | None, int, bool]


@dataclass(frozen=True)
class Entry:
    """One run to make.

    Args:
        text: its spec, with the options that a sweep adds.
        spec: what the user wrote.
        label: its name in tables.
        lr: its learning rate; None if it has none.
        seed: of weights, batches and held-out part.
        tuning: whether it helps to choose a learning rate, and is not reported.
    """

    text: str
    spec: str
    label: str
    lr: float | None
    seed: int
    tuning: bool = False

    @property
    def key(self) -> Key:
        """What tells it from the other runs of a comparison."""
        return (self.label, self.lr, self.seed, self.tuning)

    def contestant(self, lr: Mapping[str, float]) -> Contestant:
        """Return the optimizer; ``lr`` are the task's learning rates."""
        [found] = specs.parse_all([self.text], lr)
        return found if self.lr in (None, found.lr) else found.with_lr(self.lr)


def key(run: Run) -> Key:
    """Return the ``Entry.key`` of the entry that ``run`` was made for."""
    return (run.label, run.lr, run.seed, run.tuning)


def variants(
    contestants: Sequence[Contestant], sweeps: Mapping[str, Sequence[str]], lr: Mapping[str, float], seed: int
) -> list[Entry]:
    """Return each optimizer with each combination of swept options.

    Args:
        contestants: the optimizers. Those without a learning rate have one variant for all of a sweep's.
        sweeps: values of each option, as ``parse_sweeps`` returns them.
        lr: the task's learning rates.
        seed: the first seed.
    Raises:
        UsageError: if an optimizer does not have an option, the user has given it a value already, or no optimizer has
            a learning rate to sweep.
    """
    others = {name: values for name, values in sweeps.items() if name != "lr"}
    rates = [_number(value) for value in sweeps.get("lr", ())]
    found = []
    for contestant in contestants:
        if rates and re.search(r"[:,]\s*lr\s*=", contestant.text):
            raise UsageError(f"--sweep lr: {contestant.text} has a learning rate already.")
        for options in combinations(others):
            words = ",".join(f"{name}={value}" for name, value in options.items())
            text = _with_options(contestant.text, words)
            [spec] = specs.parse_all([text], lr)
            label = _with_options(contestant.label, words)
            for swept in rates if rates and _has_rate(spec) else [spec.lr]:
                found.append(Entry(text, contestant.text, label, swept, seed))
    if rates:
        check_rates("--sweep lr", found)
    return found


def check_rates(option: str, entries: Sequence[Entry]) -> None:
    """Raise a ``UsageError`` if no entry has a learning rate, for an ``option`` that is about learning rates."""
    if all(entry.lr is None for entry in entries):
        labels = joined(list(dict.fromkeys(entry.label for entry in entries)))
        raise UsageError(f"{option} needs an optimizer with a learning rate, got {labels}.")


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise UsageError(f"--sweep lr: a learning rate must be a number >= 0, got {text!r}.")
    return number


def _with_options(text: str, words: str) -> str:
    last = re.split(r"\+(?=\s*[A-Za-z])", text)[-1]  # of a chain of optimizers
    return f"{text}{',' if ':' in last else ':'}{words}" if words else text


def _has_rate(spec: Contestant) -> bool:
    try:
        spec.with_lr(1.0)
    except UsageError:
        return False
    return True


def candidates(entry: Entry) -> list[Entry]:
    """Return the runs that choose the learning rate of ``entry``; none if it has no learning rate."""
    if entry.lr is None:
        return []
    rates = [float(f"{entry.lr * factor:.2g}") for factor in FACTORS]
    seeds = [entry.seed + TUNING_OFFSET + i for i in range(TUNING_SEEDS)]
    return [replace(entry, lr=rate, seed=seed, tuning=True) for seed in seeds for rate in rates]


def tuned(entry: Entry, runs: Mapping[Key, Run]) -> Entry:
    """Return ``entry`` with the learning rate that has the lowest median loss on held-out data.

    A run that diverged or failed counts as infinitely bad; if all are, the rate stays what it was.
    """
    losses: dict[float, list[float]] = {}
    for candidate in candidates(entry):
        run = runs[candidate.key]
        loss = run.test_losses[-1] if run.status == "finished" and run.test_losses else math.inf
        losses.setdefault(candidate.lr or 0.0, []).append(loss)
    scores = {rate: median(each) for rate, each in losses.items()}
    best = min(scores, key=scores.__getitem__, default=None)
    return entry if best is None or scores[best] == math.inf else replace(entry, lr=best)


def words_for_tuning(first_seed: int) -> str:
    """Say how ``tuned`` chooses, for tables and reports."""
    seeds = " and ".join(str(first_seed + TUNING_OFFSET + i) for i in range(TUNING_SEEDS))
    return (
        f"each optimizer's learning rate is the one of {len(FACTORS)}, {FACTORS[0]:g} to {FACTORS[-1]:g} times its "
        f"default for the task, with the lowest loss on held-out data over seeds {seeds}"
    )
