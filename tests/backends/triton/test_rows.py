"""Sparse rows in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from exact_cases import ExactTwins, Run, random_tables
from sparse_cases import (
    TOUCHED,
    ByHand,
    Touched,
    coo,
    one_thread,  # noqa: F401 a fixture
    random_indices,
    random_sparse,
    table,
    zipf_indices,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from descend import SGD, Adagrad, AdamW, Monitor, SparseAdam, rules
from descend.backends.backend import Rows
from descend.backends.eager import EagerBackend
from descend.backends.triton.backend import TritonBackend
from descend.core.decision import Decision
from descend.state import lazy_memory

pytest.importorskip("triton")

from descend.backends.triton import library, rows_library, tuning
from descend.backends.triton import rows as triton_rows

pytestmark = pytest.mark.usefixtures("interpreter")

ADAMW_SCALARS = (0.1, 0.1, 0.01, 1e-8, 0.1, 0.1, 0.01)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of four entries, blocks of four columns, four pieces of a run at a time: a few entries are many."""
    monkeypatch.setattr(rows_library.Blocks, "of", lambda length, compute: rows_library.Blocks(length, 4, 4))
    monkeypatch.setattr(tuning, "CARRIES", 4)


def pattern(name: str, rows: int, count: int) -> Tensor:
    """Return indices of a table's rows: each once, all the same, some often, or runs that end anywhere in a tile."""
    random = torch.Generator().manual_seed(count)
    if name == "distinct":
        return torch.randperm(rows, generator=random)[:count]
    if name == "same":
        return torch.full((count,), rows - 1)
    if name == "zipf":
        return zipf_indices(rows, count, random)
    lengths = torch.tensor([3, 6, 1, 1, 30, 4, 9, 2, 5, 8, 1, 16])
    runs = torch.arange(len(lengths)).repeat_interleave(lengths)[:count]
    return runs[torch.randperm(len(runs), generator=random)]


def sums_of(indices: Tensor, values: Tensor, rows: int) -> Tensor:
    """Return the rows that triton sums: what SGD with a learning rate of -1 adds to zeros."""
    weight = torch.zeros(rows, *values.shape[1:], dtype=values.dtype, requires_grad=True)
    weight.grad = coo(indices, values, weight.shape)
    optimizer = SGD([weight], lr=1.0, maximize=True, sparse="touched", backend="triton")
    optimizer.step()
    return weight.detach()


# What a step computes.


@pytest.mark.parametrize("case", TOUCHED, ids=str)
def test_touched_rows_match_a_dense_optimizer(case: Touched, small_tiles: None) -> None:
    weight = table(9, 3)
    optimizer = case.ours([weight], sparse="touched", backend="triton", **case.options)
    expected = ByHand(weight, case.theirs, case.options)
    for seed in range(2):
        weight.grad = random_sparse(weight.shape, 11, seed)
        optimizer.step()
        expected.step(weight.grad)
    expected.assert_equal(optimizer, weight)


@pytest.mark.parametrize(
    ("ours", "dtype"), [(SparseAdam, torch.float32), (Adagrad, torch.bfloat16), (AdamW, torch.float16)]
)
def test_rows_match_the_eager_backend(ours: Any, dtype: torch.dtype) -> None:
    options: dict[str, Any] = {} if ours is SparseAdam else dict(sparse="touched")
    found = []
    for backend in ("eager", "cpu", "triton"):
        weight = table(7, 5, dtype)
        optimizer = ours([weight], lr=0.05, backend=backend, max_norm=2.0, **options)
        for seed in range(3):
            weight.grad = random_sparse(weight.shape, 9, seed, dtype)
            optimizer.step()
        state = {name: value for name, value in optimizer.state[weight].items() if isinstance(value, Tensor)}
        found.append((weight.detach(), state))
    # Triton's interpreter cuts off the digits that bfloat16 lacks; GPUs round.
    rtol = {torch.float32: 1e-6, torch.bfloat16: 3 * 2.0**-7, torch.float16: 3 * 2.0**-10}[dtype]
    tolerance = dict(rtol=rtol, atol=rtol / 3)
    for weight, state in found[1:]:
        torch.testing.assert_close(weight, found[0][0], **tolerance)
        for name, value in state.items():
            torch.testing.assert_close(value, found[0][1][name], **tolerance)


