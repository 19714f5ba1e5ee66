"""Files that are written completely or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def write_whole(path: Path, write_to: Callable[[Path], object]) -> None:
    """Let ``write_to`` write a temporary file beside ``path``, then rename it to ``path``."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write_to(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
