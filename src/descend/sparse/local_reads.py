"""Reads of a table that leave no trace, so that replicas stay equal bit for bit.

Every rank reads rows of its own. Catching up from step k to t in one pass or in two differs by the closed form's error,
so a rank that brings up to date what the others leave behind would drift away from them. What a rank reads is therefore
remembered as it was. At the next step, rows with a gradient stay up to date: all ranks catch up with them between the
same two steps. All others are put back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class _Before(NamedTuple):
    """Rows as they were. State of zeros is not copied: writing it back would commit its memory."""

    rows: Tensor
    row_step: Tensor
    param: Tensor
    used: Tensor  # which of the rows have state
    state: list[Tensor]  # of those


class LocalReads:
    """What reading has changed since the last step."""

    def __init__(self) -> None:
        self._before: list[_Before] = []

    def save(self, rows: Tensor, param: Tensor, state: Sequence[Tensor], row_step: Tensor) -> None:
        """Remember rows that are about to be brought up to date."""
        rows = rows.clone()
        steps = row_step.index_select(0, rows)
        used = steps > 0
        copies = [tensor.index_select(0, rows[used]) for tensor in state]
        self._before.append(_Before(rows, steps, param.detach().index_select(0, rows), used, copies))

    def undo(self, param: Tensor, state: Sequence[Tensor], row_step: Tensor, except_for: Tensor | None = None) -> None:
        """Put all rows back, except for some, given in ascending order; then forget them."""
        for before in self._before:
            back = _not_among(before.rows, except_for)
            if not back.any():
                continue
            rows = before.rows[back]
            row_step[rows] = before.row_step[back]
            param.data[rows] = before.param[back]  # no write that autograd should know of
            used, copied = before.rows[before.used & back], back[before.used]
            if len(used):
                for tensor, copy in zip(state, before.state, strict=True):
                    tensor[used] = copy[copied]
        self.forget()

    def forget(self) -> None:
        """What has been read stays as it is now."""
        self._before.clear()


def _not_among(rows: Tensor, others: Tensor | None) -> Tensor:
    """Whether each row is none of ``others``, which are in ascending order."""
    if others is None or not len(others):
        return torch.ones_like(rows, dtype=torch.bool)
    known = others.to(rows.device)
    return known[torch.searchsorted(known, rows).clamp(max=len(known) - 1)] != rows
