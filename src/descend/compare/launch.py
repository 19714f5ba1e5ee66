"""Start one process per rank, as ``torchrun`` does, and make one exit status of theirs."""

from __future__ import annotations

import logging
import signal
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from descend.compare.settings import Settings
from descend.reporting.errors import CommandError, UsageError

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


def launch(settings: Settings) -> int:
    """Compare as ``settings`` say, on ``settings.nproc`` ranks of this machine.

    Rank 0 reports. A rank that ends with an error ends the others; a signal goes to all ranks.

    Returns:
        Exit status: 0, 128 + the signal that came, or that of a rank which has told the user what failed.
    Raises:
        CommandError: the first rank to fail left a message or was killed.
    """
    with TemporaryDirectory(prefix="descend-") as folder, _settings_kept():
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=settings.nproc,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",  # a free port
            local_addr="localhost",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
            signals_to_handle=",".join(number.name for number in SIGNALS),
        )
        try:
            elastic_launch(config, sys.executable)("-m", "descend.compare.worker", settings.to_json())
        except SignalException as error:
            return 128 + error.sigval
        except ChildFailedError as error:
            return _status(error)
    return 0


def _status(error: ChildFailedError) -> int:
    """Return the exit status of the rank that failed first, or raise a ``CommandError`` with its message."""
    rank, failure = error.get_first_failure()
    if failure.exitcode < 0:
        raise CommandError(f"rank {rank} was ended by {failure.signal_name()}.")
    message = failure.error_file_data["message"]
    if message == "<NONE>":
        if rank == 0:  # it has reported
            return failure.exitcode
        raise CommandError(f"rank {rank} ended with exit status {failure.exitcode}.")
    raise (UsageError if failure.exitcode == UsageError.status else CommandError)(message)


@contextmanager
def _settings_kept() -> Iterator[None]:
    """Silence the launcher, which logs what ``_status`` tells in one line, and give back the signals it handles."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(disabled)
        for number, handler in handlers.items():
            if signal.getsignal(number) is not handler:
                signal.signal(number, handler)
