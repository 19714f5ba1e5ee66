"""Rules on lists of tensors: the bits of the eager backend, in bounded memory, and nothing waits for a device."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from cases import CASES, Case, complex_grads, give_grads
from torch import Tensor

from descend import from_rule, get_total_norm, rules
from descend.backends import EAGER, FOREACH, eager, foreach
from descend.backends.tensor_list import TensorList, on_lists
from descend.core.decision import Decision
from descend.core.signature import signature
from descend.ops import abs, exp, log, maximum, minimum, of_matrices, sign, sqrt, where

HALF, BRAIN, SINGLE, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Zeros have signs; all NaN are the same."""
    if a.is_complex():
        a, b = torch.view_as_real(a), torch.view_as_real(b)
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    integer, known = INTEGERS[a.itemsize], ~a.isnan()
    return torch.equal(known, ~b.isnan()) and torch.equal(a.view(integer)[known], b.view(integer)[known])


def values(seed: int, dtype: torch.dtype) -> list[Tensor]:
    """Parameters of all sizes and layouts, scattered over memory or transposed."""
    random = torch.Generator().manual_seed(seed)
    shapes = (), (0,), (1,), (1023,), (30, 20), (4, 3, 5)
    plain = [torch.randn(shape, generator=random, dtype=dtype) for shape in shapes]
    long = torch.randn(112, generator=random, dtype=dtype)
    return [*plain, long[:72].view(9, 8).t(), long[75:93:2]]


def trajectory(case: Case, backend: str, dtypes: Sequence[torch.dtype], steps: int = 4) -> tuple[list[Tensor], Any]:
    """What parameters and state become: two groups, one maximized, and a parameter that misses a step."""
    param_dtype, grad_dtype, state_dtype = dtypes
    params = [value.detach().requires_grad_() for value in values(0, param_dtype)]
    groups = [{"params": params[::2]}, {"params": params[1::2], "maximize": True, "lr": 0.5}]
    wide = None if param_dtype.is_complex else state_dtype
    optimizer = case.ours(groups, **case.options, backend=backend, max_norm=20.0, state_dtype=wide)
    for seed in range(steps):
        for param in params:
            param.grad_dtype = grad_dtype
        (complex_grads if param_dtype.is_complex else give_grads)(params, seed)
        if seed == 1:
            params[3].grad = None
        if seed >= 2:
            params[5].grad[0, 0, :3] = torch.tensor([torch.nan, torch.inf, -0.0])
        optimizer.step()
    state = [tensor for param in params for tensor in optimizer.state[param].values()] if optimizer.state else []
    return [*(param.detach() for param in params), *state], optimizer


MIXES = [
    (SINGLE, SINGLE, SINGLE),
    (BRAIN, BRAIN, SINGLE),
    (torch.complex64,) * 3,
    (DOUBLE, DOUBLE, DOUBLE),
    (HALF, HALF, HALF),
    (SINGLE, BRAIN, DOUBLE),
]
# How tensors are stored is no matter of the rule.
TRIED = [(case, dtypes) for place, case in enumerate(CASES) for dtypes in MIXES[: 6 if place in (5, 16) else 3]]


@pytest.mark.parametrize(("case", "dtypes"), TRIED, ids=str)
def test_bits_are_those_of_eager(case: Case, dtypes: tuple[torch.dtype, ...]) -> None:
    (ours, optimizer), (theirs, _) = (trajectory(case, backend, dtypes) for backend in ("foreach", "eager"))
    assert {placement.backend for placement in optimizer.backends()} == {"foreach"}
    assert all(map(same_bits, ours, theirs))
    assert not all(tensor.isfinite().all() for tensor in ours)  # a NaN has come through


# Operators and functions.

AWKWARD = [0.0, -0.0, 1.0, -2.5, torch.nan, torch.inf, -torch.inf, 1e-40, 3e38, 0.7]
BINARY = [operator.add, operator.sub, operator.mul, operator.truediv, operator.pow, maximum, minimum]
COMPARISONS = [operator.lt, operator.le, operator.gt, operator.ge, operator.eq, operator.ne]
UNARY = [operator.neg, operator.abs, abs, exp, log, sqrt, sign]


