"""Rows that a sparse gradient names several times: all of them count, to rounding, whoever sums them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from cases import BACKENDS, params_of
from processes import in_child, needs_fork
from sparse_cases import (
    ByHand,
    coo,
    one_thread,  # noqa: F401 a fixture
    random_sparse,
    summed,
    table,
    zipf_indices,
)
from torch import Tensor

from descend import SGD, AdamW
from descend.backends.cpu import threads
from descend.backends.cpu.launch import CHUNK

BLOCK = 64  # rows that are summed one after the other


def assert_summed(grad: Tensor, backend: str = "cpu", **options: Any) -> None:
    """Within the rounding of sums of blocks of sums; a step of SGD with lr=-1 from zero is the sum."""
    param = torch.zeros(grad.shape, dtype=grad.dtype, requires_grad=True)
    param.grad = grad
    SGD([param], lr=1.0, maximize=True, backend=backend, **options).step()
    index, total = summed(grad)
    _, size = summed(coo(grad._indices(), grad._values().abs(), grad.shape))
    longest = torch.unique(grad._indices(), dim=1, return_counts=True)[1].max()
    additions = min(int(longest), BLOCK) + int(longest) // BLOCK
    rounding = torch.finfo(torch.promote_types(grad.dtype, torch.float32)).eps / 2
    error = (param.detach()[index].double() - total).abs()
    assert (error <= additions * rounding * size + torch.finfo(grad.dtype).eps / 2 * total.abs()).all()
    untouched = torch.ones(grad.shape, dtype=torch.bool)
    untouched[index] = False
    assert not param.detach()[untouched].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", [1, 2, 63, 64, 65, 128, 129, 64 * 64, 64 * 64 + 1, 3 * 64 * 64 + 7])
def test_every_duplicate_counts_once(count: int, dtype: torch.dtype) -> None:
    """Whole numbers: no rounding, in whatever order."""
    rows = torch.tensor([2] * count + [0, 4, 4])[torch.randperm(count + 3)]
    values = torch.randint(-3, 4, (count + 3, 5)).double()
    param = torch.zeros(6, 5, dtype=dtype, requires_grad=True)
    param.grad = coo(rows, values.to(dtype), (6, 5))
    SGD([param], lr=1.0, maximize=True).step()
    expected = torch.zeros(6, 5, dtype=torch.float64).index_add_(0, rows, values)
    assert torch.equal(param, expected.to(dtype))


@pytest.mark.parametrize("dim", [1, 3, 64])
def test_rows_named_thousands_of_times_are_summed_to_rounding(dim: int) -> None:
    random = torch.Generator().manual_seed(dim)
    rows = zipf_indices(500, 20_000, random)
    assert rows.bincount().max() > 2000
    assert_summed(coo(rows, torch.randn(20_000, dim, generator=random), (500, dim)))


def test_hundred_thousand_places_are_summed_to_rounding() -> None:
    random = torch.Generator().manual_seed(0)
    rows = torch.randint(30_000, (100_000,), generator=random)
    assert_summed(coo(rows, torch.rand(100_000, 3, generator=random), (30_000, 3)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_grow_and_shrink_from_step_to_step(backend: str) -> None:
    param, random = table(300, 3), torch.Generator().manual_seed(0)
    optimizer = AdamW([param], lr=0.01, sparse="touched", backend=backend)
    expected = ByHand(param, torch.optim.AdamW, dict(lr=0.01))
    for count in (1, 5000, 0, 70, 20_000, 2, 5000):
        values = torch.randn(count, 3, generator=random, dtype=torch.float64)
        param.grad = coo(zipf_indices(300, count, random) if count else [], values, param.shape)
        expected.step(param.grad)
        optimizer.step()
    expected.assert_equal(optimizer, param, rtol=1e-10, atol=1e-10)  # where sums nearly cancel Adam sees their rounding


def test_long_sums_are_sums_of_blocks() -> None:
    """One float32 sum of these would be off by 1e-4."""
    value, param = torch.full((100_000, 1), 1000.1), torch.zeros(1, 1, requires_grad=True)
    param.grad = coo([0] * 100_000, value, (1, 1))
    SGD([param], lr=1.0, maximize=True).step()
    assert param.detach().item() == pytest.approx(value.double().sum().item(), rel=2e-5)


@pytest.mark.parametrize("rows", [2**12, 2**12 + 1, 2**24, 2**24 + 1])
def test_rows_of_large_tables_are_told_apart(rows: int) -> None:
    """Rows are sorted by digits of 12 bits."""
    random = torch.Generator().manual_seed(0)
    indices = torch.randint(rows, (3000,), generator=random)
    indices[:500] = torch.tensor([rows - 1, 0, 2**11, 2**12 - 1, rows // 2]).repeat(100)
    values = torch.randint(-9, 10, (3000, 1), generator=random).float()
    param = torch.zeros(rows, 1, requires_grad=True)
    param.grad = coo(indices, values, (rows, 1))
    SGD([param], lr=1.0, maximize=True).step()
    assert torch.equal(param, torch.zeros(rows, 1).index_add_(0, indices, values))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dim", [0, 1, 3, 64, 1000, CHUNK, CHUNK + 1, 40_000])
def test_rows_of_any_length_are_summed(dim: int, backend: str) -> None:
    random = torch.Generator().manual_seed(dim)
    grad = coo([3, 1, 3, 0, 3], torch.randn(5, dim, generator=random), (5, dim))
    assert_summed(grad, backend)
    assert_summed(grad, backend, weight_decay=0.1)  # all rows: from zero the others stay there


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("shape", "sparse_dim", "count"),
    [
        ((1, 1), 1, 3),
        ((1, 4), 1, 70),
        ((1,), 1, 70),
        ((5,), 1, 9),
        ((0, 4), 1, 0),
        ((0,), 1, 0),
        ((4, 0), 1, 3),
        ((4, 5), 1, 0),
        ((4, 5), 2, 0),
        ((4, 5), 2, 70),
        ((3, 4, 2), 2, 30),
        ((3, 4, 2), 3, 70),
        ((3, 1, 2), 2, 70),
        ((3, 4, 0), 2, 5),
    ],
    ids=str,
)
def test_gradients_of_any_shape_are_summed(shape: tuple[int, ...], sparse_dim: int, count: int, backend: str) -> None:
    grad = random_sparse(shape, count, 0, torch.float32, sparse_dim)
    for options in ({}, dict(sparse="touched"), dict(momentum=0.9), dict(max_norm=1e9)):
        if count:
            assert_summed(grad, backend, **options)
        param = torch.ones(shape, requires_grad=True)
        param.grad = grad
        optimizer = AdamW([param], sparse="touched", backend=backend, max_norm=1e9)
        optimizer.step()
        assert optimizer.grad_norm == pytest.approx(float(grad.to_dense().double().norm()), rel=1e-6)
        assert optimizer.state[param]["step"] == 1
        assert count or torch.equal(param, torch.ones(shape))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(), (4, 3)], ids=str)
@pytest.mark.parametrize("options", [{}, dict(momentum=0.9), dict(sparse="touched", momentum=0.9)], ids=str)
def test_gradients_without_sparse_dimensions_are_summed(
    options: dict[str, Any], shape: tuple[int, ...], backend: str
) -> None:
    param = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    values = torch.randn(3, *shape, dtype=torch.float64)
    param.grad = coo(torch.zeros(0, 3, dtype=torch.int64), values, shape)
    assert param.grad.sparse_dim() == 0
    SGD([param], lr=1.0, maximize=True, backend=backend, **options).step()
    torch.testing.assert_close(param.detach(), values.sum(0), rtol=1e-15, atol=1e-15)


def walk(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, float | None]:
    """Where steps with many duplicates lead; enough work for several threads."""
    random = torch.Generator().manual_seed(0)
    param = torch.randn(2000, 40, generator=random).to(dtype).requires_grad_()
    optimizer = AdamW([param], lr=0.1, sparse="touched", max_norm=1.0)
    for _ in range(3):
        rows = zipf_indices(2000, 8000, random)
        param.grad = coo(rows, torch.randn(8000, 40, generator=random).to(dtype), param.shape)
        optimizer.step()
    return param.detach(), optimizer.state[param]["exp_avg"], optimizer.grad_norm


def assert_same_walk(ours: tuple[Any, ...], theirs: tuple[Any, ...]) -> None:
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])
    assert ours[2] == theirs[2]


def test_bits_do_not_depend_on_the_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    assert threads.SERIAL_BELOW < 1000 * 40
    expected = walk()
    for count in (2, 4, 2):
        torch.set_num_threads(count)
        assert_same_walk(walk(), expected)
    monkeypatch.setattr(threads._openmp, "parallel", None)
    assert_same_walk(walk(), expected)


@pytest.mark.parametrize("openmp", [True, False])
def test_threads_that_step_at_once_equal_serial_ones(openmp: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not openmp:
        monkeypatch.setattr(threads._openmp, "parallel", None)
    torch.set_num_threads(2)
    expected = walk()
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: walk(), range(4)):
            assert_same_walk(found, expected)


def test_sgds_bits_do_not_depend_on_the_number_of_threads() -> None:
    found = []
    for count in (1, 2, 4):
        torch.set_num_threads(count)
        param = table(20_000, 8, torch.float32)
        optimizer = SGD([param], lr=0.1, momentum=0.9, weight_decay=0.1, max_norm=1.0)
        for seed in range(2):
            param.grad = random_sparse(param.shape, 9000, seed, torch.float32)
            optimizer.step()
        found.append((param.detach(), optimizer.state[param]["momentum_buffer"], optimizer.grad_norm))
    for other in found[1:]:
        assert_same_walk(other, found[0])


def bits(param: Tensor) -> np.ndarray:
    """To be compared by numpy: torch's own loops over large tensors wait for ever in a forked child."""
    return param.detach().view(torch.uint8).numpy()


@needs_fork
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("rows", "dtype"), [(2000, torch.float32), (20_000, torch.float32), (2000, torch.bfloat16)], ids=str
)
def test_forked_child_steps(rows: int, dtype: torch.dtype) -> None:
    """Its first step too, which makes the state; with numbers enough for threads, of which a child has none."""
    torch.set_num_threads(2)
    torch.randn(500, 500).mm(torch.randn(500, 500))  # torch's own workers have been at it
    optimizer, straight = (AdamW([table(rows, 40, dtype)], sparse="touched") for _ in range(2))
    for one in (optimizer, straight):
        params_of(one)[0].grad = random_sparse((rows, 40), 3000, 0, dtype)
    straight.step()
    expected = bits(params_of(straight)[0])

    def arrives() -> bool:
        optimizer.step()
        return np.array_equal(bits(params_of(optimizer)[0]), expected)

    assert in_child(arrives)
    assert arrives()
