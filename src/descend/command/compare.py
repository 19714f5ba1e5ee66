"""``descend compare``: its options."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from descend.compare.settings import Settings
from descend.compare.tasks.catalog import SUMMARIES, summary
from descend.reporting.errors import UsageError, require

TASK = f"{', '.join(SUMMARIES)}; or the path of a file that defines a task."
OPTIMIZER = (
    "NAME or NAME:key=value,key=value; give one for each optimizer; [bold]--list[/bold] shows the names. Values are "
    "Python literals; [bold]dtype=bfloat16[/bold] is of the model's parameters. The default lr is the task's. Default: "
    "optimizers that suit the task."
)
SWEEP = (
    "Vary an option: [bold]lr=1e-4..1e-1:7[/bold] takes seven values evenly spaced in the logarithm, "
    "[bold]weight_decay=0,0.1[/bold] these two. Give one for each option."
)
TUNE = (
    "First choose each optimizer's learning rate, from five around its default, by the loss on held-out data with two "
    "seeds of their own: the same budget for all."
)
JOBS = (
    "Runs at a time. Default: as many as there are cores. One run of each optimizer has the machine to itself: the "
    "one that is timed."
)
PARALLEL = (
    "How the processes share the work. [bold]ddp[/bold] (default): each has the whole model; "
    "[bold]fsdp[/bold]: a share of parameters, gradients and state; [bold]zero1[/bold]: a share of the state alone."
)


def whole_number(option: str, least: int, most: int = 2**63 - 1) -> Callable[[str], int]:
    """Return a parser for an option that takes integers from ``least`` to ``most``."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number > most:
            raise UsageError(f"{option} must be at most {most}, got {text!r}.")
        if number < least:
            raise UsageError(f"{option} must be a whole number >= {least}, got {text!r}.")
        return number

    return parse


def _list(is_given: bool) -> None:
    """Print the names of tasks and optimizers, and end."""
    if is_given:
        print("Tasks:", *(f"  {name}: {words}" for name, words in SUMMARIES.items()), sep="\n", flush=True)
        from descend.compare.specs import names

        print("Optimizers:", *(f"  {name}" for name in names()), sep="\n")
        raise typer.Exit


def compare(
    task: Annotated[str, typer.Argument(metavar="TASK", help=TASK)],
    optimizer: Annotated[list[str] | None, typer.Option(metavar="SPEC", help=OPTIMIZER)] = None,
    steps: Annotated[
        int | None, typer.Option(parser=whole_number("--steps", 1), metavar="N", help="Default: the task's.")
    ] = None,
    seed: Annotated[
        int,
        typer.Option(
            parser=whole_number("--seed", 0, 2**62),
            metavar="N",
            help="For the weights, the batches and the held-out part.",
        ),
    ] = 0,
    seeds: Annotated[
        int,
        typer.Option(
            parser=whole_number("--seeds", 1, 1000),
            metavar="N",
            help="Repeat with so many seeds, counted up from --seed; the table shows medians and quartiles.",
        ),
    ] = 1,
    sweep: Annotated[list[str] | None, typer.Option(metavar="OPTION=VALUES", help=SWEEP)] = None,
    tune: Annotated[bool, typer.Option("--tune", help=TUNE)] = False,
    jobs: Annotated[int | None, typer.Option(parser=whole_number("--jobs", 1, 1000), metavar="N", help=JOBS)] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Where to write the results; if it has some already, DIR-2 and so on. What was interrupted goes on. "
            "Default: runs/TASK.",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace results that are in DIR.")] = False,
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
    _: Annotated[
        bool, typer.Option("--list", callback=_list, is_eager=True, help="Show the names of tasks and optimizers.")
    ] = False,
) -> int:
    """Train the same model on the same data with several optimizers; compare losses, times and memory.

    All runs start from the same weights and see the same batches in the same order. Results are written as each run
    ends: after Ctrl-C or a crash the same command goes on where it was.
    """
    require("matplotlib", "plotly")
    # Torch takes a second or more to import: say first that something happens.
    print(f"{task}: {summary(task)}", flush=True)
    from descend.compare.run import run

    return run(
        Settings(
            task=task,
            optimizers=optimizer or (),
            steps=steps,
            seed=seed,
            seeds=seeds,
            sweep=sweep or (),
            tune=tune,
            jobs=jobs,
            out=out,
            overwrite=overwrite,
            batch_size=batch_size,
            threads=threads,
            nproc=nproc,
            parallel=parallel,
        )
    )
