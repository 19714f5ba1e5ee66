"""Docstrings for the reference as Python sees them at run time, in the form that griffe parses.

The options that all optimizers share are added to their docstrings when the classes are made, so griffe, which reads
the source alone, would not see them. It also needs a blank line before each section, a title "Examples", and one name
an entry.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import griffe

TITLES = "Args|Keyword Args|Attributes|Methods|Returns|Raises|Examples|Source"
SECTION = re.compile(rf"\n+({TITLES}):\n")
SEVERAL_NAMES = re.compile(r"^( {4})(\w+(?:, \w+)+): (.+)$", re.MULTILINE)


def parsable(docstring: str) -> str:
    """The docstring as griffe needs it."""
    docstring = SECTION.sub(r"\n\n\1:\n", docstring.replace("\nExample:\n", "\nExamples:\n"))
    return SEVERAL_NAMES.sub(
        lambda found: "\n".join(f"{found[1]}{name}: {found[3]}" for name in found[2].split(", ")), docstring
    )


class Docstrings(griffe.Extension):
    """Replaces each docstring of the library."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """See ``griffe.Extension``."""
        if obj.docstring is None or not (obj.is_class or obj.is_function):
            return
        text = obj.docstring.value
        if obj.is_class and obj.path.startswith("descend.first_order."):
            text = inspect.getdoc(griffe.dynamic_import(obj.path)) or text
        obj.docstring.value = parsable(inspect.cleandoc(text))
