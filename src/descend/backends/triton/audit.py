"""Where Triton's language has an operator of Python's that gives other numbers, seen in what it has made of a rule."""

from __future__ import annotations

import re

_SUMS = "it may look at one element at a time, not at sums"
_FLOAT32 = r"(?:tensor<\w+x)?f32\b"
_REASONS = {
    r"\barith\.remf\b": "the result of % has the sign of the first number in Triton, of the second in Python",
    r"\barith\.addi .*: (?:tensor<\w+x)?i1\b": "comparisons cannot be added: choose numbers by where",
    r"\btt\.(?:scan|gather|histogram|reshape|trans)\b": _SUMS,
}
# Zero is what masked loads give.
_NARROW = rf"\barith\.(?:constant (?!(?:dense<)?-?0\.0+e).*: {_FLOAT32}|[su]itofp .* to {_FLOAT32})"


def unsound(text: str, is_wide: bool, sums: int = 0) -> str | None:
    """Why a kernel that applies a rule would give other numbers than Python; None if it would not.

    Args:
        text: the kernel as TTIR, Triton's first intermediate code.
        is_wide: whether the arithmetic is in float64.
        sums: how many the kernel forms beside what the rule does. Default: 0.
    """
    found = next((reason for pattern, reason in _REASONS.items() if re.search(pattern, text)), None)
    if len(re.findall(r"\btt\.reduce\"", text)) > sums:
        return _SUMS
    if found is None and is_wide and re.search(_NARROW, text):
        return "a literal number would be rounded to float32: choose between literals by where"
    return found
