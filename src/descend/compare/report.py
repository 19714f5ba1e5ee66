"""The results of a comparison: a table, ``results.json`` and ``curves.png``."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Callable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich import box
from rich.markup import escape
from rich.table import Table

import descend
from descend.compare.problem import Problem
from descend.compare.tasks.task import Task
from descend.compare.train import Run

CAPTION = (
    "Loss: cross-entropy of a training batch in nats. Optimizer time: inside optimizer.step(), without the first step."
)
PER_RANK = ("optimizer\ntime", "state")
CAPTION_RANKS = " Time and state: the ranks' smallest to largest; results.json has each rank's."
CAPTION_SPARSE = (
    " With sparse=exact it includes settling rows before they are read. Largest diff.: the largest difference "
    "between a loss and that of {} at the same step."
)


def table(task: Task, problem: Problem, runs: Sequence[Run]) -> Table:
    """Return the final table, with one row per optimizer."""
    title = f"{task.name}, seed {problem.seed}, batches of {problem.batch_size}"
    headings = ["final\nloss", "best\nloss", "test\nacc.", "optimizer\ntime", "total\ntime", "steps", "state"]
    dense = reference(runs)
    caption = CAPTION
    if problem.ranks.world > 1:
        title += f", {problem.way.name} on {problem.ranks.world} ranks"
        headings = [heading + "\nper rank" if heading in PER_RANK else heading for heading in headings]
        caption += CAPTION_RANKS
    if dense:
        headings.append("largest\ndiff.")
        caption += CAPTION_SPARSE.format(escape(dense.spec.label))
    result = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    result.add_column("optimizer", overflow="fold")
    for heading in headings:
        result.add_column(heading, justify="right", no_wrap=True)
    for run in runs:
        result.add_row(
            "\n  ".join([escape(run.spec.label), *_remarks(run)]),
            _loss(run.final_loss),
            _loss(run.best_loss),
            "-" if run.test_accuracy is None else f"{run.test_accuracy:.1%}",
            _range(run.optimizer_seconds, lambda seconds: f"{seconds:.3f} s"),
            f"{run.total_seconds:.1f} s",
            str(len(run.steps)),
            _range(known(run.state_bytes), _bytes),
            *([_difference(run, dense)] if dense else []),
        )
    return result


def reference(runs: Sequence[Run]) -> Run | None:
    """Return the first run with dense gradients, or None unless there are runs with dense and with sparse ones."""
    dense = [run for run in runs if not run.spec.is_sparse]
    return dense[0] if 0 < len(dense) < len(runs) else None


def largest_difference(run: Run, other: Run) -> float | None:
    """Return the largest difference between two runs' losses at the same step, in nats; None without steps."""
    differences = [abs(a - b) for a, b in zip(run.losses, other.losses, strict=False)]
    # max() ignores a NaN unless it comes first.
    return max(differences, default=None) if all(map(math.isfinite, differences)) else math.nan


def _difference(run: Run, dense: Run) -> str:
    difference = largest_difference(run, dense)
    return "-" if run is dense or difference is None else f"{difference:.1e}"


def known(values: Sequence[int | None]) -> Sequence[int]:
    """Return the values of the ranks that told theirs."""
    return [value for value in values if value is not None]


def _range(values: Sequence[float], show: Callable[[float], str]) -> str:
    """Return the smallest and the largest value as ``show`` writes them; one if they look the same."""
    if not values:
        return "-"
    least, most = show(min(values)), show(max(values))
    return most if least == most else f"{least}\nto {most}"


def _loss(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.4f}"


def _remarks(run: Run) -> list[str]:
    remarks = [run.status] if run.status in ("failed", "interrupted") else []
    if run.helper:
        remarks.append(f"{run.helper.__name__} for the rest")
    if run.diverged_at:
        remarks.append(f"diverged at step {run.diverged_at}")
    elif run.status == "diverged":
        remarks.append("diverged after the last step")
    return remarks


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def write(folder: Path, task: Task, problem: Problem, runs: Sequence[Run]) -> None:
    """Write ``results.json`` and ``curves.png`` into ``folder``; each file is written completely or not at all."""
    text = json.dumps(results(task, problem, runs), indent=1, allow_nan=False, default=str)
    _write_whole(folder / "results.json", lambda path: path.write_text(text + "\n", encoding="utf-8"))
    _write_whole(folder / "curves.png", lambda path: curves(task, runs).savefig(path, format="png", dpi=150))


