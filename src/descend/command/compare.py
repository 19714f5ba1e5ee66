"""``descend compare``: its options."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from descend.compare.settings import Settings
from descend.reporting.errors import UsageError, require

OPTIMIZER = (
    "NAME or NAME:key=value,key=value; give one for each optimizer. Values are Python literals. "
    "The default lr is the task's. Default: four optimizers that suit the task."
)
PARALLEL = (
    "How the processes share the work. [bold]ddp[/bold] (default): each has the whole model; "
    "[bold]fsdp[/bold]: a share of parameters, gradients and state; [bold]zero1[/bold]: a share of the state alone."
)


def whole_number(option: str, least: int) -> Callable[[str], int]:
    """Return a parser for an option that takes integers >= ``least``."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if not least <= number < 2**63:
            raise UsageError(f"{option} must be a whole number >= {least}, got {text!r}.")
        return number

    return parse


def compare(
    task: Annotated[str, typer.Argument(metavar="TASK", help="digits, text or embeddings.")],
    optimizer: Annotated[list[str] | None, typer.Option(metavar="SPEC", help=OPTIMIZER)] = None,
    steps: Annotated[
        int | None, typer.Option(parser=whole_number("--steps", 1), metavar="N", help="Default: the task's.")
    ] = None,
    seed: Annotated[
        int,
        typer.Option(
            parser=whole_number("--seed", 0), metavar="N", help="For the weights, the batches and the held-out part."
        ),
    ] = 0,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where to write the results. Default: runs/TASK."),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(parser=whole_number("--batch-size", 1), metavar="N", help="Default: the task's.")
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(parser=whole_number("--threads", 1), metavar="N", help="Of each process. Default: the task's."),
    ] = None,
    nproc: Annotated[
        int,
        typer.Option(
            parser=whole_number("--nproc", 1), metavar="N", help="Processes; each takes a share of every batch."
        ),
    ] = 1,
    parallel: Annotated[str | None, typer.Option(metavar="WAY", help=PARALLEL)] = None,
) -> int:
    """Train the same model on the same data with several optimizers; compare losses, times and memory.

    All runs start from the same weights and see the same batches in the same order. After Ctrl-C the results so far
    are still written.
    """
    require("matplotlib")
    from descend.compare.run import run

    return run(Settings(task, optimizer or (), steps, seed, out, batch_size, threads, nproc, parallel))
