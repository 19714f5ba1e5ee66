"""Runs a rule with torch's own operations: any device, any dtype, any layout, differentiable if wanted."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from descend.backends.backend import Decisions
from descend.backends.cpu.threads import serial_in_forked_child
from descend.backends.opened import Noise, Opened
from descend.core.codecs import Formats, is_plain
from descend.core.decision import SKIPPED, Decision, judge
from descend.core.measures import COLUMNS, moments
from descend.core.memory import as_real, row_count, wide, widest
from descend.core.noise import Stream
from descend.core.signature import averaged_part, signature

_NO_MEMORY = np.zeros((0, 2), np.int64)


@serial_in_forked_child()
def run(
    rule: Callable[..., Any],
    param: Tensor,
    grad: Tensor,
    state: Sequence[Tensor],
    scalars: Sequence[Any],
    scale: float,
    differentiable: bool = False,
    measures: bool = False,
    decision: Decision | None = None,
    formats: Formats = (),
    noise: Noise | None = None,
) -> Tensor | None:
    """Apply ``rule`` to one parameter and write the results in place. Return what was measured, if it was.

    What is not stored as a dtype is opened first and stored again afterwards; ``state`` is what ``codecs.stored_names``
    lists then.

    Arithmetic is in float32, or wider where a tensor is; complex numbers are pairs of real ones, as in torch.
    ``differentiable`` keeps the graph: what the rule saw is cloned first, so that writing does not invalidate it.
    """
    if not is_plain(formats):
        return _run_opened(rule, param, grad, state, scalars, scale, measures, decision, formats, noise)
    if grad.layout != torch.strided:
        grad = grad.to_dense()
    written = [as_real(tensor) for tensor in (param, *state)]
    seen = [tensor.clone() for tensor in written] if differentiable else written
    grad, first, *rest = _in_compute_dtype([as_real(grad), *seen])
    before = first.detach().clone() if measures else None
    scaled = grad if scale == 1 else grad * scale
    scaled = scaled if decision is None else scaled * decision.factor
    if (part := averaged_part(rule)) is not None:
        results = _by_rows(rule, part, row_count(param), first, scaled, rest, scalars)
    else:
        results = rule(first, scaled, *rest, *scalars)
    results = results if state else (results,)
    # A rule may keep the old parameter in its state: what is written first must not change it.
    old = (first, *rest)
    results = [
        value.clone() if any(value is each for each in old) and value is not own else value
        for value, own in zip(results, old, strict=True)
    ]
    for tensor, result in zip(written, results, strict=True):
        write(tensor, result, decision)
    if before is None:
        return None
    with torch.no_grad():
        return measured_sums(before, grad, written, moments(rule))


def _by_rows(
    rule: Callable[..., Any],
    part: Callable[..., Any],
    rows: int,
    param: Tensor,
    grad: Tensor,
    state: Sequence[Tensor],
    scalars: Sequence[Any],
) -> Any:
    """What a rule of rows returns, the parameter in its shape; the means are taken in float64."""
    width = param.numel() // max(rows, 1)
    tensors = (param.reshape(rows, width), grad.reshape(rows, width), *state)
    numbers = part(*tensors, *scalars)
    mean = numbers.sum(1, keepdim=True, dtype=widest(param.device)) / max(width, 1)
    results = rule(*tensors, *scalars, mean.to(param.dtype))
    return (results[0].reshape(param.shape), *results[1:]) if state else results.reshape(param.shape)


def _run_opened(
    rule: Callable[..., Any],
    param: Tensor,
    grad: Tensor,
    state: Sequence[Tensor],
    scalars: Sequence[Any],
    scale: float,
    measures: bool,
    decision: Decision | None,
    formats: Formats,
    noise: Noise | None,
) -> Tensor | None:
    """``run``, where not everything is stored as a dtype. What is measured is what has been stored."""
    opened = Opened(formats, param, state)
    before = opened.param.clone() if measures else None
    run(rule, opened.param, grad, opened.state, scalars, scale, decision=decision)
    opened.close(noise)
    if before is None:
        return None
    stored = Opened(formats, param, state)
    before, dense = _in_compute_dtype([before, grad if grad.layout == torch.strided else grad.to_dense()])
    with torch.no_grad():
        return measured_sums(before, dense, [stored.param, *stored.state], moments(rule))


@serial_in_forked_child()
def sums(
    rule: Callable[..., Any],
    param: Tensor,
    grad: Tensor,
    state: Sequence[Tensor],
    scalars: Sequence[Any],
    scale: float,
    formats: Formats = (),
) -> Tensor:
    """What the part of a rule with sums returns, each number summed over the tensor: float64, or the widest dtype.

    The result is on the parameter's device, and nothing waits for it.
    """
    part = signature(rule).summed
    assert part is not None
    with torch.no_grad():
        if not is_plain(formats):
            opened = Opened(formats, param, state)
            param, state = opened.param, opened.state
        grad, first, *rest = _in_compute_dtype([as_real(tensor) for tensor in (grad, param, *state)])
        results = part(first, grad if scale == 1 else grad * scale, *rest, *scalars)
        results = results if isinstance(results, tuple) else (results,)
        # What does not depend on an element counts once for each.
        each = [as_tensor(value, first).expand_as(first) for value in results]
        return torch.stack([value.sum(dtype=widest(first.device)) for value in each])


def _in_compute_dtype(tensors: Sequence[Tensor]) -> list[Tensor]:
    """In float32, or wider where one is."""
    compute = torch.float32
    for tensor in tensors:
        compute = torch.promote_types(compute, tensor.dtype)
    return [tensor.to(compute) for tensor in tensors]


def write(tensor: Tensor, value: Any, decision: Decision | None) -> None:
    """Copy a value into a tensor, unless the decision leaves the step out."""
    value = as_tensor(value, tensor)
    if decision is not None and decision.may_skip:
        value = torch.where(decision.take != 0, value.to(tensor.dtype), tensor)
    tensor.copy_(value)


def as_tensor(value: Any, like: Tensor) -> Tensor:
    """A value on the device of ``like``; numbers are filled in there: while one is copied there, the host waits."""
    return value.to(like.device, non_blocking=True) if isinstance(value, Tensor) else like.new_full((), value)


def run_rows(
    rule: Callable[..., Any],
    param: Tensor,
    index: tuple[Tensor, ...],
    grad: Tensor | None,
    state: Sequence[Tensor],
    scalars: Sequence[Any],
    scale: float = 1.0,
    measures: bool = False,
    decision: Decision | None = None,
    formats: Formats = (),
    noise: Noise | None = None,
) -> Tensor | None:
    """Apply ``rule`` to the rows of ``param`` and of the state tensors that ``index`` names, each once.

    Args:
        rule: the function to apply.
        param: the parameter.
        index: a list of indices for each of the first dimensions.
        grad: gradients of the rows; None for a rule that does not use them.
        state: state tensors.
        scalars: one value for all rows, or a tensor with one a row.
        scale: of the gradient.
        measures: whether to return what was measured.
        decision: see ``run``.
        formats: see ``run``.
        noise: see ``run``.
    """
    # Not seen by autograd: rows may be brought up to date between a forward pass and its backward pass.
    tables = [tensor.data for tensor in (param, *state)]
    first, *rest = [table[index] for table in tables]
    aligned = [
        x.view(-1, *[1] * (as_real(first).dim() - 1)) if isinstance(x, Tensor) and x.dim() == 1 else x for x in scalars
    ]
    grad = first if grad is None else grad
    sums = run(rule, first, grad, rest, aligned, scale, False, measures, decision, formats, noise)
    for table, rows in zip(tables, (first, *rest), strict=True):
        table[index] = rows
    return sums


class EagerDecisions:
    """See ``backend.Decisions``."""

    def takes(self, device: torch.device) -> bool:
        return device.type != "cpu"

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
        loss_scale, overflow = (
            values.new_full((), start) if x is None else x.to(values.dtype).reshape(())
            for x, start in ((grad_scale, 1.0), (found_inf, 0.0))
        )
        limit = values.new_full((), max_norm)
        numbers = judge(total, loss_scale, overflow, values[SKIPPED], scale, limit, float(skips_nonfinite))
        values.copy_(torch.stack(numbers))

    def scalar_state(self, tensors: Sequence[Sequence[Tensor]], rows: Sequence[int] | np.ndarray) -> DeviceScalarState:
        return DeviceScalarState(tensors, rows)


class EagerBackend:
    """The reference: takes everything, one tensor after the other."""

    name = "eager"
    is_atomic = False
    decisions: Decisions | None = EagerDecisions()

    def why_not(
        self,
        rule: Callable[..., Any] | None,
        param: Tensor,
        grad: Tensor | None,
        state: Sequence[tuple[str, Tensor]],
    ) -> str | None:
        return None

    def why_not_rows(self, rule: Callable[..., Any], param: Tensor, state: Sequence[tuple[str, Tensor]]) -> str | None:
        return None

    def why_not_formats(
        self, rule: Callable[..., Any], param: Tensor, formats: Formats, stored: Sequence[tuple[str, Tensor]]
    ) -> str | None:
        return None

    def launch(
        self,
        rule: Callable[..., Any],
        scalars: int,
        formats: Formats,
        params: Sequence[Tensor],
        rows: Sequence[int] | np.ndarray,
        streams: Sequence[Stream] = (),
    ) -> EagerLaunch:
        return EagerLaunch(rule, scalars, formats, params, rows, streams)

    def scalar_state(self, tensors: Sequence[Tensor]) -> EagerScalarState:
        return EagerScalarState(tensors)

    def together(
        self,
        params: Sequence[Tensor],
        launches: Sequence[EagerLaunch],
        counters: EagerScalarState,
        scalar_state: EagerScalarState | DeviceScalarState,
        measures: bool = False,
    ) -> Callable[[Any, Decision | None], None]:
        def run(values: Any, decision: Decision | None = None) -> None:
            with torch.no_grad(), serial_in_forked_child():
                torch.autograd.graph.increment_version(params)
                for launch in launches:
                    launch.run(measures, decision)
                counters.add_one()
                scalar_state.write(values, decision)

        return run

    def rows(
        self,
        rule: Callable[..., Any],
        scalars: int,
        formats: Formats,
        all_rows: bool,
        param: Tensor,
        stream: Stream | None = None,
    ) -> EagerRows:
        return EagerRows(rule, formats, all_rows, stream)

    def catch_up(
        self,
        with_state: Callable[..., Any],
        without_state: Callable[..., Any],
        scalars: int,
        dtypes: tuple[torch.dtype, ...],
        param: Tensor,
    ) -> EagerCatchUp:
        return EagerCatchUp(with_state, without_state)

    def sum_of_squares(self, tensors: Sequence[Tensor]) -> float | Tensor:
        return sums_of_squares(tensors)


class EagerLaunch:
    """See ``backend.Launch``."""

    addresses = None

    def __init__(
        self,
        rule: Callable[..., Any],
        scalars: int,
        formats: Formats,
        params: Sequence[Tensor],
        rows: Sequence[int] | np.ndarray,
        streams: Sequence[Stream] = (),
    ) -> None:
        self._rule, self._n_given, self._params, self._rows = rule, scalars, params, rows
        self._formats, self._streams = formats, streams
        self._keys: dict[int, int] = {}
        self._formed: Sequence[Sequence[float]] = [()] * len(params)
        self._state: Sequence[Sequence[Tensor]] = ()
        self._scalars: dict[int, tuple[float, Sequence[float | Tensor]]] = {}
        self._measured: list[Tensor] = []

    def compile(self, wants_norm: bool, measures: bool = False) -> None:
        """Nothing needs to be compiled."""

    def set_state(self, tensors: Sequence[Sequence[Tensor]]) -> None:
        self._state = tensors

    def set_scalars(self, row: int, scale: float, scalars: Sequence[float | Tensor]) -> None:
        if len(scalars) != self._n_given:
            raise ValueError(f"the rule takes {self._n_given} scalars, got {len(scalars)}.")
        self._scalars[row] = scale, scalars

    def set_noise(self, row: int, key: int) -> None:
        self._keys[row] = key

    def sums(self) -> Tensor:
        found = []
        for param, row, state in zip(self._params, self._rows, self._state, strict=True):
            scale, scalars = self._scalars[row]
            assert param.grad is not None
            found.append(sums(self._rule, param, param.grad, state, scalars, scale, self._formats))
        return torch.stack(found)

    def set_formed(self, values: np.ndarray) -> None:
        self._formed = values.tolist()

    def sum_of_squares(self) -> float | Tensor:
        return sums_of_squares([param.grad for param in self._params if param.grad is not None])

    def written(self) -> np.ndarray:
        return _NO_MEMORY

    def measured(self) -> Tensor:
        return torch.stack(self._measured)

    def run(self, measures: bool, decision: Decision | None) -> None:
        """Apply the rule to one parameter after the other."""
        self._measured.clear()
        for i, (param, row, state, own) in enumerate(
            zip(self._params, self._rows, self._state, self._formed, strict=True)
        ):
            scale, scalars = self._scalars[row]
            assert param.grad is not None
            scalars = (*scalars, *own)
            noise = Noise(self._streams[i], self._keys[row]) if self._streams else None
            measured = run(
                self._rule, param, param.grad, state, scalars, scale, False, measures, decision, self._formats, noise
            )
            if measured is not None:
                self._measured.append(measured)


class EagerScalarState:
    """See ``backend.ScalarState``."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tensors
        self._expected = [tensor.item() for tensor in tensors]

    def is_unchanged(self) -> bool:
        return self._expected == [tensor.item() for tensor in self._tensors]

    def add_one(self) -> None:
        """Add one to each."""
        for tensor in self._tensors:
            tensor += 1
        self._expected = [value + 1 for value in self._expected]  # not read: make_fx may be tracing them

    def write(self, values: np.ndarray, decision: Decision | None) -> None:
        """Set them, in the order of the tensors."""
        for tensor, value in zip(self._tensors, values, strict=True):
            tensor.fill_(value)
        self._expected = [tensor.item() for tensor in self._tensors]


