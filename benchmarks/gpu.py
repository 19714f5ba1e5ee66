"""Check on a GPU that steps are right, then time them against torch.optim and the memory's own limit.

    python benchmarks/gpu.py [--quick] [--only PATTERN] [--out FILE.json] [--device cuda:0] [--tune]

It takes less than five minutes on a GPU of the class of an H100. It needs torch, NumPy and descend, nothing else, and
runs from a checkout that is not installed, too:

    PYTHONPATH=src DESCEND_CACHE_DIR=/tmp/cache python3 benchmarks/gpu.py --out gpu.json

``gpu_checks.py`` says what is checked, ``gpu_times.py`` how times are made comparable. The file is written anew after
each check and case: a run that is killed leaves what it had. Without a GPU, ``--device cpu --quick`` runs the checks
that need none; with ``TRITON_INTERPRET=1`` in the environment, on Triton's kernels.

Exit status: 0; 1 if a check has failed; 2 if there is no such device.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import gpu_times as times
import torch
from gpu_checks import CHECKS, Outcome, Place, run_checks
from gpu_tune import Trial, current, tune

import descend
from descend.reporting.whole_files import write_whole

MINUTES = 4.6
"""When the last case begins, by default."""
HEADINGS = (
    "case",
    "ours, ms",
    "floor, ms",
    "of a copy's bandwidth",
    "vs fused",
    "vs foreach",
    "vs torch",
    "device, ms",
    "host, us",
    "first, s",
)


def parse_arguments(names: Sequence[str]) -> argparse.Namespace:
    """Arguments of the command line; the checks and cases to run are the attribute ``names``."""
    parser = argparse.ArgumentParser(description="Check steps on a GPU, then time them against torch's.")
    parser.add_argument("--quick", action="store_true", help="cut the sizes down: checks everything, measures nothing")
    parser.add_argument("--only", metavar="PATTERN", default="*", help="run what has the pattern in its name")
    parser.add_argument("--out", metavar="FILE", type=Path, help="write everything measured as JSON")
    parser.add_argument("--device", default="cuda:0", help="default: cuda:0")
    parser.add_argument("--backend", help="default: auto; on the CPU in Triton's interpreter: triton")
    parser.add_argument("--seed", type=int, help="of the inputs of the checks. Default: another one in each run")
    parser.add_argument("--tune", action="store_true", help="only try other ways to cut work: gpu_tune.py")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"no case begins later. Default: {MINUTES}")
    arguments = parser.parse_args()
    if arguments.out and not arguments.out.resolve().parent.is_dir():
        parser.error(f"--out: there is no folder {arguments.out.parent}.")
    arguments.names = {name for name in names if fnmatchcase(name, f"*{arguments.only}*")}
    if not arguments.names:
        parser.error(f"--only: nothing matches {arguments.only!r}. There is {', '.join(names)}.")
    return arguments


def describe(device: torch.device) -> dict[str, str]:
    """The device and the programs on it."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    about = {"device": "CPU", "torch": torch.__version__, "triton": triton, "descend": descend.__version__}
    about["python"] = sys.version.split()[0]
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        about["device"] = properties.name
        about["memory"] = f"{properties.total_memory / 2**30:.0f} GiB"
        about["platform"] = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    return about


class Report:
    """What has been measured so far, and its file."""

    def __init__(self, about: dict[str, str], arguments: argparse.Namespace, seed: int) -> None:
        self._file: Path | None = arguments.out
        self._head = {"machine": about, "quick": arguments.quick, "backend": arguments.backend, "seed": seed}
        self.outcomes: list[Outcome] = []
        self.results: dict[str, times.Result] = {}
        self.left_out: dict[str, str] = {}
        self.bandwidth: float | None = None
        self.trials: list[Trial] = []

    def write(self) -> None:
        """Write the file anew, whole."""
        if self._file is None:
            return
        content: dict[str, Any] = {
            **self._head,
            "checks": [each._asdict() for each in self.outcomes],
            "copy_bytes_per_second": self.bandwidth,
            "cases": [each.to_json() for each in self.results.values()],
            "left_out": self.left_out,
            "tuning": [each._asdict() for each in self.trials],
            "figures": [each.to_json(self.results) for each in times.FIGURES],
        }
        text = json.dumps(content, indent=1) + "\n"
        write_whole(self._file, lambda path: path.write_text(text, encoding="utf-8"))


def cells(result: times.Result) -> list[str]:
    """A line of the table, as ``HEADINGS`` has it."""
    ours = result.times[times.OURS]
    ratios = [result.ratio(peer) for peer in (times.FUSED, times.FOREACH, times.TORCH)]
    return [
        result.case.name,
        f"{ours.step.median * 1e3:.3f}",
        f"{result.floor * 1e3:.3f}",
        f"{result.of_floor:.0%}",
        *("-" if ratio is None else f"{ratio:.2f}x" for ratio in ratios),
        f"{ours.device * 1e3:.3f}",
        f"{ours.host * 1e6:.0f}",
        f"{ours.first:.2f}",
    ]


