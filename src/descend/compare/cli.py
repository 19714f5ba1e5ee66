"""The entry point ``descend``: every failure becomes one line on stderr and an exit status.

The packages of the extra ``compare`` are imported inside ``main``, so that a missing one is reported the same way.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from descend.compare.errors import CommandError, require


def main(args: Sequence[str] | None = None) -> int:
    """Run the command ``descend``.

    Args:
        args: the arguments after the program's name. Default: those of this process.
    Returns:
        Exit status: 0, 1 (an optimizer or the disk failed), 2 (bad arguments, or a missing package) or 130 (Ctrl-C).
    """

    def run() -> int:
        require("typer", "rich", "matplotlib")
        from descend.compare.app import run

        return run(sys.argv[1:] if args is None else list(args))

    return guard(run, tell=lambda message: print(message, file=sys.stderr))


def guard(run: Callable[[], int], tell: Callable[[str], object]) -> int:
    """Return the exit status of ``run()``; if it fails, ``tell`` gets one line that says why."""
    try:
        return run()
    except CommandError as error:
        message, status = str(error), error.status
    except OSError as error:
        message, status = f"compare: {error}.", 1
    except KeyboardInterrupt:
        return 130
    tell(" ".join(message.split()))
    return status
