"""What ``torch.optim`` promises is measured class by class; what we do not keep has its reason in the documentation."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from deliberate import ABSENT, BEFORE_2_15, DELIBERATE, anchor_of
from measure import describe, same
from parity_table import (
    FUNCTIONS,
    INDEX,
    OTHERS,
    PAGE,
    VERSION,
    absent,
    function_arguments,
    index,
    is_torchs_own,
    page,
    pairs,
    rows_of,
)

DIFFERENCES = (Path(__file__).parents[2] / "docs" / "differences.md").read_text(encoding="utf-8")
ANCHORS = re.findall(r'<a id="([^"]+)"></a>', DIFFERENCES)


@pytest.mark.parametrize("name", pairs())
def test_every_difference_is_deliberate(name: str) -> None:
    bugs = {
        row.item: (row.theirs, row.ours) for row in rows_of(name) if not row.is_same and not anchor_of(name, row.item)
    }
    assert bugs == {}, "ours must do what torch does, or tests/parity/deliberate.py and docs/differences.md say why not"


def test_every_deliberate_difference_is_one() -> None:
    differing = [(name, row.item) for name in pairs() for row in rows_of(name) if not row.is_same]
    used = {anchor_of(name, item) for name, item in differing} | ({ABSENT} if absent() else set())
    assert used == {*(anchor for *_, anchor in DELIBERATE), *([ABSENT] if absent() else [])}


def test_every_deliberate_difference_has_its_sentence() -> None:
    assert len(ANCHORS) == len(set(ANCHORS))
    anchors = {anchor for *_, anchor in (*DELIBERATE, *BEFORE_2_15)}
    assert {*anchors, *([ABSENT] if absent() else [])} == set(ANCHORS)


class Careless(torch.optim.SGD):
    """A class that breaks one promise of each kind."""

    def __init__(self, params: Any, lr: float = 0.1, momentum: float = 0.9, weight_decay: float = 0) -> None:
        super().__init__(params, abs(lr), momentum, weight_decay=weight_decay)
        self.param_groups = tuple(self.param_groups)

    def zero_grad(self) -> None:
        """Without torch's argument."""


def test_what_is_broken_is_noticed() -> None:
    theirs, ours = describe(torch.optim.SGD), describe(Careless, like=torch.optim.SGD)
    broken = {tuple(item) for item, detail in theirs.items() if not same(item, detail, ours.get(item))}
    assert broken >= {
        ("argument", "lr"),
        ("argument", "nesterov"),
        ("attribute", "param_groups"),
        ("method", "zero_grad"),
        ("state key", "momentum_buffer"),
        ("group key", "lr"),
        ("error", "`lr=-1.0`"),
    }


@pytest.mark.parametrize("name", OTHERS)
def test_other_names_of_torch_are_here(name: str) -> None:
    assert is_torchs_own(name)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_have_torchs_arguments(name: str) -> None:
    theirs, ours = function_arguments(name)
    assert ours == theirs


def test_page_is_what_the_classes_are() -> None:
    written = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    if f"torch.optim {VERSION}," not in written:
        pytest.skip("there is no page about this torch")
    assert written == page(), f"{PAGE.name} is out of date: make parity"


def test_index_lists_the_pages() -> None:
    assert INDEX.read_text(encoding="utf-8") == index(), "docs/parity.md is out of date: make parity"
