"""The terminal's table: as many columns as there is room for, or a block for each optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median, quantiles

from rich import box
from rich.console import Console
from rich.table import Table

from descend.compare.records import WINDOW, Comparison, Run
from descend.reporting.text import number, plural, rate, seconds, size

BLOCKS = 60  # columns of a terminal below which a table has too little room
NAME = 30  # columns of the longest name that is not folded


@dataclass(frozen=True)
class Row:
    """Runs that differ in their seeds alone.

    Args:
        label: the optimizer.
        lr: its learning rate.
        runs: by seed.
        timed: the runs of the optimizer whose times count: those that had the machine to themselves.
        dense: the run with dense gradients to compare ``runs[0]`` with; None if there is none.
    """

    label: str
    lr: float | None
    runs: Sequence[Run]
    timed: Sequence[Run]
    dense: Run | None

    @property
    def remarks(self) -> list[str]:
        """What else is to be said."""
        found = []
        for status in ("diverged", "failed", "interrupted"):
            runs = [run for run in self.runs if run.status == status]
            of = f" {len(runs)} of {len(self.runs)}" if len(self.runs) > 1 and runs else ""
            steps = [run.diverged_at for run in runs if run.diverged_at]
            at = f" at step {min(steps)}" if steps else ""
            found += [f"{status}{of}{at}"] if runs else []
        found += [f"{self.runs[0].helper.rpartition('.')[2]} for the rest"] if self.runs[0].helper else []
        peaks = [run.peak for run in self.runs if run.peak]
        if peaks:
            step, loss = max(peaks, key=lambda peak: peak[1])
            of = f" {len(peaks)} of {len(self.runs)}" if len(self.runs) > 1 else ""
            found.append(f"blew up{of}: {number(loss, 2)} at step {step}")
        stopped = [run for run in self.runs if run.stopped and run.status == "finished"]
        found += [f"stopped after {plural(len(stopped[0].losses), 'step')}"] if stopped else []
        return found


@dataclass(frozen=True)
class Column:
    """A column.

    Args:
        heading: its words, one a line.
        cell: what it says about a row.
        rank: columns with the highest go first when there is no room.
    """

    heading: str
    cell: Callable[[Row], str]
    rank: int


def rows(runs: Sequence[Run]) -> list[Row]:
    """Return the table's rows; runs that chose a learning rate are not among them."""
    reported = [run for run in runs if not run.tuning and (run.losses or run.error)]
    alone = [run for run in reported if run.alone]
    grouped: dict[tuple[str, float | None], list[Run]] = {}
    for run in sorted(reported, key=lambda run: run.seed):
        grouped.setdefault((run.label, run.lr), []).append(run)
    labels = list(dict.fromkeys(run.label for run in runs))
    keys = sorted(grouped, key=lambda key: (labels.index(key[0]), key[1] or 0))
    found = []
    for label, lr in keys:
        own = grouped[label, lr]
        timed = [run for run in alone if run.label == label]
        dense = reference([run for run in reported if run.seed == own[0].seed])
        found.append(Row(label, lr, own, timed, dense))
    return found


def reference(runs: Sequence[Run]) -> Run | None:
    """Return the first run with dense gradients, or None unless there are runs with dense and with sparse ones."""
    dense = [run for run in runs if not is_sparse(run)]
    return dense[0] if 0 < len(dense) < len(runs) else None


def is_sparse(run: Run) -> bool:
    """Whether the run's embeddings had sparse gradients."""
    return run.options.get("sparse") is not None or run.optimizer.endswith("SparseAdam")


def largest_difference(run: Run, other: Run) -> float | None:
    """Return the largest difference between two runs' losses at the same step; None without steps."""
    differences = [abs(a - b) for a, b in zip(run.losses, other.losses, strict=False)]
    # max() ignores a NaN unless it comes first.
    return max(differences, default=None) if all(map(math.isfinite, differences)) else math.nan


