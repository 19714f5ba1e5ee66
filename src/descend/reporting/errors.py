"""Errors that the user can fix, each reported in one line."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from difflib import get_close_matches

PACKAGES = {"sklearn": "scikit-learn"}


class CommandError(Exception):
    """What ends the command: it prints one line, without a traceback, and exits with ``status``."""

    status = 1


class UsageError(CommandError):
    """An invalid request."""

    status = 2


def unknown(problem: str, given: str, known: Iterable[str]) -> UsageError:
    """Return the error for a name that does not exist; it lists the closest match, if any, and all existing names.

    Args:
        problem: the start of the message, as in ``"there is no task"``.
        given: the name that does not exist.
        known: the names that do.
    """
    names = sorted(known)
    close = get_close_matches(given, names, n=1)
    hint = f" did you mean {close[0]}?" if close else ""
    return UsageError(f"{problem} {given!r};{hint} there are {', '.join(names)}.")


def require(*modules: str) -> None:
    """Raise a ``UsageError`` that lists the packages of all ``modules`` that cannot be imported."""
    missing = []
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError:
            missing.append(PACKAGES.get(module, module))
    if missing:
        raise UsageError(f"this needs {', '.join(missing)}: pip install 'descend[compare]'.")
