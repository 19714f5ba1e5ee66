"""Progress bars for a running comparison."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from descend.compare.train import Run


@contextmanager
def progress(console: Console, runs: Sequence[Run], steps: int) -> Iterator[Callable[[Run], None]]:
    """Show one bar per optimizer; yield the function to call after each step of a run.

    A terminal shows live bars. Anything else (a file, a pipe) gets one line when a run has finished.
    """
    columns = (
        TextColumn("{task.fields[label]}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        tasks = {
            run.spec.label: bars.add_task("", start=False, total=steps, label=run.spec.label, loss=float("nan"))
            for run in runs
        }

        def on_step(run: Run) -> None:
            task, done = tasks[run.spec.label], len(run.steps)
            if done == 1:
                bars.start_task(task)
            bars.update(task, completed=done, loss=run.losses[-1])
            if done == steps and not console.is_terminal:
                console.print(f"{run.spec.label}: {done} steps, loss {run.losses[-1]:.4f}", markup=False)

        yield on_step
