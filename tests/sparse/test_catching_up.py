"""The rules for rows that miss steps, judged by a dense optimizer that takes every one of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from descend import Adam, AdamW, FirstOrder

ROWS, COLUMNS, STEPS = 6, 3, 12


def gradient(step: int, *, sparse: bool) -> Tensor:
    """Some rows, never the last one, each named once or not at all."""
    random = torch.Generator().manual_seed(step)
    rows = torch.randperm(ROWS - 1, generator=random)[:2]
    values = torch.randn(2, COLUMNS, generator=random, dtype=torch.float64)
    grad = torch.sparse_coo_tensor(rows[None], values, (ROWS, COLUMNS))
    return grad if sparse else grad.to_dense()


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [(Adam, {}), (AdamW, dict(weight_decay=0.1)), (AdamW, dict(weight_decay=0.0)), (AdamW, dict(betas=(0.5, 0.9)))],
    ids=str,
)
def test_rows_catch_up_with_a_dense_optimizer(kind: type[FirstOrder], options: dict[str, object], backend: str) -> None:
    start = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    dense, sparse = start.clone().requires_grad_(), start.clone().requires_grad_()
    other = kind([dense], lr=0.1, backend=backend, **options)  # type: ignore[arg-type]
    optimizer = kind([sparse], lr=0.1, backend=backend, sparse="exact", **options)  # type: ignore[arg-type]
    optimizer.attach(sparse)
    for step in range(STEPS):
        optimizer.settle()
        sparse.grad, dense.grad = gradient(step, sparse=True), gradient(step, sparse=False)
        optimizer.step()
        other.step()
        if step % 5 == 4:
            optimizer.settle()
            # The closed form expands the square root; its error is far below the steps of 0.1.
            torch.testing.assert_close(sparse, dense, rtol=1e-6, atol=1e-6)
    optimizer.settle()
    torch.testing.assert_close(sparse, dense, rtol=1e-6, atol=1e-6)
    for name in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(optimizer.state[sparse][name], other.state[dense][name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_row_without_a_gradient_ever_only_decays(backend: str) -> None:
    table = torch.ones(ROWS, COLUMNS, dtype=torch.float64, requires_grad=True)
    optimizer = AdamW([table], lr=0.1, weight_decay=0.5, sparse="exact", backend=backend)
    optimizer.attach(table)
    for step in range(4):
        with optimizer.settled():
            table.grad = gradient(step, sparse=True)
            optimizer.step()
    optimizer.settle()
    torch.testing.assert_close(table[-1], torch.full_like(table[-1], 0.95**4), rtol=1e-12, atol=0)
