"""Try other ways to cut work than ``descend.backends.triton.tuning`` does: ``gpu.py --tune``.

Every number there in turn is halved and doubled, the others at their best so far; of a range, its end. What is best has
the smallest geometric mean of the times of ``CASES``. Only times are compared: run the checks with whatever is chosen.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Iterator
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

from gpu_times import OURS, Case, Clock, Plan, time_dense

PACKAGE = "descend.backends.triton"
CASES = (
    Case("124M", "float32"),
    Case("124M", "float32", clip=True),
    Case("124M", "bfloat16", clip=True),
    Case("1000x1000", "float32", clip=True),
)
Settings = dict[str, Any]
LIMITS = {"REGISTERS"}
"""Numbers that only tests read."""
NOISE = 0.005
"""By how much a setting must be better to be preferred."""


class Trial(NamedTuple):
    """What was tried.

    Attributes:
        settings: what differs from the present settings.
        seconds: a step's, on the device, by name of the case.
        relative: their geometric mean over that of the present settings, below 1 is better; None for a problem.
        problem: why it cannot be used, else empty.
    """

    settings: Settings
    seconds: dict[str, float]
    relative: float | None
    problem: str = ""


def current() -> Settings:
    """The numbers that ``tuning`` has now."""
    tuning = import_module(f"{PACKAGE}.tuning")
    numbers = {name: value for name, value in vars(tuning).items() if name.isupper() and isinstance(value, int | tuple)}
    return {name: value for name, value in numbers.items() if name not in LIMITS}


def neighbours(value: Any) -> list[Any]:
    """Half, double and four times a number, or a range with such an end."""
    if isinstance(value, tuple):
        return [(*value[:-1], end) for end in neighbours(value[-1]) if end >= value[0]]
    return [value // 2, value * 2, value * 4] if value > 1 else [value * 2, value * 4]


def use(settings: Settings) -> None:
    """Let kernels and tables that are made from now on have these settings."""
    for module in _modules():
        for name, value in settings.items():
            if name in vars(module):
                setattr(module, name, value)
        for cached in list(vars(module).values()):
            if callable(getattr(cached, "cache_clear", None)):
                cached.cache_clear()


def _modules() -> list[ModuleType]:
    return [module for name, module in sys.modules.items() if name.startswith(f"{PACKAGE}.")]


def tune(plan: Plan, clock: Clock) -> Iterator[Trial]:
    """Yield each trial as it ends, the present settings first and the best once more at the end."""
    present = current()
    start = _try({}, plan, clock, {})
    yield start
    best = start
    try:
        for name, value in present.items():
            if start.problem:
                break
            for other in neighbours(value):
                settings = {**best.settings, name: other}
                use({**present, **settings})
                trial = _try(settings, plan, clock, start.seconds)
                yield trial
                if (trial.relative or math.inf) < (1 - NOISE) * (best.relative or 1.0):
                    best = trial
    finally:
        use(present)
    yield best


def _try(settings: Settings, plan: Plan, clock: Clock, start: dict[str, float]) -> Trial:
    seconds = {}
    for case in CASES:
        try:
            times = time_dense(case, plan, clock, "triton", names=(OURS,)).times[OURS]
        except Exception as error:  # too many registers, or a block that Triton refuses
            return Trial(settings, {}, None, f"{type(error).__name__}: {error}".splitlines()[0])
        seconds[case.name] = times.device
    ratios = [seconds[name] / before for name, before in start.items()]
    return Trial(settings, seconds, statistics.geometric_mean(ratios) if ratios else 1.0)
