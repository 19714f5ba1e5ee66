"""Time an optimizer step: ours against torch's for-loop (its CPU default), foreach and fused.

    python benchmarks/step.py [--only PATTERN] [--quick] [--json FILE]

Prints milliseconds, how many times faster ours is than each peer (torch's AdamW, for the two that
torch does not have), and the bytes per second that ours moves beside the memory bandwidth measured;
then Python time per step, a training step, import and first-step times; at last the figures that
the project wants to reach, with what was measured.

All times are medians. ``contest.py`` says what is timed, ``descend.bench`` how the comparison is kept fair. On a
machine that is busy with something else the figures are worthless.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from contest import (
    COLD_SHAPES,
    DTYPES,
    MODEL_SHAPES,
    PYTHON_SHAPES,
    ROW_SHAPES,
    THOROUGH,
    UNPLANNED,
    Case,
    draw_values,
    time_case,
    time_training,
)
from first_step import in_fresh_process

from descend.backends.cpu import probe
from descend.bench.bandwidth import Bandwidth, measure
from descend.bench.clock import Pace, Timing
from descend.bench.methods import DEFAULT, FUSED, METHODS, OURS, PEERS
from descend.bench.shapes import SHAPES, Shape

Timings = dict[str, dict[str, Timing]]
"""Case name -> contender -> seconds."""

TRAINING = "training-step"
PYTHON_PROBE = "python-probe"
IMPORT = "import"
CONSTRUCTOR = "constructor"
FIRST_STEP_CACHED = "first-step-cached"
FIRST_STEP_NOT_CACHED = "first-step-not-cached"
STARTUP = (IMPORT, CONSTRUCTOR, FIRST_STEP_CACHED, FIRST_STEP_NOT_CACHED)

OWN_FLOAT32 = "our float32"


class Figure(NamedTuple):
    """A figure to reach.

    Attributes:
        cases: pattern of case names; the worst of them counts.
        against: the contender, or ``OWN_FLOAT32``, that ours is to be faster than; None where a
            time is bounded.
        bound: how many times faster at least; seconds at most where ``against`` is None.
    """

    cases: str
    against: str | None
    bound: float

    def measured(self, timings: Timings) -> float | None:
        """The worst ratio, or the longest time, of the cases; None if none of them ran."""
        cases = [name for name in timings if fnmatchcase(name, self.cases)]
        if self.against is None:
            return max((timings[name][OURS].median for name in cases), default=None)
        ratios = [
            peer.median / timings[name][OURS].median for name in cases if (peer := self.peer(name, timings)) is not None
        ]
        return min(ratios, default=None)

    def peer(self, name: str, timings: Timings) -> Timing | None:
        if self.against == OWN_FLOAT32:
            return timings.get(name.replace("bfloat16", "float32"), {}).get(OURS)
        return timings[name].get(self.against or "")

    def reached_by(self, measured: float) -> bool:
        return measured <= self.bound if self.against is None else measured >= self.bound


# Fresh and fixed gradients both have to reach a figure, unless it names one of them.
FIGURES = (
    Figure("adamw-float32-64M-plain-*", FUSED, 0.97),
    Figure("adamw-float32-gpt2-plain-*", FUSED, 0.97),
    Figure("adamw-float32-64M-clip-*", FUSED, 1.3),
    Figure("adamw-float32-gpt2-clip-*", FUSED, 1.3),
    Figure("adamw-float32-1000x1000-plain-fresh", FUSED, 7),
    Figure("adamw-float32-1000x1000-plain-fresh", DEFAULT, 30),
    Figure("adamw-float32-1000x1000-plain-fixed", FUSED, 10),
    Figure("adamw-float32-1000x1000-plain-fixed", DEFAULT, 45),
    Figure("adamw-float32-1000x1000-clip-fresh", FUSED, 8),
    Figure("adamw-float32-1000x1000cold-plain-fresh", FUSED, 6),
    Figure("adamw-float32-300odd-plain-fresh", FUSED, 5),
    Figure("adamw-float32-mlp-plain-*", FUSED, 2.5),
    Figure("adamw-float32-mlp-plain-*", DEFAULT, 10),
    Figure("adamw-float32-gpt2-plain-*", DEFAULT, 7),
    Figure("adamw-bfloat16-gpt2-plain-*", FUSED, 1.05),
    Figure("adamw-bfloat16-gpt2-plain-*", OWN_FLOAT32, 1.5),
    Figure(PYTHON_PROBE, UNPLANNED, 1),
    Figure(FIRST_STEP_CACHED, None, 0.6),
    Figure(FIRST_STEP_NOT_CACHED, None, 3.0),
)


class Plan(NamedTuple):
    """How much to run.

    Attributes:
        processes: fresh processes for each start-up time.
    """

    shapes: dict[str, Shape]
    pace: Pace
    processes: int


FULL = Plan(SHAPES, Pace(rounds=24, share=0.7), processes=3)
QUICK = Plan(
    {name: shape.cut(tensors=16, rows=8) for name, shape in SHAPES.items()},
    Pace(rounds=2, share=0.0),
    processes=1,
)


def model_cases() -> list[Case]:
    """Every case of the large table, those with the same tensors next to each other."""
    cases = []
    for shape in MODEL_SHAPES:
        cases += [
            Case(shape, dtype, method, clip, fresh)
            for dtype in DTYPES
            for method in THOROUGH
            for clip in (False, True)
            for fresh in (False, True)
        ]
        if shape in ROW_SHAPES:
            cases += [
                Case(shape, "float32", method, clip=False, fresh=True) for method in METHODS if method not in THOROUGH
            ]
    return cases + [Case(shape, "float32", "adamw", clip=False, fresh=True) for shape in COLD_SHAPES]


def python_cases() -> list[Case]:
    return [
        Case(shape, "float32", "adamw", clip=False, fresh=fresh) for shape in PYTHON_SHAPES for fresh in (False, True)
    ]


def run_cases(cases: list[Case], plan: Plan) -> Iterator[tuple[Case, dict[str, Timing]]]:
    """Time one case after the other; neighbours with the same tensors share their values."""
    drawn: tuple[str, str] | None = None
    values: list[torch.Tensor] = []
    for case in cases:
        shape = plan.shapes[case.shape]
        if drawn != (case.shape, case.dtype):
            values.clear()  # before the next are drawn: two sets of the largest need not fit
            values = draw_values(shape, case.dtype)
            drawn = (case.shape, case.dtype)
        yield case, time_case(case, shape, values, plan.pace)


def time_startup(processes: int) -> Timings:
    """Time import and first AdamW step in fresh processes, ours and torch's."""
    not_cached, cached, theirs = [], [], []
    for _ in range(processes):
        with tempfile.TemporaryDirectory() as cache:
            not_cached.append(in_fresh_process("descend", cache))
            cached.append(in_fresh_process("descend", cache))
            theirs.append(in_fresh_process("torch.optim", cache))

    def timing(runs: list[dict[str, float]], *parts: str) -> Timing:
        return Timing.of([sum(run[part] for part in parts) for run in runs])

    return {
        IMPORT: {OURS: timing(cached, "import"), DEFAULT: timing(theirs, "import")},
        CONSTRUCTOR: {OURS: timing(cached, "constructor"), DEFAULT: timing(theirs, "constructor")},
        FIRST_STEP_CACHED: {
            OURS: timing(cached, "constructor", "zero_grad", "step"),
            DEFAULT: timing(theirs, "constructor", "zero_grad", "step"),
        },
        FIRST_STEP_NOT_CACHED: {
            OURS: timing(not_cached, "constructor", "zero_grad", "step"),
            DEFAULT: timing(theirs, "constructor", "zero_grad", "step"),
        },
    }


