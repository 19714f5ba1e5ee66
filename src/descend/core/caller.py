"""Warnings that point to the program, and not to what it calls."""

from __future__ import annotations

import sys
import warnings


def warn_caller(text: str, category: type[Warning] = UserWarning) -> None:
    """Warn with the location of the first caller outside of this package and torch."""
    level = 1
    while sys._getframe(level).f_globals.get("__name__", "").split(".")[0] in ("descend", "torch"):
        level += 1
    warnings.warn(text, category, stacklevel=level + 1)
