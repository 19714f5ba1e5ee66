"""One rank of ``descend compare --nproc``: what ``launch`` starts."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from typing import NoReturn

from descend.compare.app import run
from descend.compare.cli import guard
from descend.compare.group import join


def main() -> NoReturn:
    """Run ``descend`` as one rank, and end the process."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        status = guard(lambda: run(sys.argv[1:], join()), _leave)
    except Exception as error:
        traceback.print_exc()
        _leave(f"compare: rank {os.environ['RANK']}: {type(error).__name__}: {error}")
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # An exit as usual would first wait for an operation that another rank has left.
    os._exit(status)


def _leave(message: str) -> None:
    """Leave ``message`` for the launcher, in the file that it reads when this process has failed."""
    with open(os.environ["TORCHELASTIC_ERROR_FILE"], "w", encoding="utf-8") as file:
        json.dump({"message": message, "timestamp": time.time()}, file)


if __name__ == "__main__":
    main()