def print_row(title: str, cells: Iterable[str]) -> None:
    print(f"{title:<48}" + "".join(f"{cell:>10}" for cell in cells), flush=True)


def times_faster(timings: dict[str, Timing], peers: Iterable[str]) -> list[str]:
    """How many times faster ours is than each peer; "-" where torch has no such peer."""
    return [f"{timings[peer].median / timings[OURS].median:.2f}x" if peer in timings else "-" for peer in peers]


def report_models(cases: list[Case], plan: Plan, memory: Bandwidth) -> Timings:
    """Print a line per case as it is measured: milliseconds, ratios, bandwidth."""
    print("\nMilliseconds per step; how many times faster ours is; what a step of ours moves.\n")
    print_row("case", [OURS, *PEERS, *(f"/{peer}" for peer in PEERS), "GB/s", "of memory"])
    report: Timings = {}
    for case, timings in run_cases(cases, plan):
        report[case.name] = timings
        moved = case.bytes_moved(plan.shapes[case.shape]) / timings[OURS].median
        milliseconds = [f"{timings[name].median * 1e3:.3f}" if name in timings else "-" for name in (OURS, *PEERS)]
        bandwidth = [f"{moved / 1e9:.1f}", f"{moved / memory.rate:.0%}"]
        print_row(case.name, [*milliseconds, *times_faster(timings, PEERS), *bandwidth])
    return report