def _write_whole(path: Path, write_to: Callable[[Path], object]) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write_to(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def results(task: Task, problem: Problem, runs: Sequence[Run]) -> dict[str, Any]:
    """Return the contents of ``results.json``: times in seconds, losses in nats, null for NaN and Inf."""
    dense = reference(runs)
    finite: dict[str, Any] = _only_finite(
        {
            "task": task.name,
            "steps": problem.steps,
            "batch_size": problem.batch_size,
            "seed": problem.seed,
            "threads": torch.get_num_threads(),
            "nproc": problem.ranks.world,
            "parallel": problem.way.name,
            "versions": {
                "descend": descend.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
            "reference": dense.spec.label if dense else None,
            "runs": [_result(run, dense) for run in runs],
        }
    )
    return finite


def _result(run: Run, dense: Run | None) -> dict[str, Any]:
    return {
        "label": run.spec.label,
        "spec": run.spec.text,
        "optimizer": f"{run.spec.optimizer.__module__}.{run.spec.optimizer.__qualname__}",
        "helper": f"{run.helper.__module__}.{run.helper.__qualname__}" if run.helper else None,
        "options": run.options,
        "status": run.status,
        "error": run.error,
        "steps": len(run.steps),
        "diverged_at": run.diverged_at,
        "final_loss": run.final_loss,
        "best_loss": run.best_loss,
        "test_loss": run.test_loss,
        "test_accuracy": run.test_accuracy,
        "prepare_seconds": run.prepare_seconds,
        "first_step_seconds": max(run.first_step_seconds, default=None),
        "optimizer_seconds": max(run.optimizer_seconds, default=None),
        "total_seconds": run.total_seconds,
        "peak_state_bytes": max(known(run.state_bytes), default=0),
        "ranks": _ranks(run),
        "largest_difference": largest_difference(run, dense) if dense else None,
        "losses": run.losses,
    }


def _ranks(run: Run) -> list[dict[str, float | None]]:
    """Return what differs between the ranks; None for what is not known."""
    names = ("first_step_seconds", "optimizer_seconds", "peak_state_bytes")
    each = zip_longest(run.first_step_seconds, run.optimizer_seconds, run.state_bytes)
    return [dict(zip(names, values, strict=True)) for values in each]


def _only_finite(value: Any) -> Any:
    """Replace NaN and Inf, which JSON does not have, by None."""
    if isinstance(value, dict):
        return {key: _only_finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_only_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def curves(task: Task, runs: Sequence[Run]) -> Figure:
    """Plot each run's loss over its steps, and its time inside ``optimizer.step()``."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    losses, times = figure.subplots(1, 2, width_ratios=(2, 1))
    for i, run in enumerate(runs):
        steps = range(1, len(run.losses) + 1)
        # Equal curves overlap, so later ones are thinner and leave the earlier ones visible.
        width = 1.5 + 3 * (len(runs) - 1 - i) / len(runs)
        losses.plot(steps, run.losses, color=f"C{i}", linewidth=0.5, alpha=0.3)
        losses.plot(steps, _smooth(run.losses), color=f"C{i}", linewidth=width, label=run.spec.label)
        times.barh(i, 1e6 * _seconds_per_step(run), color=f"C{i}")
    losses.set(title=f"{task.name}: training loss", xlabel="step", ylabel="cross-entropy in nats", yscale="log")
    losses.legend()
    times.set(title="time in the optimizer", xlabel="microseconds per step", yticks=range(len(runs)))
    times.set_yticklabels([run.spec.label for run in runs])
    times.invert_yaxis()
    return figure


def _smooth(losses: Sequence[float]) -> list[float]:
    """Return the exponential moving average over about five steps; NaN and Inf leave gaps."""
    smooth: list[float] = []
    average = math.nan
    for loss in losses:
        if math.isfinite(loss):
            average = loss if math.isnan(average) else average + 0.2 * (loss - average)
        smooth.append(average if math.isfinite(loss) else math.nan)
    return smooth


def _seconds_per_step(run: Run) -> float:
    return max(run.optimizer_seconds, default=0.0) / max(1, len(run.steps) - 1)
