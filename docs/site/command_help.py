"""Replaces ``[help: compare](...)`` on a line of its own by what ``descend compare --help`` says, as a table."""

from __future__ import annotations

import inspect
import re
from typing import Any

HELP = re.compile(r"^\[help: (\w+)\]\([^)\s]+\)$", re.MULTILINE)


def help_of(name: str) -> str:
    """The arguments and options of a command, in Markdown."""
    import typer

    from descend.command.app import app

    command: Any = typer.main.get_command(app)
    command = command.commands[name]
    rows = [f"| `{' '.join([*_names(param), *_value(param)])}` | {_markdown(param.help)} |" for param in command.params]
    return "\n".join([_markdown(inspect.cleandoc(command.help)), "", "| argument or option | |", "|---|---|", *rows])


def _names(param: Any) -> list[str]:
    return [name for name in param.opts if name.startswith("--")]


def _value(param: Any) -> list[str]:
    is_flag = getattr(param, "is_flag", False)
    return [] if is_flag else [param.metavar or param.name.upper()]


def _markdown(text: str | None) -> str:
    """What Rich prints bold as code, safe in a table."""
    return re.sub(r"\[/?bold\]", "`", text or "").replace("|", "\\|")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """See mkdocs."""
    return HELP.sub(lambda found: help_of(found[1]), markdown)
