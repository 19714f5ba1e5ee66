"""The Triton backend, as the engine sees it. Triton is imported when a tensor of a GPU is first asked about."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from descend.backends import eager, supports
from descend.backends.backend import Decisions
from descend.backends.backend import DeviceScalarState as OnDevice
from descend.backends.cpu.launch import ScalarState
from descend.backends.cpu.threads import CallSequence
from descend.backends.cpu.versions import Versions
from descend.core.codecs import Formats
from descend.core.decision import Decision
from descend.core.noise import Stream

if TYPE_CHECKING:
    from descend.backends.triton.launch import Launch
    from descend.backends.triton.rows import StaleRows, TouchedRows


class TritonDecisions:
    """See ``backend.Decisions``."""

    def takes(self, device: torch.device) -> bool:
        return device.type == "cuda" or (device.type == "cpu" and _interprets())

    def judge(
        self,
        values: Tensor,
        total: Tensor,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        scale: float,
        max_norm: float,
        skips_nonfinite: bool,
    ) -> None:
        from descend.backends.triton import judging

        judging.judge(values, total, grad_scale, found_inf, scale, max_norm, skips_nonfinite)

    def scalar_state(self, tensors: Sequence[Sequence[Tensor]], rows: Sequence[int] | np.ndarray) -> OnDevice:
        from descend.backends.triton.tables import DeviceScalarState

        is_usual = all(tensor.dtype in supports.DTYPES for each in tensors for tensor in each)
        return DeviceScalarState(tensors, rows) if is_usual else eager.DeviceScalarState(tensors, rows)


class TritonBackend:
    """Rules compiled by Triton: one launch for all tensors of equal formats."""

    name = "triton"
    is_atomic = False
    decisions: Decisions | None = TritonDecisions()

    def why_not(
        self, rule: Callable[..., Any] | None, param: Tensor, grad: Tensor | None, state: Sequence[tuple[str, Tensor]]
    ) -> str | None:
        return _why_not_device(param) or _why_not_rule(rule) or supports.why_not(param, grad, state)

    def why_not_rows(self, rule: Callable[..., Any], param: Tensor, state: Sequence[tuple[str, Tensor]]) -> str | None:
        return _why_not_device(param) or _why_not_rule(rule) or supports.why_not_rows(param, state)

    def why_not_formats(
        self, rule: Callable[..., Any], param: Tensor, formats: Formats, stored: Sequence[tuple[str, Tensor]]
    ) -> str | None:
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
        from descend.backends.triton.launch import Launch

        return Launch(rule, scalars, formats, params, rows, streams)

    def scalar_state(self, tensors: Sequence[Tensor]) -> ScalarState:
        return ScalarState(tensors)

    def together(
        self,
        params: Sequence[Tensor],
        launches: Sequence[Launch],
        counters: ScalarState,
        scalar_state: ScalarState | OnDevice,
        measures: bool = False,
    ) -> Callable[[Any, Decision | None], None]:
        versions = Versions(params)
        writes = scalar_state.write_calls() if isinstance(scalar_state, ScalarState) else []
        sequence = CallSequence([*versions.calls(), *counters.add_one_calls(), *writes])

        def run(values: Any, decision: Decision | None = None) -> None:
            for launch in launches:
                launch.run(decision, measures)
            if isinstance(scalar_state, ScalarState):
                scalar_state.set_next(values)
            else:
                scalar_state.write(values, decision)
            versions.bump()
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
        from descend.backends.triton.rows import TouchedRows

        return TouchedRows(rule, scalars, formats, all_rows, param, stream)

    def catch_up(
        self,
        with_state: Callable[..., Any],
        without_state: Callable[..., Any],
        scalars: int,
        dtypes: tuple[torch.dtype, ...],
        param: Tensor,
    ) -> StaleRows:
        from descend.backends.triton.rows import StaleRows

        return StaleRows(with_state, without_state, scalars, dtypes, param)

    def sum_of_squares(self, tensors: Sequence[Tensor]) -> Tensor:
        from descend.backends.triton.launch import sum_of_squares

        return sum_of_squares(tensors)


def _interprets() -> bool:
    """Whether Triton's interpreter is on, which runs kernels on CPU tensors."""
    if knobs := getattr(sys.modules.get("triton"), "knobs", None):
        return bool(knobs.runtime.interpret)
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


@cache
def _why_not_triton() -> str | None:
    if find_spec("triton") is None:
        return "triton is not installed"
    try:
        import descend.backends.triton.library  # noqa: F401
    except Exception as error:  # whatever an installation that does not fit raises
        return f"triton cannot be imported: {error}"
    return None


def _why_not_device(param: Tensor) -> str | None:
    if not (param.is_cuda or (param.is_cpu and _interprets())):
        return f"on {param.device}"
    return _why_not_triton()


def _why_not_rule(rule: Callable[..., Any] | None) -> str | None:
    if rule is None:
        return None
    from descend.backends.triton import library

    return supports.why_not_kind(rule) or library.declined(rule)