def print_row(row: Iterable[str]) -> None:
    title, *rest = row
    print(
        f"{title:<36}"
        + "".join(f"{cell:>{max(11, len(name) + 2)}}" for cell, name in zip(rest, HEADINGS[1:], strict=True)),
        flush=True,
    )


def print_markdown(results: Iterable[times.Result]) -> None:
    """Print the table for a page."""
    print("\n| " + " | ".join(HEADINGS) + " |\n|" + "---|" * len(HEADINGS))
    for result in results:
        print("| " + " | ".join(cells(result)) + " |")


def print_figures(results: dict[str, times.Result]) -> None:
    """Print what was to be reached beside what was measured."""
    print("\n| figure | at least | measured | reached |\n|---|---|---|---|")
    for figure in times.FIGURES:
        measured = figure.measured(results)
        unit = "{:.0%}" if figure.against is None else "{:.2f}x"
        shown, reached = "-", "-"
        if measured is not None:
            shown, reached = unit.format(measured), "yes" if measured >= figure.bound else "**no**"
        print(f"| {figure.says} | {unit.format(figure.bound)} | {shown} | {reached} |")


def check(report: Report, place: Place, names: Sequence[str]) -> None:
    """Run checks and print what came of each."""
    for outcome in run_checks(place, names):
        report.outcomes.append(outcome)
        report.write()
        print(f"{outcome.outcome:<5}{outcome.name:<15}{outcome.seconds:6.1f} s  {outcome.seen}", flush=True)


def time_cases(report: Report, place: Place, cases: Sequence[times.Case], deadline: float) -> None:
    """Time cases, print a line of each, and the tables at the end."""
    clock = times.Clock(place.device, place.is_quick)
    report.bandwidth = clock.bandwidth
    print(f"\nA copy within the memory: {clock.bandwidth / 1e9:,.0f} GB/s, bytes read and written.\n")
    print_row(HEADINGS)
    plan = times.QUICK if place.is_quick else times.FULL
    for case, result in times.run_cases(cases, plan, clock, place.backend, deadline):
        if isinstance(result, str):
            report.left_out[case.name] = result
            print(f"{case.name:<36}  left out: {result}", flush=True)
        else:
            report.results[case.name] = result
            print_row(cells(result))
        report.write()
    print_markdown(report.results.values())
    print_figures(report.results)


def try_settings(report: Report, place: Place) -> None:
    """Print how fast other ways to cut work are."""
    plan = times.QUICK if place.is_quick else times.FULL._replace(seconds=0.0)
    print(f"The settings are {current()}. Times relative to theirs, the best once more at the end:\n")
    for trial in tune(plan, times.Clock(place.device, place.is_quick)):
        report.trials.append(trial)
        report.write()
        milliseconds = ", ".join(f"{name} {seconds * 1e3:.3f} ms" for name, seconds in trial.seconds.items())
        relative = "     -" if trial.relative is None else f"{trial.relative:6.3f}"
        print(f"{relative}  {trial.settings or 'as it is'}: {trial.problem or milliseconds}", flush=True)


def main() -> int:
    begin = time.perf_counter()
    checks = {f"check-{name}": name for name in CHECKS}
    arguments = parse_arguments([*checks, *(case.name for case in times.CASES)])
    device = torch.device(arguments.device)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            print("gpu.py: torch sees no GPU; --device cpu --quick runs the checks that need none.", file=sys.stderr)
            return 2
        torch.cuda.set_device(device)
    interpreted = device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    arguments.backend = arguments.backend or ("triton" if interpreted else "auto")
    seed = int.from_bytes(os.urandom(4), "little") if arguments.seed is None else arguments.seed
    about = describe(device)
    report = Report(about, arguments, seed)
    print(", ".join(f"{key} {value}" for key, value in about.items()) + f"; backend {arguments.backend}, seed {seed}\n")

    place = Place(device, arguments.backend, arguments.quick, torch.Generator().manual_seed(seed))
    if arguments.tune:
        try_settings(report, place)
    else:
        check(report, place, [name for title, name in checks.items() if title in arguments.names])
        if cases := [case for case in times.CASES if case.name in arguments.names]:
            time_cases(report, place, cases, begin + 60 * arguments.minutes)
    if arguments.quick or device.type == "cpu":
        print("\nThe sizes were cut down, or there is no GPU: none of these times means anything.")
    failed = [outcome.name for outcome in report.outcomes if outcome.outcome == "FAIL"]
    names = f": {', '.join(failed)}" if failed else ""
    print(f"\n{len(report.outcomes)} checks, {len(failed)} failed{names}; {time.perf_counter() - begin:.0f} s.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
