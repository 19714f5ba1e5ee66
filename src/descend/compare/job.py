"""A process that makes runs, one at a time, for ``jobs``: entries come in on stdin, measurements go out on stdout."""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from dataclasses import asdict
from typing import Any

import torch

from descend.compare.plan import Entry
from descend.compare.ranks import Alone
from descend.compare.records import Run
from descend.compare.settings import Settings
from descend.compare.work import Work
from descend.reporting.errors import CommandError

PERIOD = 0.1  # seconds between messages about a run


def main() -> None:
    """Serve until stdin ends. The first line is the settings and the number of threads, each further one an entry."""
    output = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # a task may print

    def tell(**message: Any) -> None:
        try:
            output.write(json.dumps(message, default=str) + "\n")
            output.flush()
        except BrokenPipeError:  # nobody is left to hear it
            os._exit(1)

    settings, threads = json.loads(sys.stdin.readline())
    work = Work(Settings.from_json(settings), Alone())
    torch.set_num_threads(threads)
    gc.freeze()  # modules stay: without them the collection before each run takes microseconds, not 0.1 s
    told = 0.0

    def on_step(run: Run) -> None:
        nonlocal told
        if time.monotonic() - told > PERIOD:
            told = time.monotonic()
            tell(step=len(run.losses), loss=run.losses[-1])

    for line in sys.stdin:
        values, prepare_seconds = json.loads(line)
        entry = Entry(**values)
        try:
            run, _ = work.run(entry, prepare_seconds, on_step)
        except CommandError as error:  # the data of this seed
            run = work.new_run(entry, prepare_seconds)
            run.status, run.error = "failed", str(error)
        run.alone = False
        tell(run=asdict(run))


if __name__ == "__main__":
    main()
