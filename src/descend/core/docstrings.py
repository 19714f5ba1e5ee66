"""Docstrings of optimizers: what all have in common is written once and added to each class."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Mapping

WIDTH = 116  # of a line in a docstring without its class's indentation
LATER = re.compile(r"^(Attributes|Raises|Example|Source):", re.MULTILINE)


def with_sections(documentation: str, sections: Mapping[str, Mapping[str, str]]) -> str:
    """Add sections to a Google-style docstring, after its arguments.

    Args:
        documentation: the docstring.
        sections: by title, what each name in the section means.
    Returns:
        The docstring without indentation, the sections before the first of Attributes, Raises, Example and Source.
    Example:
        >>> print(with_sections("Step.\\n\\nRaises:\\n    ValueError: never.", {"Args": {"lr": "step size."}}))
        Step.
        <BLANKLINE>
        Args:
            lr: step size.
        Raises:
            ValueError: never.
    """
    documentation = inspect.cleandoc(documentation)
    added = "".join(
        f"{title}:\n" + "".join(f"{_entry(name, text)}\n" for name, text in entries.items())
        for title, entries in sections.items()
    )
    later = LATER.search(documentation)
    if later is None:
        return f"{documentation}\n\n{added.rstrip()}"
    return documentation[: later.start()] + added + documentation[later.start() :]


def summary_of(documented: object) -> str:
    """The first line of a docstring; empty without one."""
    return (inspect.getdoc(documented) or "").partition("\n")[0]


def _entry(name: str, text: str) -> str:
    return textwrap.fill(f"{name}: {text}", WIDTH, initial_indent=" " * 4, subsequent_indent=" " * 8)
