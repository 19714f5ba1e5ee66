"""Runs a benchmark from a request to its files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from descend.bench.bandwidth import FOOTPRINTS, Bandwidth, measure_all
from descend.bench.machine import Machine
from descend.bench.measure import Case
from descend.bench.outputs import Outputs
from descend.bench.report import Report, title
from descend.bench.settings import Settings
from descend.bench.workload import workloads
from descend.reporting.errors import CommandError, UsageError
from descend.reporting.signals import Interrupted, interruptible
from descend.reporting.text import seconds
from descend.state.available_memory import available_memory


def run(settings: Settings, machine: Machine) -> int:
    """Measure, print the table and write the files.

    Args:
        settings: what to measure.
        machine: what it is measured on.
    Returns:
        Exit status: 0; 1 if something could not be measured or results differ; 130 after Ctrl-C and 143 after
        SIGTERM, when what was measured so far is printed and written.
    Raises:
        CommandError: nothing could be measured.
        UsageError: the request is not valid; nothing has been written then.
    """
    _check_device(settings.device)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    loads = list(workloads(settings))
    outputs = Outputs(settings)
    console = Console(highlight=False)
    report = Report(machine, torch.get_num_threads(), settings.device, settings.gradients, (), ())
    status = 0
    with interruptible():
        try:
            bandwidths: list[Bandwidth] = []
            with _status(console, "memory bandwidth") as advance:
                for bandwidth in measure_all(settings.device, memory_left(settings.device)):
                    bandwidths.append(bandwidth)
                    advance(len(bandwidths) / len(FOOTPRINTS))
            report = replace(report, bandwidths=bandwidths)
            _print(console, report.memory())
            cases = [
                Case.of(optimizer, load, settings.max_norm, settings.gradients == "fresh", bandwidths)
                for load in loads
                for optimizer in dict.fromkeys(settings.optimizers)
            ]
            report = replace(report, cases=cases)
            for case in cases:
                with _status(console, f"{case.optimizer}, {case.workload.name}, {case.workload.dtype}") as advance:
                    case.time(settings.device, settings.seconds / len(cases), memory_left(settings.device), advance)
                if not console.is_terminal:
                    ours = case.rows[0].timing
                    _print(console, f"{title(case)}: {seconds(ours.median) if ours else 'not measured'}")
        except Interrupted as error:
            report, status = replace(report, interrupted=True), error.status
        return _finish(console, report, outputs) or status


def memory_left(device: str) -> int:
    """Bytes that tensors may take: nine tenths of what is free; 0 if the system does not say."""
    free = torch.cuda.mem_get_info(device)[0] if device.startswith("cuda") else available_memory()
    return free * 9 // 10


def _finish(console: Console, report: Report, outputs: Outputs) -> int:
    """Print and write what was measured; return 1 if a run that was not interrupted lacks a time, or results differ."""
    if not any(row.seconds for case in report.cases for row in case.rows):
        outputs.give_up()
        if report.interrupted:
            return 0
        reasons = [row.remark for case in report.cases for row in case.rows if row.remark]
        raise CommandError(f"nothing was measured: {reasons[0] if reasons else 'no step was taken'}.")
    files = outputs.write(report)
    _print(console, "")
    _print(console, report.table(console.width))
    _print(console, f"\n{'Interrupted; this is what was measured so far. ' if report.interrupted else ''}Written:")
    for file in files:
        _print(console, f"  {file}")
    if report.interrupted:
        return 0
    return int(any(row.remark or not row.agrees for case in report.cases for row in case.rows))


def _print(console: Console, text: str) -> None:
    console.print(text, markup=False, soft_wrap=True)


def _check_device(device: str) -> None:
    try:
        kind = torch.device(device)
    except RuntimeError:
        kind = None
    if kind is None or kind.type not in ("cpu", "cuda"):
        raise UsageError(f"--device must be cpu, cuda or cuda:N, got {device!r}.")
    if kind.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device {device}: torch {torch.__version__} sees no GPU here.")
    if kind.type == "cuda" and (kind.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {device}: there are {torch.cuda.device_count()} GPUs, counted from 0.")


@contextmanager
def _status(console: Console, what: str) -> Iterator[Callable[[float], None]]:
    """Show a bar in a terminal; yield the function to call with the share that is done."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bars:
        task = bars.add_task(what, total=1.0)
        yield lambda done: bars.update(task, completed=done)
