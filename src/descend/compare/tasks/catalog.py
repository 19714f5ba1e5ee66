"""The names of the tasks. Each is in the module of its name, which is imported when the task is asked for."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from descend.reporting.errors import unknown

if TYPE_CHECKING:
    from descend.compare.tasks.task import Task

SUMMARIES = {
    "digits": "handwritten digits and a small convolutional net",
    "text": "Python's standard library and a character-level transformer",
    "embeddings": "lines of Python's standard library and a classifier over a million embeddings of hashed words",
}


def find_task(name: str) -> Task:
    """Return the task called ``name``; raise a ``UsageError`` that lists all tasks if it does not exist."""
    if name not in SUMMARIES:
        raise unknown("there is no task", name, SUMMARIES)
    task: Task = import_module(f"descend.compare.tasks.{name}").TASK
    return task