def report_python(cases: list[Case], plan: Plan) -> Timings:
    """Print a line per case of one number per tensor, where Python's work is all that is left."""
    print("\nPython time: microseconds per step, and per tensor, with one number in each tensor.\n")
    shown = (OURS, *PEERS)
    print_row("case", [*shown, *(f"{name}/t" for name in shown)])
    report: Timings = {}
    for case, timings in run_cases(cases, plan):
        report[case.name] = timings
        tensors = len(plan.shapes[case.shape].sizes)
        microseconds = [timings[name].median * 1e6 for name in shown]
        per_tensor = [f"{time / tensors:.3f}" for time in microseconds]
        print_row(case.name, [*(f"{time:.1f}" for time in microseconds), *per_tensor])
    return report


def report_python_probe(plan: Plan) -> Timings:
    """Print the milliseconds of a step whose plan is proved by the probe in Python, as on other systems than Linux."""
    print("\nMilliseconds per step, 1,000 tensors of 1,000 numbers, fresh gradients, the probe in Python.\n")
    case, peers = Case("1000x1000", "float32", "adamw", clip=False, fresh=True), (UNPLANNED, FUSED)
    shape = plan.shapes[case.shape]
    with mock.patch.object(probe, "_bindings", return_value=None):
        timings = time_case(case, shape, draw_values(shape, case.dtype), plan.pace, (OURS, *peers))
    print_row("", [OURS, *peers, *(f"/{peer}" for peer in peers)])
    milliseconds = [f"{timings[name].median * 1e3:.3f}" for name in (OURS, *peers)]
    print_row(PYTHON_PROBE, [*milliseconds, *times_faster(timings, peers)])
    return {PYTHON_PROBE: timings}


def report_training(plan: Plan) -> Timings:
    """Print the milliseconds of a whole training step."""
    print("\nMilliseconds of a training step with clipping, small transformer, AdamW, float32.\n")
    peers = (DEFAULT, FUSED)
    timings = time_training(plan.pace)
    print_row("", [OURS, *peers, *(f"/{peer}" for peer in peers)])
    milliseconds = [f"{timings[name].median * 1e3:.3f}" for name in (OURS, *peers)]
    print_row(TRAINING, [*milliseconds, *times_faster(timings, peers)])
    return {TRAINING: timings}