def lists(dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    every = torch.tensor(list(product(AWKWARD, AWKWARD)), dtype=dtype)
    return list(every[:, 0].split(37)), list(every[:, 1].split(37))


def assert_same(function: Callable[..., Any], *arguments: Any) -> None:
    """The function does to lists what it does to each of their tensors."""
    columns = [value if isinstance(value, list) else [value] * 3 for value in arguments]
    expected = [function(*row) for row in zip(*columns, strict=True)]
    given = [TensorList(value) if isinstance(value, list) else value for value in arguments]
    found = on_lists(_calling(function))(*given)
    assert len(found.tensors) == len(expected)
    assert all(map(same_bits, found.tensors, expected)), (function, arguments)


def _calling(function: Any) -> Any:
    """A rule that calls the function and nothing else."""
    return lambda *arguments: function(*arguments)


@pytest.mark.parametrize("dtype", [SINGLE, DOUBLE], ids=str)
def test_operators_do_what_they_do_to_tensors(dtype: torch.dtype) -> None:
    a, b = lists(dtype)
    for function in [*BINARY, *COMPARISONS]:
        assert_same(function, a, b)
        for number in (*AWKWARD, 2, -1):
            for other in (number, torch.tensor(number, dtype=DOUBLE)):
                assert_same(function, a, other)
                assert_same(function, other, a)
    for function in UNARY:
        assert_same(function, a)


def test_conditions_do_what_they_do_to_tensors() -> None:
    a, b = lists(SINGLE)

    def rule(x: Any, y: Any, number: Any) -> Any:
        inside = (x > number) & ~(y <= 0) | (x == y)
        return where(inside, where(number > 0, x, 2.0), where(x < y, 0.0, y))

    for number in (0.5, -0.5, torch.tensor(0.5)):
        assert_same(rule, a, b, number)
    assert_same(lambda x: where(x > 0, 1.0, 0.0), a)  # float64, as of tensors
    assert_same(lambda x: (x > 0) * 2.0, a)
    assert_same(lambda x: (x > 0) + torch.tensor(1.5, dtype=DOUBLE), a)


def test_a_wide_number_widens_no_list() -> None:
    """Torch widens tensors of shape () by others of that shape; a list keeps one dtype."""
    x, number = TensorList([torch.tensor(2.0), torch.ones(3)]), torch.tensor(0.1, dtype=DOUBLE)
    results = x + number, x - number, x * number, x / number, x**number, number - x, number / x, number**x
    assert {tensor.dtype for result in results for tensor in result.tensors} == {SINGLE}


def test_a_branch_on_elements_is_an_error() -> None:
    with pytest.raises(TypeError, match="use where"):
        bool(TensorList([torch.ones(1)]) > 0)


# Rules of users.


def _mixed(a: Any, b: Any, share: Any) -> Any:
    return a + share * (b - a)


def _recipe(limit: float) -> Callable[..., Any]:
    def shrinking(param: Any, grad: Any, slow: Any, lr: Any, share: Any = 0.25) -> Any:
        slow = _mixed(slow, grad, share)
        if lr > 0.15:
            slow = 0.5 * slow
        return param - lr * minimum(maximum(slow, -limit), limit), slow

    return shrinking


def test_rules_of_users_call_helpers_and_branch_on_numbers() -> None:
    optimizer_class = from_rule(_recipe(0.5), "Shrinking", lr=0.1)
    case = Case(optimizer_class, torch.optim.SGD, {})
    (ours, optimizer), (theirs, _) = (trajectory(case, backend, MIXES[0]) for backend in ("foreach", "eager"))
    assert {placement.backend for placement in optimizer.backends()} == {"foreach"}
    assert all(map(same_bits, ours, theirs))


def _remembering(param: Any, grad: Any, last: Any, older: Any, lr: Any) -> Any:
    return param - lr * grad, param, last


@pytest.mark.parametrize("dtype", [SINGLE, BRAIN], ids=str)
@pytest.mark.parametrize("backend", ["cpu", "eager", "foreach"])
def test_state_may_become_what_another_tensor_was(backend: Any, dtype: torch.dtype) -> None:
    weight = torch.tensor([1.0, 2.0], dtype=dtype, requires_grad=True)
    optimizer = from_rule(_remembering, "Remembering", lr=1.0)([weight], backend=backend)
    for _ in range(3):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    state = optimizer.state[weight]
    assert [weight.tolist(), state["last"].tolist(), state["older"].tolist()] == [[-2, -1], [-1, 0], [0, 1]]


def _squashed(param: Any, grad: Any, lr: Any) -> Any:
    return param - lr * torch.tanh(grad)


def _constant(param: Any, grad: Any, count: Any, lr: Any) -> Any:
    return param - lr * grad, 1.0


@of_matrices
def _of_matrices(param: Any, grad: Any, lr: Any) -> Any:
    return param - lr * grad


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        (_squashed, "does not run on lists"),
        (_constant, "returns numbers"),
        (_of_matrices, "dtype torch.complex64"),  # the backend for matrices has been asked
    ],
)
def test_rules_that_lists_cannot_run_are_declined(rule: Any, reason: str) -> None:
    weight = torch.zeros(2, 2, dtype=torch.complex64, requires_grad=True)
    weight.grad = torch.ones_like(weight)
    refusing = from_rule(rule, "Refusing", lr=0.1)
    assert refusing([weight]).backends()[0].backend == "eager"
    with pytest.raises(RuntimeError, match=f"backend='foreach' cannot run .*{reason}"):
        refusing([weight], backend="foreach").step()
    assert not weight.any()


