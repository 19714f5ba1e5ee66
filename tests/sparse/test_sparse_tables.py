"""Tables of any dtype, in any memory, edited between steps; what a large one costs."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from cases import BACKENDS, Twins, params_of
from sparse_cases import (
    ADAMW,
    NESTEROV,
    SGD_CASES,
    ByHand,
    Touched,
    coo,
    one_thread,  # noqa: F401 a fixture
    random_sparse,
    table,
)
from torch import Tensor

from descend import SGD, AdamW, rules
from descend.backends.eager import EagerRows


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_duplicates_of_half_precision_are_summed_in_float32_and_rounded_once(dtype: torch.dtype, backend: str) -> None:
    param = torch.zeros(5, 3, dtype=dtype, requires_grad=True)
    rows = torch.tensor([1] * 300 + [4] * 50 + [0])[torch.randperm(351)]
    values = (torch.rand(351, 3) + 0.5).to(dtype)
    param.grad = coo(rows, values, (5, 3))
    SGD([param], lr=1.0, maximize=True, backend=backend).step()
    exact = torch.zeros(5, 3, dtype=torch.float64).index_add_(0, rows, values.double())
    error = (param.detach().double() - exact).abs()
    assert (error <= torch.finfo(dtype).eps / 2 * exact * (1 + 1e-3)).all()  # half a unit; a float32 sum adds little


DTYPES = [
    (torch.float32, None),
    (torch.bfloat16, None),
    (torch.bfloat16, torch.float32),
    (torch.float16, None),
    (torch.float32, torch.float64),
]


@pytest.mark.parametrize(("dtype", "state_dtype"), DTYPES, ids=str)
def test_rows_move_as_dense_parameters_do(dtype: torch.dtype, state_dtype: torch.dtype | None) -> None:
    """Gathered, with a dense gradient and a state of their own."""
    param, rows = table(9, 20, dtype), [5, 0, 7]
    dense = param.detach()[rows].clone().requires_grad_()
    optimizers = [
        AdamW([p], lr=0.1, weight_decay=0.1, state_dtype=state_dtype, sparse="touched") for p in (param, dense)
    ]
    for seed in range(5):
        dense.grad = torch.randn(3, 20, generator=torch.Generator().manual_seed(seed)).to(dtype)
        param.grad = coo(rows, dense.grad.clone(), param.shape)
        for optimizer in optimizers:
            optimizer.step()
    pairs = [(param.detach(), dense.detach(), dtype)]
    for name in ("exp_avg", "exp_avg_sq"):
        expected = state_dtype or (torch.float32 if dtype == torch.float16 else dtype)
        pairs.append((optimizers[0].state[param][name], optimizers[1].state[dense][name], expected))
    # Gradients of half precision come as float32 sums: another kernel, whose compiler may round other products once.
    is_same_kernel = dtype == torch.float32
    for ours, theirs, expected in pairs:
        assert ours.dtype == theirs.dtype == expected
        tolerance = 0 if is_same_kernel else max(torch.finfo(expected).eps, 1e-5)
        torch.testing.assert_close(ours[rows], theirs, rtol=tolerance, atol=tolerance / 1000)


@pytest.mark.parametrize("meaning", [None, "touched"])
@pytest.mark.parametrize("options", [dict(lr=0.1), dict(lr=0.1, momentum=0.9)], ids=str)
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_sgd_takes_complex_tables(dtype: torch.dtype, options: dict[str, float], meaning: str | None) -> None:
    random = torch.Generator().manual_seed(0)
    ours = torch.randn(9, 4, dtype=dtype, generator=random).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    optimizers = SGD([ours], **options, sparse=meaning), torch.optim.SGD([theirs], **options)
    rows = [3, 3, 5, 0]
    for _ in range(4):
        ours.grad = coo(rows, torch.randn(4, 4, dtype=dtype, generator=random), (9, 4))
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    tolerance = 1e-5 if dtype == torch.complex64 else 1e-12
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    assert [placement.backend for placement in optimizers[0].backends()] == ["foreach"]


def transposed(param: Tensor) -> Tensor:
    return param.detach().t().contiguous().t().requires_grad_()


def strided(param: Tensor) -> Tensor:
    return torch.stack([param.detach(), param.detach()], -1)[..., 1].requires_grad_()


def every_other_row(param: Tensor) -> Tensor:
    return param.detach().repeat_interleave(2, 0)[::2].requires_grad_()


class Marked(torch.Tensor):
    """A tensor subclass without behaviour of its own."""


def marked(param: Tensor) -> Tensor:
    return param.detach().as_subclass(Marked).requires_grad_()


@pytest.mark.parametrize("layout", [transposed, strided, every_other_row, marked], ids=lambda f: f.__name__)
@pytest.mark.parametrize("case", [NESTEROV, ADAMW], ids=str)
def test_tables_in_any_memory_are_updated(case: Touched, layout: Callable[[Tensor], Tensor]) -> None:
    param = layout(table())
    optimizer = case.ours([param], **case.options, sparse="touched")
    expected = ByHand(table(), case.theirs, case.options)
    for seed in range(4):
        param.grad = random_sparse(param.shape, 6, seed)
        expected.step(param.grad)
        optimizer.step()
    expected.assert_equal(optimizer, param)


@pytest.mark.parametrize("first", [0, 1], ids=["sparse first", "dense first"])
def test_tables_that_share_memory_are_updated_one_after_the_other(first: int) -> None:
    """Dense or sparse, in the groups' order: what decays then moves is elsewhere than what moves then decays."""

    def groups() -> list[dict[str, Any]]:
        memory = torch.linspace(-1, 1, 60, dtype=torch.float64)
        tables = [view.requires_grad_() for view in (memory[:36].view(9, 4), memory[20:].view(10, 4))]
        decays = [0.0 if number == first else 0.5 for number in range(2)]  # torch's sparse ones cannot
        return [{"params": [table], "weight_decay": decay} for table, decay in zip(tables, decays, strict=True)]

    def grads(params: Sequence[Tensor], seed: int) -> None:
        for number, param in enumerate(params):
            param.grad = random_sparse(param.shape, 6, 10 * seed + number)
            if number != first:
                param.grad = param.grad.to_dense()

    twins = Twins(SGD_CASES[0], groups)
    for seed in range(4):
        twins.step(seed, grads)
    for ours, theirs in zip(params_of(twins.ours), params_of(twins.theirs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def swap_storage(param: Tensor) -> None:
    param.data = param.data.clone() + 1


def swap_for_transposed(param: Tensor) -> None:
    param.data = param.data.mT.contiguous().mT


def swap_for_float64_again(param: Tensor) -> None:
    param.data = param.data.float().double()


EDITS: list[Callable[[Tensor], None]] = [swap_storage, swap_for_transposed, swap_for_float64_again]


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
@pytest.mark.usefixtures("either_probe")
def test_edits_between_steps_are_noticed(edit: Callable[[Tensor], None]) -> None:
    param = table()
    optimizer = AdamW([param], lr=0.1, sparse="touched")
    expected = ByHand(param, torch.optim.AdamW, dict(lr=0.1))
    for seed in range(6):
        param.grad = random_sparse(param.shape, 6, seed)
        expected.step(param.grad)
        optimizer.step()
        if seed in (1, 3):
            edit(param)
            expected.table = param.detach().clone()
    expected.assert_equal(optimizer, param)


@pytest.mark.usefixtures("either_probe")
def test_edits_of_the_state_are_noticed() -> None:
    param = table()
    optimizer = AdamW([param], lr=0.1, sparse="touched")
    expected = ByHand(param, torch.optim.AdamW, dict(lr=0.1))
    for seed in range(8):
        param.grad = random_sparse(param.shape, 6, seed)
        expected.step(param.grad)
        optimizer.step()
        if seed == 1:
            optimizer.state[param]["step"].fill_(10)
            expected.state["step"] = torch.tensor(10.0)
        if seed == 3:
            optimizer.state[param]["exp_avg"] = optimizer.state[param]["exp_avg"] * 0.5
            expected.state["exp_avg"] *= 0.5
        if seed == 5:
            optimizer.state.clear()
            expected.state.clear()
    expected.assert_equal(optimizer, param)


def test_rows_of_several_sparse_dimensions_are_numbered_through() -> None:
    rows = EagerRows(rules.sgd, (torch.float32, torch.float32), all_rows=False)
    rows.read(torch.tensor([[2, 0, 2, 1], [3, 1, 3, 0]]), torch.ones(4, 5), (3, 4), None, 0)
    assert rows.rows.tolist() == [1, 4, 11]


def test_step_on_a_large_table_costs_what_it_touches() -> None:
    code = """
        import torch
        from descend import AdamW
        from descend.state import lazy_memory
        def memory(key):
            with open("/proc/self/status") as file:
                return next(int(line.split()[1]) for line in file if line.startswith(key)) / 1024
        param = lazy_memory.zeros((2_000_000, 64), torch.float32).requires_grad_()
        torch.sparse.check_sparse_tensor_invariants.disable()
        small = torch.zeros(9, 64, requires_grad=True)
        optimizer = AdamW([small, param], sparse="touched", max_norm=1.0, nonfinite="skip")
        small.grad = torch.sparse_coo_tensor(torch.tensor([[1, 1]]), torch.ones(2, 64), (9, 64))
        optimizer.step()
        rows = torch.arange(0, 32_000, 16)[None]  # neighbouring pages
        before = memory("VmRSS")
        for _ in range(2):
            param.grad = torch.sparse_coo_tensor(rows, torch.ones(2000, 64), param.shape)
            optimizer.step()
        print(memory("VmHWM") - before)
        """
    if not sys.platform.startswith("linux"):
        pytest.skip("needs Linux")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=250)
    assert done.returncode == 0, done.stderr
    # 2,000 rows in a page each of three tables: 24 MiB. A table has 488 MiB.
    assert float(done.stdout) < 60
