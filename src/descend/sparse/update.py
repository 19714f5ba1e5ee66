"""Sparse gradients in a plan: which rows they touch, and what is done to the others."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from descend.backends import eager
from descend.backends.cpu.rows import TouchedRows, load_reader
from descend.backends.cpu.threads import serial_in_forked_child
from descend.core import memory
from descend.core.signature import signature
from descend.norms import clip
from descend.sparse.table import ROW_STEP
from descend.state import lazy_memory

if TYPE_CHECKING:
    from descend.first_order.optimizer import FirstOrder
    from descend.sparse.table import Table

# What a sparse gradient means. "all": zero for every row it does not name, as in torch's SGD.
MEANINGS = (None, "touched", "exact")


class SparseUpdate:
    """One parameter with a sparse gradient.

    Args:
        optimizer: whose step it is.
        param: the parameter.
        group: the position of its group.
        rule: the rule to apply.
        meaning: "all", "touched" or "exact".
        reason: why no kernel can run it; None if one can.
    """

    def __init__(
        self, optimizer: FirstOrder, param: Tensor, group: int, rule: Any, meaning: str, reason: str | None
    ) -> None:
        self.param, self.group, self.rule, self.meaning, self.reason = param, group, rule, meaning, reason
        self.table: Table | None = optimizer.table_of(param) if meaning == "exact" else None
        self._rows: TouchedRows | EagerRows
        assert param.grad is not None
        self._dtype = torch.promote_types(param.grad.dtype, torch.float32)  # sums need the digits
        found = optimizer.state_of(param)
        if reason is None:
            dtypes = (param.dtype, self._dtype, *optimizer.state_dtypes(rule, param, found))
            self._rows = TouchedRows(rule, len(signature(rule).numbers), dtypes, meaning == "all")
        else:
            self._rows = EagerRows(rule, meaning == "all")
        self._numbers: Sequence[Any] = ()
        self._kept_next: Sequence[float] = ()
        self._scale = 1.0
        self._is_one_row = False
        self._state: list[Tensor] = []
        self._n_rows = 0
        self._own = [place for tensor in (param, *_tensors(found)) if (place := memory.span(tensor))]

    def read(self, optimizer: FirstOrder) -> None:
        """Check the gradient and sum what it names twice; nothing but scratch memory is written."""
        grad = self.param.grad
        assert grad is not None
        indices, values = grad._indices().contiguous(), grad._values()
        if memory.is_freed(values) or memory.is_freed(indices):
            raise RuntimeError(
                f"{type(optimizer).__name__}: {optimizer.name_of(self.param)}: the memory of its gradient has been "
                "freed (untyped_storage().resize_). Restore it before the step, or set the gradient to None."
            )
        with serial_in_forked_child():
            values = values.to(self._dtype).contiguous()
        sizes = tuple(grad.shape[: grad.sparse_dim()])
        self._is_one_row = not sizes
        if self._is_one_row:
            indices, sizes = indices.new_zeros(1, len(values)), (1,)
        self._n_rows = math.prod(sizes)
        start = values.data_ptr()
        if any(begin < start + values.nbytes and start < end for begin, end in self._own):
            values = values.clone()
        steps, step = None, 0
        if self.table is not None:
            self.table.check(optimizer, self.group, grad)
            steps, step = self.table.expected_steps(optimizer)
        try:
            stale = self._rows.read(indices, values, sizes, steps, step)
        except IndexError as error:
            raise IndexError(
                f"{type(optimizer).__name__}: the sparse gradient of {optimizer.name_of(self.param)}: {error}. "
                "Nothing has moved."
            ) from None
        if stale is not None:
            raise RuntimeError(
                f"{type(optimizer).__name__}: row {stale} of {optimizer.name_of(self.param)} has a gradient, but was "
                "not brought up to date before it was read. Embeddings that optimizer.attach(model) has seen do so by "
                "themselves; code that reads the weight itself must call optimizer.settle() first, or run in "
                "`with optimizer.settled():`. Nothing has moved."
            )

    def sum_of_squares(self) -> float:
        """Of the gradient's values, summed first where a row is named twice."""
        return self._rows.sum_of_squares()

    def set_numbers(self, numbers: Sequence[Any], kept_next: Sequence[float], scale: float) -> None:
        """Take the numbers of the coming step, and those to be kept after it."""
        self._numbers, self._kept_next, self._scale = numbers, kept_next, scale

    def prepare(self, optimizer: FirstOrder) -> dict[str, Any]:
        """Make the state that is missing."""
        group = optimizer.param_groups[self.group]
        found = optimizer.ensure_state(self.param, self.rule, group, lazy=self.meaning != "all")
        if self.table is not None:
            self.table.ensure_state(optimizer, found)
        self._state = [found[name] for name in signature(self.rule).state]
        self._own = [place for tensor in (self.param, *_tensors(found)) if (place := memory.span(tensor))]
        return found

    def run(self, optimizer: FirstOrder) -> None:
        """Take the step."""
        if self.table is None:
            lazy_memory.commit_rows(self._state, self._rows.rows, self._n_rows)
            param, state = self.param.data, self._state
            if self._is_one_row:  # the gradient has no sparse dimension
                param, state = param[None], [tensor[None] for tensor in state]
            self._rows.update(param, state, self._numbers, self._scale)
        else:
            with self.table.lock:
                self.table.begin_step(optimizer, self.group)
                tables = (*self._state, optimizer.state_of(self.param)[ROW_STEP])
                lazy_memory.commit_rows(tables, self._rows.rows, self._n_rows)
                self._rows.update(self.param, self._state, self._numbers, self._scale)
                self.table.end_step(optimizer, self.group, self._rows.rows)
        for name, number in zip(optimizer.keeps, self._kept_next, strict=True):
            optimizer.state_of(self.param)[name].fill_(number)

    def forget(self) -> None:
        """Let go of the gradient."""
        self._rows.forget()

    def warm_up(self, norm: bool) -> None:
        """Load what a step will call beside what making this has loaded."""
        if norm and isinstance(self._rows, TouchedRows):
            self._rows.warm_up_norm()


