"""Options to vary: ``lr=1e-4..1e-1:7`` and ``weight_decay=0,0.01,0.1``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from descend.reporting.errors import UsageError

COUNT = 5  # values of a range that gives no number


def parse_sweeps(texts: Sequence[str]) -> dict[str, list[str]]:
    """Return the values of each option, as the words of a spec.

    Args:
        texts: ``NAME=LOW..HIGH:COUNT``, evenly spaced in the logarithm, ``COUNT`` 5 by default; or
            ``NAME=VALUE,VALUE``.
    Raises:
        UsageError: if one is neither, a range is not positive and rising, or an option or a value comes twice.
    Example:
        >>> parse_sweeps(["lr=1e-3..1e-1:3", "weight_decay=0,0.1"])
        {'lr': ['0.001', '0.01', '0.1'], 'weight_decay': ['0', '0.1']}
    """
    sweeps: dict[str, list[str]] = {}
    for text in texts:
        name, _, rest = (part.strip() for part in text.partition("="))
        if not name.isidentifier() or not rest:
            raise UsageError(f"--sweep {text}: expected NAME=LOW..HIGH:COUNT or NAME=VALUE,VALUE.")
        if name in sweeps:
            raise UsageError(f"--sweep {text}: {name} is given twice.")
        values = _range(text, rest) if ".." in rest else [value.strip() for value in rest.split(",")]
        if not all(values) or len(set(values)) < len(values):
            raise UsageError(f"--sweep {text}: the values of {name} must differ, and none may be empty.")
        sweeps[name] = values
    return sweeps


def _range(text: str, rest: str) -> list[str]:
    ends, _, number = rest.partition(":")
    try:
        low, high = (float(end) for end in ends.split(".."))
        count = int(number or COUNT)
    except ValueError:
        raise UsageError(f"--sweep {text}: expected numbers, LOW..HIGH:COUNT.") from None
    if not (0 < low < high < math.inf and 2 <= count <= 1000):
        raise UsageError(f"--sweep {text}: a range must have 0 < LOW < HIGH and a COUNT of 2 to 1000.")
    return [f"{low * (high / low) ** (i / (count - 1)):.4g}" for i in range(count)]


def combinations(sweeps: Mapping[str, Sequence[str]]) -> list[dict[str, str]]:
    """Return every combination of the values, the last option varying fastest."""
    found: list[dict[str, str]] = [{}]
    for name, values in sweeps.items():
        found = [{**before, name: value} for before in found for value in values]
    return found
