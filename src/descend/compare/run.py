"""Runs a comparison: reads the data, trains with each optimizer, and reports."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from descend.compare import report, specs
from descend.compare.parallel import choose
from descend.compare.problem import Problem
from descend.compare.progress import progress
from descend.compare.ranks import Alone, Ranks
from descend.compare.settings import Settings
from descend.compare.tasks.catalog import find_task
from descend.compare.tasks.task import Task
from descend.compare.train import Run, compete, prepare
from descend.reporting.errors import UsageError


def run(settings: Settings, ranks: Ranks | None = None) -> int:
    """Compare as ``settings`` say, and return the exit status.

    Args:
        settings: the request.
        ranks: the processes that take part, this one included. Default: those that ``settings`` ask for are started.
    """
    chosen = find_task(settings.task)
    contestants = specs.parse_all(settings.optimizers or chosen.optimizers, chosen.lr)
    batch_size = settings.batch_size or chosen.batch_size or 1
    sparse = [spec.text for spec in contestants if spec.is_sparse]
    way = choose(settings.parallel, settings.nproc, batch_size, sparse)
    if settings.nproc > 1 and ranks is None:
        from descend.compare.launch import launch

        return launch(settings)
    ranks = ranks or Alone()
    torch.set_num_threads(settings.threads or chosen.threads or max(1, torch.get_num_threads() // settings.nproc))
    console = Console(quiet=ranks.rank > 0)
    with console.status("Reading the data and building the optimizers"):
        torch.manual_seed(settings.seed)
        problem = Problem(
            task=chosen,
            data=chosen.load(settings.seed),
            model=chosen.model(),
            steps=settings.steps or chosen.steps,
            batch_size=batch_size,
            seed=settings.seed,
            ranks=ranks,
            way=way,
        )
        runs = prepare(contestants, problem)
    folder = settings.out or Path("runs") / chosen.name
    make_folder(folder)

    is_interrupted = False
    try:
        with progress(console, runs, problem.steps) as on_step:
            compete(problem, runs, on_step)
    except KeyboardInterrupt:
        is_interrupted = True
    # Rank 0 alone tells what failed: a rank that ends with an error would end the others while they report.
    status = _report(console, folder, chosen, problem, runs) if ranks.rank == 0 else 0
    return 130 if is_interrupted else status


def _report(console: Console, folder: Path, chosen: Task, problem: Problem, runs: Sequence[Run]) -> int:
    """Show and write what was measured; return the exit status."""
    measured = [run for run in runs if run.steps or run.error]
    if measured:
        console.print(report.table(chosen, problem, measured))
        report.write(folder, chosen, problem, measured)
        console.print(
            f"Wrote results.json and curves.png into {folder}.", markup=False, highlight=False, soft_wrap=True
        )
    failed = [run for run in measured if run.error]
    for run in failed:
        print(f"descend compare: {run.spec.label} failed after {len(run.steps)} steps: {run.error}", file=sys.stderr)
    return 1 if failed else 0


def make_folder(folder: Path) -> None:
    """Make the output folder; raise a ``UsageError`` if that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {folder} cannot be made: {error.strerror}.") from error