class EagerRows:
    """What ``TouchedRows`` does, on tensors: any device, any dtype, any strides."""

    def __init__(self, rule: Any, all_rows: bool) -> None:
        self._rule, self._all_rows = rule, all_rows
        self._grad: Tensor | None = None
        self.rows = np.empty(0, np.int64)

    def read(
        self, indices: Tensor, values: Tensor, sizes: tuple[int, ...], steps: Tensor | None, step: int
    ) -> int | None:
        """See ``TouchedRows.read``."""
        limits = torch.tensor(sizes, device=indices.device)[:, None]
        wrong = ((indices < 0) | (indices >= limits)).any(0)
        if wrong.any():
            index = tuple(indices[:, int(wrong.nonzero()[0])].tolist())
            raise IndexError(f"index {index} is out of range for a table of {sizes} rows")
        grad = torch.sparse_coo_tensor(indices, values, (*sizes, *values.shape[1:]), check_invariants=False)
        self._grad = grad.coalesce()
        rows = self._grad.indices()[0]
        self.rows = np.ravel_multi_index(tuple(self._grad.indices().cpu().numpy()), sizes)
        if steps is None:
            return None
        late = rows[steps[rows].abs() != step]
        return int(late[0]) if len(late) else None

    def sum_of_squares(self) -> float:
        """See ``TouchedRows.sum_of_squares``."""
        assert self._grad is not None
        norm = float(clip.norm([self._grad.values()], 2.0)) if self._grad._nnz() else 0.0
        return norm * norm

    def update(self, param: Tensor, state: Sequence[Tensor], numbers: Sequence[Any], scale: float) -> None:
        """Apply the rule."""
        assert self._grad is not None
        if self._all_rows:
            with torch.no_grad():
                eager.run(self._rule, param, self._grad, state, numbers, scale)
        elif self._grad._nnz():
            index = tuple(self._grad.indices())
            eager.run_rows(self._rule, param, index, self._grad.values(), state, numbers, scale)

    def forget(self) -> None:
        """Let go of the gradient."""
        self._grad = None


def _tensors(state: Mapping[str, Any]) -> list[Tensor]:
    return [value for value in state.values() if isinstance(value, Tensor)]


def warm_up_rows(dtype: torch.dtype) -> None:
    """Load the loops that read gradients of ``dtype``."""
    load_reader(torch.promote_types(dtype, torch.float32))


def check_meaning(optimizer: FirstOrder, meaning: Any) -> None:
    """Raise ``ValueError`` for a ``sparse`` that is none, or that this optimizer cannot keep."""
    name = type(optimizer).__name__
    if meaning not in MEANINGS:
        raise ValueError(f"{name}: sparse must be one of {MEANINGS}, got {meaning!r}.")
    if meaning == "exact" and optimizer.coasting is None:
        raise ValueError(
            f"{name}: sparse='exact' is for Adam and AdamW, whose missed steps have a closed form; try 'touched'."
        )
