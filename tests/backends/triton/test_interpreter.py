"""The kernels in Triton's interpreter: results, memory, decisions, norms, scalar state."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from cases import CASES, Case, Twins, give_grads, leaves, params_of
from rule_runs import BRAIN, DOUBLE, HALF, RULES, SINGLE, Run, dtypes_of, values

from descend import SGD, AdamW, NAdam, rules
from descend.backends import eager
from descend.backends.triton.backend import TritonBackend, TritonDecisions
from descend.core.decision import Decision

pytest.importorskip("triton")

from descend.backends.triton import judging, launch, library, tables

pytestmark = pytest.mark.usefixtures("interpreter")

# In float32 the interpreter does the operations of the rule one by one, as torch does; each may round differently by
# one unit in the last place, and none of these rules has more than 20 of them.
ROUNDING = {SINGLE: 20 * 2**-24, DOUBLE: 20 * 2**-53, HALF: 2**-10, BRAIN: 2**-7}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_steps_match_torch(case: Case) -> None:
    def groups() -> list[Any]:
        params = leaves([(), (0,), (7, 5)])
        return [{"params": params[:2]}, {"params": params[2:], "lr": 0.02}]

    twins = Twins(case, groups, backend="triton")
    for seed in range(2):  # every gradient lies in new memory
        twins.step(seed)
    twins.assert_equal()
    assert {placement.backend for placement in twins.ours.backends()} == {"triton"}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_matches_eager_in_float32(rule: Any) -> None:
    run = Run(rule, dtypes_of(rule, SINGLE, SINGLE, SINGLE), [37])
    run.run()
    run.assert_as_expected(ROUNDING[SINGLE])


@pytest.mark.parametrize(("param", "grad", "state"), [*product((HALF, BRAIN, SINGLE, DOUBLE), repeat=3)])
def test_every_mix_of_dtypes_matches_eager(param: torch.dtype, grad: torch.dtype, state: torch.dtype) -> None:
    run = Run(rules.momentum, (param, grad, state), [5])
    run.run()
    run.assert_as_expected(max(ROUNDING[param], ROUNDING[state]))


@pytest.mark.parametrize("offset", [0, 1, 4])
def test_sizes_and_offsets(offset: int) -> None:
    run = Run(rules.momentum, [SINGLE] * 3, [0, 1, 16, 511, 512, 513, 1023, 1024, 1025, 2065], offset)
    run.run()
    run.assert_as_expected(ROUNDING[SINGLE])


@pytest.mark.parametrize("column", [0, 1, 2])
def test_one_tensor_of_a_parameter_is_not_aligned(column: int) -> None:
    offsets = [0, 0, 0]
    offsets[column] = 1
    run = Run(rules.momentum, [SINGLE] * 3, [1030], offsets)
    run.run()
    run.assert_as_expected(ROUNDING[SINGLE])


def test_offsets_beyond_31_bits() -> None:
    far = 2**33
    param, grad = torch.ones(20), torch.ones(20)
    chunks = torch.tensor([[0, 0, far, 20]])
    addresses = torch.tensor([[tensor.data_ptr() - 4 * far for tensor in (param, grad)]])
    kernel = library.update(rules.sgd, 2, (SINGLE, SINGLE))
    kernel.bind(1, param.device, chunks, addresses, torch.tensor([[1.0, 0.5, 0.0]]), torch.ones(4, dtype=DOUBLE))()
    assert (param == 0.5).all()


def test_sum_of_squares_beyond_31_bits() -> None:
    far, sums = 2**33, torch.zeros(1, dtype=DOUBLE)
    grad = torch.full((1030,), 2.0)
    addresses = torch.tensor([[grad.data_ptr() - 4 * far]])
    kernel = library.sums_of_squares(SINGLE, 0, 1, True)
    kernel.bind(1, grad.device, torch.tensor([[0, 0, far, 1030]]), addresses, sums)()
    assert float(sums) == 4 * 1030


def test_transposed_and_strided_layouts() -> None:
    def groups() -> list[torch.Tensor]:
        first, second = leaves([(5, 7), (3, 4, 2, 2)], SINGLE)
        return [
            first.detach().t().requires_grad_(),
            second.detach().to(memory_format=torch.channels_last).requires_grad_(),
        ]

    def grads(params: Any, seed: int) -> None:
        give_grads(params, seed)
        for param in params:
            param.grad = torch.empty_like(param).copy_(param.grad)

    twins = Twins(CASES[5], groups, backend="triton")
    for seed in range(2):
        twins.step(seed, grads)
    twins.assert_equal(1e-5, 1e-6)
    assert {placement.backend for placement in twins.ours.backends()} == {"triton"}


def test_nan_and_inf_stay_what_they_are() -> None:
    run = Run(rules.adam_amsgrad, [SINGLE] * 5, [600])
    for column, row in enumerate(run.tensors[0]):
        row[column::7] = float("nan")
        row[column + 2 :: 11] = float("inf")
    run.before = [[tensor.clone() for tensor in row] for row in run.tensors]
    run.run()
    run.assert_as_expected(ROUNDING[SINGLE])


@pytest.mark.parametrize(("take", "may_skip"), [(1.0, False), (1.0, True), (0.0, True)])
def test_decision_is_read(take: float, may_skip: bool) -> None:
    decision = Decision(torch.tensor([0.25, take, 1.0, 0.0], dtype=DOUBLE), may_skip)
    run = Run(rules.momentum, [SINGLE] * 3, [3, 1030])
    run.run(decision)
    run.assert_as_expected(ROUNDING[SINGLE], decision)
    assert all(torch.equal(*pair) for pair in zip(run.tensors[0], run.before[0], strict=True)) == (take == 0)


def test_same_launch_follows_another_decision_and_moved_gradients() -> None:
    run = Run(rules.sgd, [SINGLE] * 2, [3])
    backend = TritonBackend()
    launch, none = run.launch(backend), backend.scalar_state([])
    together = backend.together([run.tensors[0][0]], [launch], none, none)
    param, grad = run.tensors[0]
    lr, decay = values(rules.sgd)
    want = run.before[0][0]
    for factor in (1.0, 0.5, 0.25):
        moved = grad.clone() * 3
        launch.addresses[0, 1] = moved.data_ptr()
        together(np.zeros(0), Decision(torch.tensor([factor, 1.0, 0, 0], dtype=DOUBLE), False))
        want = want - lr * (0.5 * factor * moved + decay * want)
        torch.testing.assert_close(param, want, rtol=1e-6, atol=1e-6)


def test_scalars_on_the_device_are_read_when_the_launch_runs() -> None:
    run = Run(rules.sgd, [SINGLE] * 2, [3])
    backend = TritonBackend()
    launch, none = run.launch(backend), backend.scalar_state([])
    together = backend.together([run.tensors[0][0]], [launch], none, none)
    lr = torch.tensor(0.0, dtype=DOUBLE)
    launch.set_scalars(0, 1.0, [lr, 0.0])
    together(np.zeros(0), None)
    assert torch.equal(run.tensors[0][0], run.before[0][0])
    lr.fill_(0.1)
    together(np.zeros(0), None)
    torch.testing.assert_close(run.tensors[0][0], run.before[0][0] - 0.1 * run.before[0][1])
    launch.set_scalars(0, 0.0, [0.5, 0.5])  # numbers again
    before = run.tensors[0][0].clone()
    together(np.zeros(0), None)
    torch.testing.assert_close(run.tensors[0][0], 0.75 * before)


def test_wrong_number_of_scalars_is_an_error() -> None:
    launch = Run(rules.sgd, [SINGLE] * 2, [3]).launch(TritonBackend())
    with pytest.raises(ValueError, match="takes 2 scalars, got 1"):
        launch.set_scalars(0, 1.0, [0.1])


@pytest.mark.parametrize("dtype", [HALF, BRAIN, SINGLE, DOUBLE])
def test_sum_of_squares(dtype: torch.dtype) -> None:
    sizes = [0, 1, 1023, 1024, 2100]
    sums = []
    for offset in (0, 3):
        torch.manual_seed(1)
        run = Run(rules.sgd, [dtype] * 2, sizes, offset)
        launch = run.launch(TritonBackend(), wants_norm=True)
        sums.append(float(launch.sum_of_squares()))
        assert sums[-1] == float(TritonBackend().sum_of_squares([row[1] for row in run.tensors]))
    want = math.fsum(float(x) ** 2 for row in run.tensors for x in row[1])
    assert sums[0] == pytest.approx(want, rel=1e-14)
    assert sums[0] == sums[1], "the bits depend on where the gradients lie"


def test_sum_of_squares_of_several_dtypes_and_of_nothing() -> None:
    tensors = [torch.full((3,), 2.0, dtype=dtype) for dtype in (SINGLE, BRAIN)]
    assert float(TritonBackend().sum_of_squares(tensors)) == 24
    assert float(TritonBackend().sum_of_squares([torch.zeros(0)])) == 0


@pytest.mark.parametrize("total", [4.0, 1e-6, float("nan"), float("inf")])
@pytest.mark.parametrize("max_norm", [0.0, 0.1])
@pytest.mark.parametrize("found", [None, 0.0, 1.0])
def test_judge_says_what_eager_mode_says(total: float, max_norm: float, found: float | None) -> None:
    written = []
    for decisions in (TritonDecisions(), eager.EagerDecisions()):
        values = torch.tensor([9.0, 9.0, 9.0, 3.0], dtype=DOUBLE)
        decisions.judge(
            values,
            torch.tensor(total, dtype=DOUBLE),
            None if found is None else torch.tensor([8.0]),
            None if found is None else torch.tensor([found]),
            0.7,
            max_norm,
            True,
        )
        written.append(values)
    torch.testing.assert_close(*written, rtol=1e-15, atol=0, equal_nan=True)


@pytest.mark.parametrize("take", [0.0, 1.0])
def test_scalar_state_is_written_in_its_dtypes(take: float) -> None:
    tensors = [[torch.tensor(1.0), torch.tensor(0.5, dtype=DOUBLE)] for _ in range(150)]
    state = TritonDecisions().scalar_state(tensors, [i % 2 for i in range(150)])
    decision = Decision(torch.tensor([1.0, take, 0, 0], dtype=DOUBLE), True)
    state.write([[2.0, torch.tensor(0.1, dtype=DOUBLE)], [torch.tensor(3.0, dtype=DOUBLE), 0.2]], decision)
    found = [[float(x) for x in row] for row in tensors]
    assert found == ([[2.0, 0.1], [3.0, 0.2]] * 75 if take else [[1.0, 0.5]] * 150)
    assert state.is_unchanged()
    tensors[7][1] += 1
    assert not state.is_unchanged()


def test_scalar_state_of_other_dtypes_is_written() -> None:
    count = torch.tensor(3)
    TritonDecisions().scalar_state([[count]], [0]).write([[4.0]], None)
    assert int(count) == 4


def test_measured_step_is_as_any_other_and_measures_what_eager_mode_does() -> None:
    sums = []
    for measures in (False, True):
        torch.manual_seed(3)
        run = Run(rules.adamw, [SINGLE] * 4, [5, 600])
        backend = TritonBackend()
        launch, none = run.launch(backend), backend.scalar_state([])
        backend.together([row[0] for row in run.tensors], [launch], none, none, measures)(np.zeros(0), None)
        sums.append([tensor.clone() for row in run.tensors for tensor in row])
    assert all(map(torch.equal, *sums))
    rows = [[tensor.clone() for tensor in row] for row in run.before]
    want = [eager.run(rules.adamw, p, g, s, values(rules.adamw), 0.5, measures=True) for p, g, *s in rows]
    torch.testing.assert_close(launch.measured(), torch.stack(want), rtol=1e-6, atol=1e-6)


def test_graph_keeps_all_that_its_launches_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (launch, judging, tables):
        monkeypatch.setattr(module, "is_capturing", lambda device: True)
    kept: list[Any] = []
    monkeypatch.setattr(tables, "_captured", kept)
    decisions, total, found = TritonDecisions(), torch.tensor(4.0, dtype=DOUBLE), torch.tensor([0.0])
    decision = Decision(torch.ones(4, dtype=DOUBLE), True)
    decisions.judge(decision.values, total, None, found, 1.0, 0.0, True)
    state = decisions.scalar_state([[torch.tensor(1.0)]], [0])
    for needed, act in (
        ((decision.values, total, found), lambda: None),
        ((decision.values,), lambda: Run(rules.sgd, [SINGLE] * 2, [3]).run(decision)),
        ((decision.values,), lambda: state.write([[2.0]], decision)),
    ):
        act()
        held = [item for objects in kept for item in objects]
        assert all(any(item is tensor for item in held) for tensor in needed)
        kept.clear()


def test_version_counters_rise() -> None:
    (param,) = leaves([(3,)])
    optimizer = SGD([param], backend="triton")
    give_grads([param], 0)
    before = param._version
    optimizer.step()
    assert param._version == before + 1


def test_steps_that_are_decided_on_the_device() -> None:
    ends = []
    for backend in ("triton", "eager"):
        params = leaves([(3, 2), (5,)])
        optimizer = AdamW(params, max_norm=0.5, nonfinite="skip", backend=backend)
        for seed in range(3):
            give_grads(params, seed)
            if seed == 1:
                params[0].grad[0, 0] = float("nan")
            optimizer.step()
        ends.append([*map(torch.clone, params_of(optimizer)), torch.tensor(optimizer.grad_norm)])
        assert optimizer.skipped_steps == 1
        assert float(optimizer.state[params[1]]["step"]) == 2
    torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-12)


def test_scalar_state_of_skipped_steps_stays() -> None:
    (param,) = leaves([(3,)])
    optimizer = NAdam([param], nonfinite="skip", backend="triton")
    for grad in (1.0, float("inf"), 1.0):
        param.grad = torch.full_like(param, grad)
        optimizer.step()
    other = leaves([(3,)])[0]
    twin = NAdam([other], backend="eager")
    for _ in range(2):
        other.grad = torch.ones_like(other)
        twin.step()
    torch.testing.assert_close(param, other, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(optimizer.state[param]["mu_product"], twin.state[other]["mu_product"])