def columns(comparison: Comparison, found: Sequence[Row]) -> list[Column]:
    """Return the columns that these rows have something for."""
    runs = [run for row in found for run in row.runs]
    ranks = "\nper rank" if any(len(run.state_bytes) > 1 for run in runs) else ""
    result = [
        Column("lr", lambda row: rate(row.lr), 1),
        Column("final\nloss", lambda row: _spread([run.final_loss for run in row.runs], _loss), 0),
        Column("test\nloss", lambda row: _spread([_last(run, run.test_losses) for run in row.runs], _loss), 1),
    ]
    if comparison.metric_name:
        heading = f"test\n{comparison.metric_name}"
        show: Callable[[float], str] = number if comparison.metric_is_error else "{:.1%}".format
        result.append(Column(heading, lambda row: _spread([_last(run, run.test_metrics) for run in row.runs], show), 2))
    result += [
        Column("time per\nstep", lambda row: _middle([_per_step(run) for run in row.timed], seconds), 5),
        Column(f"optimizer\nper step{ranks}", lambda row: _range("optimizer_seconds", row.timed), 2),
        Column(f"optimizer\nfirst step{ranks}", lambda row: _range("first_step_seconds", row.timed), 6),
        Column("whole\nrun", lambda row: _middle([run.seconds[-1] for run in row.timed if run.seconds], seconds), 4),
        Column(f"state{ranks}", lambda row: _range("state_bytes", row.runs[:1], size), 3),
        Column(f"state per\nparameter{ranks}", _state_per_parameter, 3),
    ]
    if any(run.evaluations and run.evaluations[-1] != len(run.losses) for run in runs):
        result.append(Column("gradients", lambda row: f"{max(_gradients(run) for run in row.runs):,}", 3))
    if any(row.dense for row in found):
        result.append(Column("largest\ndifference", _difference, 3))
    return result


def caption(comparison: Comparison, found: Sequence[Row]) -> str:
    """Return what must be known to read the table."""
    settings = comparison.settings
    steps = min(WINDOW, settings["steps"]) if settings["batch_size"] else 1
    final = f"mean of the last {steps} steps, each of its training batch" if steps > 1 else "last step"
    has_name = comparison.loss_name != "loss"  # a user's has none
    words = [f"Loss: {comparison.loss_name}; final: {final}." if has_name else f"Final loss: {final}."]
    if any(len(row.runs) > 1 for row in found):
        words.append("Median over the seeds, and below it the quartiles.")
    if comparison.tuned:
        words.append(f"Tuned: {comparison.tuned}.")
    elif not settings["sweep"]:
        words.append("Learning rates: those given, else the task's; they are not tuned.")
    runs = [run for row in found for run in row.runs]
    if not all(run.alone for run in runs):
        words.append("Times are those of the runs that had the machine to themselves.")
    words.append("Times per step: medians, without the first step; optimizer: inside optimizer.step().")
    if any(row.dense for row in found):
        dense = next(row.dense.label for row in found if row.dense)
        words.append(
            "With sparse=exact it includes settling rows before they are read. "
            f"Largest difference: between a loss and that of {dense} at the same step."
        )
    if any(len(run.state_bytes) > 1 for run in runs):
        words.append("Time and state: the ranks' smallest to largest; results.jsonl has each rank's.")
    return " ".join(words)


def title(comparison: Comparison) -> str:
    """Return what was compared, in one line."""
    settings = comparison.settings
    seeds = settings["seeds"]
    which = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {seeds[0]} to {seeds[-1]}"
    batches = f"batches of {settings['batch_size']}" if settings["batch_size"] else "all data in each step"
    ranks = f", {settings['parallel']} on {settings['nproc']} ranks" if settings["nproc"] > 1 else ""
    return f"{comparison.task}, {which}, {settings['steps']} steps, {batches}{ranks}"


def show(console: Console, comparison: Comparison, runs: Sequence[Run]) -> None:
    """Print the results, in the width that ``console`` has."""
    found = rows(runs)
    every = columns(comparison, found)
    shown = _fitting(console, found, every)
    if shown:
        console.print(title(comparison), markup=False, highlight=False)
        console.print(_table(found, shown))
    else:
        console.print(title(comparison), markup=False, highlight=False)
        for row in found:
            _show_block(console, row, every)
        console.print()
    if hidden := [column.heading.replace("\n", " ") for column in every if shown and column not in shown]:
        console.print(f"Not shown in {console.width} columns: {', '.join(hidden)}.", markup=False, highlight=False)
    console.print(caption(comparison, found), markup=False, highlight=False)