class DeviceScalarState:
    """See ``backend.ScalarState``: 0-dim tensors on a device, which the host does not read.

    In-place edits are noticed by their version counters.
    """

    def __init__(self, tensors: Sequence[Sequence[Tensor]], rows: Sequence[int] | np.ndarray) -> None:
        self._tensors, self._rows = tensors, rows
        self._versions = self._current_versions()

    def is_unchanged(self) -> bool:
        return self._versions == self._current_versions()

    def write(self, values: Sequence[Sequence[Any]], decision: Decision | None) -> None:
        """Set each parameter's to the numbers of its row."""
        for tensors, row in zip(self._tensors, self._rows, strict=True):
            for tensor, value in zip(tensors, values[row], strict=True):
                write(tensor, value, decision)
        self._versions = self._current_versions()

    def _current_versions(self) -> list[int]:
        return [tensor._version for tensors in self._tensors for tensor in tensors if not tensor.is_inference()]


class EagerRows:
    """See ``backend.Rows``."""

    def __init__(
        self, rule: Callable[..., Any], formats: Formats, all_rows: bool, stream: Stream | None = None
    ) -> None:
        self._rule, self._formats, self._all_rows, self._stream = rule, formats, all_rows, stream
        self._grad: Tensor | None = None
        self._sizes: tuple[int, ...] = ()

    @property
    def rows(self) -> np.ndarray:
        assert self._grad is not None
        rows: np.ndarray = np.ravel_multi_index(tuple(self._grad.indices().cpu().numpy()), self._sizes)
        return rows

    @property
    def count(self) -> int:
        assert self._grad is not None
        return self._grad._nnz()

    def compile(self, wants_norm: bool, measures: bool = False) -> None:
        """Nothing needs to be compiled."""

    def read(
        self, indices: Tensor, values: Tensor, sizes: tuple[int, ...], steps: Tensor | None, step: int
    ) -> int | None:
        limits = torch.tensor(sizes, device=indices.device)[:, None]
        wrong = ((indices < 0) | (indices >= limits)).any(0)
        if wrong.any():
            index = tuple(indices[:, int(wrong.nonzero()[0])].tolist())
            raise IndexError(f"index {index} is out of range for a table of {sizes} rows")
        shape, device = (*sizes, *values.shape[1:]), values.device
        grad = torch.sparse_coo_tensor(indices, values, shape, device=device, check_invariants=False)
        self._grad, self._sizes = grad.coalesce(), sizes
        rows = self._grad.indices()[0]
        if steps is None:
            return None
        late = rows[steps[rows].abs() != step]
        return int(late[0]) if len(late) else None

    def sum_of_squares(self) -> float | Tensor:
        assert self._grad is not None
        return sums_of_squares([self._grad.values()])

    def run(
        self,
        param: Tensor,
        state: Sequence[Tensor],
        scalars: Sequence[float | Tensor],
        scale: float,
        counters: EagerScalarState,
        mark: tuple[Tensor, int] | None,
        measures: bool = False,
        decision: Decision | None = None,
        noise_key: int = 0,
    ) -> None:
        assert self._grad is not None
        noise = Noise(self._stream, noise_key) if self._stream is not None else None
        with torch.no_grad():
            sums, formats = None, self._formats
            if self._all_rows:
                sums = run(
                    self._rule, param, self._grad, state, scalars, scale, False, measures, decision, formats, noise
                )
            elif self._grad._nnz():
                index, values = tuple(self._grad.indices()), self._grad.values()
                if noise is not None:
                    noise = noise.of_rows(torch.from_numpy(self.rows).to(param.device), math.prod(values.shape[1:]))
                sums = run_rows(
                    self._rule, param, index, values, state, scalars, scale, measures, decision, formats, noise
                )
            self._measured = param.new_zeros(len(COLUMNS), dtype=widest(param.device)) if sums is None else sums
            if mark is not None:
                steps, step = mark
                rows = self._grad.indices()[0]
                current = steps[rows]
                write(current, step, decision)
                steps[rows] = current
            counters.add_one()

    def measured(self) -> Tensor:
        return self._measured[None]

    def release(self) -> None:
        self._grad = None


