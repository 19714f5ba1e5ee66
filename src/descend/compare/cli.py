"""The entry point ``descend``: every failure becomes one line on stderr and an exit status.

The packages of the extra ``compare`` are imported inside ``main``, so that a missing one is reported the same way.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from descend.compare.errors import UsageError, require


def main(args: Sequence[str] | None = None) -> int:
    """Run the command ``descend``.

    Args:
        args: the arguments after the program's name. Default: those of this process.
    Returns:
        Exit status: 0, 1 (an optimizer or the disk failed), 2 (bad arguments, or a missing package) or 130 (Ctrl-C).
    """
    try:
        require("typer", "rich", "matplotlib")
        from descend.compare.app import run

        return run(sys.argv[1:] if args is None else list(args))
    except UsageError as error:
        return _fail(error, status=2)
    except OSError as error:
        return _fail(f"compare: {error}.", status=1)
    except KeyboardInterrupt:
        return 130


def _fail(message: object, status: int) -> int:
    print(" ".join(str(message).split()), file=sys.stderr)
    return status