def _fitting(console: Console, found: Sequence[Row], every: Sequence[Column]) -> list[Column]:
    """Return the columns for which there is room, the least important left out; none if that leaves too few."""
    shown = list(every)
    while console.width >= BLOCKS and shown:
        if _table(found, shown).__rich_measure__(console, console.options.update(width=1000)).maximum <= console.width:
            return shown
        last = max(column.rank for column in shown)
        shown = [column for column in shown if column.rank < last or column is not _last_of(shown, last)]
        if last <= 1:
            break
    return []


def _last_of(shown: Sequence[Column], rank: int) -> Column:
    return [column for column in shown if column.rank == rank][-1]


def _table(found: Sequence[Row], shown: Sequence[Column]) -> Table:
    result = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    longest = max((len(line) for row in found for line in _name(row).split("\n")), default=0)
    result.add_column("optimizer", overflow="fold", min_width=min(NAME, longest), max_width=NAME)
    for column in shown:
        result.add_column(column.heading, justify="right", no_wrap=True)
    for row in found:
        result.add_row(_plain(_name(row)), *(column.cell(row) for column in shown))
    return result


def _plain(text: str) -> str:
    return text.replace("[", r"\[")


def _name(row: Row) -> str:
    return "\n  ".join([row.label, *row.remarks])


def _show_block(console: Console, row: Row, every: Sequence[Column]) -> None:
    lines = ["", row.label, *(f"  {remark}" for remark in row.remarks)]
    for column in every:
        cell = column.cell(row).replace("\n", " ")
        lines += [f"  {column.heading.replace(chr(10), ' ')}: {cell}"] if cell != "-" else []
    console.print("\n".join(lines), markup=False, highlight=False)


def _spread(values: Sequence[float | None], show: Callable[[float], str]) -> str:
    """Return the median, and the quartiles of three or more; values that are not numbers count as infinitely bad."""
    bad = [value for value in values if value is None or not math.isfinite(value)]
    known = sorted(value for value in values if value is not None and math.isfinite(value))
    if not known or len(bad) >= len(known):
        return "-"
    padded = [*known, *(math.inf for _ in bad)]
    middle = show(median(padded))
    if len(padded) < 3:
        return middle
    low, _, high = quantiles(padded, n=4, method="inclusive")
    return f"{middle}\n{show(low)}\nto {show(high) if math.isfinite(high) else 'diverged'}"


def _middle(values: Sequence[float | None], show: Callable[[float], str]) -> str:
    known = [value for value in values if value is not None]
    return show(median(known)) if known else "-"


def _loss(loss: float) -> str:
    return f"{loss:.4f}" if loss >= 0.001 or loss == 0 else f"{loss:.2e}"


def _last(run: Run, values: Sequence[float]) -> float | None:
    return values[-1] if values and run.status != "diverged" else None


def _per_step(run: Run) -> float | None:
    return median(b - a for a, b in zip(run.seconds, run.seconds[1:], strict=False)) if len(run.seconds) > 1 else None


def _gradients(run: Run) -> int:
    return run.evaluations[-1] if run.evaluations else 0


def _range(name: str, runs: Sequence[Run], show: Callable[[float], str] = seconds) -> str:
    """Return the smallest and the largest value of the ranks as ``show`` writes them; one if they look the same."""
    by_rank = zip(*(run.ranks for run in runs if run.ranks), strict=False)
    values = [median(known) for ranks in by_rank if (known := [each[name] for each in ranks if each[name] is not None])]
    if not values:
        return "-"
    least, most = show(min(values)), show(max(values))
    return most if least == most else f"{least}\nto {most}"


def _state_per_parameter(row: Row) -> str:
    parameters = row.runs[0].parameters
    return _range("state_bytes", row.runs[:1], lambda count: size(count / parameters)) if parameters else "-"


def _difference(row: Row) -> str:
    run = row.runs[0]
    difference = None if row.dense is None or run is row.dense else largest_difference(run, row.dense)
    return "-" if difference is None else f"{difference:.1e}"
