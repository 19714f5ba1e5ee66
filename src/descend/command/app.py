"""The command's typer application: one function a command, each in its own file."""

from __future__ import annotations

from typing import Annotated, Any, cast

import typer

from descend import __version__
from descend.command.bench import bench
from descend.command.compare import compare
from descend.command.inspect import inspect
from descend.reporting.errors import UsageError

app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)
app.command()(compare)
app.command()(bench)
app.command()(inspect)


def _version(is_given: bool) -> None:
    if is_given:
        print(f"descend {__version__}")
        raise typer.Exit


@app.callback()
def descend(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    """See what an optimizer does."""


def run(args: list[str]) -> int:
    """Run ``descend`` with ``args``; return its exit status, or raise a ``CommandError``."""
    # The base class of typer's errors has no public name: BadParameter < UsageError < ClickException.
    typer_error: Any = typer.BadParameter.__mro__[2]
    try:
        status = app(args or ["--help"], prog_name="descend", standalone_mode=False)
    except typer.Abort:  # what some versions of typer turn Ctrl-C into
        return 130
    except typer_error as error:
        raise UsageError(f"{error.format_message().rstrip('.')}. {_what_exists(args)}") from None
    return int(status or 0)


def _what_exists(args: list[str]) -> str:
    group = cast(Any, typer.main.get_command(app))
    commands = group.commands
    if args and args[0] in commands:
        params = commands[args[0]].params
        return f"Options: {', '.join(name for param in params for name in param.opts if name.startswith('--'))}."
    return f"Commands: {', '.join(commands)}."
