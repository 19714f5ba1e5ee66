"""The entry point ``descend``: every failure becomes one line on stderr and an exit status."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from descend.reporting.errors import CommandError, require


def main(args: Sequence[str] | None = None) -> int:
    """Run the command ``descend``.

    Args:
        args: the arguments after the program's name. Default: those of this process.
    Returns:
        Exit status: 0, 1 (something measured failed, the disk, or the reader of a pipe has gone), 2 (bad arguments, or
        a missing package) or 130 (Ctrl-C).
    """
    args = sys.argv[1:] if args is None else list(args)
    try:
        require("typer", "rich")
        from descend.command.app import run

        status = run(args)
        if sys.stdout:
            sys.stdout.flush()  # else Python would, at exit, where errors cannot be caught
        return status
    except CommandError as error:
        message, status = str(error), error.status
    except BrokenPipeError:  # its reader, as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        message, status = f"{error}.", 1
    except KeyboardInterrupt:
        return 130
    command = " ".join(["descend", *(arg for arg in args[:1] if not arg.startswith("-"))])
    print(" ".join(f"{command}: {message}".split()), file=sys.stderr)
    return status
