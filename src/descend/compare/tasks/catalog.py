"""The names of the tasks. Each is in the module of its name, which is imported when the task is asked for."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from descend.reporting.errors import unknown

if TYPE_CHECKING:
    from descend.compare.tasks.task import Task

SUMMARIES = {
    "digits": "handwritten digits and a small convolutional net",
    "text": "Python's standard library and a character-level transformer",
    "embeddings": "lines of Python's standard library and a classifier over a million embeddings of hashed words",
    "regression": "handwritten digits and logistic regression, in float64 with all data in each step",
    "pinn": "Burgers' equation with a shock and a physics-informed network",
    "rnn": "sums of two numbers in a sequence and a recurrent network with exploding gradients",
}


def summary(name: str) -> str:
    """Return in one line what the task called ``name`` is, without an import of torch.

    Raises:
        UsageError: if there is no such task; it lists all names.
    """
    if _is_path(name):
        return "a task of yours"
    if name not in SUMMARIES:
        raise unknown("there is no task", name, [*SUMMARIES, "path/to/task.py"])
    return SUMMARIES[name]


def _is_path(name: str) -> bool:
    return name.endswith(".py") or "/" in name


def find_task(name: str) -> Task:
    """Return the task called ``name``, or that of the user's file at the path ``name``.

    Raises:
        UsageError: if there is neither; see ``summary``. If the file defines no task; see ``user_file``.
    """
    if _is_path(name):
        from descend.compare.tasks.user_file import read_task

        return read_task(Path(name))
    summary(name)
    task: Task = import_module(f"descend.compare.tasks.{name}").TASK
    return task
