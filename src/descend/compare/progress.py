"""Progress bars for a running comparison."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

from descend.compare.plan import Entry
from descend.compare.records import Run
from descend.reporting.text import plural

NARROW = 60  # columns of a terminal below which there is room for names and losses alone


class Bars:
    """One bar per optimizer. A terminal shows them live; a file or a pipe gets one line when a run has ended.

    Args:
        console: where to show them.
        entries: all runs of the comparison that are known.
        steps: steps of each run.
    """

    def __init__(self, console: Console, entries: Sequence[Entry], steps: int) -> None:
        self._console, self._steps = console, steps
        self._counts = Counter(entry.label for entry in entries)
        self._ended: Counter[str] = Counter()
        self._taken: dict[str, dict[object, int]] = {label: {} for label in self._counts}
        columns: list[ProgressColumn] = [TextColumn("{task.fields[label]}", markup=False)]
        if console.width >= NARROW:
            columns += [BarColumn(bar_width=None if console.width < 100 else 40)]
        columns += [TextColumn("{task.fields[done]}", justify="right"), TextColumn("{task.fields[says]}")]
        if console.width >= NARROW:
            columns += [TimeRemainingColumn(compact=True, elapsed_when_finished=True)]
        self._bars = Progress(*columns, console=console, disable=not console.is_terminal or console.quiet)
        self._tasks = {
            label: self._bars.add_task(
                "", start=False, total=steps * count, label=label, done=self._done(label), says="waiting"
            )
            for label, count in self._counts.items()
        }

    def __enter__(self) -> Bars:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def stepped(self, entry: Entry, steps: int, loss: float) -> None:
        """Show that ``entry`` has taken ``steps`` steps."""
        taken = self._taken[entry.label]
        if not taken:
            self._bars.start_task(self._tasks[entry.label])
        taken[entry.key] = steps
        self._show(entry.label, f"loss {loss:.4f}")

    def ended(self, run: Run) -> None:
        """Show that a run has ended, now or before the comparison was continued."""
        self._ended[run.label] += 1
        # A run that ended early leaves nothing to wait for.
        self._taken[run.label][run.label, run.lr, run.seed, run.tuning] = self._steps
        says = run.status if run.final_loss is None or run.status == "failed" else f"loss {run.final_loss:.4f}"
        if run.diverged_at:
            says = f"diverged at step {run.diverged_at}"
        self._show(run.label, says)

    def say(self, run: Run) -> None:
        """Print a line about a run that has ended, where there are no live bars."""
        if self._bars.disable:
            which = ", tuning" if run.tuning else ""
            rate = "" if run.lr is None else f"lr {run.lr:g}, "
            loss = "" if run.final_loss is None else f", loss {run.final_loss:.4f}"
            end = f", diverged at step {run.diverged_at}" if run.diverged_at else ""
            end = ", failed" if run.status == "failed" else end
            line = f"{run.label}: {rate}seed {run.seed}{which}, {plural(len(run.losses), 'step')}{loss}{end}"
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _show(self, label: str, says: str) -> None:
        taken = sum(self._taken[label].values())
        self._bars.update(self._tasks[label], completed=taken, done=self._done(label), says=says)

    def _done(self, label: str) -> str:
        if self._counts[label] > 1:
            return f"{self._ended[label]}/{self._counts[label]} runs"
        return f"{sum(self._taken[label].values())}/{self._steps}"
