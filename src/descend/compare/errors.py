"""What the user can put right, in one line."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from difflib import get_close_matches

PACKAGES = {"sklearn": "scikit-learn"}


class UsageError(Exception):
    """A wrong request. The command line prints it as one line, without a traceback, and exits with status 2."""


def unknown(problem: str, came: str, known: Iterable[str]) -> UsageError:
    """Return the error for a name that does not exist: what came, the closest match if any, and what exists.

    Args:
        problem: who has no what, as in ``"there is no task"``.
        came: the wrong name.
        known: the right ones.
    """
    names = sorted(known)
    close = get_close_matches(came, names, n=1)
    hint = f" did you mean {close[0]}?" if close else ""
    return UsageError(f"compare: {problem} {came!r};{hint} there are {', '.join(names)}.")


def require(*modules: str) -> None:
    """Raise a ``UsageError`` that names the packages of those ``modules`` that cannot be imported."""
    missing = []
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError:
            missing.append(PACKAGES.get(module, module))
    if missing:
        raise UsageError(f"compare needs {', '.join(missing)}: pip install 'descend[compare]'.")
