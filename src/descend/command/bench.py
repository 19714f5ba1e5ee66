"""``descend bench``: its options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from descend.bench.methods import METHODS
from descend.bench.settings import DEFAULT_SHAPES, DTYPES, FOLDER, SECONDS, Settings
from descend.bench.shapes import SHAPES
from descend.reporting.errors import require

MODEL = "FILE.py:FUNCTION; the function returns a torch.nn.Module, whose parameters are stepped."
SIZES = "Sizes of tensors, as in [bold]768x768,768[/bold], or [bold]1000*64x64[/bold] for a thousand."


def bench(
    optimizer: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help=f"{', '.join(METHODS)}; may be given again. Default: adamw."),
    ] = None,
    shapes: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help=f"{', '.join(SHAPES)}; may be given again. Default: {', '.join(DEFAULT_SHAPES)}."
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(metavar="FILE:FUNCTION", help=MODEL)] = None,
    sizes: Annotated[str | None, typer.Option(metavar="SIZES", help=SIZES)] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help=f"{', '.join(DTYPES)}; may be given again. Default: float32, or the model's."
        ),
    ] = None,
    max_norm: Annotated[
        float | None, typer.Option(metavar="X", help="Clip gradients at this norm. Default: do not clip.")
    ] = None,
    gradients: Annotated[
        str, typer.Option(metavar="KIND", help="fresh: allocated before each step, as in training; or fixed.")
    ] = "fresh",
    device: Annotated[str, typer.Option(metavar="NAME", help="cpu, cuda or cuda:N.")] = "cpu",
    threads: Annotated[
        int | None, typer.Option(metavar="N", min=1, max=4096, help="Default: as many as torch takes.")
    ] = None,
    seconds: Annotated[
        float, typer.Option(metavar="S", help="How long to time steps, all together; slow optimizers take longer.")
    ] = SECONDS,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help=f"For bench.json, .png and .svg. Default: {FOLDER}, or a new one."),
    ] = None,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the measurements here too.")] = None,
    markdown: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the table as Markdown.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")] = False,
) -> int:
    """Time an optimizer's step on this machine: descend beside torch.optim, and both beside the memory's speed.

    All optimizers step the same parameters in turns, and their results are compared. After Ctrl-C the results so far
    are still shown and written.
    """
    settings = Settings(
        optimizers=[name.lower() for name in optimizer or ("adamw",)],
        shapes=shapes or (),
        model=model,
        sizes=sizes,
        dtypes=[name.removeprefix("torch.") for name in dtype or ()],
        max_norm=max_norm,
        gradients=gradients,
        device=device,
        threads=threads,
        seconds=seconds,
        out=out,
        json=json,
        markdown=markdown,
        overwrite=overwrite,
    )
    settings.check()
    require("matplotlib")
    from descend.bench.machine import Machine

    machine = Machine.this()
    versions = machine.versions
    print(f"descend {versions['descend']}, torch {versions['torch']}, {machine.processor}, {machine.date}", flush=True)
    if machine.is_busy:
        print(f"Other programs keep the machine busy (load {machine.load:.1f}): times will be too long.", flush=True)
    from descend.bench.run import run

    return run(settings, machine)
