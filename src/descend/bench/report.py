"""What was measured, as a table in the terminal, as Markdown and as JSON."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from descend.bench.bandwidth import Bandwidth
from descend.bench.machine import Machine
from descend.bench.measure import Case, Row
from descend.bench.methods import DEFAULT, FOREACH, FUSED, OURS
from descend.reporting.text import plural, seconds, size

LABELS = {OURS: "descend", DEFAULT: "torch for-loop", FOREACH: "torch foreach", FUSED: "torch fused"}
HEADINGS = ("step", "median", "quartiles", "first step", "faster", "GB/s", "reached")
# What a narrow terminal does without, in this order.
DISPENSABLE = ("GB/s", "quartiles", "first step")
GAP = 2
NOTES = (
    "Median and quartiles of a step with {gradients} gradients. First step: with new state; the first one of a kind "
    "also loads or compiles kernels. Faster: descend, so many times. Reached: share of the limit, which is the time to "
    "move the bytes that a step must move, at the bandwidth measured on arrays as large. Where others share the "
    "memory, as on a rented machine, its speed changes, and a step may seem to beat the limit."
)


@dataclass(frozen=True)
class Report:
    """All that was measured.

    Args:
        machine: the computer.
        threads: torch's.
        device: where the tensors were.
        gradients: ``"fresh"`` or ``"fixed"``.
        bandwidths: of the memory.
        cases: one per optimizer and workload; those that were not begun have empty rows.
        interrupted: whether Ctrl-C ended it.
    """

    machine: Machine
    threads: int
    device: str
    gradients: str
    bandwidths: Sequence[Bandwidth]
    cases: Sequence[Case]
    interrupted: bool = False

    def where(self) -> str:
        """Return one line: machine, programs and date."""
        machine = self.machine
        versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
        cores, threads = plural(machine.cores, "core"), plural(self.threads, "thread")
        device = "" if self.device == "cpu" else f", {self.device}"
        return f"{machine.processor}, {cores}, {threads}{device}; {machine.system}; {versions}; {machine.date}"

    def memory(self) -> str:
        """Return one line: the bandwidth by size of the arrays."""
        rates = ", ".join(f"{each.rate / 1e9:.3g} ({size(each.footprint)})" for each in self.bandwidths)
        return f"Memory bandwidth in GB/s, by size of the arrays: {rates}."

    def notes(self) -> str:
        """Return what the columns mean, and what makes them doubtful."""
        notes = NOTES.format(gradients=self.gradients)
        machine = self.machine
        if machine.is_busy:
            load = f"load {machine.load:.1f} on {plural(machine.cores, 'core')}"
            notes += f" The machine was busy ({load}): do not trust the times."
        return notes

    def to_json(self) -> dict[str, Any]:
        """Return what ``bench.json`` holds: times in seconds, null for what was not measured."""
        return {
            "machine": {**asdict(self.machine), "threads": self.threads},
            "device": self.device,
            "gradients": self.gradients,
            "interrupted": self.interrupted,
            "bandwidth": [{"footprint": each.footprint, "bytes_per_second": each.rate} for each in self.bandwidths],
            "cases": [
                {
                    "optimizer": case.optimizer,
                    "shape": case.workload.name,
                    "dtype": case.workload.dtype,
                    "tensors": len(case.workload.templates),
                    "numbers": case.workload.shape.numel,
                    "max_norm": case.max_norm,
                    "interleaved": case.interleaved,
                    "rows": [_row(case, row) for row in case.rows],
                }
                for case in self.cases
            ],
        }

    def table(self, width: int) -> str:
        """Return the table for a terminal of so many columns; a narrow one has fewer columns, and all names."""
        body = [(case, [(row, cells(case, row)) for row in case.rows if _is_shown(row)]) for case in self.cases]
        lines = [row for _, rows in body for _, row in rows]
        shown = list(range(len(HEADINGS)))
        widths = [max(len(line[i]) for line in (HEADINGS, *lines)) for i in shown]
        for name in DISPENSABLE:
            if sum(widths[i] for i in shown) + GAP * (len(shown) - 1) > width:
                shown.remove(HEADINGS.index(name))

        def line(row: Sequence[str]) -> str:
            first, *others = shown
            numbers = [f"{row[i]:>{widths[i] + GAP}}" for i in others]
            return f"{row[first]:<{widths[first]}}{''.join(numbers)}".rstrip()

        text = [line(HEADINGS)]
        for case, rows in body:
            text += ["", *_wrapped(title(case), width)]
            for row, row_cells in rows:
                text.append(line(row_cells))
                text += _wrapped(f"  {remark(row)}", width) if remark(row) else []
            if not rows:
                text.append("not measured")
        missing = [HEADINGS[i] for i in range(len(HEADINGS)) if i not in shown]
        notes = self.notes() + (f" Not shown at this width: {', '.join(missing)}." if missing else "")
        return "\n".join([*text, "", *_wrapped(notes, width)])

    def markdown(self) -> str:
        """Return the table as Markdown, with machine and date."""
        lines = [
            "| optimizer, parameters | " + " | ".join(HEADINGS) + " |",
            "|---|---|" + "---:|" * (len(HEADINGS) - 1),
        ]
        for case in self.cases:
            for row in case.rows:
                if _is_shown(row):
                    name, *numbers = cells(case, row)
                    name += f" ({remark(row)})" if remark(row) else ""
                    texts = (title(case), name, *numbers)
                    lines.append("| " + " | ".join(text.replace("|", r"\|") for text in texts) + " |")
        return "\n".join([*lines, "", f"{self.where()}.", "", self.memory(), "", self.notes(), ""])


def title(case: Case) -> str:
    """Return the name of a case, with what it holds."""
    workload = case.workload
    tensors = len(workload.templates)
    parts = [case.optimizer, workload.name, workload.dtype]
    parts += [] if case.max_norm is None else [f"clipped at {case.max_norm:g}"]
    parts.append(f"{count_text(workload.shape.numel)} in {plural(tensors, 'tensor')}")
    parts.append(f"limit {seconds(case.rows[0].limit)}")
    parts += [] if case.interleaved else ["one after the other, as memory is short"]
    return ", ".join(parts)


def cells(case: Case, row: Row) -> tuple[str, ...]:
    """Return a line of the table, a text under each of ``HEADINGS``."""
    timing, ours = row.timing, case.rows[0].timing
    if timing is None:
        return (LABELS[row.name], *(len(HEADINGS) - 1) * ("-",))
    faster = _times(timing.median / ours.median) if ours and row.name != OURS else ""
    return (
        LABELS[row.name],
        seconds(timing.median),
        _range(timing.quartile1, timing.quartile3),
        seconds(row.first) if row.first is not None else "-",
        faster,
        f"{row.moved / timing.median / 1e9:.3g}",
        _percent(row.limit / timing.median),
    )


def remark(row: Row) -> str:
    """Return what must be said of a row; nothing if all is well."""
    if row.remark:
        return f"not measured: {row.remark}"
    if not row.agrees:
        again = " when it takes them again" if row.name == OURS else ""
        return f"differs from descend after {row.steps} steps{again}, {row.distance:.3g} times what rounding allows"
    return ""


def count_text(count: int) -> str:
    """Return a count of numbers.

    Example:
        >>> count_text(124_439_808), count_text(17)
        ('124 M numbers', '17 numbers')
    """
    for unit, factor in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= 0.9995 * factor:
            return f"{count / factor:.3g} {unit} numbers"
    return plural(count, "number")


def _range(least: float, most: float) -> str:
    first, last = seconds(least), seconds(most)
    if first == last:
        return last
    return f"{first.removesuffix(last[last.index(' ') :])} to {last}"  # the unit once, if it is the same


def _times(ratio: float) -> str:
    return f"{ratio:.0f}x" if ratio >= 99.95 else f"{ratio:.3g}x"


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.0995 else f"{share:.1%}"


def _is_shown(row: Row) -> bool:
    return bool(row.seconds or row.remark)


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, max(10, width), subsequent_indent="  ", break_on_hyphens=False)


def _row(case: Case, row: Row) -> dict[str, Any]:
    timing, ours = row.timing, case.rows[0].timing
    return {
        "name": row.name,
        "label": LABELS[row.name],
        "first_seconds": row.first,
        "median_seconds": timing and timing.median,
        "quartile1_seconds": timing and timing.quartile1,
        "quartile3_seconds": timing and timing.quartile3,
        "counted_steps": len(row.seconds),
        "steps": row.steps,
        "bytes_moved": row.moved,
        "limit_seconds": row.limit,
        "share_of_limit": timing and row.limit / timing.median,
        "times_ours": timing and ours and timing.median / ours.median,
        "agrees": None if row.distance is None else row.agrees,
        "remark": remark(row) or None,
    }
