"""Running ``descend compare`` in tests, and reading what it wrote."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from descend.command.cli import main
from descend.compare import report
from descend.compare.records import Comparison, Run

FILES = ["curves.png", "curves.svg", "report.html", "results.jsonl"]

Results = tuple[dict[str, Any], list[dict[str, Any]]]


def arguments(out: Path, task: str, *optimizers: str, steps: int = 3, **options: Any) -> list[str]:
    """Return the words of a command; an option that is True has no value, a list is given several times."""
    named = [word for optimizer in optimizers for word in ("--optimizer", optimizer)]
    words = ["compare", task, *named, "--steps", str(steps), "--out", str(out)]
    for name, value in options.items():
        for one in value if isinstance(value, list) else [value]:
            words += [f"--{name.replace('_', '-')}"] if one is True else [f"--{name.replace('_', '-')}", str(one)]
    return words


def compare(out: Path, task: str, *optimizers: str, steps: int = 3, status: int = 0, **options: Any) -> Results:
    """Run the command without its report, assert its exit status, and return what it measured."""
    options = {"batch_size": 8, **options}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "write", write_nothing)  # takes longer than a few steps, and has tests of its own
        assert main(arguments(out, task, *optimizers, steps=steps, **options)) == status
    return read(out)


def read(out: Path) -> Results:
    """Return the lines of ``results.jsonl``; assert that they are standard JSON, and that the report is there."""
    assert sorted(path.name for path in out.iterdir()) == FILES
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    lines = (out / "results.jsonl").read_text("utf-8").splitlines()
    first, *runs = (json.loads(line, parse_constant=pytest.fail) for line in lines)
    return first, runs


def write_nothing(folder: Path, comparison: Comparison, runs: Sequence[Run]) -> None:
    """Stand in for ``report.write``: write files that are no report."""
    for name in FILES[:-1]:
        (folder / name).write_bytes(b"\x89PNG")
