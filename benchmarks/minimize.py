"""Count the evaluations that `minimize` needs, against SciPy, torch and pytorch-minimize.

    python benchmarks/minimize.py [--only PATTERN] [--quick] [--plot FILE] [--json FILE]

Prints for each solver how many problems it solves and how ours compares on those that both solve;
then the time of an L-BFGS iteration outside of the closure; at last the figures that the project
wants to reach, with what was measured. ``--plot`` draws Dolan & Moré's performance profiles.

``race.py`` says what is counted and when a run ends, ``iteration.py`` what is timed, ``problems/``
has the problems. Counts are the same on a busy machine; times are worthless there.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import iteration
import torch
from problems import Problem, bounded, bounded_seen, bounded_unseen, ill_conditioned_squares, rounded, unconstrained
from profiles import plot_profiles
from race import (
    BFGS,
    LARGEST,
    LBFGSB,
    NEWTON_CG,
    OURS,
    PEERS,
    TORCH,
    TORCH_DEFAULTS,
    TORCHMIN,
    TORCHMIN_B,
    TRUST_NCG,
    Outcomes,
    Solver,
    begins_solved,
    our_newton,
    ours,
    run,
)


class Contest(NamedTuple):
    """One contest.

    Attributes:
        solver: ours.
        peers: names of the others.
    """

    name: str
    title: str
    problems: Callable[[], list[Problem]]
    tol: float
    solver: Solver
    peers: tuple[str, ...]

    def solvers(self) -> dict[str, Solver]:
        there = [name for name in self.peers if not name.startswith("torchmin") or find_spec("torchmin")]
        return {OURS: self.solver, **{name: PEERS[name] for name in there}}


FREE, SINGLE, BOUNDS, NEWTON = "lbfgs", "float32", "bounds", "newton"
SEEN, UNSEEN, ILL = "bounds_seen", "bounds_unseen", "ill_conditioned"
LBFGS_PEERS = (LBFGSB, BFGS, TORCH, TORCH_DEFAULTS, TORCHMIN)


def contests() -> tuple[Contest, ...]:
    def in_float32() -> list[Problem]:
        return [rounded(problem) for problem in unconstrained()]

    def lbfgs(tol: float) -> Solver:
        return partial(ours, tol=tol, method="l-bfgs")

    return (
        Contest(FREE, "L-BFGS, float64, to 1e-6", unconstrained, 1e-6, lbfgs(1e-6), LBFGS_PEERS),
        Contest(SINGLE, "L-BFGS, everybody gets float32, to 1e-3", in_float32, 1e-3, lbfgs(1e-3), LBFGS_PEERS),
        Contest(BOUNDS, "With bounds, float64, to 1e-6", bounded, 1e-6, lbfgs(1e-6), (LBFGSB, TORCHMIN_B)),
        Contest(SEEN, "With bounds, other formulas, tuned on", bounded_seen, 1e-6, lbfgs(1e-6), (LBFGSB,)),
        Contest(UNSEEN, "With bounds, other formulas, not tuned on", bounded_unseen, 1e-6, lbfgs(1e-6), (LBFGSB,)),
        Contest(
            NEWTON,
            "Newton-CG, float64, to 1e-6, evaluations and products",
            unconstrained,
            1e-6,
            partial(our_newton, tol=1e-6),
            (NEWTON_CG, TRUST_NCG),
        ),
        Contest(
            ILL,
            "Newton-CG, ill-conditioned least squares, to 1e-6, evaluations and products",
            ill_conditioned_squares,
            1e-6,
            partial(our_newton, tol=1e-6),
            (NEWTON_CG, TRUST_NCG),
        ),
    )


class Measured(NamedTuple):
    """All that was measured: contest -> outcomes, and time of an iteration: size -> solver -> seconds."""

    outcomes: dict[str, Outcomes]
    seconds: dict[str, dict[str, float]]


def ratio(outcomes: Outcomes, peer: str) -> tuple[float, int]:
    """Geometric mean of our cost over the peer's where both solve, and on how many problems."""
    both = [solved for solved in outcomes.values() if peer in solved and solved[OURS].solved and solved[peer].solved]
    logs = [math.log(solved[OURS].cost / solved[peer].cost) for solved in both]
    return (math.exp(sum(logs) / len(logs)) if logs else math.nan), len(logs)


def evaluations(table: str, peer: str, measured: Measured) -> float | None:
    mean, problems = ratio(measured.outcomes.get(table, {}), peer)
    return mean if problems else None


