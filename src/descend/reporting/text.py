"""Numbers with units, as text.

Example:
    >>> size(1_234_567), seconds(0.00123), rate(0.001), number(0.0123456)
    ('1.23 MB', '1.23 ms', '0.001', '0.01235')
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def size(count: float) -> str:
    """Return a number of bytes in B, kB (1,000 bytes), MB, GB or TB, with three digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def seconds(duration: float) -> str:
    """Return a duration in ns, us, ms, s, min or h, with three digits.

    Example:
        >>> seconds(0.0000256), seconds(12.34), seconds(754), seconds(7200)
        ('25.6 us', '12.3 s', '12.6 min', '2 h')
    """
    if duration == 0:
        return "0 s"
    for factor, unit in ((1e9, "ns"), (1e6, "us"), (1e3, "ms"), (1, "s")):
        if abs(duration) * factor < (999.5 if factor > 1 else 119.5):
            return f"{duration * factor:.3g} {unit}"
    return f"{duration / 60:.3g} min" if abs(duration) < 7199 else f"{duration / 3600:.3g} h"


def rate(lr: float | None) -> str:
    """Return a learning rate as people write it; ``-`` for None.

    Example:
        >>> rate(0.00031622776), rate(1000.0), rate(None)
        ('0.000316', '1000', '-')
    """
    return "-" if lr is None else f"{lr:.{3 if lr < 100 else 6}g}"


def number(value: float | None, digits: int = 4) -> str:
    """Return a number with ``digits`` significant digits; ``-`` for None, NaN and Inf.

    Example:
        >>> number(1234567), number(0.5), number(3.1e-9), number(float("nan"))
        ('1,234,567', '0.5', '3.1e-09', '-')
    """
    if value is None or not math.isfinite(value):
        return "-"
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def plural(count: int, noun: str) -> str:
    """Return a count with its noun.

    Example:
        >>> plural(1, "seed"), plural(5, "seed")
        ('1 seed', '5 seeds')
    """
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def shortened(text: str, most: int) -> str:
    """Return the text, or its start and an ellipsis, in at most ``most`` characters.

    Example:
        >>> shortened("momentum=0.9", 12), shortened("momentum=0.95", 12)
        ('momentum=0.9', 'momentum=0.…')
    """
    return text if len(text) <= most else f"{text[: most - 1]}…"


def joined(names: Sequence[str]) -> str:
    """Return names as a phrase.

    Example:
        >>> joined(["adam", "lion", "sgd"]), joined(["adam"])
        ('adam, lion and sgd', 'adam')
    """
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))
