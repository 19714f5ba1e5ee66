"""Runs a comparison: reads the data, trains with each optimizer, and reports."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import torch
from rich.console import Console

from descend.compare import jobs
from descend.compare.journal import Journal, open_journal
from descend.compare.plan import Entry, Key, candidates, key, tuned, words_for_tuning
from descend.compare.progress import Bars
from descend.compare.ranks import Alone, Ranks
from descend.compare.records import Comparison, Run
from descend.compare.settings import Settings
from descend.compare.table import show
from descend.compare.train import prepare
from descend.compare.work import Work, cores, machine, versions
from descend.reporting.signals import Interrupted, interruptible
from descend.reporting.text import plural


def run(settings: Settings, ranks: Ranks | None = None) -> int:
    """Compare as ``settings`` say, and return the exit status.

    Args:
        settings: the request.
        ranks: the processes that take part, this one included. Default: those that ``settings`` ask for are started.
    """
    work = Work(settings, ranks or Alone())
    if settings.nproc > 1 and ranks is None:
        from descend.compare.launch import launch

        return launch(settings)
    torch.set_num_threads(work.threads(settings.nproc))
    comparing = Comparing(work, Console(quiet=work.ranks.rank > 0))
    status = 0
    try:
        try:
            with interruptible():
                comparing.run_all()
        except KeyboardInterrupt as error:
            status = error.status if isinstance(error, Interrupted) else 130
        # Rank 0 alone tells what failed: a rank that ends with an error would end the others while they report.
        if work.ranks.rank > 0:
            return status
        with interruptible():
            return comparing.report(is_interrupted=status > 0) or status
    finally:
        if comparing.journal:
            comparing.journal.close()


class Comparing:
    """The runs of one comparison, in order: those that choose rates, those that are timed alone, the others.

    Args:
        work: what to run.
        console: where to show it.
    """

    def __init__(self, work: Work, console: Console) -> None:
        self.work, self.console = work, console
        self.seconds = {entry: self._prepare(entry) for entry in work.variants}
        self.jobs = 1 if work.settings.nproc > 1 else work.settings.jobs or cores()
        self.entries = list(work.variants)
        self.current: Run | None = None
        self.journal: Journal | None = None
        if work.ranks.rank == 0:
            self.journal = open_journal(
                work.settings.out or Path("runs") / work.task.name,
                self._comparison(),
                self._is_complete,
                work.settings.overwrite,
            )
            self.console.print(
                f"{self._plan()} Results: {self.journal.folder}", markup=False, highlight=False, soft_wrap=True
            )

    def _prepare(self, entry: Entry) -> float:
        return prepare(entry.contestant(self.work.task.lr), self.work.problem(entry.seed))

    def _comparison(self) -> Comparison:
        work, task = self.work, self.work.task
        return Comparison(
            task=task.name,
            summary=task.summary,
            loss_name=task.loss_name,
            metric_name=task.metric_name,
            metric_is_error=task.metric_is_error,
            settings=work.identity(),
            versions=versions(),
            machine=machine(torch.get_num_threads(), self.jobs),
            started=datetime.now().astimezone().isoformat(timespec="seconds"),
            tuned=words_for_tuning(work.settings.seed) if work.settings.tune else None,
        )

    def _is_complete(self, runs: Sequence[Run]) -> bool:
        """Whether every reported run has ended; what rates ``--tune`` chose does not matter."""
        is_tuned = self.work.settings.tune
        have = {(run.label, None if is_tuned else run.lr, run.seed) for run in runs if not run.tuning}
        need = {
            (entry.label, None if is_tuned else entry.lr, seed)
            for entry in self.work.variants
            for seed in self.work.seeds
        }
        return need <= have

    def _tuning(self) -> list[Entry]:
        tune = self.work.settings.tune
        return [each for entry in self.work.variants for each in candidates(entry)] if tune else []

    def _plan(self) -> str:
        done = len(self.journal.runs) if self.journal else 0
        words = f"{plural(self._count(), 'run')} of {plural(self.work.steps, 'step')}"
        return f"{words}, {done} of them already there." if done else f"{words}."

    def _count(self) -> int:
        return len(self._tuning()) + len(self.entries) * len(self.work.seeds)

    def run_all(self) -> None:
        """Make all runs that are not in the journal; if ranks end differently, stop there."""
        tuning = self._tuning()
        reported = [replace(entry, seed=seed) for seed in self.work.seeds for entry in self.work.variants]
        with Bars(self.console, [*tuning, *reported], self.work.steps) as self.bars:
            for run in self.journal.runs if self.journal else ():
                self.bars.ended(run)
            if not self._run(tuning, timed=()):
                return
            if tuning:
                self.entries = self._tuned()
                reported = [replace(entry, seed=seed) for seed in self.work.seeds for entry in self.entries]
            self._run(reported, timed=self._timed())

    def _tuned(self) -> list[Entry]:
        """Return the variants with the rates that rank 0 finds best."""
        runs = {key(run): run for run in self.journal.runs} if self.journal else {}
        found = [tuned(entry, runs).lr for entry in self.work.variants] if self.journal else []
        rates = json.loads(self.work.ranks.tell(json.dumps(found)))
        return [replace(entry, lr=rate) for entry, rate in zip(self.work.variants, rates, strict=True)]

    def _timed(self) -> set[Entry]:
        """Return the runs whose times are reported: one of each optimizer, the middle one of a sweep."""
        by_label: dict[str, list[Entry]] = {}
        for entry in self.entries:
            by_label.setdefault(entry.label, []).append(entry)
        return {entries[len(entries) // 2] for entries in by_label.values()}

    def _run(self, entries: Sequence[Entry], timed: set[Entry] | tuple[()]) -> bool:
        """Make the runs of ``entries``, first those of ``timed``; return False if they cannot go on."""
        done = self._done()
        waiting = [entry for entry in entries if entry.key not in done]
        is_parallel = self.jobs > 1 and any(entry not in timed for entry in waiting)
        for entry in sorted(waiting, key=lambda entry: entry not in timed):
            if (entry in timed or not is_parallel) and not self._run_here(entry):
                return False
        others = [entry for entry in waiting if entry not in timed]
        if is_parallel and others:
            count = min(self.jobs, len(others))
            records = [(entry, self.work.new_run(entry, self._seconds(entry))) for entry in others]
            threads = self.work.threads(count)
            jobs.run_all(self.work.settings, records, count, threads, self.bars.stepped, self._ended)
        return True

    def _done(self) -> set[Key]:
        """Return the runs that rank 0 has in the journal."""
        keys = [key(run) for run in self.journal.runs] if self.journal else []
        return {
            (label, lr, seed, tuning) for label, lr, seed, tuning in json.loads(self.work.ranks.tell(json.dumps(keys)))
        }

    def _run_here(self, entry: Entry) -> bool:
        """Make a run in this process; return False if the ranks cannot go on."""

        def on_step(run: Run) -> None:
            self.current = run
            self.bars.stepped(entry, len(run.losses), run.losses[-1])

        run, is_common = self.work.run(entry, self._seconds(entry), on_step)
        self.current = None if is_common else run
        if is_common or run.error:
            self._ended(run)
        return is_common

    def _seconds(self, entry: Entry) -> float:
        """Return the time that it took to build the optimizer, whose rate and seed do not matter."""
        return next(s for each, s in self.seconds.items() if (each.label, each.text) == (entry.label, entry.text))

    def _ended(self, run: Run) -> None:
        if self.journal:
            self.journal.append(run)
        self.bars.ended(run)
        self.bars.say(run)

    def report(self, is_interrupted: bool) -> int:
        """Show what was measured and write the report; return the exit status, 0 if interrupted."""
        assert self.journal
        journal, folder = self.journal, self.journal.folder
        runs = [*journal.runs]
        if self.current and self.current not in runs:
            runs.append(self.current)
        if any(not run.tuning and (run.losses or run.error) for run in runs):
            from descend.compare import report

            show(self.console, journal.comparison, runs)
            report.write(folder, journal.comparison, runs)
        if is_interrupted:
            done = f"{plural(len(journal.runs), 'run')} of {self._count()} done"
            self._say(f"Interrupted: {done}. The same command continues in {folder}.")
            return 0
        self._say(f"Wrote results.jsonl, report.html, curves.png and curves.svg into {folder}.")
        failed = {run.label: run for run in reversed(runs) if run.error}
        for label, run in reversed(failed.items()):
            message = f"descend compare: {label} failed after {plural(len(run.losses), 'step')}: {run.error}"
            print(message, file=sys.stderr)
        return 1 if failed else 0

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)
