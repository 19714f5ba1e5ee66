"""What a user asked ``descend bench`` for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from descend.bench.methods import METHODS
from descend.bench.shapes import SHAPES
from descend.reporting.errors import UsageError, unknown

DTYPES = ("float32", "bfloat16", "float16", "float64")
GRADIENTS = ("fresh", "fixed")
DEFAULT_SHAPES = ("mlp", "1000x1000", "resnet50")
SECONDS = 30.0
FOLDER = Path("runs/bench")


@dataclass(frozen=True)
class Settings:
    """A request, as written.

    Args:
        optimizers: names in ``METHODS``. Default: AdamW.
        shapes: names in ``SHAPES``. Default: three of them, unless there are ``model`` or ``sizes``.
        model: ``FILE.py:FUNCTION``; the function returns the model.
        sizes: sizes of tensors, ``768x768,768`` or ``1000*64x64``.
        dtypes: names of dtypes. Default: float32, or a model's own.
        max_norm: limit of the gradients' joint norm, > 0; None not to clip.
        gradients: ``"fresh"`` or ``"fixed"``.
        device: ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.
        threads: torch's threads; None for as many as it takes.
        seconds: how long all optimizers are timed together, > 0.
        out: folder of the results; None for a new one.
        json: where the measurements are written too.
        markdown: where the table is written as Markdown.
        overwrite: whether existing results may be replaced.
    """

    optimizers: Sequence[str] = ("adamw",)
    shapes: Sequence[str] = ()
    model: str | None = None
    sizes: str | None = None
    dtypes: Sequence[str] = ()
    max_norm: float | None = None
    gradients: str = "fresh"
    device: str = "cpu"
    threads: int | None = None
    seconds: float = SECONDS
    out: Path | None = None
    json: Path | None = None
    markdown: Path | None = None
    overwrite: bool = False

    def check(self) -> None:
        """Raise a ``UsageError`` for what can be seen to be wrong without torch."""
        for name in self.optimizers:
            if name in ("lbfgs", "newton", "sparseadam"):
                needs = "sparse gradients" if name == "sparseadam" else "a closure that evaluates a model"
                raise UsageError(f"{name} needs {needs}, so bench does not time it; it times {', '.join(METHODS)}.")
            if name not in METHODS:
                raise unknown("there is no optimizer", name, METHODS)
        for options, known, problem in (
            (self.shapes, SHAPES, "there are no shapes"),
            (self.dtypes, DTYPES, "--dtype cannot be"),
            ((self.gradients,), GRADIENTS, "--gradients cannot be"),
        ):
            for option in options:
                if option not in known:
                    raise unknown(problem, option, known)
        for option, text in (("--model", self.model), ("--sizes", self.sizes)):
            if text is not None and not text.strip():
                raise UsageError(f"{option} must not be empty.")
        if self.json and self.markdown and self.json.resolve() == self.markdown.resolve():
            raise UsageError(f"--json and --markdown must be two files, got {self.json} for both.")
        for option, number in (("--max-norm", self.max_norm), ("--seconds", self.seconds)):
            if number is not None and not (0 < number < math.inf):
                raise UsageError(f"{option} must be a number > 0, got {number}.")
