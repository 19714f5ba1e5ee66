"""``descend inspect``: its options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def inspect(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="CHECKPOINT",
            help="A file of torch.save, safetensors, or a folder of torch.distributed.checkpoint.",
        ),
    ],
    other: Annotated[
        Path | None, typer.Argument(metavar="OTHER", help="A later checkpoint: what changed?", show_default=False)
    ] = None,
    top: Annotated[
        int, typer.Option(min=1, metavar="N", help="Parameters to list: suspicious ones, then the largest.")
    ] = 10,
    every: Annotated[bool, typer.Option("--all", help="List all parameters.")] = False,
    json: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Write everything as JSON; - for standard output, instead of the text."),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Exit with 1 if anything looks wrong in the last checkpoint given.")
    ] = False,
) -> int:
    """Say what is in an optimizer's checkpoint, and what looks wrong. No code from the file is ever run.

    Exit status: 0 if it could be read (with --check: and nothing looks wrong), 2 if not.
    """
    from descend.diagnostics.inspection.run import run

    return run(checkpoint, other, None if every else top, json, check)