class EagerCatchUp:
    """See ``backend.CatchUp``."""

    def __init__(self, with_state: Callable[..., Any], without_state: Callable[..., Any]) -> None:
        self._with_state, self._without_state = with_state, without_state

    @property
    def rows(self) -> Tensor:
        return self._rows

    def compile(self) -> None:
        """Nothing needs to be compiled."""

    def find(
        self, which: Tensor | range, sizes: tuple[int, ...], steps: Tensor, now: int, start: int
    ) -> tuple[np.ndarray, bool, bool] | None:
        if isinstance(which, range):
            rows = torch.arange(which.start, which.stop, device=steps.device)
        else:
            rows = torch.unique(which.reshape(-1).long()).to(steps.device)
            if len(rows) and (rows[0] < 0 or rows[-1] >= len(steps)):
                return None
        since = steps[rows].abs().clamp(min=start)
        self._rows, since = rows[since < now], since[since < now]
        distinct, self._position = torch.unique(since.long(), return_inverse=True)
        self._steps, self._now = steps, now
        self._has_state = steps[self._rows] > 0
        return distinct.cpu().numpy(), bool(self._has_state.any()), not bool(self._has_state.all())

    def run(
        self,
        param: Tensor,
        state: Sequence[Tensor],
        scalars: np.ndarray | None,
        factors: np.ndarray | None,
        mark: bool,
    ) -> None:
        with torch.no_grad():
            rows, has_state = self._rows, self._has_state
            for each in () if scalars is None else scalars:
                table = self._by_row(each)[has_state]
                run_rows(self._with_state, param, (rows[has_state],), None, state, list(table.unbind(1)))
            if factors is not None:
                table = self._by_row(factors)[~has_state]
                run_rows(self._without_state, param, (rows[~has_state],), None, [], [table])
            if mark:
                self._steps[rows] = torch.where(has_state, self._now, -self._now).to(self._steps.dtype)

    def _by_row(self, by_step: np.ndarray) -> Tensor:
        """What is given for each distinct step, for each of the rows found."""
        return torch.from_numpy(by_step).to(widest(self._steps.device)).to(self._steps.device)[self._position]