@pytest.mark.parametrize("name", ["distinct", "same", "zipf", "runs"])
@pytest.mark.parametrize(("length", "count"), [(3, 1), (4, 5), (5, 86)])
def test_duplicates_are_summed(name: str, length: int, count: int, small_tiles: None) -> None:
    indices = pattern(name, rows=160, count=count)
    values = torch.randint(-8, 8, (count, length), generator=torch.Generator().manual_seed(1)).float()
    expected = torch.zeros(160, length).index_add_(0, indices, values)  # whole numbers: exact in any order
    assert torch.equal(sums_of(indices, values, 160), expected)


def test_a_gradient_without_entries(small_tiles: None) -> None:
    weight = table(6, 3, torch.float32)
    before = weight.detach().clone()
    optimizer = AdamW([weight], sparse="touched", max_norm=1.0, backend="triton")
    weight.grad = coo(torch.empty(1, 0), torch.empty(0, 3), weight.shape)
    optimizer.step()
    assert torch.equal(weight.detach(), before)
    assert optimizer.grad_norm == 0
    assert optimizer.state[weight]["step"] == 1


@pytest.mark.parametrize("length", [1, 64, 200])
def test_duplicates_are_summed_in_tiles_of_their_size(length: int) -> None:
    indices = pattern("runs", rows=12, count=86)
    values = torch.randint(-8, 8, (86, length), generator=torch.Generator().manual_seed(1)).float()
    assert torch.equal(sums_of(indices, values, 12), torch.zeros(12, length).index_add_(0, indices, values))


