"""A verdict in words, backed by numbers, for each quantity; none where the seeds overlap.

The rule: a difference between two optimizers is shown if each has at least three seeds and every seed of one is below
every seed of the other. If there were no difference, n and m seeds would part like this by chance in 2 of C(n + m, n)
cases: 1 in 10 with three seeds each, 1 in 126 with five. Step times, of which each run has many, part if their
quartiles do not overlap. The state's size is exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles

from descend.compare.records import Comparison, Run
from descend.compare.results.series import (
    Series,
    final_loss,
    held_out_loss,
    held_out_metric,
    smooth_losses,
    state_bytes,
    step_seconds,
)
from descend.reporting.text import joined, number, plural, rate, seconds, size

SEEDS = 3  # that a verdict needs
NAMED = 6  # that a sentence lists
VERBS = {
    "lower": "is lower than",
    "higher": "is higher than",
    "fewer": "needs fewer than",
    "shorter": "needs less time than",
}


@dataclass(frozen=True)
class Finding:
    """What is said of one quantity.

    Args:
        quantity: its name.
        words: the verdict; empty where there is nothing to compare.
        kind: "shown" for a difference, "open" for none, "bad" for what went wrong.
        numbers: what backs it, by optimizer, the best first.
    """

    quantity: str
    words: str
    kind: str
    numbers: Sequence[str] = ()


def findings(comparison: Comparison, series: Sequence[Series]) -> list[Finding]:
    """Return what can be said, quantity by quantity, and what went wrong."""
    sound = [one for one in series if all(run.status == "finished" for run in one.best.runs)]

    def seeds(measure: Callable[[Run], float | None]) -> dict[str, list[float]]:
        found = {one.label: one.best.values(measure) for one in sound}
        return {label: values for label, values in found.items() if len(values) == seed_count[label]}

    seed_count = {one.label: len(one.best.runs) for one in sound}
    found = [
        of_seeds("Held-out loss", seeds(held_out_loss), _short, "lower"),
        of_seeds("Training loss", seeds(final_loss), _short, "lower"),
    ]
    if comparison.metric_name:
        better = "lower" if comparison.metric_is_error else "higher"
        show = _short if comparison.metric_is_error else _share
        found.insert(1, of_seeds(f"Held-out {comparison.metric_name}", seeds(held_out_metric), show, better))
    goal = common_loss(sound)
    if goal is not None:
        reach = f" to a training loss of {number(goal, 3)}"
        found += [
            of_seeds(f"Evaluations{reach}", seeds(lambda run: _at(run, run.evaluations, goal)), number, "fewer"),
            of_seeds(
                f"Time{reach}",
                seeds(lambda run: _at(run, run.seconds, goal) if run.alone else None),
                seconds,
                "shorter",
            ),
        ]
    found += [of_steps(sound), of_bytes({one.label: one.best.median(state_bytes) for one in series})]
    return [finding for finding in found if finding] + [*_edges(sound), *_ties(sound), *_ends(series)]


def common_loss(series: Sequence[Series]) -> float | None:
    """Return the smoothed training loss that every run reached; None if there is none below where all of them began."""
    runs = [run for one in series for run in one.best.runs]
    finals = [final_loss(run) for run in runs]
    known = [final for final in finals if final is not None]
    if not runs or len(known) < len(runs) or len(series) < 2:
        return None
    goal = max(known)
    return goal if goal < min(run.losses[0] for run in runs) else None


def _at(run: Run, axis: Sequence[float], goal: float) -> float | None:
    """Return the place on ``axis`` where the smoothed loss is first as low as ``goal``."""
    # The same mean, summed in another order, may differ in its last digit.
    near = goal * (1 + 1e-12) if goal > 0 else goal
    return next((x for x, loss in zip(axis, smooth_losses(run), strict=False) if loss <= near), None)


def of_seeds(
    quantity: str, values: Mapping[str, Sequence[float]], show: Callable[[float], str], better: str
) -> Finding | None:
    """Judge a quantity of which each seed gives one value.

    Args:
        quantity: its name.
        values: by optimizer, of all seeds.
        show: writes a value.
        better: "lower", "fewer", "shorter" or "higher".
    Returns:
        None without values.
    """
    sign = -1 if better == "higher" else 1
    order = sorted((name for name in values if values[name]), key=lambda name: sign * median(values[name]))
    if not order:
        return None

    numbers = _first([f"{name} {_spread(values[name], show)}" for name in order])
    if len(order) == 1:
        return Finding(quantity, "", "open", numbers)
    least = min(len(values[name]) for name in order)
    if least < SEEDS:
        return Finding(quantity, f"No verdict from {plural(least, 'seed')}: it takes {SEEDS}.", "open", numbers)
    best, *others = order
    apart = [name for name in others if _is_apart(values[best], values[name], sign)]
    close = [name for name in others if name not in apart]
    if not apart:
        return Finding(quantity, "No difference shown: the seeds overlap.", "open", numbers)
    better = f"{best} {VERBS[better]} {_listed(apart)}: no seeds overlap"
    if not close:
        total = sum(len(values[name]) for name in order)
        chance = sum(1 / math.comb(total, len(values[name])) for name in order)
        return Finding(quantity, f"{better} (by chance: {_odds(chance)}).", "shown", numbers)
    chance = max(2 / math.comb(len(values[best]) + len(values[name]), len(values[best])) for name in apart)
    words = (
        f"No difference shown between {_listed([best, *close])}: the seeds overlap. "
        f"{better} (by chance: {_odds(chance)}{' for each' if len(apart) > 1 else ''})."
    )
    return Finding(quantity, words, "shown", numbers)


def of_steps(series: Sequence[Series]) -> Finding | None:
    """Judge the time of a step by the quartiles over all steps but the first of each run."""
    spreads: dict[str, list[float]] = {}
    for one in series:
        durations = [duration for run in one.timed.runs for duration in step_seconds(run)]
        if len(durations) >= 4:
            spreads[one.label] = quantiles(durations, n=4)
    order = sorted(spreads, key=lambda name: spreads[name][1])
    if not order:
        return None

    def told(name: str) -> str:
        low, middle, high = spreads[name]
        return f"{name} {seconds(middle)} ({seconds(low)} to {seconds(high)})"

    numbers = _first([told(name) for name in order])
    best = order[0]
    apart = [name for name in order[1:] if spreads[best][2] < spreads[name][0]]
    close = [name for name in order[1:] if name not in apart]
    words = f"No difference shown between {_listed([best, *close])}: the quartiles overlap." if close else ""
    if apart:
        words = f"{words} {best} is faster than {_listed(apart)}: the quartiles do not overlap.".strip()
    return Finding("Time of a step", words, "shown" if apart else "open", numbers)


def of_bytes(sizes: Mapping[str, float | None]) -> Finding | None:
    """Say who keeps how much state."""
    names: dict[str, list[str]] = {}
    for label, count in sorted(sizes.items(), key=lambda item: item[1] or 0):
        if count is not None:
            names.setdefault(size(count), []).append(label)
    if not names:
        return None
    numbers = _first([f"{_listed(labels)} {shown}" for shown, labels in names.items()])
    if len(names) == 1:
        return Finding("State", "No difference." if len(next(iter(names.values()))) > 1 else "", "open", numbers)
    least = next(iter(names.values()))
    words = f"{_listed(least)} {'keeps' if len(least) == 1 else 'keep'} least"
    known = ", of those known" if None in sizes.values() else ""
    return Finding("State", f"{words}{known}.", "shown", numbers)


def _edges(series: Sequence[Series]) -> list[Finding]:
    """Name the optimizers whose best learning rate is the smallest or the largest that was tried."""
    found = []
    for one in series:
        rates = [setting.lr for setting in one.swept]
        if one.best.lr in (*rates[:1], *rates[-1:]):
            which = "largest" if one.best.lr == rates[-1] else "smallest"
            words = f"{one.label}: {rate(one.best.lr)} is the {which} rate that was tried; one beyond it may be better."
            found.append(Finding("Rate at the edge", words, "open"))
    return found


def _ties(series: Sequence[Series]) -> list[Finding]:
    """Name the optimizers whose two best rates were not told apart by the runs that chose between them."""
    ties = []
    for one in series:
        scores = [(setting.values(held_out_loss), setting) for setting in one.tried]
        known = [(losses, setting) for losses, setting in scores if len(losses) == len(setting.runs)]
        order = sorted(known, key=lambda pair: median(pair[0]))
        if len(order) > 1 and not _is_apart(order[0][0], order[1][0], 1):
            ties.append(f"{one.label} {rate(order[0][1].lr)} or {rate(order[1][1].lr)}")
    if not ties:
        return []
    words = "The seeds that chose the rates do not tell the two best apart; others might have chosen the second."
    return [Finding("Rates as good", words, "open", _first(ties))]


def _ends(series: Sequence[Series]) -> list[Finding]:
    """Name the runs that did not go to the end or blew up on the way, and why."""
    found = []
    for one in series:
        for setting in one.settings:
            name = one.label if len(one.settings) == 1 else f"{one.label} with lr {rate(setting.lr)}"
            some = setting.diverged
            if some:
                steps = _steps([run.diverged_at for run in some])
                of = f" in {len(some)} of {plural(len(setting.runs), 'seed')}" if len(setting.runs) > 1 else ""
                found.append(Finding("Diverged", f"{name}{of}, at {steps}. It has no final loss.", "bad"))
            failed = next((run for run in setting.runs if run.status == "failed"), None)
            if failed:
                found.append(Finding("Failed", f"{name}: {failed.error or 'unknown error'}", "bad"))
            interrupted = [run for run in setting.runs if run.status == "interrupted"]
            if interrupted:
                steps = _listed([number(len(run.losses)) for run in interrupted])
                found.append(Finding("Interrupted", f"{name}, after {steps} steps. It is not judged.", "bad"))
            peaks = [(run.peak[1], run.peak[0]) for run in setting.runs if run.peak]
            if peaks:
                loss, step = max(peaks)
                of = f" in {len(peaks)} of {plural(len(setting.runs), 'seed')}" if len(setting.runs) > 1 else ""
                words = f"{name}{of}: the loss rose to {number(loss, 2)} at step {number(step)} and came back."
                found.append(Finding("Blew up", words, "bad"))
            stopped = next((run for run in setting.runs if run.stopped and run.status == "finished"), None)
            if stopped:
                found.append(
                    Finding(
                        "Stopped early",
                        f"{name}, after {plural(len(stopped.losses), 'step')}: {stopped.stopped}",
                        "open",
                    )
                )
    return found


def _steps(steps: Sequence[int | None]) -> str:
    """Return steps in words, each once; None is the end."""
    known = sorted({step for step in steps if step})
    words = [f"step{'s' if len(known) > 1 else ''} {_listed([number(step) for step in known])}"] if known else []
    return " and ".join([*words, *(["the end"] if None in steps else [])])


def _is_apart(better: Sequence[float], worse: Sequence[float], sign: int) -> bool:
    return max(sign * value for value in better) < min(sign * value for value in worse)


def _spread(values: Sequence[float], show: Callable[[float], str]) -> str:
    middle, low, high = show(median(values)), show(min(values)), show(max(values))
    return middle if low == high else f"{middle} ({low} to {high})"


def _short(value: float) -> str:
    return number(value, 3)


def _odds(chance: float) -> str:
    return f"1 in {1 / chance:,.0f}"


def _share(value: float) -> str:
    return f"{value:.1%}"


def _listed(names: Sequence[str]) -> str:
    """Return the first names as one phrase, and how many more there are."""
    more = len(names) - NAMED
    return joined([*names[:NAMED], f"{more} more"] if more > 0 else names)


def _first(numbers: Sequence[str]) -> list[str]:
    most = 2 * NAMED
    return [*numbers[:most], f"and {len(numbers) - most} more"] if len(numbers) > most else list(numbers)