@serial_in_forked_child()
def sums_of_squares(tensors: Sequence[Tensor]) -> float | Tensor:
    """Of all tensors together: on the CPU a number, on a device of shape (), and nothing waits for it."""
    sums = [_sum_of_squares(tensor) for tensor in tensors]
    if sums and sums[0].device.type != "cpu":
        return torch.stack(sums).sum()
    return sum(map(float, sums))


def _sum_of_squares(tensor: Tensor) -> Tensor:
    """In float64, or float32 where the device has nothing wider; may overflow to Inf."""
    if tensor.layout != torch.strided:
        tensor = tensor.to_sparse().to(torch.promote_types(tensor.dtype, torch.float32)).coalesce().values()
    flat = as_real(tensor.detach())
    flat = wide(flat)
    return (flat * flat).sum()


def measured_sums(before: Tensor, grad: Tensor, written: Sequence[Tensor], moments: Any) -> Tensor:
    """What ``core.measures.COLUMNS`` lists, as a tensor on the parameter's device: nothing waits for it.

    Args:
        before: the parameter before the step, in the compute dtype.
        grad: the gradient as it is stored, in the compute dtype.
        written: parameter and state tensors after the step.
        moments: positions of the two averages among the state tensors, or None.
    """
    dtype = widest(before.device)
    kept, old, new = written[0].to(before.dtype), before.to(dtype), written[0].to(dtype)
    moving = grad != 0
    sums = [grad.to(dtype).square().sum(), (new - old).square().sum(), old.square().sum()]
    if moments is None:
        sums += [old.new_zeros(())] * 2
    else:
        exp_avg, exp_avg_sq = (written[1 + position].to(before.dtype) for position in moments)
        is_used = exp_avg_sq > 0
        sums += [torch.where(is_used, exp_avg.abs() / exp_avg_sq.sqrt(), 0).to(dtype).sum(), is_used.sum()]
    sums += [moving.sum(), (moving & (kept == before)).sum(), (~grad.isfinite()).sum(), (~new.isfinite()).sum()]
    return torch.stack([value.to(dtype) for value in sums])