def report_startup(plan: Plan) -> Timings:
    """Print the seconds that fresh processes wait."""
    print("\nSeconds in a fresh process after `import torch`; a first step with its constructor.\n")
    report = time_startup(plan.processes)
    print_row("", [OURS, "torch"])
    for name, timings in report.items():
        print_row(name, [f"{timings[contender].median:.3f}" for contender in (OURS, DEFAULT)])
    return report


def report_figures(timings: Timings) -> list[dict[str, Any]]:
    """Print the figures to reach beside the measured ones; return them for the JSON file."""
    print("\nFigures to reach (the worst of the cases counts)\n")
    print_row("case", ["against", "bound", "measured", "reached"])
    rows = []
    for figure in FIGURES:
        measured = figure.measured(timings)
        reached = None if measured is None else figure.reached_by(measured)
        unit, sign = ("s", "<=") if figure.against is None else ("x", ">=")
        print_row(
            figure.cases,
            [
                figure.against or "",
                f"{sign} {figure.bound:g}{unit}",
                "-" if measured is None else f"{measured:.2f}{unit}",
                {True: "yes", False: "no", None: "-"}[reached],
            ],
        )
        rows.append({**figure._asdict(), "measured": measured, "reached": reached})
    return rows


def environment() -> dict[str, str | int]:
    return {
        "machine": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def parse_arguments(names: list[str], description: str, example: str, listing: str = "") -> argparse.Namespace:
    """Arguments of the command line.

    Args:
        names: of the cases; those to run are the attribute ``names``.
        description: of the script.
        example: patterns of names.
        listing: how to list the names in a message. Default: all of them.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--only",
        metavar="PATTERN",
        default="*",
        help=f"run what has the pattern in its name, as in {example}",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="cut the sizes down: shows that the script works, measures nothing",
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write everything measured")
    arguments = parser.parse_args()
    if arguments.json and not arguments.json.parent.is_dir():  # said now, not after ten minutes
        parser.error(f"--json: there is no folder {arguments.json.parent}.")
    arguments.names = {name for name in names if fnmatchcase(name, f"*{arguments.only}*")}
    if not arguments.names:
        parser.error(f"--only: nothing matches {arguments.only!r}. There is {listing or ', '.join(names)}.")
    return arguments


def main() -> None:
    models, python = model_cases(), python_cases()
    arguments = parse_arguments(
        [*(case.name for case in models + python), PYTHON_PROBE, TRAINING, *STARTUP],
        "Time an optimizer step, ours against torch's.",
        "adamw-*-gpt2 or first-step",
        f"({'|'.join(METHODS)})-({'|'.join(DTYPES)})-({'|'.join(SHAPES)})-(plain|clip)-(fixed|fresh), "
        f"{', '.join((PYTHON_PROBE, TRAINING, *STARTUP))}",
    )
    plan = QUICK if arguments.quick else FULL
    models = [case for case in models if case.name in arguments.names]
    python = [case for case in python if case.name in arguments.names]

    about = environment()
    memory = measure(footprint=512 * 2**20)
    print(", ".join(f"{key} {value}" for key, value in about.items()) + f", memory {memory.rate / 1e9:.1f} GB/s")

    timings: Timings = {}
    if models:
        timings |= report_models(models, plan, memory)
    if python:
        timings |= report_python(python, plan)
    if PYTHON_PROBE in arguments.names:
        timings |= report_python_probe(plan)
    if TRAINING in arguments.names:
        timings |= report_training(plan)
    if not arguments.names.isdisjoint(STARTUP):
        timings |= report_startup(plan)
    figures = report_figures(timings)
    if arguments.quick:
        print("\nQuick run: the shapes were cut down, so none of these times means anything.")

    if arguments.json:
        cases = {
            name: {contender: timing._asdict() for contender, timing in contenders.items()}
            for name, contenders in timings.items()
        }
        report = {
            "environment": about,
            "quick": arguments.quick,
            "memory_bytes_per_second": memory.rate,
            "seconds": cases,
            "figures": figures,
        }
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
