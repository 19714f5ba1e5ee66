"""The compiled CPU backend, as the engine sees it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from descend.backends import supports
from descend.backends.backend import Decisions
from descend.backends.cpu import threads
from descend.backends.cpu.launch import CHUNK, ChunkTable, Launch, ScalarState
from descend.backends.cpu.rows import StaleRows, TouchedRows
from descend.backends.cpu.versions import Versions
from descend.core.codecs import Formats
from descend.core.decision import Decision
from descend.core.noise import Stream
from descend.core.signature import signature

_NO_SCALARS = np.zeros(0)


class CpuBackend:
    """Rules compiled by Numba, run on torch's threads."""

    name = "cpu"
    decisions: Decisions | None = None

    @property
    def is_atomic(self) -> bool:
        return threads.has_openmp()

    def why_not(
        self, rule: Callable[..., Any] | None, param: Tensor, grad: Tensor | None, state: Sequence[tuple[str, Tensor]]
    ) -> str | None:
        if rule is not None and signature(rule).kind == "row":
            return _why_not_device(param) or supports.why_not_by_rows(rule, CHUNK, param, grad, state)
        return supports.why_not_kind(rule) or _why_not_device(param) or supports.why_not(param, grad, state)

    def why_not_rows(self, rule: Callable[..., Any], param: Tensor, state: Sequence[tuple[str, Tensor]]) -> str | None:
        if signature(rule).kind == "row":
            return _why_not_device(param) or supports.why_not_by_rows(rule, CHUNK, param, None, state)
        return supports.why_not_kind(rule) or _why_not_device(param) or supports.why_not_rows(param, state)

    def why_not_formats(
        self, rule: Callable[..., Any], param: Tensor, formats: Formats, stored: Sequence[tuple[str, Tensor]]
    ) -> str | None:
        if signature(rule).kind == "row":
            return "rounding, in a rule of rows"
        return supports.why_not_formats(param, stored)

    def launch(
        self,
        rule: Callable[..., Any],
        scalars: int,
        formats: Formats,
        params: Sequence[Tensor],
        rows: Sequence[int] | np.ndarray,
        streams: Sequence[Stream] = (),
    ) -> Launch:
        return Launch(rule, scalars, formats, params, rows, streams)

    def scalar_state(self, tensors: Sequence[Tensor]) -> ScalarState:
        return ScalarState(tensors)

    def together(
        self,
        params: Sequence[Tensor],
        launches: Sequence[Launch],
        counters: ScalarState,
        scalar_state: ScalarState,
        measures: bool = False,
    ) -> Callable[[Any, Decision | None], None]:
        versions = Versions(params)
        updates = [launch.measured_update_call() if measures else launch.update_call() for launch in launches]
        sequence = threads.CallSequence(
            [*versions.calls(), *updates, *counters.add_one_calls(), *scalar_state.write_calls()]
        )

        def run(values: np.ndarray, decision: Decision | None = None) -> None:
            assert decision is None  # this backend reads none
            scalar_state.set_next(values)
            versions.bump()
            if measures:
                for launch in launches:
                    launch.measured_update_call()
            sequence.run()

        return run

    def rows(
        self,
        rule: Callable[..., Any],
        scalars: int,
        formats: Formats,
        all_rows: bool,
        param: Tensor,
        stream: Stream | None = None,
    ) -> TouchedRows:
        return TouchedRows(rule, scalars, formats, all_rows, stream)

    def catch_up(
        self,
        with_state: Callable[..., Any],
        without_state: Callable[..., Any],
        scalars: int,
        dtypes: tuple[torch.dtype, ...],
        param: Tensor,
    ) -> StaleRows:
        return StaleRows(with_state, without_state, scalars, dtypes)

    def sum_of_squares(self, tensors: Sequence[Tensor]) -> float:
        by_dtype: defaultdict[torch.dtype, list[Tensor]] = defaultdict(list)
        for tensor in tensors:
            by_dtype[tensor.dtype].append(tensor)
        return sum(
            ChunkTable([members], 1, [0] * len(members), _NO_SCALARS).sum_of_squares(0, dtype)
            for dtype, members in by_dtype.items()
        )


def _why_not_device(param: Tensor) -> str | None:
    return None if param.is_cpu else f"on {param.device}"