def solved(table: str, peer: str, measured: Measured) -> float | None:
    """Problems that ours solves over those that the peer solves, of those that both were given."""
    both = [outcome for outcome in measured.outcomes.get(table, {}).values() if peer in outcome]
    theirs = sum(outcome[peer].solved for outcome in both)
    return sum(outcome[OURS].solved for outcome in both) / theirs if theirs else None


def seconds(pattern: str, contender: str, measured: Measured) -> float | None:
    """Our time over torch's, the worst of those that match."""
    ratios = [
        times[contender] / times[iteration.TORCH]
        for name, times in measured.seconds.items()
        if fnmatchcase(name, pattern)
    ]
    return max(ratios, default=None)


def failures(measured: Measured) -> float | None:
    """How often ours returned a NaN, said wrongly that it converged, or left the bounds."""
    own = [outcome[OURS] for outcomes in measured.outcomes.values() for outcome in outcomes.values()]
    return float(sum(run.nan + run.false_success + run.outside for run in own)) if own else None


class Figure(NamedTuple):
    """A figure to reach: what it is of, how it is measured, and at most (or at least) what."""

    name: str
    measure: Callable[[Measured], float | None]
    sign: str
    bound: float

    def reached_by(self, value: float) -> bool:
        return value <= self.bound if self.sign == "<=" else value >= self.bound


FIGURES = (
    Figure("lbfgs: evaluations / SciPy's L-BFGS-B", partial(evaluations, FREE, LBFGSB), "<=", 0.87),
    Figure("lbfgs: solved / SciPy's L-BFGS-B", partial(solved, FREE, LBFGSB), ">=", 1.0),
    Figure("float32: evaluations / SciPy's L-BFGS-B", partial(evaluations, SINGLE, LBFGSB), "<=", 0.90),
    Figure("float32: solved / SciPy's L-BFGS-B", partial(solved, SINGLE, LBFGSB), ">=", 1.05),
    Figure("bounds: evaluations / SciPy's L-BFGS-B", partial(evaluations, BOUNDS, LBFGSB), "<=", 0.95),
    Figure("bounds: solved / SciPy's L-BFGS-B", partial(solved, BOUNDS, LBFGSB), ">=", 1.05),
    Figure("bounds_unseen: evaluations / SciPy's L-BFGS-B", partial(evaluations, UNSEEN, LBFGSB), "<=", 0.87),
    Figure("bounds_unseen: solved / SciPy's L-BFGS-B", partial(solved, UNSEEN, LBFGSB), ">=", 1.05),
    Figure("newton: evaluations / SciPy's Newton-CG", partial(evaluations, NEWTON, NEWTON_CG), "<=", 0.80),
    Figure("newton: solved / SciPy's Newton-CG", partial(solved, NEWTON, NEWTON_CG), ">=", 1.0),
    *(
        Figure(f"time, {name}: {contender} / torch", partial(seconds, pattern, contender), "<=", bound)
        for name, pattern, bound in (
            ("N >= 100,000, history 10", "*-*00000-10-*", 0.67),
            ("N >= 100,000, history 100", "*-*00000-100-*", 0.83),
            ("N = 100", "*-100-*-*", 0.71),
        )
        for contender in (iteration.MINIMIZE, iteration.CLASS)
    ),
    Figure("NaN, false success, out of bounds", failures, "<=", 0.0),
)


class Workload(NamedTuple):
    """How much to run: every ``stride``-th problem with at most ``largest`` variables."""

    stride: int
    largest: int
    budget: int
    sizes: tuple[iteration.Size, ...]


FULL = Workload(1, 1_000_000, 2000, iteration.SIZES)
QUICK = Workload(29, 60, 100, iteration.QUICK)


def race(contest: Contest, problems: Iterable[Problem], budget: int) -> Outcomes:
    """Let everybody solve every problem that does not begin solved."""
    outcomes: Outcomes = {}
    for problem in problems:
        if not begins_solved(problem, contest.tol):
            outcomes[problem.name] = {
                name: run(solver, problem, contest.tol, budget)
                for name, solver in contest.solvers().items()
                if len(problem.x0) <= LARGEST.get(name, len(problem.x0))
            }
    return outcomes


def print_row(title: str, cells: Iterable[str], width: int = 9) -> None:
    print(f"{title:<44}" + "".join(f"{cell:>{width}}" for cell in cells), flush=True)


