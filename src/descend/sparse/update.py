"""The part of a step for one parameter with a sparse gradient."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from descend.backends.backend import Backend
from descend.backends.cpu.threads import serial_in_forked_child
from descend.core import memory
from descend.core.codecs import Codec, Formats, needs_noise, stored_names
from descend.core.measures import Sample, correction
from descend.core.memory import wide
from descend.core.method import MethodRef
from descend.core.optimizer import MethodOptimizer
from descend.core.signature import signature
from descend.core.update import Update, signed
from descend.distributed.dtensors import local_of
from descend.distributed.ranks import Share
from descend.sparse.table import ROW_STEP, Table
from descend.state import lazy_memory
from descend.state.container import CPU
from descend.state.formats import key_of, streams_of
from descend.state.make import ensure_state, scalar_tensors, step_count


class SparseUpdate(Update):
    """One parameter with a sparse gradient.

    Args:
        optimizer: the optimizer.
        param: the parameter.
        local: the plain tensor to update, with its gradient: this rank's part of a sharded parameter, else ``param``.
        share: which ranks hold the parts.
        group: the index of its group.
        method: finds how the group is updated.
        rule: the rule to apply.
        meaning: what happens to rows that the gradient does not name: "all" (a gradient of zero), "touched"
            (nothing) or "exact" (a gradient of zero, when they are next read).
        backend: runs the rule.
        table: the parameter's rows, for "exact".
        formats: of the parameter, its gradient and its state.
    """

    def __init__(
        self,
        optimizer: MethodOptimizer,
        param: Tensor,
        local: Tensor,
        share: Share | None,
        group: int,
        method: MethodRef,
        rule: Any,
        meaning: str,
        backend: Backend,
        table: Table | None,
        formats: Formats,
    ) -> None:
        self.params, self.share = [local], share
        self._param, self._local, self._group, self._rule = param, local, group, rule
        self._method, self._meaning, self._table, self._backend = method, meaning, table, backend
        self.decisions = backend.decisions
        if table is not None:
            table.check_whole(optimizer, local)
        assert local.grad is not None
        self._dtype = torch.promote_types(local.grad.dtype, torch.float32)  # sums need the digits
        state = optimizer.state_of(param)
        self._formats = (formats[0], self._dtype, *formats[2:])
        self._noise: dict[str, int] = {}
        self._is_noisy, given = needs_noise(formats), len(signature(rule).given)
        self._is_coded = any(isinstance(format, Codec) for format in formats)
        if self._is_noisy:
            (stream,) = streams_of(optimizer, [param])
            self._rows = backend.rows(rule, given, self._formats, meaning == "all", local, stream)
        else:
            self._rows = backend.rows(rule, given, self._formats, meaning == "all", local)
        self._scale = 1.0
        self._step: Any = 1.0
        self._scalars: list[float | Tensor] = []
        self._next_state: list[Any] = []
        self._is_one_row = False
        self._n_rows = 0
        self._state: dict[str, Any] = state
        self._counters: Any = None
        self._own_memory = _spans(local, state)

    def compile(self, wants_norm: bool, measures: bool = False) -> None:
        self._rows.compile(wants_norm, measures)

    def read(self, optimizer: MethodOptimizer) -> None:
        grad = self._local.grad
        assert grad is not None
        who, name = type(optimizer).__name__, optimizer.name_of
        if self._is_coded and (grad.sparse_dim() != 1 or grad.dim() == 1):
            raise RuntimeError(
                f"{who}: state of {name(self._param)} is kept in 8 bits, in blocks along its rows, but its gradient of "
                f"{grad.sparse_dim()} sparse among {grad.dim()} dimensions does not name rows. Make it dense, or "
                "sparse in the first of several, or keep this state in float32 (float32_state). Nothing has moved."
            )
        indices, values = grad._indices().contiguous(), grad._values()
        if memory.is_freed(values) or memory.is_freed(indices):
            raise RuntimeError(
                f"{who}: {name(self._param)}: the memory of its gradient has been "
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
        if any(begin < start + values.nbytes and start < end for begin, end in self._own_memory):
            values = values.clone()
        steps, step = None, 0
        if self._table is not None:
            self._table.check(optimizer, self._group, grad)
            steps, step = self._table.expected_steps(optimizer)
        try:
            stale = self._rows.read(indices, values, sizes, steps, step)
        except IndexError as error:
            raise IndexError(
                f"{who}: the sparse gradient of {name(self._param)}: {error}. Nothing has moved."
            ) from None
        if stale is not None:
            raise RuntimeError(
                f"{who}: row {stale} of {name(self._param)} has a gradient, but was "
                "not brought up to date before it was read. Embeddings that optimizer.attach(model) has seen do so by "
                "themselves; code that reads the weight itself must call optimizer.settle() first, or run in "
                "`with optimizer.settled():`. If other processes read rows too, attach the DistributedDataParallel "
                "module, or call optimizer.attach(model, replicated=True). Nothing has moved."
            )

    def sum_of_squares(self) -> float | Tensor:
        return self._rows.sum_of_squares()

    def may_count_on_device(self, optimizer: MethodOptimizer) -> bool:
        # The schedule of a table in exact mode is the host's.
        return self._table is None and self._method().may_decide_on_device(optimizer.param_groups[self._group])

    def set_scalars(self, optimizer: MethodOptimizer, scale: float) -> None:
        self._scale, method = scale, self._method()
        group, state = optimizer.param_groups[self._group], optimizer.state_of(self._param)
        place = self.device if self.counts_on_device else CPU
        scalar_state = scalar_tensors(method, method.scalar_state, self._param, group, state, place)
        if self.counts_on_device and self._method().counts_steps and isinstance(state.get("step"), Tensor):
            self._step = wide(state["step"]).to(place).reshape(()) + 1
        else:
            self._step = step_count(method, self._rule, state) + 1
        scalars, next_state = self._method().scalars_and_state(group, self._step, scalar_state)
        self._scalars = self.numbers(scalars)
        self._next_state = self.numbers(next_state)
        if self._is_noisy:
            self._noise = {"noise_key": key_of(optimizer, self._step)}

    def make_state(self, optimizer: MethodOptimizer) -> None:
        group = optimizer.param_groups[self._group]
        place = self.device if self.counts_on_device else CPU
        lazy = self._meaning != "all"
        self._state = ensure_state(optimizer, self._param, self._rule, group, lazy=lazy, scalars_on=place)
        if self._table is not None:
            self._table.ensure_state(optimizer, self._state)
            self._table.prepare(optimizer)
        has_counter = self._method().counts_steps and not self._method().step_is_int and not self.counts_on_device
        self._counters = self._backend.scalar_state([self._state["step"]] if has_counter else [])
        if self.counts_on_device:
            names = (
                ("step", *self._method().scalar_state) if self._method().counts_steps else self._method().scalar_state
            )
            self._on_device = self.decisions.scalar_state([[self._state[name] for name in names]], [0])
        self._own_memory = _spans(self._local, self._state)

    def run(self, optimizer: MethodOptimizer, sample: Sample | None = None) -> None:
        if self._method().counts_steps:
            self.set_scalars(optimizer, self._scale)  # a parameter that is listed twice has taken a step since
        names = stored_names(signature(self._rule).state, self._formats)
        state, measures = [local_of(self._state[name]) for name in names], sample is not None
        if self._local.is_cpu:
            written = state if self._table is None else [*state, self._state[ROW_STEP]]
            lazy_memory.commit_rows(written, self._rows.rows, self._n_rows, optimizer.options.state_pages)
        if self._table is None:
            torch.autograd.graph.increment_version(self.params)
            param = self._local.data
            if self._is_one_row:  # the gradient has no sparse dimension
                param, state = param[None], [tensor[None] for tensor in state]
            self._rows.run(
                param,
                state,
                self._scalars,
                self._signed_scale(optimizer),
                self._counters,
                None,
                measures,
                self.decision,
                **self._noise,
            )
        else:
            with self._table.lock:
                mark = self._table.begin_step(optimizer, self._group, self._rows)
                torch.autograd.graph.increment_version(self.params)
                scale = self._signed_scale(optimizer)
                self._rows.run(self._local, state, self._scalars, scale, self._counters, mark, measures, self.decision)
                self._table.end_step()
        if self.counts_on_device:
            step = [self._step] if self._method().counts_steps else []
            self._on_device.write([[*step, *self._next_state]], self.decision)
        else:
            for name, value in zip(self._method().scalar_state, self._next_state, strict=True):
                self._state[name].fill_(value)
        if self._method().counts_steps and self._method().step_is_int:
            optimizer.state_of(self._param)["step"] += 1
        if sample is not None:
            corrections = np.array([correction(self._rule, optimizer.param_groups[self._group], self._step)])
            sample.add([self._param], self._rows.measured(), corrections, self._rows.count)

    def release(self) -> None:
        self._rows.release()

    def is_valid(self, optimizer: MethodOptimizer) -> bool:
        return optimizer.meaning_of_gradient(self._param, optimizer.param_groups[self._group]) == self._meaning

    def state_tensors(self) -> list[tuple[Tensor, str, Tensor]]:
        return [(self._param, name, value) for name, value in self._state.items() if isinstance(value, Tensor)]

    def _signed_scale(self, optimizer: MethodOptimizer) -> float:
        return signed(self._scale, optimizer.param_groups[self._group])


def _spans(param: Tensor, state: Mapping[str, Any]) -> list[tuple[int, int]]:
    tensors = [param, *(local_of(value) for value in state.values() if isinstance(value, Tensor))]
    return [span for tensor in tensors if (span := memory.span(tensor))]
