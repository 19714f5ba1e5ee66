"""The entry point ``descend``: every failure becomes one line on stderr and an exit status."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from descend.reporting.errors import CommandError, require
from descend.reporting.signals import Interrupted, ending_at_once


def main(args: Sequence[str] | None = None) -> int:
    """Run the command ``descend``.

    Args:
        args: the arguments after the program's name. Default: those of this process.
    Returns:
        Exit status: 0, 1 (something measured failed, the disk, or the reader of a pipe has gone), 2 (bad arguments, or
        a missing package), 130 (Ctrl-C) or 143 (SIGTERM).
    """
    args = sys.argv[1:] if args is None else list(args)
    name = _name(args)
    with ending_at_once(f"{name}: interrupted before anything was measured or written."):
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
        except Interrupted as error:
            return error.status
        except KeyboardInterrupt:
            return 130
    print(" ".join(f"{name}: {message}".split()), file=sys.stderr)
    return status


def _name(args: Sequence[str]) -> str:
    """Return what errors are signed with: ``descend``, and the command if it exists. Each is a file of this folder."""
    command = args[0] if args else ""
    is_command = command.isidentifier() and Path(__file__).with_name(f"{command}.py").exists()
    return f"descend {command}" if is_command and command not in ("app", "cli") else "descend"
