"""One rank of ``descend compare --nproc``: what ``launch`` starts."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from typing import NoReturn

from descend.compare.group import join
from descend.compare.run import run
from descend.compare.settings import Settings
from descend.reporting.errors import CommandError


def main() -> NoReturn:
    """Compare as one rank, and end the process."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        status = run(Settings.from_json(sys.argv[1]), join())
    except KeyboardInterrupt:
        status = 130
    except CommandError as error:
        _leave(str(error))
        status = error.status
    except Exception as error:
        traceback.print_exc()
        _leave(f"rank {os.environ['RANK']}: {type(error).__name__}: {error}")
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
