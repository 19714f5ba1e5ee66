"""Several runs at a time, each in a process of its own."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict
from tempfile import TemporaryFile
from typing import IO, Any

from descend.compare.plan import Entry
from descend.compare.records import Run
from descend.compare.settings import Settings

OnStep = Callable[[Entry, int, float], None]


class Job:
    """A process that makes one run after another."""

    def __init__(self, settings: Settings, threads: int) -> None:
        self.entry: Entry | None = None
        self._errors: IO[bytes] = TemporaryFile()  # noqa: SIM115, closed at the end
        self._process = subprocess.Popen(
            [sys.executable, "-m", "descend.compare.job"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            start_new_session=True,  # Ctrl-C reaches the command alone, which then ends its processes
        )
        self._rest = b""
        self._send([settings.to_json(), threads])

    def fileno(self) -> int:
        """The file to wait for."""
        assert self._process.stdout
        return self._process.stdout.fileno()

    def start(self, entry: Entry, prepare_seconds: float) -> None:
        """Let it make the run of ``entry``."""
        self.entry = entry
        self._send([asdict(entry), prepare_seconds])

    def messages(self) -> list[dict[str, Any]] | None:
        """Return what it says, once there is something; None if it has ended."""
        got = os.read(self.fileno(), 1 << 20)
        *lines, self._rest = (self._rest + got).split(b"\n")
        return [json.loads(line) for line in lines] if got else None

    def end(self) -> str:
        """End it, and say how it ended."""
        self._process.kill()
        self._process.communicate()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").split("\n")
        self._errors.close()
        said = next((line.strip() for line in reversed(lines) if line.strip()), "")
        status = self._process.returncode
        how = f"exit status {status}" if status >= 0 else signal.Signals(-status).name
        return f"its process ended with {how}{': ' if said else ''}{said}"

    def _send(self, message: Any) -> None:
        assert self._process.stdin
        try:
            self._process.stdin.write(json.dumps(message, default=str).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:  # it has died, which ``messages`` finds out
            pass


def run_all(
    settings: Settings,
    entries: Sequence[tuple[Entry, Run]],
    count: int,
    threads: int,
    on_step: OnStep,
    on_end: Callable[[Run], None],
) -> None:
    """Make the runs of ``entries``, ``count`` at a time.

    A process that dies fails its run; the others go on. If this function raises, the processes are ended.

    Args:
        settings: the request.
        entries: each with the record of its run, not begun.
        count: processes.
        threads: threads of each.
        on_step: called now and then with an entry, the steps that it has taken and the last loss.
        on_end: called with the record of each run that has ended.
    """
    waiting = deque(entries)
    records = {entry.key: run for entry, run in entries}
    jobs: set[Job] = set()
    with selectors.DefaultSelector() as selector:

        def feed(job: Job) -> None:
            if waiting:
                entry, run = waiting.popleft()
                job.start(entry, run.prepare_seconds)
            else:
                job.entry = None
                leave(job)

        def leave(job: Job) -> str:
            selector.unregister(job)
            jobs.discard(job)
            return job.end()

        def add() -> None:
            job = Job(settings, threads)
            jobs.add(job)
            selector.register(job, selectors.EVENT_READ)
            feed(job)

        try:
            for _ in range(min(count, len(waiting))):
                add()
            while jobs:
                for chosen, _ in selector.select():
                    job = chosen.fileobj
                    assert isinstance(job, Job)
                    assert job.entry
                    messages = job.messages()
                    if messages is None:
                        run = records[job.entry.key]
                        run.status, run.error, run.alone = "failed", leave(job), False
                        on_end(run)
                        if waiting:
                            add()
                    for message in messages or ():
                        if "run" in message:
                            on_end(Run(**message["run"]))
                            feed(job)
                        else:
                            on_step(job.entry, message["step"], message["loss"])
        finally:
            for job in [*jobs]:
                job.end()
