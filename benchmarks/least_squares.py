"""Count the residuals and Jacobians that `least_squares` needs, against SciPy's trf, dogbox and MINPACK's lm.

    python benchmarks/least_squares.py [--only PATTERN] [--quick] [--plot FILE] [--json FILE]

Prints for each set of problems and each solver how many it solves and how ours compares on those that both solve; then
what a user sees who leaves all options alone, on NIST's regressions: whether the result has six digits, and whether
the solver says so. At last the figures that the project wants to reach.

``fit_race.py`` says what is counted and when a run ends; ``problems/fits.py`` has the problems. Counts are the same on
a busy machine.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import torch
from fit_race import (
    DIGITS,
    LM,
    TRF,
    FitOutcome,
    begins_solved,
    default_options,
    run,
    tight_options,
)
from minimize import print_row, ratio
from problems import fits
from problems.fit import Fit
from profiles import plot_profiles
from race import OURS, Outcomes

FULL, QUICK = (1, 500), (37, 60)  # every how many problems, and how many evaluations for each
LOWEST = 1e-4  # relative, of a sum of squares that counts as the lowest
FitOutcomes = dict[str, dict[str, FitOutcome]]
"""Fit name -> solver -> what it did."""


class FitContest(NamedTuple):
    """One set of problems."""

    name: str
    title: str
    fits: Callable[[], list[Fit]]


NIST, FREE, BOUNDS, OTHER, FAR, USER = "nist", "free", "bounds", "other", "far", "user"
CONTESTS = (
    FitContest(NIST, "NIST's nonlinear regressions from both starts, to six digits", fits.certified),
    FitContest(FREE, "Moré, Garbow & Hillstrom from 1, 10 and 100 times the start, and bundles", fits.unconstrained),
    FitContest(BOUNDS, "With bounds", fits.bounded),
    FitContest(OTHER, "NIST's and Moré's from other starts, never tuned on", fits.validation),
    FitContest(FAR, "Moré's from 3 and 30 times the start, and other families, never tuned on", fits.far),
)


def plain(outcomes: FitOutcomes) -> Outcomes:
    """What ``ratio`` and ``plot_profiles`` understand."""
    return {fit: {name: run.outcome for name, run in runs.items()} for fit, runs in outcomes.items()}


def jacobian_ratio(outcomes: FitOutcomes, peer: str) -> float:
    """Geometric mean of our Jacobians over the peer's where both solve; a run without any has one."""
    both = [runs for runs in outcomes.values() if runs[OURS].outcome.solved and runs[peer].outcome.solved]
    logs = [math.log(max(runs[OURS].n_jacobians, 1) / max(runs[peer].n_jacobians, 1)) for runs in both]
    return math.exp(statistics.fmean(logs)) if logs else math.nan


def n_solved(outcomes: FitOutcomes, name: str) -> int:
    return sum(runs[name].outcome.solved for runs in outcomes.values())


def n_lowest(outcomes: FitOutcomes, name: str) -> int:
    """How often a solver came to the lowest sum of squares that any did."""
    least = [min(run.lowest for run in runs.values()) for runs in outcomes.values()]
    own = [runs[name].lowest for runs in outcomes.values()]
    return sum(value <= lowest * (1 + LOWEST) + 1e-14 for value, lowest in zip(own, least, strict=True))


def race(chosen: list[Fit], budget: int) -> FitOutcomes:
    """Let everybody solve every problem that does not begin solved, with tight tolerances, to the same finish."""
    solvers = tight_options()
    return {
        fit.name: {name: run(solver, fit, budget) for name, solver in solvers.items() if is_for(name, fit)}
        for fit in chosen
        if not begins_solved(fit)
    }


def is_for(name: str, fit: Fit) -> bool:
    """MINPACK knows no bounds."""
    return name != LM or fit.lower is None


def report_contest(contest: FitContest, outcomes: FitOutcomes) -> None:
    print(f"\n{contest.title}: {len(outcomes)} problems\n")
    print_row(
        "solver", ["solved", "lowest", "early", "false", "NaN", "outside", "raised", "ours/it", "Jacob.", "of both"]
    )
    for name in next(iter(outcomes.values())):
        runs = [solvers[name].outcome for solvers in outcomes.values()]
        counts = [
            n_solved(outcomes, name),
            n_lowest(outcomes, name),
            sum(run.early for run in runs),
            sum(run.false_success for run in runs),
            sum(run.nan for run in runs),
            sum(run.outside for run in runs),
            sum(bool(run.error) for run in runs),
        ]
        mean, both = ratio(plain(outcomes), name)
        print_row(name, [*map(str, counts), f"{mean:.3f}", f"{jacobian_ratio(outcomes, name):.3f}", str(both)])


def use(chosen: list[Fit], budget: int) -> FitOutcomes:
    """Let everybody solve NIST's problems with default options, and stop by himself."""
    return {
        fit.name: {name: run(solver, fit, budget, ends=False) for name, solver in default_options().items()}
        for fit in chosen
    }


