"""What a user asked ``descend compare`` for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Settings:
    """A request, as written; None stands for the task's default.

    Args:
        task: name of a task, or path of a file that defines one.
        optimizers: specs, ``NAME`` or ``NAME:key=value,...``.
        steps: steps of each run.
        seed: for the weights, the batches and the held-out part; the first of ``seeds``.
        seeds: how many seeds, counted up from ``seed``.
        sweep: options to vary, ``NAME=LOW..HIGH:COUNT`` or ``NAME=VALUE,VALUE``.
        tune: whether each optimizer's learning rate is chosen first.
        jobs: runs at a time, in processes of their own; None for as many as there are cores.
        out: folder of the results.
        overwrite: whether results in that folder are replaced.
        batch_size: samples in a batch.
        threads: threads of each process.
        nproc: processes that share each batch.
        parallel: how they share the work.
    """

    task: str
    optimizers: Sequence[str] = ()
    steps: int | None = None
    seed: int = 0
    seeds: int = 1
    sweep: Sequence[str] = ()
    tune: bool = False
    jobs: int | None = None
    out: Path | None = None
    overwrite: bool = False
    batch_size: int | None = None
    threads: int | None = None
    nproc: int = 1
    parallel: str | None = None

    def to_json(self) -> str:
        """Return the request as text, for another process."""
        return json.dumps(asdict(self), default=str)

    @classmethod
    def from_json(cls, text: str) -> Settings:
        """Return the request that ``to_json`` wrote."""
        values = json.loads(text)
        return cls(**{**values, "out": values["out"] and Path(values["out"])})
