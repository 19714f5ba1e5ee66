"""``descend inspect``: read, examine, compare, print."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from descend.diagnostics.inspection.comparison import Comparison, compare
from descend.diagnostics.inspection.examination import Examination, examine
from descend.diagnostics.inspection.files import Checkpoint, open_checkpoint
from descend.diagnostics.inspection.findings import Finding, findings_of
from descend.diagnostics.inspection.optimizers import find_optimizers
from descend.diagnostics.inspection.step_sizes import QUANTILES
from descend.diagnostics.inspection.stored import Stored, shown
from descend.diagnostics.inspection.text import (
    Page,
    printable,
    write_checkpoint,
    write_comparison,
    write_findings,
    write_optimizer,
    write_state,
)
from descend.reporting.errors import UsageError

Examined = list[tuple[Examination, list[Finding]]]


def run(path: Path, other: Path | None, top: int | None, json_file: str | None, check: bool) -> int:
    """Inspect one checkpoint, or two of the same optimizer.

    Args:
        path: the checkpoint.
        other: a later one, to compare with.
        top: how many parameters to list; None for all.
        json_file: where to write everything as JSON; "-" for standard output, instead of the text.
        check: return 1 if anything looks wrong in the last checkpoint given.
    Returns:
        Exit status, 0 or 1.
    Raises:
        UsageError: if a file cannot be read, holds no optimizer, or ``json_file`` exists.
    """
    target = None if json_file in (None, "-") else Path(str(json_file))
    if target is not None:
        if target.exists():
            raise UsageError(f"{target} exists and is not overwritten; give --json another file.")
        if not target.parent.is_dir():
            raise UsageError(f"--json: there is no folder {target.parent}.")
    page = Page(shutil.get_terminal_size((100, 24)).columns)
    try:
        checkpoints = [open_checkpoint(given) for given in (path, other) if given is not None]
        found = [_examined(checkpoint) for checkpoint in checkpoints]
        pairs = _pairs(found[0], found[1]) if other is not None else []
        comparisons = [(title, compare(a, b, x, y)) for title, (a, x), (b, y) in pairs]
    except UsageError as error:
        raise UsageError(printable(str(error))) from None
    except OSError as error:  # a name that is too long, or a folder that may not be entered
        raise UsageError(printable(f"{error}.")) from None
    for checkpoint, examined in zip(checkpoints, found, strict=True):
        write_checkpoint(page, checkpoint)
        for examination, findings in examined:
            write_optimizer(page, examination)
            if other is None:
                write_findings(page, findings)
                write_state(page, examination, findings, top)
        if other is not None:
            page.add()
    for title, comparison in comparisons:
        write_comparison(page, comparison, title, top)
    if json_file is not None:
        document = json.dumps(_document(checkpoints, found, comparisons), indent=1, allow_nan=False)
        if target is None:
            print(document)
        else:
            try:
                with target.open("x", encoding="utf-8") as file:
                    file.write(document + "\n")
            except OSError as error:
                raise UsageError(f"--json: {target} cannot be written: {error.strerror}.") from None
    if json_file != "-":
        encoding = getattr(sys.stdout, "encoding", None) or "ascii"  # there may be no standard output
        print(str(page).strip().encode(encoding, "replace").decode(encoding))
    is_wrong = any(finding.is_wrong for _, findings in found[-1] for finding in findings)
    return int(check and is_wrong)


def _examined(checkpoint: Checkpoint) -> Examined:
    try:
        optimizers = find_optimizers(checkpoint.content)
        if not optimizers:
            raise UsageError(f"there is no optimizer in it: {_what_is_there(checkpoint.content)}.")
        examinations = [examine(optimizer) for optimizer in optimizers]
    except UsageError as error:
        raise UsageError(f"{checkpoint.path}: {error}") from None
    except (RuntimeError, MemoryError, RecursionError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UsageError(f"{checkpoint.path}: its state cannot be read: {lines[0][:200]}") from None
    return [(examination, findings_of(examination)) for examination in examinations]


def _what_is_there(content: Any) -> str:
    if isinstance(content, Stored):
        return f"it is a tensor {list(content.shape)}"
    if not isinstance(content, Mapping):
        return f"it is a {type(content).__name__}"
    if content and all(isinstance(value, Stored) for value in content.values()):
        elements = sum(value.numel for value in content.values())
        return f"it has {len(content):,} tensors with {elements:,} elements, as a model's state_dict()"
    keys = [str(key)[:40] for key in content]
    return f"it has the keys {', '.join(keys[:8])}{', ...' if len(keys) > 8 else ''}" if keys else "it is empty"


def _pairs(
    before: Examined, after: Examined
) -> list[tuple[str, tuple[Examination, list[Finding]], tuple[Examination, list[Finding]]]]:
    """The optimizers that belong together: those at the same place, else those in the same order."""
    places = {examined[0].saved.where: examined for examined in after}
    if {examined[0].saved.where for examined in before} == set(places) and len(places) == len(after):
        return [(old[0].saved.where or "optimizer", old, places[old[0].saved.where]) for old in before]
    if len(before) != len(after):
        raise UsageError(f"the first file has {len(before)} optimizers, the second {len(after)}: nothing to compare.")
    return [(old[0].saved.where or "optimizer", old, new) for old, new in zip(before, after, strict=True)]


def _document(
    checkpoints: list[Checkpoint], found: list[Examined], comparisons: list[tuple[str, Comparison]]
) -> dict[str, Any]:
    files = [
        {
            "path": str(checkpoint.path),
            "format": checkpoint.kind,
            "bytes": checkpoint.size,
            "optimizers": [_of_optimizer(*one) for one in examined],
        }
        for checkpoint, examined in zip(checkpoints, found, strict=True)
    ]
    changes = [
        {
            "where": title,
            **asdict(comparison),
            "appeared": [_of_finding(finding) for finding in comparison.appeared],
            "vanished": [_of_finding(finding) for finding in comparison.vanished],
        }
        for title, comparison in comparisons
    ]
    document: dict[str, Any] = _finite({"quantiles": list(QUANTILES), "files": files, "comparisons": changes})
    return document


def _of_optimizer(examination: Examination, findings: list[Finding]) -> dict[str, Any]:
    saved = examination.saved
    return {
        "where": saved.where,
        "method": saved.method or None,
        "groups": [
            {"options": {name: shown(value) for name, value in options.items()}, "step_sizes": quantiles}
            for options, quantiles in zip(saved.groups, examination.group_step_sizes, strict=True)
        ],
        "parameters": [
            {
                "name": param.label,
                "group": param.group,
                "scalars": param.scalars,
                "state": {
                    name: {
                        "shape": list(tensors[0].shape),
                        "dtype": tensors[0].format,
                        "tensors": len(tensors),
                        **(asdict(numbers) if (numbers := measures.statistics.get(name)) else {}),
                    }
                    for name, tensors in param.everything.items()
                },
                "step_sizes": measures.step_sizes,
                "below_eps": list(measures.below_eps),
                "rows_without_gradient": list(measures.zero_rows),
            }
            for param, measures in zip(saved.params, examination.measures, strict=True)
        ],
        "findings": [_of_finding(finding) for finding in findings],
    }


def _of_finding(finding: Finding) -> dict[str, Any]:
    return {
        "kind": finding.kind,
        "wrong": finding.is_wrong,
        "what": finding.what,
        "advice": finding.advice,
        "cases": [asdict(case) for case in finding.cases],
    }


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become strings."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    return [_finite(entry) for entry in value] if isinstance(value, list | tuple) else value