def report_use(outcomes: FitOutcomes) -> None:
    print(f"\nDefault options, exact Jacobians: {len(outcomes)} starts of NIST's; right: {DIGITS:g} digits\n")
    print_row("solver", ["right", "and sure", "4 digits", "false", "raised", "budget", "median"])
    for name in default_options():
        runs = [solvers[name] for solvers in outcomes.values()]
        right = [run for run in runs if run.digits >= DIGITS]
        counts = [
            len(right),
            sum(run.outcome.false_success for run in right),
            sum(run.digits >= 4 for run in runs),
            sum(run.outcome.false_success and run.digits < 4 for run in runs),
            sum(bool(run.outcome.error) for run in runs),
            sum(not run.outcome.early for run in runs),
            int(statistics.median(run.outcome.cost for run in runs)),
        ]
        print_row(name, map(str, counts))
    print("\nsure: the solver says that it converged; false: it says so with fewer than 4 digits.")


Measured = dict[str, FitOutcomes]
"""Contest -> outcomes."""


def figures(measured: Measured) -> list[dict[str, Any]]:
    """The figures to reach, with what was measured; those of contests that were not run are left out."""
    rows: list[dict[str, Any]] = []

    def add(name: str, value: float, sign: str, bound: float) -> None:
        reached = value >= bound if sign == ">=" else value > bound if sign == ">" else value <= bound
        rows.append({"name": name, "sign": sign, "bound": bound, "measured": value, "reached": reached})

    if NIST in measured:
        add("nist: starts solved", n_solved(measured[NIST], OURS), ">=", len(fits.certified()))
    for contest, outcomes in measured.items():
        for peer in (TRF, LM) if contest != USER else ():
            if all(peer in runs for runs in outcomes.values()):
                add(f"{contest}: evaluations / {peer}", ratio(plain(outcomes), peer)[0], "<=", 0.9)
                add(f"{contest}: solved", n_solved(outcomes, OURS), ">", n_solved(outcomes, peer))
    own = [runs[OURS].outcome for outcomes in measured.values() for runs in outcomes.values()]
    add("NaN, out of bounds, raised", sum(run.nan + run.outside + bool(run.error) for run in own), "<=", 0)
    return rows


def report_figures(rows: list[dict[str, Any]]) -> None:
    print("\nFigures to reach\n")
    print_row("", ["bound", "measured", "reached"])
    for row in rows:
        measured = f"{row['measured']:.3f}".rstrip("0").rstrip(".")
        print_row(row["name"], [f"{row['sign']} {row['bound']:g}", measured, "yes" if row["reached"] else "no"])


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Count what least_squares evaluates, against its peers.")
    parser.add_argument("--only", metavar="PATTERN", default="*", help="run what matches, as in nist-*, user-Misra1a-*")
    parser.add_argument("--quick", action="store_true", help="a few problems: shows that the script works")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="also draw performance profiles, as in profile.png")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write everything measured")
    arguments = parser.parse_args()
    for option, file in (("--plot", arguments.plot), ("--json", arguments.json)):
        if file and not file.parent.is_dir():  # said now, not after many minutes
            parser.error(f"{option}: there is no folder {file.parent}.")
    return arguments


def measure(only: str, stride: int, budget: int) -> Measured:
    """Run and print every ``stride``-th problem that matches."""
    measured: Measured = {}

    def matching(contest: str, problems: list[Fit]) -> list[Fit]:
        return [fit for fit in problems if fnmatchcase(f"{contest}-{fit.name}", f"*{only}*")][::stride]

    for contest in CONTESTS:
        if (chosen := matching(contest.name, contest.fits())) and (outcomes := race(chosen, budget)):
            measured[contest.name] = outcomes
            report_contest(contest, outcomes)
    if chosen := matching(USER, fits.certified()):
        measured[USER] = use(chosen, 20 * budget)
        report_use(measured[USER])
    return measured


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)  # the problems are small: threads would only wait for each other
    measured = measure(arguments.only, *(QUICK if arguments.quick else FULL))
    if not measured:
        sys.exit(
            f"--only: nothing matches {arguments.only!r}. Names are those of contests and problems, joined by a -."
        )
    rows = figures(measured)
    report_figures(rows)
    if arguments.quick:
        print("\nQuick run: a few problems, so none of these figures means anything.")
    if arguments.plot:
        titles = {contest.name: contest.title for contest in CONTESTS}
        plot_profiles({titles[name]: plain(measured[name]) for name in measured if name in titles}, arguments.plot)
    if arguments.json:
        outcomes = {
            contest: {
                fit: {name: {**run._asdict(), "outcome": run.outcome._asdict()} for name, run in runs.items()}
                for fit, runs in fitted.items()
            }
            for contest, fitted in measured.items()
        }
        report = {"torch": torch.__version__, "quick": arguments.quick, "outcomes": outcomes, "figures": rows}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