def report_contest(contest: Contest, outcomes: Outcomes) -> None:
    """Print what each solver did, and our cost over its."""
    print(f"\n{contest.title}, {len(outcomes)} problems\n")
    print_row("solver", ["run on", "solved", "early", "false", "NaN", "outside", "raised", "ours/it", "of both"])
    for name in contest.solvers():
        runs = [solvers[name] for solvers in outcomes.values() if name in solvers]
        counts = [
            len(runs),
            sum(run.solved for run in runs),
            sum(run.early for run in runs),
            sum(run.false_success for run in runs),
            sum(run.nan for run in runs),
            sum(run.outside for run in runs),
            sum(bool(run.error) for run in runs),
        ]
        mean, both = ratio(outcomes, name)
        print_row(name, [*map(str, counts), f"{mean:.3f}", str(both)])
    if len(contest.solvers()) <= len(contest.peers):
        print("pytorch-minimize is not there to be compared with: pip install pytorch-minimize.")


def report_iterations(sizes: Iterable[iteration.Size]) -> dict[str, dict[str, float]]:
    """Print microseconds per iteration."""
    print(f"\nMicroseconds per iteration outside of the closure, {torch.get_num_threads()} threads\n")
    names = list(iteration.CONTENDERS)
    print_row("iteration-N-history-dtype", [*names, *(f"{name} /torch" for name in names[:-1])], width=24)
    report = {}
    for size in sizes:
        report[size.name] = times = iteration.time_iterations(size)
        shares = [f"{times[name] / times[iteration.TORCH]:.2f}" for name in names[:-1]]
        print_row(size.name, [*(f"{times[name] * 1e6:.1f}" for name in names), *shares], width=24)
    return report


def report_figures(measured: Measured) -> list[dict[str, Any]]:
    """Print the figures to reach beside the measured ones; return them for the JSON file."""
    print("\nFigures to reach\n")
    print_row("", ["bound", "measured", "reached"])
    rows = []
    for figure in FIGURES:
        value = figure.measure(measured)
        reached = None if value is None else figure.reached_by(value)
        print_row(
            figure.name,
            [
                f"{figure.sign} {figure.bound:g}",
                "-" if value is None else f"{value:.3f}",
                {True: "yes", False: "no", None: "-"}[reached],
            ],
        )
        rows.append({"name": figure.name, "bound": figure.bound, "measured": value, "reached": reached})
    return rows


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Count the evaluations that minimize needs, against its peers.")
    parser.add_argument(
        "--only",
        metavar="PATTERN",
        default="*",
        help=f"run what has the pattern in its name, as in {BOUNDS}-*, lbfgs-rosenbrock-*, iteration-100-; contests: "
        + ", ".join(contest.name for contest in contests())
        + "; times are iteration",
    )
    parser.add_argument("--quick", action="store_true", help="a few small problems: shows that the script works")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="also draw performance profiles, as in profile.png")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write everything measured")
    arguments = parser.parse_args()
    for option, file in (("--plot", arguments.plot), ("--json", arguments.json)):
        if file and not file.parent.is_dir():  # said now, not after many minutes
            parser.error(f"{option}: there is no folder {file.parent}.")
    return arguments


def measure(only: str, workload: Workload) -> Measured:
    """Run and print all that matches."""
    measured = Measured({}, {})
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the problems are small: threads would only wait for each other
    for contest in contests():
        problems = [problem for problem in contest.problems() if len(problem.x0) <= workload.largest]
        chosen = [problem for problem in problems if fnmatchcase(f"{contest.name}-{problem.name}", f"*{only}*")]
        if chosen:
            measured.outcomes[contest.name] = race(contest, chosen[:: workload.stride], workload.budget)
            report_contest(contest, measured.outcomes[contest.name])
    torch.set_num_threads(threads)
    sizes = [size for size in workload.sizes if fnmatchcase(size.name, f"*{only}*")]
    if sizes:
        measured.seconds.update(report_iterations(sizes))
    return measured


def main() -> None:
    arguments = parse_arguments()
    about = {
        "machine": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    measured = measure(arguments.only, QUICK if arguments.quick else FULL)
    if not measured.outcomes and not measured.seconds:
        sys.exit(f"--only: nothing matches {arguments.only!r}. Names are those of tables and problems, joined by a -.")
    figures = report_figures(measured)
    if arguments.quick:
        print("\nQuick run: a few problems and a small budget, so none of these figures means anything.")
    if arguments.plot:
        titles = {contest.name: contest.title for contest in contests()}
        plot_profiles({titles[name]: outcomes for name, outcomes in measured.outcomes.items()}, arguments.plot)
    if arguments.json:
        outcomes = {
            contest: {
                problem: {name: run._asdict() for name, run in solvers.items()} for problem, solvers in problems.items()
            }
            for contest, problems in measured.outcomes.items()
        }
        report = {
            "environment": about,
            "quick": arguments.quick,
            "outcomes": outcomes,
            "seconds": measured.seconds,
            "figures": figures,
        }
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