class Twice(Tensor):
    pass


def test_backend_declines_what_is_no_plain_tensor() -> None:
    odd = {
        "a Twice": torch.ones(2).as_subclass(Twice),
        "layout": torch.eye(2).to_sparse(),
        "dtype": torch.ones(2, dtype=torch.int64),
        "lazy": torch.ones(2, dtype=torch.complex64).conj(),
    }
    for reason, param in odd.items():
        assert reason in str(FOREACH.why_not(rules.sgd, param, None, ()))
    param = torch.ones(2)
    assert "gradient: a Twice" in str(FOREACH.why_not(rules.sgd, param, odd["a Twice"], ()))
    assert "exp_avg: shape (3,)" in str(FOREACH.why_not(rules.sgd, param, None, [("exp_avg", torch.ones(3))]))
    assert "on meta" in str(FOREACH.why_not(rules.sgd, param, None, [("exp_avg", torch.ones(2, device="meta"))]))
    assert "complex" in str(
        FOREACH.why_not(rules.sgd, param, None, [("exp_avg", torch.ones(2, dtype=torch.complex64))])
    )
    assert FOREACH.why_not(rules.sgd, torch.ones(3, 4, device="meta").t(), None, ()) is None


# Memory.


@pytest.mark.parametrize("dtypes", MIXES[:3], ids=str)
def test_a_rule_sees_few_elements_at_a_time(dtypes: tuple[torch.dtype, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreach, "CPU_ELEMENTS", 100)
    sizes, write = [], foreach.write

    def noted(tensors: Any, *arguments: Any) -> None:
        sizes.append(sum(tensor.numel() for tensor in tensors))
        write(tensors, *arguments)

    monkeypatch.setattr(foreach, "write", noted)
    (ours, _), (theirs, _) = (trajectory(CASES[5], backend, dtypes) for backend in ("foreach", "eager"))
    assert all(map(same_bits, ours, theirs))
    parts = 2 if dtypes[0].is_complex else 1
    assert max(sizes) <= 100 * parts
    updated = 4 * sum(map(torch.numel, values(0, SINGLE))) - 1023  # one has missed a step
    assert sum(sizes) == 3 * updated * parts  # param, exp_avg, exp_avg_sq


# Launches, and what devices decide.


def launched(
    backend: Any,
    dtype: torch.dtype,
    measures: bool = False,
    decision: Decision | None = None,
    device: str = "cpu",
    as_tensors: bool = False,
    rule: Any = rules.adam_amsgrad,
) -> tuple[list[Tensor], Any]:
    """Parameters and state after one launch with two rows of scalars, some of their numbers and gradients NaN."""
    takes = signature(rule)
    columns = [[value.to(device) for value in values(seed, dtype)[1:]] for seed in range(2 + len(takes.state))]
    params, grads, *state = columns
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    for tensor in (params[2], grads[3], *(column[4] for column in state)):
        tensor[0] = torch.nan
    launch = backend.launch(rule, len(takes.scalars), (dtype,) * (2 + len(state)), params, [0, 1] * 3 + [0])
    launch.compile(False)
    launch.set_state([[column[i] for column in state] for i in range(len(params))])
    for row in range(2):
        scalars: list[Any] = [0.1 + row / 4 + i / 50 for i in range(len(takes.scalars))]
        if as_tensors:
            scalars = [torch.tensor(x, dtype=DOUBLE, device=device) for x in scalars]
        launch.set_scalars(row, 0.5 - row, scalars)
    with torch.no_grad():
        launch.run(measures, decision)
    return [tensor for column in (params, *state) for tensor in column], launch


def decided(factor: float, take: float, may_skip: bool = True, device: str = "cpu") -> Decision:
    return Decision(torch.tensor([factor, take, 1.0, 0.0], dtype=DOUBLE, device=device), may_skip)


LAUNCHED = [HALF, BRAIN, SINGLE, DOUBLE, torch.complex64]


@pytest.mark.parametrize("dtype", LAUNCHED, ids=str)
def test_decisions_are_followed(dtype: torch.dtype) -> None:
    for as_tensors in (False, True):
        for decision in (decided(0.3, 1), decided(0.3, 1, may_skip=False), decided(torch.nan, 1)):
            ours, theirs = (
                launched(backend, dtype, decision=decision, as_tensors=as_tensors)[0] for backend in (FOREACH, EAGER)
            )
            assert all(map(same_bits, ours, theirs))


@pytest.mark.parametrize("dtype", LAUNCHED, ids=str)
def test_a_step_left_out_changes_no_bit(dtype: torch.dtype) -> None:
    left, _ = launched(FOREACH, dtype, decision=decided(torch.nan, 0))
    before = [value for seed in (0, 2, 3, 4) for value in values(seed, dtype)[1:]]
    for place in (2, 11, 18, 25):  # as ``launched`` does
        before[place][0] = torch.nan
    assert all(map(same_bits, left, before))


@pytest.mark.parametrize("elements", [100, foreach.CPU_ELEMENTS])
@pytest.mark.parametrize("dtype", LAUNCHED, ids=str)
def test_what_is_measured_is_what_eager_measures(
    dtype: torch.dtype, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(foreach, "CPU_ELEMENTS", elements)
    (ours, launch), (theirs, other) = (launched(backend, dtype, measures=True) for backend in (FOREACH, EAGER))
    assert all(map(same_bits, ours, theirs))
    tolerance = 1e-13 if elements == 100 else 0.0  # float64, added in another order
    torch.testing.assert_close(launch.measured(), other.measured(), rtol=tolerance, atol=0.0, equal_nan=True)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_nothing_is_read_back_from_a_device(case: Case) -> None:
    """Tensors on ``meta`` have no values: whatever would wait for a device raises."""
    optimizer = case.ours([torch.ones(1, requires_grad=True)], **case.options)
    rule = optimizer.rule_for(optimizer.param_groups[0])
    for dtype in (SINGLE, BRAIN):
        decision = decided(1.0, 1.0, device="meta")
        _, launch = launched(FOREACH, dtype, False, decision, "meta", as_tensors=True, rule=rule)
        total = launch.sum_of_squares()
        assert (total.shape, total.dtype, total.device.type) == ((), DOUBLE, "meta")


def test_sums_of_squares() -> None:
    grads = [*values(0, SINGLE), torch.full((5,), 3e38), *values(1, BRAIN)]
    expected = sum(grad.double().square().sum().item() for grad in grads)
    assert FOREACH.sum_of_squares(grads) == eager.sums_of_squares(grads) == pytest.approx(expected, rel=1e-14)
    # As on a device: one norm a tensor, whatever list it is in.
    total = foreach.sums_on_device(grads)
    assert total.item() == pytest.approx(expected, rel=1e-14)
    pairs = foreach.sums_on_device([torch.full((3,), 3 + 4j, dtype=torch.complex64)])
    assert pairs.item() == pytest.approx(75, rel=1e-14)
    assert torch.equal(foreach.sums_on_device(grads[:8]), foreach.sums_on_device(grads[:8]))


def test_sums_on_a_device() -> None:
    tensors = [torch.randn(shape) for shape in ((), (0,), (1023,), (7, 5))]
    expected = torch.stack([tensor.double().sum() for tensor in tensors])
    torch.testing.assert_close(foreach.each_on_device(tensors), expected, rtol=1e-12, atol=1e-12)
    odd = [
        torch.tensor(row) for row in ([1.0, torch.nan], [1.0, torch.inf], [-torch.inf, 1.0], [torch.inf, -torch.inf])
    ]
    torch.testing.assert_close(
        foreach.each_on_device(odd), torch.stack([each.double().sum() for each in odd]), equal_nan=True
    )


def test_norms_of_a_device_are_not_read() -> None:
    grads = [torch.ones(3, dtype=dtype, device="meta") for dtype in (SINGLE, BRAIN, torch.complex64)]
    assert get_total_norm(grads).shape == ()
    odd = torch.ones(3), torch.ones(3, dtype=DOUBLE, device="meta"), torch.ones(2, device="meta").as_subclass(Twice)
    assert all(FOREACH.why_not(None, tensor, None, ()) for tensor in odd)


# Step counts.


@pytest.mark.parametrize("dtype", [SINGLE, DOUBLE, BRAIN], ids=str)
def test_step_counts_of_the_host_are_counted_together(dtype: torch.dtype) -> None:
    tensors = [torch.tensor(float(i), dtype=dtype) for i in range(5)]
    counts: Any = FOREACH.scalar_state(tensors)
    assert isinstance(counts, foreach.HostScalarState)
    assert counts.is_unchanged()
    counts.add_one()
    assert [tensor.item() for tensor in tensors] == [1, 2, 3, 4, 5]
    assert counts.is_unchanged()
    tensors[3].fill_(9)
    assert not counts.is_unchanged()
    counts.write(np.array([0.5, 1.0, 2.0, 4.0, 8.0]), None)
    assert [tensor.item() for tensor in tensors] == [0.5, 1, 2, 4, 8]
    assert counts.is_unchanged()


def test_scalar_state_that_is_no_plain_number_goes_to_eager() -> None:
    for tensors in ([], [torch.tensor(3)], [torch.ones((), device="meta")][:0], [torch.tensor(1.0).as_subclass(Twice)]):
        counts: Any = FOREACH.scalar_state(tensors)
        assert isinstance(counts, eager.EagerScalarState)
        assert counts.is_unchanged()


def test_step_counts_on_a_device_follow_the_decision() -> None:
    assert FOREACH.decisions is not None
    tensors = [[torch.tensor(1.0), torch.tensor(i, dtype=DOUBLE)] for i in (2.0, 3.0, 4.0)]
    counts: Any = FOREACH.decisions.scalar_state(tensors, [0, 1, 0])
    rows = [[torch.tensor(7.0, dtype=DOUBLE), 0.5], [8.0, torch.tensor(torch.nan)]]
    counts.write(rows, decided(1.0, 0))
    assert [[x.item() for x in each] for each in tensors] == [[1, 2], [1, 3], [1, 4]]
    assert counts.is_unchanged()
    counts.write(rows, decided(1.0, 1))
    assert [[x.item() for x in each] for each in tensors[::2]] == [[7, 0.5], [7, 0.5]]
    assert tensors[1][0] == 8
    assert tensors[1][1].isnan()
    tensors[1][0].add_(1)
    assert not counts.is_unchanged()
    counts.write([[3.0, 0.5], [3.0, 0.5]], None)
    assert [[x.item() for x in each] for each in tensors] == [[3, 0.5]] * 3


def test_scalar_state_on_a_device_is_not_read() -> None:
    assert FOREACH.decisions is not None
    tensors = [[torch.ones((), device="meta")] for _ in range(3)]
    counts = FOREACH.decisions.scalar_state(tensors, [0, 1, 1])
    counts.write([[2.0], [torch.ones((), device="meta")]], decided(1.0, 1.0, device="meta"))
    assert counts.is_unchanged()
