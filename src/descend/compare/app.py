"""The command ``descend compare`` and its options, in typer."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from descend.compare import report, specs
from descend.compare.errors import UsageError
from descend.compare.parallel import choose
from descend.compare.progress import progress
from descend.compare.ranks import Alone, Ranks
from descend.compare.tasks import TASKS, Task, find_task
from descend.compare.train import Problem, Run, compete, prepare

app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)

TASK = "; ".join(f"[bold]{task.name}[/bold]: {task.summary}" for task in TASKS.values()) + "."
OPTIMIZER = (
    "NAME or NAME:key=value,key=value; give one for each optimizer. Values are Python literals. "
    "The default lr is the task's. Default: four optimizers that suit the task."
)
PARALLEL = (
    "How the processes share the work. [bold]ddp[/bold] (default): each has the whole model; "
    "[bold]fsdp[/bold]: a share of parameters, gradients and state; [bold]zero1[/bold]: a share of the state alone."
)
EPILOG = (
    "[bold]Example:[/bold] descend compare text --optimizer adamw:lr=3e-3,weight_decay=0.1 "
    f"--optimizer torch.adamw:lr=3e-3 --steps 300\n\n[bold]Optimizers:[/bold] {', '.join(sorted(specs.classes()))}."
)


def whole_number(option: str, least: int) -> Callable[[str], int]:
    """Return a parser for an option that takes integers >= ``least``."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if not least <= number < 2**63:
            raise UsageError(f"compare: {option} must be a whole number >= {least}, got {text!r}.")
        return number

    return parse


@dataclass(frozen=True)
class Call:
    """How ``descend`` was called.

    Args:
        args: the arguments.
        ranks: the processes that take part; None before those of ``--nproc`` are started.
    """

    args: Sequence[str]
    ranks: Ranks | None


@app.callback()
def descend() -> None:
    """Optimizers for PyTorch, compared."""


@app.command(epilog=EPILOG)
def compare(
    context: typer.Context,
    task: Annotated[str, typer.Argument(metavar="TASK", help=TASK)],
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
        typer.Option(metavar="DIR", help="Where to write results.json and curves.png. Default: runs/TASK."),
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
    chosen = find_task(task)
    contestants = specs.parse_all(optimizer or chosen.optimizers, chosen.lr)
    batch_size = batch_size or chosen.batch_size
    way = choose(parallel, nproc, batch_size, contestants)
    call: Call = context.obj
    if nproc > 1 and call.ranks is None:
        from descend.compare.launch import launch

        return launch(nproc, call.args)
    ranks = call.ranks or Alone()
    torch.set_num_threads(threads or chosen.threads or max(1, torch.get_num_threads() // nproc))
    console = Console(quiet=ranks.rank > 0)
    with console.status("Reading the data and building the optimizers"):
        torch.manual_seed(seed)
        problem = Problem(
            data=chosen.load(seed),
            model=chosen.model(),
            steps=steps or chosen.steps,
            batch_size=batch_size,
            seed=seed,
            ranks=ranks,
            way=way,
        )
        runs = prepare(contestants, problem)
    folder = out or Path("runs") / chosen.name
    make_folder(folder)

    is_interrupted = False
    try:
        with progress(console, runs, problem.steps) as on_step:
            compete(problem, runs, on_step)
    except KeyboardInterrupt:
        is_interrupted = True
    # Rank 0 alone tells what failed: a rank that ends with an error would end the others while they report.
    status = _report(console, folder, chosen, problem, runs) if ranks.rank == 0 else 0
    return 130 if is_interrupted else status


def _report(console: Console, folder: Path, chosen: Task, problem: Problem, runs: Sequence[Run]) -> int:
    """Show and write what was measured; return the exit status."""
    measured = [run for run in runs if run.steps or run.error]
    if measured:
        console.print(report.table(chosen, problem, measured))
        report.write(folder, chosen, problem, measured)
        console.print(
            f"Wrote results.json and curves.png into {folder}.", markup=False, highlight=False, soft_wrap=True
        )
    failed = [run for run in measured if run.error]
    for run in failed:
        print(f"compare: {run.spec.label} failed after {len(run.steps)} steps: {run.error}", file=sys.stderr)
    return 1 if failed else 0


def make_folder(folder: Path) -> None:
    """Make the output folder; raise a ``UsageError`` if that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"compare: --out {folder} cannot be made: {error.strerror}.") from error


def run(args: list[str], ranks: Ranks | None = None) -> int:
    """Run ``descend`` with ``args``; return its exit status, or raise a ``CommandError``.

    Args:
        args: the arguments after the program's name.
        ranks: the processes that take part, this one included. Default: those that ``args`` ask for are started.
    """
    # The base class of typer's errors has no public name: BadParameter < UsageError < ClickException.
    typer_error: Any = typer.BadParameter.__mro__[2]
    try:
        status = app(args or ["--help"], prog_name="descend", standalone_mode=False, obj=Call(args, ranks))
    except typer.Abort:  # what some versions of typer turn Ctrl-C into
        return 130
    except typer_error as error:
        raise UsageError(f"compare: {error.format_message()} {_what_exists()}") from None
    return int(status or 0)


def _what_exists() -> str:
    group: Any = typer.main.get_command(app)
    options = [name for param in group.commands["compare"].params for name in param.opts if name.startswith("--")]
    return f"Tasks of descend compare: {', '.join(TASKS)}; options: {', '.join(options)}."