def test_sums_have_the_same_bits_in_every_run(small_tiles: None) -> None:
    indices = pattern("zipf", rows=20, count=60)
    values = torch.randn(60, 5, generator=torch.Generator().manual_seed(1))
    first, second = (sums_of(indices, values, 20) for _ in range(2))
    assert torch.equal(first, second)
    expected = torch.zeros(20, 5, dtype=torch.float64).index_add_(0, indices, values.double())
    torch.testing.assert_close(first.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("values", [[torch.nan, 1.0], [torch.inf, 1.0]])
def test_what_is_not_finite_stays_in_its_row(values: list[float], small_tiles: None) -> None:
    indices = torch.tensor([2] * 9 + [1, 3])
    given = torch.ones(11, 2)
    given[4] = torch.tensor(values)
    sums = sums_of(indices, given, 5)
    assert sums[[1, 3]].eq(1).all()
    assert not sums[2, 0].isfinite()
    assert sums[2, 1] == 9


@pytest.mark.parametrize("sparse_dim", [0, 2, 3])
def test_several_sparse_dimensions(sparse_dim: int, small_tiles: None) -> None:
    weights = []
    for backend in ("eager", "triton"):
        weight = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
        optimizer = AdamW([weight], lr=0.1, sparse="touched", backend=backend)
        for seed in range(2):
            random = torch.Generator().manual_seed(seed)
            indices = random_indices((3, 4, 2)[:sparse_dim], 9, random) if sparse_dim else torch.empty(0, 9)
            values = torch.randn(9, *weight.shape[sparse_dim:], generator=random)
            weight.grad = coo(indices.long(), values, weight.shape)
            optimizer.step()
        weights.append(weight.detach())
    torch.testing.assert_close(*weights)


def test_all_rows_move_where_zeros_do(small_tiles: None) -> None:
    weights = []
    for backend in ("eager", "triton"):
        weight = table(9, 3, torch.float32)
        optimizer = SGD([weight], lr=0.1, momentum=0.9, backend=backend, max_norm=1.0)
        for seed in range(3):
            weight.grad = random_sparse(weight.shape, 7, seed, torch.float32)
            optimizer.step()
        weights.append(weight.detach())
    torch.testing.assert_close(*weights)


# What it leaves alone.


def test_only_touched_rows_are_written(small_tiles: None) -> None:
    memory = torch.full((14, 5), torch.nan)
    weight = memory[2:12].requires_grad_()
    weight.data[[0, 4, 9]] = 1.0
    optimizer = AdamW([weight], lr=0.1, weight_decay=0.0, sparse="touched", backend="triton")
    for _ in range(2):
        weight.grad = coo([9, 0, 4, 9, 9, 0], torch.ones(6, 5), weight.shape)
        optimizer.step()
    touched = torch.zeros(14, dtype=torch.bool)
    touched[[2, 6, 11]] = True
    assert memory[~touched].isnan().all()
    torch.testing.assert_close(memory[touched], torch.full((3, 5), 0.8))
    assert not optimizer.state[weight]["exp_avg"][[1, 2, 3, 5, 6, 7, 8]].any()


def test_gradients_stay_as_they_are(small_tiles: None) -> None:
    weight = table(6, 3, torch.float32)
    weight.grad = random_sparse(weight.shape, 9, 0, torch.float32)
    indices, values = weight.grad._indices().clone(), weight.grad._values().clone()
    AdamW([weight], sparse="touched", max_norm=0.1, backend="triton").step()
    assert torch.equal(weight.grad._indices(), indices)
    assert torch.equal(weight.grad._values(), values)


def test_values_in_the_memory_of_the_table_are_read_before_it_is_written(small_tiles: None) -> None:
    weight = table(8, 4, torch.float32)
    expected = weight.detach() - 0.5 * weight.detach().flip(0)
    backend = TritonBackend()
    rows = backend.rows(rules.sgd, 2, (torch.float32, torch.float32), False, weight)
    rows.compile(False)
    rows.read(torch.arange(7, -1, -1)[None], weight.detach(), (8,), None, 0)
    rows.run(weight.detach(), [], (0.5, 0.0), 1.0, backend.scalar_state([]), None)
    assert torch.equal(weight.detach(), expected)


def test_a_wrong_index_is_refused_with_the_same_words(small_tiles: None) -> None:
    messages = []
    for backend in ("eager", "cpu", "triton"):
        weight = table(6, 3, torch.float32)
        before = weight.detach().clone()
        weight.grad = coo([[1, 6, -1, 2]], torch.ones(4, 3), weight.shape)
        with pytest.raises(IndexError, match="index") as raised:
            AdamW([weight], sparse="touched", backend=backend).step()
        assert torch.equal(weight.detach(), before)
        messages.append(str(raised.value))
    assert messages[0] == messages[1] == messages[2]


def test_a_device_writes_nothing_for_a_wrong_index(monkeypatch: pytest.MonkeyPatch, small_tiles: None) -> None:
    asserted: list[bool] = []
    monkeypatch.setattr(triton_rows, "_is_on_host", lambda tensor: False)
    monkeypatch.setattr(torch, "_assert_async", lambda condition, message: asserted.append(bool(condition)))
    memory = torch.full((14, 3), torch.nan)
    weight = memory[4:10]
    weight[2] = 1.0
    rows = TritonBackend().rows(rules.sgd, 2, (torch.float32, torch.float32), False, weight)
    wrong = [-1, -4, 6, 2**31, 2**32 + 2, -(2**63)]
    rows.read(torch.tensor([[2, *wrong, 2]]), torch.ones(8, 3), (6,), None, 0)
    rows.run(weight, [], (1.0, 0.0), 1.0, TritonBackend().scalar_state([]), None)
    assert asserted == [False]
    assert memory[6].tolist() == [-1.0] * 3
    assert memory[torch.arange(14) != 6].isnan().all()


def test_a_step_left_out_moves_nothing(small_tiles: None) -> None:
    weight = table(6, 3, torch.float32)
    optimizer = AdamW([weight], lr=0.1, sparse="touched", nonfinite="skip", max_norm=1.0, backend="triton")
    weight.grad = random_sparse(weight.shape, 9, 0, torch.float32)
    optimizer.step()
    before = weight.detach().clone(), {name: value.clone() for name, value in optimizer.state[weight].items()}
    weight.grad = random_sparse(weight.shape, 9, 1, torch.float32)
    weight.grad._values()[3, 1] = torch.inf
    optimizer.step()
    assert torch.equal(weight.detach(), before[0])
    assert all(torch.equal(value, before[1][name]) for name, value in optimizer.state[weight].items())
    assert optimizer.skipped_steps == 1


@pytest.mark.slow
def test_tables_of_more_than_two_thousand_million_numbers() -> None:
    rows, backend = 2**25 + 3, TritonBackend()
    weight = lazy_memory.zeros((rows, 64), torch.float16)
    touched = backend.rows(rules.sgd, 2, (torch.float16, torch.float32), False, weight)
    touched.compile(False)
    touched.read(torch.tensor([[rows - 1, 5, rows - 1]]), torch.ones(3, 64), (rows,), None, 0)
    touched.run(weight, [], (1.0, 0.0), 1.0, backend.scalar_state([]), None)
    assert weight[[5, rows - 2, rows - 1], 63].tolist() == [-1, 0, -2]


def test_numbers_of_rows_may_need_more_than_32_bits(small_tiles: None) -> None:
    rows = TritonBackend().rows(rules.sgd, 2, (torch.float32, torch.float32), False, torch.zeros(9, 4))
    rows.read(torch.tensor([[2**20, 1, 2**20], [2**12, 0, 2**12]]), torch.ones(3, 4), (2**21, 2**13), None, 0)
    assert rows.rows.tolist() == [2**13, 2**33 + 2**12]
    assert float(rows.sum_of_squares()) == 4 * (4 + 1)


# How it is run.


def prepared(backend: Any, weight: Tensor, wants_norm: bool = True) -> tuple[Rows, list[Tensor]]:
    """Return a backend's rows for AdamW, compiled, and state of zeros."""
    rows = backend.rows(rules.adamw, 7, (weight.dtype, torch.float32, weight.dtype, weight.dtype), False, weight)
    rows.compile(wants_norm, True)
    return rows, [torch.zeros_like(weight), torch.zeros_like(weight)]


class _NoWaiting(TorchDispatchMode):
    """Raises where a host would wait for a device."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function)
        assert not any(op in name for op in ("_local_scalar_dense", "nonzero", "unique", "masked_select")), name
        assert not (name.startswith("aten.index") and any(getattr(x, "dtype", None) == torch.bool for x in args[1]))
        return function(*args, **(kwargs or {}))


def test_a_touched_step_waits_for_nothing(monkeypatch: pytest.MonkeyPatch, small_tiles: None) -> None:
    monkeypatch.setattr(triton_rows, "_is_on_host", lambda tensor: False)
    backend, weight = TritonBackend(), table(9, 3, torch.float32).detach()
    rows, state = prepared(backend, weight)
    grad = random_sparse(weight.shape, 11, 0, torch.float32)
    decision = Decision(torch.tensor([0.5, 1.0, 0.0, 0.0], dtype=torch.float64), True)
    scalars = (torch.tensor(0.1, dtype=torch.float64), *ADAMW_SCALARS[1:])
    mark = torch.zeros(9, dtype=torch.int32), 4
    before = weight.clone()
    with _NoWaiting():
        rows.read(grad._indices(), grad._values(), (9,), None, 0)
        total = rows.sum_of_squares()
        rows.run(weight, state, scalars, 1.0, backend.scalar_state([]), mark, True, decision)
        count = rows.count
        rows.measured()
        rows.release()
    touched = grad._indices()[0].unique()
    summed = grad.coalesce().values()
    assert isinstance(total, Tensor)
    assert total.shape == ()
    assert total.item() == pytest.approx(summed.square().sum().item())
    assert int(count) == len(touched)
    assert (weight != before).any(1).nonzero().flatten().tolist() == touched.tolist()
    assert mark[0].nonzero().flatten().tolist() == touched.tolist()
    assert mark[0].max() == 4


def test_graph_keeps_the_scratch_memory_that_it_uses(monkeypatch: pytest.MonkeyPatch, small_tiles: None) -> None:
    scratch = {"in_range", "carries", "squares", "result"}
    used: dict[str, int] = {}
    kept: list[Tensor] = []
    bind = library.Kernel.bind

    def watched(kernel: Any, programs: int, device: torch.device, *arguments: Any) -> Any:
        given = zip(kernel._signature, arguments, strict=False)
        used.update((name, each.data_ptr()) for name, each in given if name in scratch)
        return bind(kernel, programs, device, *arguments)

    monkeypatch.setattr(library.Kernel, "bind", watched)
    monkeypatch.setattr(triton_rows, "is_capturing", lambda device: True)
    monkeypatch.setattr(triton_rows, "keep", lambda *tensors: kept.extend(tensors))
    backend, weight = TritonBackend(), table(9, 3, torch.float32).detach()
    rows, state = prepared(backend, weight)
    grad = random_sparse(weight.shape, 11, 0, torch.float32)
    rows.read(grad._indices(), grad._values(), (9,), None, 0)
    rows.sum_of_squares()
    rows.run(weight, state, ADAMW_SCALARS, 1.0, backend.scalar_state([]), None)
    assert used.keys() == scratch
    assert set(used.values()) <= {tensor.data_ptr() for tensor in kept}


@pytest.mark.parametrize("backend", [EagerBackend(), TritonBackend()])
@pytest.mark.parametrize("take", [0.0, 1.0])
def test_a_step_left_out_marks_no_row(backend: Any, take: float, small_tiles: None) -> None:
    weight = table(9, 3, torch.float32).detach()
    before, mark = weight.clone(), torch.arange(9, dtype=torch.int32)
    rows, state = prepared(backend, weight)
    grad = random_sparse(weight.shape, 11, 0, torch.float32)
    decision = Decision(torch.tensor([0.5, take, 0.0, 0.0], dtype=torch.float64), True)
    rows.read(grad._indices(), grad._values(), (9,), None, 0)
    rows.run(weight, state, ADAMW_SCALARS, 1.0, backend.scalar_state([]), (mark, 20), False, decision)
    touched = torch.zeros(9, dtype=torch.bool)
    touched[grad._indices()[0]] = bool(take)
    assert torch.equal((weight != before).any(1), touched)
    assert torch.equal(mark, torch.where(touched, 20, torch.arange(9)).int())


def test_a_step_is_measured_as_the_eager_backend_does(small_tiles: None) -> None:
    measured = []
    for backend in (EagerBackend(), TritonBackend()):
        weight = table(9, 3, torch.float32).detach()
        rows, state = prepared(backend, weight)
        for seed in range(2):
            grad = random_sparse(weight.shape, 11, seed, torch.float32)
            rows.read(grad._indices(), grad._values(), (9,), None, 0)
            rows.run(weight, state, ADAMW_SCALARS, 2.0, backend.scalar_state([]), None, True)
        measured.append(torch.as_tensor(rows.measured()))
        assert np.array_equal(rows.rows, grad._indices()[0].unique().numpy())
        assert int(rows.count) == len(rows.rows)
    torch.testing.assert_close(*measured)


def test_monitor_counts_the_rows(small_tiles: None) -> None:
    named = []
    for backend in ("eager", "triton"):
        weight = table(9, 3, torch.float32)
        optimizer = AdamW([weight], sparse="touched", backend=backend)
        monitor = Monitor(optimizer, every=1, detail="params")
        weight.grad = coo([4, 1, 4, 8], torch.ones(4, 3), weight.shape)
        optimizer.step()
        named.append(next(iter(monitor.read()["params"].values()))["rows_named"])
    assert named == [3, 3]


# Rows that catch up.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_that_missed_steps_catch_up(dtype: torch.dtype, small_tiles: None) -> None:
    run = Run(backend="triton", dtype=dtype).train([0, 1, 2, 3], steps=2).train([0], steps=9)
    run.train([0, 2, 2, 2], steps=2).assert_close()
    run.train([5, 1, 1], steps=2).assert_close(catch_ups=2)


def test_exact_tables_match_a_dense_optimizer(small_tiles: None) -> None:
    twins = ExactTwins(random_tables((9, 5), (7, 1), dtype=torch.float32), backend="triton", lr=0.05, max_norm=1.0)
    random = torch.Generator().manual_seed(1)
    for _ in range(4):
        grads = []
        for number, weight in enumerate(twins.weights):
            rows = torch.randint(len(weight), (5,), generator=random)
            twins.read(number, rows)
            grads.append((rows, torch.randn(5, weight.shape[1], generator=random)))
        twins.step(*grads)
    twins.assert_close()


def test_a_large_decay_takes_two_rounds(small_tiles: None) -> None:
    weights = []
    for backend in ("eager", "triton"):
        run = Run(backend=backend, dtype=torch.float32, weight_decay=25.0)
        run.train([0, 1, 2, 3], steps=2).train([0], steps=3).ours.settle()
        weights.append(run.layer.weight.detach())
    torch.testing.assert_close(*weights)


def test_a_row_that_was_read_too_early_is_refused(small_tiles: None) -> None:
    run = Run(backend="triton").train([0, 1, 2, 3], steps=2).train([0], steps=2)
    weight = run.layer.weight
    weight.grad = coo([3, 1, 0], torch.ones(3, 2, dtype=weight.dtype), weight.shape)
    with pytest.raises(RuntimeError, match="row 1 of"):
        run.ours.step()


def test_replicas_undo_their_own_reads(small_tiles: None) -> None:
    weights = []
    for backend in ("eager", "triton"):
        run = Run(backend=backend, dtype=torch.float32)
        run.ours.attach(run.layer, replicated=True)
        run.train([0, 1, 2, 3], steps=3).train([0], steps=4)
        run.layer(torch.tensor([2, 2, 3]))
        run.train([0, 1, 1], steps=2)
        run.ours.settle()
        weights.append(run.layer.weight.detach())
    torch.testing.assert_close(*weights)


def test_indices_out_of_range_are_left_to_the_reader(small_tiles: None) -> None:
    run = Run(backend="triton").train([0, 1, 2, 3], steps=2).train([0], steps=2)
    with pytest.raises(IndexError):
        run.layer(torch.tensor([1, 6]))
    with pytest.raises(IndexError):
        run.layer(torch.tensor([-1, 2]))


def test_catching_up_waits_once(monkeypatch: pytest.MonkeyPatch, small_tiles: None) -> None:
    weight, state = table(9, 3, torch.float32).detach(), [torch.ones(9, 3), torch.ones(9, 3)]
    stale = TritonBackend().catch_up(rules.coast, rules.decay, 7, (torch.float32,) * 3, weight)
    stale.compile()
    steps = torch.tensor([5, -2, 0, 3, 4, 1, -5, 3, 2], dtype=torch.int32)
    with _NoWaiting():  # the copy of what was found is the one wait
        found = stale.find(torch.tensor([7, 1, 0, 3, 7, 2, 6]), (9, 3), steps, 5, 1)
    assert found is not None
    assert (found[0].tolist(), *found[1:]) == ([1, 2, 3], True, True)
    before = weight.clone()
    scalars = np.array([1.0, 0.5, 1.0, 0.0, 1.0, 0.5, 0.25]) * np.ones((1, 3, 1))
    scalars[0, 2, 0] = 3.0
    factors, tables = np.array([7.0, 8.0, 9.0]), []
    monkeypatch.setattr(triton_rows, "uploaded", lambda table, device: tables.append(table) or torch.from_numpy(table))
    with _NoWaiting():
        stale.run(weight, state, scalars, factors, True)
    assert [table.shape for table in tables] == [(1, 3, 7), (1, 3, 1)], "copies of pageable memory wait"
    expected = before.clone()
    expected[2], expected[1] = 7 * before[2], 8 * before[1]
    expected[[3, 7]] = 3 * before[[3, 7]] - 0.25
    torch.testing.assert_close(weight, expected)
    assert steps.tolist() == [5, -5, -5, 5, 4, 1, -5, 5, 2]
    assert stale.rows.tolist() == [1, 2, 3, 7]
    assert state[0][[3, 7]].eq(0.5).all()
    assert state[1][:3].eq(1).all()
