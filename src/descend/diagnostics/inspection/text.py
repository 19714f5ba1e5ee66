"""An inspection as text for a terminal of any width."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence

from descend.diagnostics.inspection.comparison import Comparison
from descend.diagnostics.inspection.examination import Examination, Measures
from descend.diagnostics.inspection.files import Checkpoint
from descend.diagnostics.inspection.findings import Finding
from descend.diagnostics.inspection.optimizers import Param, SavedOptimizer
from descend.diagnostics.inspection.statistics import Statistics
from descend.diagnostics.inspection.stored import Stored, exact, shown

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_NAMED = 4  # places that a finding lists in text
_HEADS = ("", "norm", "smallest", "largest", "zeros", "NaN", "Inf")


class Page:
    """Lines that are wrapped at ``width``."""

    def __init__(self, width: int) -> None:
        self.width = max(width, 20)
        self.lines: list[str] = []

    def __str__(self) -> str:
        return "\n".join(self.lines)

    def add(self, text: str = "", indent: int = 0, hang: int = 2) -> None:
        """Add a paragraph; what does not fit goes to further lines, indented by ``hang`` more."""
        self.lines += textwrap.wrap(
            printable(text),
            self.width,
            initial_indent=" " * indent,
            subsequent_indent=" " * (indent + hang),
            break_on_hyphens=False,
        ) or [""]

    def table(self, rows: Sequence[Sequence[str]], indent: int) -> bool:
        """Add aligned columns, unless they do not fit; say whether they do."""
        rows = [[printable(cell) for cell in row] for row in rows]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        if indent + sum(widths) + 2 * (len(widths) - 1) > self.width:
            return False
        for row in rows:
            first, *others = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
            line = "  ".join([first.strip().ljust(widths[0]), *others])
            self.lines.append((" " * indent + line).rstrip())
        return True


def write_checkpoint(page: Page, checkpoint: Checkpoint) -> None:
    """The first line: the file."""
    page.add(f"{checkpoint.path}: {checkpoint.kind}, {size(checkpoint.size)}")


def write_optimizer(page: Page, examination: Examination) -> None:
    """What it is, and its groups."""
    page.add()
    page.add(_title(examination.saved))
    for index, options in enumerate(examination.saved.groups):
        _write_group(page, index, options, examination)


def write_state(page: Page, examination: Examination, findings: Sequence[Finding], top: int | None) -> None:
    """The state of the ``top`` most telling parameters; of all if None."""
    params = examination.saved.params
    there = [index for index in _order(examination, findings) if params[index].everything]
    listed = there if top is None else there[:top]
    if listed:
        page.add()
    for index in listed:
        _write_param(page, params[index], examination.measures[index])
    if len(there) > len(listed):
        page.add(f"... and {len(there) - len(listed):,} more; --all lists them.")


def write_findings(page: Page, findings: Sequence[Finding]) -> None:
    """What looks wrong, then what is worth knowing."""
    wrong = [finding for finding in findings if finding.is_wrong]
    page.add()
    page.add("Looks wrong:" if wrong else "Nothing looks wrong.")
    for finding in wrong:
        _write_finding(page, finding)
    if notes := [finding for finding in findings if not finding.is_wrong]:
        page.add("Worth knowing:")
        for finding in notes:
            _write_finding(page, finding)


def write_comparison(page: Page, comparison: Comparison, title: str, top: int | None) -> None:
    """What changed."""
    page.add(f"{title}: what changed (parameters matched by {comparison.matched_by})")
    steps = [change.steps for change in comparison.changes if change.steps is not None]
    if steps:
        page.add(f"steps advanced: {_range(steps)}", 2)
    for line in comparison.groups or ["no option of a group changed"]:
        page.add(line, 2)
    for what, labels in (("added", comparison.added), ("removed", comparison.removed)):
        if labels:
            page.add(f"{what}: {_some(labels)}", 2)
    changes = sorted(comparison.changes, key=lambda change: (not change.other, -_largest(change.relative.values())))
    moved = [change for change in changes if change.other or any(change.relative.values())]
    if len(moved) < len(changes):
        page.add(f"{len(changes) - len(moved):,} of {len(changes):,} parameters have the same state", 2)
    if moved:
        page.add("relative change, the largest first:", 2)
    for change in moved if top is None else moved[:top]:
        parts = [f"{name} {relative:.3g}" for name, relative in change.relative.items()]
        page.add(f"{change.label}: {', '.join([*change.other, *parts])}", 4)
    if top is not None and len(moved) > top:
        page.add(f"... and {len(moved) - top:,} more; --all lists them.", 4)
    for title, found in (("Newly found:", comparison.appeared), ("No longer found:", comparison.vanished)):
        if found:
            page.add(title)
        for finding in found:
            _write_finding(page, finding)


def _title(saved: SavedOptimizer) -> str:
    params = saved.distinct
    steps = [param.step for param in params if param.step is not None and math.isfinite(param.step)]
    steps = steps or [float(group["k"]) for group in saved.groups if isinstance(group.get("k"), int)]
    grouped = [param for param in params if param.group is not None]
    count = f"{len(grouped):,} parameter{'s' if len(grouped) != 1 else ''}"
    shapes = [param.shape for param in grouped if param.shape is not None]
    if shapes and len(shapes) == len(grouped):
        count += f" ({sum(map(math.prod, shapes)):,} elements)"
    state = sum(tensor.nbytes for param in params for tensors in param.tensors.values() for tensor in tensors)
    method = f"looks like {saved.method}" if saved.method else "an unknown method"
    parts = [method, count, f"{size(state)} of state"]
    parts.append(f"step {_range(steps)}" if steps else "no step counts")
    if any(param.name is None for param in params):
        parts.append("without names")
    return f"{saved.where or 'optimizer'}: {', '.join(parts)}"


def _write_group(page: Page, index: int, options: dict[str, object], examination: Examination) -> None:
    count = len(examination.saved.keys[index])
    values = ", ".join(
        f"{name}={shown(value)}" for name, value in options.items() if value is not None and value is not False
    )
    head = f"group {index}: {count:,} parameter{'s' if count != 1 else ''}"
    page.add(f"{head}; {values}" if values else f"{head}, no options", 2)
    if quantiles := examination.group_step_sizes[index]:
        page.add(f"step sizes lr / (sqrt(v_hat) + eps): {_quantiles(quantiles)}", 4)


def _write_finding(page: Page, finding: Finding) -> None:
    page.add(f"- {finding.what}. {finding.advice}", 2)
    for case in finding.cases[:_NAMED]:
        page.add(f"{case.where}: {case.detail}", 6)
    if len(finding.cases) > _NAMED:
        page.add(f"and {len(finding.cases) - _NAMED:,} more", 6)


def _write_param(page: Page, param: Param, measures: Measures) -> None:
    every = [tensor for tensors in param.everything.values() for tensor in tensors]
    same = len({(tensor.shape, tensor.format) for tensor in every}) == 1
    head = [_kind(every[0])] if same else []
    head += [f"{name}={exact(value)}" for name, value in param.scalars.items()]
    if param.group is not None:
        head.append(f"group {param.group}")
    page.add(f"{param.label}  {', '.join(head)}")
    rows = []
    for name, tensors in param.everything.items():
        label = name if len(tensors) == 1 else f"{name} x{len(tensors)}"
        label = label if same else f"{label} {_kind(tensors[0])}"
        rows.append((label, *_cells(measures.statistics.get(name))))
    if not page.table([_HEADS, *rows], 2):
        for label, *cells in rows:
            pairs = zip(_HEADS[1:], cells, strict=True)
            page.add(f"{label}: {', '.join(f'{head} {cell}' for head, cell in pairs)}", 2)
    if measures.step_sizes:
        page.add(f"step sizes: {_quantiles(measures.step_sizes)}", 2)


def _cells(numbers: Statistics | None) -> tuple[str, ...]:
    if numbers is None:
        return ("-",) * 6
    low, high = ("-" if value is None else f"{value:.3g}" for value in (numbers.smallest, numbers.largest))
    zeros = f"{100 * numbers.zeros / numbers.numel:.3g}%" if numbers.numel else "-"
    return f"{numbers.norm:.3g}", low, high, zeros, f"{numbers.nans:,}", f"{numbers.infs:,}"


def _quantiles(values: Sequence[float]) -> str:
    low, _, median, _, high = (f"{value:.3g}" for value in values)
    return f"1%: {low}, median: {median}, 99%: {high}"


def _kind(tensor: Stored) -> str:
    return f"{list(tensor.shape)} {tensor.format}"


def _order(examination: Examination, findings: Sequence[Finding]) -> list[int]:
    """Parameters with something wrong first, then the largest."""
    wrong = {case.where for finding in findings if finding.is_wrong for case in finding.cases}
    params = examination.saved.params
    return sorted(
        range(len(params)),
        key=lambda index: (params[index].label not in wrong, -math.prod(params[index].shape or (0,))),
    )


def _some(labels: Sequence[str]) -> str:
    more = f" and {len(labels) - _NAMED:,} more" if len(labels) > _NAMED else ""
    return ", ".join(labels[:_NAMED]) + more


def _range(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return exact(low) if low == high else f"{exact(low)} to {exact(high)}"


def _largest(values: Iterable[float]) -> float:
    return max((math.inf if math.isnan(value) else value for value in values), default=0.0)


def printable(text: str) -> str:
    """The text without control characters: a name in a file may hold commands to the terminal."""
    return "".join(char if char.isprintable() else " " if char.isspace() else "?" for char in text)


def size(count: int) -> str:
    """Bytes with a unit."""
    value, unit = float(count), 0
    while value >= 1024 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:.1f} {_UNITS[unit]}" if unit else f"{count} B"
