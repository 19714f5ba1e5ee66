"""Where ``Monitor`` writes: one callback, ``write(metrics, step)``, for files, dictionaries and loggers."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any, TypeAlias

Writer: TypeAlias = Callable[[dict[str, float], int], object]


def writer(to: Any) -> Writer:
    """The callback for whatever ``to`` is; nothing is imported to find out.

    Args:
        to: a path: JSON lines are appended. A dictionary: a list a metric, and the list ``"step"``. An object with
            ``add_scalar`` (TensorBoard's ``SummaryWriter``), ``log_metrics`` (Lightning's loggers) or ``log`` (a run of
            Weights & Biases or trackio, or these modules). A function of metrics and step.
    Raises:
        TypeError: if it is nothing of these.
    """
    if isinstance(to, str | os.PathLike):
        return JsonLines(to)
    if isinstance(to, MutableMapping):
        return lambda metrics, step: _append(to, metrics, step)
    if callable(add_scalar := getattr(to, "add_scalar", None)):
        return lambda metrics, step: [add_scalar(name, value, step) for name, value in metrics.items()]
    if callable(log_metrics := getattr(to, "log_metrics", None)):
        return lambda metrics, step: log_metrics(metrics, step=step)
    if callable(log := getattr(to, "log", None)):
        return lambda metrics, step: log(metrics, step=step)
    if callable(to):
        return to  # type: ignore[no-any-return]
    raise TypeError(
        "Monitor: to must be a path, a dictionary, a SummaryWriter, a run with `log`, a logger with `log_metrics`, "
        f"or a function of metrics and step, got {type(to).__name__}."
    )


class JsonLines:
    """Appends one line of JSON a sample: ``{"step": 100, "grad_norm": 0.5, ...}``; NaN and Inf are null.

    A line is written in one piece. If a crash has cut the last one short, the next begins on a line of its own, and
    ``read_json_lines`` leaves the torn one out.

    Args:
        path: the file; made if there is none.
    Raises:
        OSError: if it cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = path
        with open(path, "ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.write(b"\n")

    def __call__(self, metrics: Mapping[str, float], step: int) -> None:
        numbers = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        line = json.dumps({"step": step, **numbers}, allow_nan=False) + "\n"
        with open(self._path, "ab", buffering=0) as file:
            file.write(line.encode())


def read_json_lines(path: str | os.PathLike[str]) -> Iterator[dict[str, float | None]]:
    """The samples in a file that ``JsonLines`` has written, without lines that a crash has cut short."""
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                sample = json.loads(line)
            except ValueError:
                continue
            if isinstance(sample, dict) and "step" in sample:
                yield sample


def _append(to: MutableMapping[str, Any], metrics: Mapping[str, float], step: int) -> None:
    """Lists stay equally long: what a sample lacks is NaN."""
    steps = to.setdefault("step", [])
    for name in metrics.keys() | to.keys() - {"step"}:
        values = to.setdefault(name, [])
        values += [math.nan] * (len(steps) - len(values))
        values.append(metrics.get(name, math.nan))
    steps.append(step)
