"""Python's standard library as text, which every machine has."""

from __future__ import annotations

import sysconfig
from pathlib import Path

from descend.reporting.errors import UsageError


def library(task: str) -> list[Path]:
    """Return the files of the standard library's single-file modules."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(folder.glob("*.py"))
    if len(files) < 100:
        raise UsageError(f"the task {task} is read from Python's library, but {folder} holds no sources.")
    return files
