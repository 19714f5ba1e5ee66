"""The file ``results.jsonl``: runs are appended as they end, so that a comparison can go on after a crash."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from descend.compare.records import Comparison, Run
from descend.reporting.errors import UsageError

try:
    import fcntl
except ImportError:  # Windows: two comparisons must not be given the same folder
    fcntl = None  # type: ignore[assignment]

NAME = "results.jsonl"
# What a folder of results holds; results.json was written before there were lines.
NAMES = (NAME, "results.json", "report.html", "curves.png", "curves.svg")


class Journal:
    """An open ``results.jsonl``, locked until it is closed.

    Attributes:
        folder: where it is.
        comparison: its first line.
        runs: its other lines.
        is_continued: whether it held this comparison before.
    """

    def __init__(self, file: IO[str], folder: Path, comparison: Comparison, runs: list[Run], is_continued: bool):
        self._file = file
        self.folder, self.comparison, self.runs, self.is_continued = folder, comparison, runs, is_continued

    def append(self, run: Run) -> None:
        """Write ``run``; when this returns, it is on the disk."""
        _write(self._file, asdict(run))
        self.runs.append(run)

    def close(self) -> None:
        """Let others have the folder."""
        self._file.close()


def open_journal(
    base: Path, comparison: Comparison, is_complete: Callable[[Sequence[Run]], bool], overwrite: bool
) -> Journal:
    """Open the journal of ``comparison``.

    A folder is taken if it holds other results, all results of this comparison, or another process uses it. The journal
    is then in the next folder, ``base-2``, ``base-3`` and so on, that is not.

    Args:
        base: the folder to use if it is not taken; made if it does not exist.
        comparison: what all runs share. The same, unfinished, is continued.
        is_complete: whether nothing is left to run.
        overwrite: whether results in ``base`` are deleted.
    Raises:
        UsageError: if the folder cannot be made or written to, is a file, or, with ``overwrite``, is in use.
    """
    number, folder = 1, base
    while True:
        try:
            if folder.exists() and not folder.is_dir():
                raise UsageError(f"--out {folder} is a file: give a folder, or a name that does not exist.")
            taken = [name for name in NAMES if (folder / name).exists()]
            journal = None
            if overwrite or not taken:
                journal = _start(folder, comparison, taken)
            elif NAME in taken:
                journal = _continue(folder, comparison, is_complete)
        except OSError as error:
            raise UsageError(f"--out {folder} cannot be written: {error.strerror}.") from error
        if journal:
            return journal
        if overwrite:
            raise UsageError(f"--out {folder} is being written by another process: give another folder.")
        number += 1
        folder = base.with_name(f"{base.name}-{number}")


def _start(folder: Path, comparison: Comparison, taken: Iterable[str]) -> Journal | None:
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / NAME, "a+", encoding="utf-8")  # noqa: SIM115, the journal closes it
    if not _lock(file):
        return None
    for name in taken:
        if name != NAME:
            (folder / name).unlink()
    file.truncate(0)
    _write(file, asdict(comparison))
    return Journal(file, folder, comparison, [], is_continued=False)


def _continue(folder: Path, comparison: Comparison, is_complete: Callable[[Sequence[Run]], bool]) -> Journal | None:
    file = open(folder / NAME, "r+", encoding="utf-8")  # noqa: SIM115, the journal closes it
    if _lock(file):
        text = file.read()
        whole = text[: text.rfind("\n") + 1]  # a crash may have cut off the last line
        found = _parse(whole)
        if found and _is_same(found[0], comparison) and not is_complete(found[1]):
            file.truncate(len(whole.encode()))
            file.seek(0, os.SEEK_END)
            return Journal(file, folder, *found, is_continued=True)
    file.close()
    return None


def read(folder: Path) -> tuple[Comparison, list[Run]]:
    """Return what the ``results.jsonl`` of ``folder`` holds; raise a ``UsageError`` if it is not one."""
    text = (folder / NAME).read_text("utf-8")
    found = _parse(text[: text.rfind("\n") + 1])
    if not found:
        raise UsageError(f"{folder / NAME} holds no results of descend compare.")
    return found


def _parse(text: str) -> tuple[Comparison, list[Run]] | None:
    try:
        first, *others = (json.loads(line) for line in text.splitlines())
        return Comparison(**first), [_run(values) for values in others]
    except (ValueError, TypeError):  # not JSON, no line, or other names
        return None


def _run(values: Mapping[str, Any]) -> Run:
    lists = ("losses", "test_losses", "test_metrics")
    return Run(**{**values, **{name: [math.nan if x is None else x for x in values[name]] for name in lists}})


def _is_same(one: Comparison, other: Comparison) -> bool:
    settings = [json.loads(json.dumps(each.settings, default=str)) for each in (one, other)]
    return settings[0] == settings[1] and dict(one.versions) == dict(other.versions)


def _lock(file: IO[str]) -> bool:
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return False
    return True


def _write(file: IO[str], values: Mapping[str, Any]) -> None:
    file.write(json.dumps(_only_finite(values), allow_nan=False, default=str) + "\n")
    file.flush()
    os.fsync(file.fileno())


def _only_finite(value: Any) -> Any:
    """Replace NaN and Inf, which JSON does not have, by None."""
    if isinstance(value, Mapping):
        return {key: _only_finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_only_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
