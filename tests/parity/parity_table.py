"""Writes the page about the installed torch in ``docs/parity``, and their list, ``docs/parity.md``.

Usage: ``python tests/parity/parity_table.py``, or ``make parity``.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from deliberate import ABSENT, anchor_of
from measure import KINDS, START, Item, describe, same, signature_of
from torch.optim import Optimizer

import descend
from descend.first_order.optimizer import Options

INDEX = Path(__file__).parents[2] / "docs" / "parity.md"
VERSION = torch.__version__.split("+")[0]
PAGE = INDEX.with_suffix("") / f"{'.'.join(VERSION.split('.')[:2])}.md"
FUNCTIONS = ("clip_grad_norm_", "clip_grad_value_", "clip_grads_with_norm_", "get_total_norm")

INDEX_HEAD = """# Parity with torch.optim, measured

`make parity` compares the classes of the installed torch with ours and writes the page of that version. A test fails
while the page is out of date. Each page lists what a program can see of a class: arguments, attributes, methods, state,
options of groups, errors.

| torch | the same in both |
|---|---|
"""

HEAD = """# Parity with torch.optim {torch}, measured

Written by `make parity`; other versions are listed in [parity.md](../parity.md). "yes" means that ours is the same: the
position and default of an argument, the arguments of a method, the type and shape of a state tensor, the default of an
option, the type of an error and the first {start} characters of its text. Every "no" links to its reason in
[differences.md](../differences.md).
"""


# What ``torch.optim`` has beside its optimizers.
OTHERS = tuple(
    name
    for name in torch.optim.__all__
    if not (isinstance(found := getattr(torch.optim, name), type) and issubclass(found, Optimizer))
    or found is Optimizer
)


class Row(NamedTuple):
    """What torch's class has, and what ours makes of it."""

    item: Item
    theirs: str
    ours: str | None
    is_same: bool


def torch_classes() -> dict[str, type[Optimizer]]:
    """Every optimizer of ``torch.optim``."""
    found = {name: getattr(torch.optim, name) for name in torch.optim.__all__}
    return {
        name: value
        for name, value in found.items()
        if isinstance(value, type) and issubclass(value, Optimizer) and value is not Optimizer
    }


def pairs() -> dict[str, tuple[type[Optimizer], Any]]:
    """Torch's class and ours, for each that we have."""
    return {
        name: (theirs, getattr(descend, name)) for name, theirs in torch_classes().items() if name in descend.__all__
    }


@cache
def rows_of(name: str) -> tuple[Row, ...]:
    """All that is measured of one class."""
    theirs, ours = pairs()[name]
    expected, found = describe(theirs), describe(ours, like=theirs)
    return tuple(
        Row(item, detail, found.get(item), same(item, detail, found.get(item))) for item, detail in expected.items()
    )


def absent() -> list[str]:
    """Classes of torch that have no counterpart here."""
    return [name for name in torch_classes() if name not in descend.__all__]


def page() -> str:
    """The whole page about the installed torch."""
    return "\n".join([HEAD.format(start=START, torch=VERSION), *_body(), ""])


def index() -> str:
    """The list of the pages, with the sums of their first tables."""
    lines = []
    for path in sorted(PAGE.parent.glob("*.md"), key=lambda path: int(path.stem.split(".")[1])):
        text = path.read_text(encoding="utf-8")
        same, total = (sum(map(int, counts)) for counts in zip(*re.findall(r" (\d+) of (\d+) ", text), strict=True))
        version = text.split(maxsplit=5)[4].rstrip(",")
        lines.append(f"| [{version}](parity/{path.name}) | {same} of {total} |\n")
    return INDEX_HEAD + "".join(lines)


def _body() -> Iterator[str]:
    names = sorted(pairs(), key=str.lower)
    yield "| class | " + " | ".join(f"{kind}s" for kind in KINDS) + " |"
    yield "|---|" + "---|" * len(KINDS)
    for name in names:
        counts = []
        for kind in KINDS:
            rows = [row for row in rows_of(name) if row.item.kind == kind]
            counts.append(f"{sum(row.is_same for row in rows)} of {len(rows)}")
        yield f"| [{name}](#{name.lower()}) | " + " | ".join(counts) + " |"
    if absent():
        yield f"\nNot here: {', '.join(absent())} ([why](../differences.md#{ABSENT}))."
    shared = _shared(names)
    yield "\n## Every class\n"
    yield from _table(row for row in rows_of(names[0]) if row in shared)
    for name in names:
        yield f"\n## {name}\n"
        if pairs()[name][0] is pairs()[name][1]:
            yield "torch's own class."
            continue
        if alone := _alone(name):
            yield f"Ours alone: {', '.join(f'`{argument}`' for argument in alone)}.\n"
        yield from _table((row for row in rows_of(name) if row not in shared), name)
    yield "\n## Other names of torch.optim\n"
    yield "| name | ours |\n|---|---|"
    for name in OTHERS:
        ours = "torch's own" if is_torchs_own(name) else "**missing**"
        yield f"| `{name}` | {ours} |"
    yield "\n## Functions of torch.nn.utils\n"
    yield "| function | arguments | ours |\n|---|---|---|"
    for name in FUNCTIONS:
        yield f"| `{name}` | {', '.join(f'`{argument}`' for argument, _ in function_arguments(name)[0])} | yes |"


def is_torchs_own(name: str) -> bool:
    """Whether a name of ``torch.optim`` is also ours, for the same object."""
    return name in descend.__all__ and getattr(descend, name) is getattr(torch.optim, name)


def function_arguments(name: str) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Arguments of a function of ``torch.nn.utils``, and of ours of the same name."""
    theirs, ours = (inspect.unwrap(getattr(module, name)) for module in (torch.nn.utils, descend))
    return signature_of(theirs), signature_of(ours)


def _shared(names: list[str]) -> set[Row]:
    """What all classes have alike."""
    shared = set(rows_of(names[0]))
    for name in names[1:]:
        shared &= set(rows_of(name))
    return {row for row in shared if row.is_same}


def _alone(name: str) -> list[str]:
    theirs, ours = (inspect.signature(side).parameters for side in pairs()[name])
    named = [argument for argument, parameter in ours.items() if parameter.kind is not parameter.VAR_KEYWORD]
    options = Options.__annotations__ if len(named) < len(ours) else {}
    return [argument for argument in (*named, *options) if argument not in theirs]


def _table(rows: Iterator[Row], name: str = "") -> Iterator[str]:
    yield "| | | torch | ours |\n|---|---|---|---|"
    for row in rows:
        label = row.item.name if "`" in row.item.name or row.item.kind == "error" else f"`{row.item.name}`"
        theirs, ours = _cell(_told(row.item, row.theirs)), _cell(_answer(row, name))
        yield f"| {row.item.kind} | {_cell(label)} | {theirs} | {ours} |"


def _answer(row: Row, name: str) -> str:
    if row.is_same:
        return "yes"
    anchor = anchor_of(name, row.item)
    why = f"[why](../differences.md#{anchor})" if anchor else "**a bug**"
    return f"no, {_told(row.item, row.ours) if row.ours else 'missing'}, {why}"


def _told(item: Item, detail: str) -> str:
    if item.kind != "error" or detail == "accepted":
        return detail
    return f"`` {detail} ``" if "`" in detail else f"`{detail}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")
    INDEX.write_text(index(), encoding="utf-8")
