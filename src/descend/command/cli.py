"""The entry point ``descend``: every failure becomes one line on stderr and an exit status."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from descend.reporting.errors import CommandError, require


def main(args: Sequence[str] | None = None) -> int:
    """Run the command ``descend``.

    Args:
        args: the arguments after the program's name. Default: those of this process.
    Returns:
        Exit status: 0, 1 (something measured failed, or the disk), 2 (bad arguments, or a missing package) or
        130 (Ctrl-C).
    """
    args = sys.argv[1:] if args is None else list(args)
    try:
        require("typer", "rich")
        from descend.command.app import run

        return run(args)
    except CommandError as error:
        message, status = str(error), error.status
    except OSError as error:
        message, status = f"{error}.", 1
    except KeyboardInterrupt:
        return 130
    command = " ".join(["descend", *(arg for arg in args[:1] if not arg.startswith("-"))])
    print(" ".join(f"{command}: {message}".split()), file=sys.stderr)
    return status
