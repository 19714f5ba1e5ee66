"""The picture of a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from descend.compare.records import Comparison, Run, smooth
from descend.reporting.whole_files import write_whole


def write(folder: Path, comparison: Comparison, runs: Sequence[Run]) -> None:
    """Write ``curves.png`` into ``folder``, completely or not at all."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    losses = figure.subplots()
    for run in runs:
        if not run.tuning:
            losses.plot(range(1, len(run.losses) + 1), smooth(run.losses), label=f"{run.label}, lr {run.lr}")
    losses.set(title=comparison.task, xlabel="step", ylabel=comparison.loss_name, yscale="log")
    losses.legend()
    write_whole(folder / "curves.png", lambda path: figure.savefig(path, format="png", dpi=150))
