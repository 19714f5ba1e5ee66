"""A request made ready to run: the task, and each run's problem and optimizer."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

import descend
from descend.compare import specs
from descend.compare.parallel import choose
from descend.compare.plan import Entry, check_rates, variants
from descend.compare.problem import Problem
from descend.compare.ranks import Ranks
from descend.compare.records import WINDOW, Run
from descend.compare.settings import Settings
from descend.compare.sweep import parse_sweeps
from descend.compare.tasks.catalog import find_task
from descend.compare.train import train
from descend.reporting.errors import UsageError


class Work:
    """What a request asks for, with the task's defaults.

    Args:
        settings: the request.
        ranks: the processes that take part.
    Raises:
        UsageError: if there is no such task, optimizer or option, or they do not go together.
    """

    def __init__(self, settings: Settings, ranks: Ranks) -> None:
        sweeps = parse_sweeps(settings.sweep)
        if settings.tune and "lr" in sweeps:
            raise UsageError("--tune chooses learning rates and --sweep lr gives them: give one of the two.")
        if settings.nproc > 1 and (settings.jobs or 1) > 1:
            raise UsageError("--jobs runs several at a time, --nproc shares one among processes: give one of the two.")
        self.settings, self.ranks = settings, ranks
        self.task = find_task(settings.task)
        self.texts = settings.optimizers or self.task.optimizers
        contestants = specs.parse_all(self.texts, self.task.lr)
        self.variants = variants(contestants, sweeps, self.task.lr, settings.seed)
        if settings.tune:
            check_rates("--tune", self.variants)
        self.steps = settings.steps or self.task.steps
        self.batch_size = settings.batch_size or self.task.batch_size or 0
        sparse = [contestant.text for contestant in contestants if contestant.is_sparse]
        self.way = choose(settings.parallel, settings.nproc, self.batch_size, sparse)
        self.seeds = range(settings.seed, settings.seed + settings.seeds)
        self._problem: Problem | None = None

    def threads(self, processes: int) -> int:
        """Return the number of threads of each of ``processes``."""
        return self.settings.threads or self.task.threads or max(1, cores() // processes)

    def problem(self, seed: int) -> Problem:
        """Return the task with ``seed``; the last one is kept."""
        if self._problem is None or self._problem.seed != seed:
            self._problem = None  # two at a time would take twice the memory
            torch.manual_seed(seed)
            data = self.task.load(seed)
            model = self.task.model()
            self._problem = Problem(self.task, data, model, self.steps, self.batch_size, seed, self.ranks, self.way)
        return self._problem

    def run(self, entry: Entry, prepare_seconds: float, on_step: Callable[[Run], None]) -> tuple[Run, bool]:
        """Make the run of ``entry``; return it, and whether it ended alike on all ranks."""
        run = self.new_run(entry, prepare_seconds)
        return run, train(self.problem(entry.seed), entry.contestant(self.task.lr), run, on_step)

    def new_run(self, entry: Entry, prepare_seconds: float) -> Run:
        """Return the record of a run that has not begun."""
        contestant = entry.contestant(self.task.lr)
        return Run(
            label=entry.label,
            spec=entry.spec,
            optimizer=contestant.name,
            options=dict(contestant.options),
            lr=entry.lr,
            seed=entry.seed,
            prepare_seconds=prepare_seconds,
            tuning=entry.tuning,
            window=WINDOW if self.batch_size else 1,
        )

    def identity(self) -> dict[str, Any]:
        """Return the request with its defaults: runs of equal ones can be continued."""
        path = Path(self.settings.task)
        return {
            "task": self.settings.task,
            "task_file": hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None,
            "optimizers": list(self.texts),
            "steps": self.steps,
            "batch_size": self.batch_size,
            "seeds": list(self.seeds),
            "sweep": list(self.settings.sweep),
            "tune": self.settings.tune,
            "threads": self.settings.threads,
            "nproc": self.settings.nproc,
            "parallel": self.way.name,
        }


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def versions() -> dict[str, str]:
    """Return the versions that results depend on."""
    return {"descend": descend.__version__, "torch": torch.__version__, "python": platform.python_version()}


def machine(threads: int, jobs: int) -> Mapping[str, Any]:
    """Return what times depend on."""
    return {
        "processor": _processor(),
        "cores": cores(),
        "threads": threads,
        "jobs": jobs,
        "system": platform.system(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
