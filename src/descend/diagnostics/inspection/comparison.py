"""What changed from one checkpoint to another."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from descend.diagnostics.inspection.examination import Examination
from descend.diagnostics.inspection.findings import Finding
from descend.diagnostics.inspection.optimizers import Param
from descend.diagnostics.inspection.stored import Stored, pieces, shown


@dataclass
class Change:
    """What changed in one parameter.

    Attributes:
        label: its name or number.
        steps: how many steps it has advanced; None if either file does not say.
        relative: by name of a state tensor, the norm of the difference over the norm before; inf if it was zero.
        other: changes of another kind, in words.
    """

    label: str
    steps: float | None
    relative: dict[str, float] = field(default_factory=dict)
    other: list[str] = field(default_factory=list)


@dataclass
class Comparison:
    """Two states of one optimizer.

    Attributes:
        matched_by: "name" or "order".
        groups: changes of groups and options, in words.
        added, removed: labels of parameters.
        changes: of each parameter that both have.
        appeared: what looks wrong, or is worth knowing, only in the later file.
        vanished: what did only in the earlier one.
    """

    matched_by: str
    groups: list[str]
    added: list[str]
    removed: list[str]
    changes: list[Change]
    appeared: list[Finding]
    vanished: list[Finding]


def compare(
    before: Examination, after: Examination, found_before: Sequence[Finding], found_after: Sequence[Finding]
) -> Comparison:
    """Compare an optimizer with itself at another time; by name if both files have names, else by order."""
    old, new = before.saved, after.saved
    by_name = old.is_named and new.is_named
    if by_name:
        others = {param.name: param for param in new.params}
        pairs = [(param, others[param.name]) for param in old.params if param.name in others]
    else:
        pairs = list(zip(old.params, new.params, strict=False))
    kept_old, kept_new = {id(param) for param, _ in pairs}, {id(param) for _, param in pairs}
    renamed = {was.label: now.label for was, now in pairs}
    was = {(finding.kind, renamed.get(case.where, case.where)) for finding in found_before for case in finding.cases}
    now = {(finding.kind, case.where) for finding in found_after for case in finding.cases}
    return Comparison(
        matched_by="name" if by_name else "order",
        groups=_group_changes(old.groups, new.groups),
        added=[param.label for param in new.params if id(param) not in kept_new],
        removed=[param.label for param in old.params if id(param) not in kept_old],
        changes=[_change(*pair) for pair in pairs],
        appeared=_without(found_after, was, {}),
        vanished=_without(found_before, now, renamed),
    )


def _without(findings: Sequence[Finding], known: set[tuple[str, str]], renamed: Mapping[str, str]) -> list[Finding]:
    """The findings less the cases that are among ``known``."""
    left = (
        Finding(
            finding.kind,
            tuple(case for case in finding.cases if (finding.kind, renamed.get(case.where, case.where)) not in known),
        )
        for finding in findings
    )
    return [finding for finding in left if finding.cases]


def _group_changes(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[str]:
    changes = [] if len(old) == len(new) else [f"{len(old)} groups became {len(new)}"]
    for index, (was, now) in enumerate(zip(old, new, strict=False)):
        for name in dict.fromkeys([*was, *now]):
            if name not in now:
                changes.append(f"group {index}: {name} is gone")
            elif name not in was:
                changes.append(f"group {index}: {name}={shown(now[name])} is new")
            elif shown(was[name]) != shown(now[name]):
                changes.append(f"group {index}: {name} {shown(was[name])} -> {shown(now[name])}")
    return changes


def _change(old: Param, new: Param) -> Change:
    steps = None if old.step is None or new.step is None else new.step - old.step
    change = Change(new.label, steps)
    if old.group != new.group:
        change.other.append(f"moved from group {old.group} to {new.group}")
    was, now = old.everything, new.everything
    for name in dict.fromkeys([*was, *now]):
        if name not in now or name not in was:
            change.other.append(f"{name} was {'added' if name in now else 'removed'}")
            continue
        shapes = [[list(tensor.shape) for tensor in tensors] for tensors in (was[name], now[name])]
        if shapes[0] != shapes[1]:
            if len(was[name]) == len(now[name]) == 1:
                change.other.append(f"{name} {shapes[0][0]} -> {shapes[1][0]}")
            else:
                change.other.append(f"{name}: {len(was[name])} tensors became {len(now[name])}")
            continue
        formats = [tensors[0].format for tensors in (was[name], now[name])]
        if formats[0] != formats[1]:
            change.other.append(f"{name} {formats[0]} -> {formats[1]}")
        relative = _relative(was[name], now[name])
        if relative is not None:
            change.relative[name] = relative
    return change


def _relative(old: Sequence[Stored], new: Sequence[Stored]) -> float | None:
    """Norm of the difference over the norm of the old; NaN if a difference is not finite, None without values."""
    difference = base = 0.0
    for was, now in zip(old, new, strict=True):
        before, after = was.read(), now.read()
        if before is None or after is None or before.is_complex() != after.is_complex():
            return None
        for a, b in zip(pieces(before), pieces(after), strict=True):
            a, b = a.to(torch.float64), b.to(torch.float64)
            difference = math.hypot(difference, float((b - a).norm()))
            base = math.hypot(base, float(a.norm()))
    if difference == 0:
        return 0.0
    return difference / base if base else math.inf
