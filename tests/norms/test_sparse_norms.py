"""Norms, clipping, skipping and mixed precision see rows summed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from cases import BACKENDS, EVERYWHERE, assert_unmoved, leaves, params_of, snapshot
from sparse_cases import (
    ADAMW,
    TOUCHED,
    ByHand,
    Touched,
    coo,
    give_sparse_grads,
    one_thread,  # noqa: F401 a fixture
    summed,
    table,
    versions,
)
from torch import Tensor, nn

import descend
from descend import SGD, AdamW, FirstOrder, SparseAdam


def dense_norm(params: Sequence[Tensor], order: float = 2.0) -> float:
    """In float64, of gradients whose duplicates have been summed in float64."""
    parts = [summed(p.grad)[1] if p.grad.is_sparse else p.grad.double().cpu() for p in params]
    return float(torch.linalg.vector_norm(torch.cat([part.flatten() for part in parts]), order))


@pytest.mark.parametrize("backend", EVERYWHERE)
@pytest.mark.parametrize("max_norm", [0.5, 1e4])
@pytest.mark.parametrize("case", [TOUCHED[1], ADAMW], ids=str)
def test_clipping_in_the_step_sees_summed_rows(case: Touched, max_norm: float, backend: str) -> None:
    params = leaves([(9, 4), (6, 3, 2), (7,)])
    optimizer = case.ours(params, **case.options, sparse="touched", max_norm=max_norm, backend=backend)
    expected = [ByHand(param, case.theirs, case.options) for param in params]
    for seed in range(5):
        give_sparse_grads(params, seed)
        norm = dense_norm(params)
        scale = min(1.0, max_norm / (norm + 1e-6))
        for param, hand in zip(params, expected, strict=True):
            hand.step(param.grad if param.grad.is_sparse else param.grad.to_sparse(1), scale)
        optimizer.step()
        assert optimizer.grad_norm == pytest.approx(norm, rel=1e-14)  # float64, other sums
    for param, hand in zip(params, expected, strict=True):
        hand.assert_equal(optimizer, param)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("first", [True, False])
def test_one_bad_row_among_many_skips_the_step(first: bool, bad: float, backend: str) -> None:
    params = leaves([(7,), (900, 4), (9, 4)])
    optimizer = AdamW(params, sparse="touched", nonfinite="skip", backend=backend)
    if not first:
        give_sparse_grads(params, 0)
        optimizer.step()
    give_sparse_grads(params, 1)
    params[1].grad._values()[400, 2] = bad
    before, was = snapshot(optimizer), versions(optimizer)
    for skipped in (1, 2):
        optimizer.step()
        assert optimizer.skipped_steps == skipped
        assert_unmoved(optimizer, before)
        assert versions(optimizer) == was
    assert not first or not optimizer.state
    give_sparse_grads(params, 2)
    optimizer.step()
    plain = AdamW(leaves([(7,), (900, 4), (9, 4)]), sparse="touched", backend=backend)
    for seed in (2,) if first else (0, 2):
        give_sparse_grads(params_of(plain), seed)
        plain.step()
    assert all(map(torch.equal, params, params_of(plain)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_raised_step_names_the_parameter_and_moves_nothing(backend: str) -> None:
    params = leaves([(7,), (9, 4), (9, 4), (9, 4)])
    optimizer = AdamW(list(zip("abcd", params, strict=True)), sparse="touched", nonfinite="raise", backend=backend)
    before = snapshot(optimizer)
    give_sparse_grads(params, 0)
    params[1].grad._values()[0, 0] = torch.nan
    params[3].grad = coo([3, 3], torch.tensor([[torch.inf], [-torch.inf]]).double().expand(2, 4), (9, 4))
    with pytest.raises(FloatingPointError, match=r"AdamW: NaN or Inf in the gradient of b, d\."):
        optimizer.step()
    assert_unmoved(optimizer, before)
    assert not optimizer.state


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float16, 6e4), (torch.float32, 1e38), (torch.float64, 1e200)], ids=str
)
def test_large_finite_gradients_are_finite(dtype: torch.dtype, size: float, backend: str) -> None:
    """Squares overflow; in float16 so do sums, which are formed in float32."""
    param = torch.zeros(5, 3, dtype=dtype, requires_grad=True)
    param.grad = coo([1, 1, 4], torch.full((3, 3), size, dtype=dtype), (5, 3))
    optimizer = SGD([param], lr=1.0, max_norm=1.0, nonfinite="raise", sparse="touched", backend=backend)
    optimizer.step()
    expected = float(param.grad._values()[0, 0].double()) * 15**0.5
    assert optimizer.grad_norm == pytest.approx(expected, rel=1e-7)
    torch.testing.assert_close(float(param.detach().double().norm()), 1.0, rtol=1e-2, atol=0)  # float16


def test_sum_that_only_float16_cannot_hold_is_not_named() -> None:
    a, b = (torch.zeros(5, 3, dtype=torch.float16, requires_grad=True) for _ in range(2))
    a.grad = coo([1, 1], torch.full((2, 3), 6e4, dtype=torch.float16), (5, 3))
    b.grad = coo([1, 1], torch.full((2, 3), torch.nan, dtype=torch.float16), (5, 3))
    optimizer = SGD([("a", a), ("b", b)], nonfinite="raise", sparse="touched")
    with pytest.raises(FloatingPointError, match=r"gradient of b\."):
        optimizer.step()


NORM_DTYPES = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 1e-6, torch.float16: 1e-6}


@pytest.mark.parametrize("order", [1, 2, 3, torch.inf])
@pytest.mark.parametrize("dtype", NORM_DTYPES, ids=str)
def test_functions_see_summed_rows(dtype: torch.dtype, order: float) -> None:
    """Beside dense gradients. A bfloat16 sum of 1,000 ones would be 256; a float16 sum of 2 * 6e4 infinite."""
    params = leaves([(9, 4), (6, 3, 2), (7,)], dtype)
    give_sparse_grads(params, 0)
    many = torch.zeros(3, 2, dtype=dtype, requires_grad=True)
    many.grad = coo([1] * 1000 + [2, 2], torch.ones(1002, 2, dtype=dtype), (3, 2))
    large = torch.zeros(3, 2, dtype=dtype, requires_grad=True)
    large.grad = coo([1, 1], torch.full((2, 2), 6e4, dtype=dtype), (3, 2))
    # The functions sum in float32, or wider, and return that.
    tolerance = NORM_DTYPES[dtype]
    for chosen in ([*params, many], [*params, large]):
        expected = dense_norm(chosen, order)
        grads = [param.grad for param in chosen]
        norm = descend.get_total_norm(grads, order)
        assert float(norm) == pytest.approx(expected, rel=tolerance)
        assert float(descend.clip_grad_norm_(chosen, 1e9, order)) == pytest.approx(expected, rel=tolerance)
        assert all(param.grad is grad for param, grad in zip(chosen, grads, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_clip_grad_norm_scales_sparse_and_dense_alike(dtype: torch.dtype) -> None:
    params = leaves([(9, 4), (7,), (6, 3, 2)], dtype)
    give_sparse_grads(params, 0)
    params[2].grad = params[2].grad.coalesce()
    before = [param.grad.to_dense().double().clone() for param in params]
    norm = dense_norm(params)
    assert float(descend.clip_grad_norm_(params, 0.5)) == pytest.approx(norm, rel=1e-6)
    assert params[0].grad.is_sparse
    assert params[2].grad.is_coalesced()
    for param, grad in zip(params, before, strict=True):
        torch.testing.assert_close(param.grad.to_dense().double(), grad * 0.5 / norm, rtol=1e-5, atol=1e-7)
    descend.clip_grads_with_norm_(params, 1.0, torch.tensor(10.0))
    assert dense_norm(params) == pytest.approx(0.05, rel=1e-5)  # float32; 1e-6 is added to norms


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_error_if_nonfinite_sees_sparse_gradients(bad: float) -> None:
    params = leaves([(7,), (9, 4)])
    give_sparse_grads(params, 0)
    params[1].grad._values()[2, 2] = bad
    before = params[0].grad.clone()
    with pytest.raises(RuntimeError, match="non-finite"):
        descend.clip_grad_norm_(params, 1.0, error_if_nonfinite=True)
    assert torch.equal(params[0].grad, before)


@pytest.mark.parametrize("is_coalesced", [True, False])
def test_clip_grad_value_limits_summed_rows(is_coalesced: bool) -> None:
    params = leaves([(7,), (9, 4)])
    give_sparse_grads(params, 0)
    values = torch.tensor([[1.0, 3, -1, 0.2], [1, -2.5, -1, 0.1], [-4, 0.5, 0, 1]]).double()
    params[1].grad = coo([1, 1, 2], values, (9, 4))
    if is_coalesced:
        params[1].grad = params[1].grad.coalesce()
    dense = [param.grad.to_dense().clamp(-1.5, 1.5) for param in params]
    assert descend.clip_grad_value_(params, 1.5) is None
    assert params[1].grad.is_coalesced()
    for param, expected in zip(params, dense, strict=True):
        torch.testing.assert_close(param.grad.to_dense(), expected, rtol=1e-15, atol=1e-15)


@pytest.mark.parametrize("is_coalesced", [True, False])
def test_functions_clip_expanded_values(is_coalesced: bool) -> None:
    """What the backward pass of a sum leaves: one number in memory."""
    param = table()
    param.grad = coo([1, 2, 5], torch.full((1, 1), 3.0).double().expand(3, 4), (9, 4), coalesced=is_coalesced)
    assert float(descend.clip_grad_norm_([param], 1e9)) == pytest.approx(3 * 12**0.5, rel=1e-15)
    descend.clip_grad_value_([param], 2.0)
    assert param.grad.to_dense()[[1, 2, 5]].eq(2).all()
    descend.clip_grad_norm_([param], 1.0)
    torch.testing.assert_close(param.grad.to_dense().norm(), torch.tensor(1.0).double(), rtol=1e-5, atol=0)


# Mixed precision and schedules.


def train(kind: Callable[..., Any], scaler: torch.amp.GradScaler | None, clip: bool, **options: Any) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.EmbeddingBag(20, 6, sparse=True), nn.Linear(6, 2))
    optimizers = [kind([model[0].weight], lr=0.1, **options), torch.optim.SGD(model[1].parameters(), lr=0.1)]
    for step in range(8):
        model.zero_grad()
        words = torch.randint(20, (5, 4), generator=torch.Generator().manual_seed(step))
        loss = model(words).square().sum()
        if step == 3:
            loss = loss * torch.inf
        if scaler is None:
            loss.backward()
            if clip:
                descend.clip_grad_norm_(model.parameters(), 0.5)
            for optimizer in optimizers if step != 3 else ():
                optimizer.step()
            continue
        scaler.scale(loss).backward()
        if clip:
            for optimizer in optimizers:
                scaler.unscale_(optimizer)
            descend.clip_grad_norm_(model.parameters(), 0.5)
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
    return model, optimizers[0]


@pytest.mark.parametrize("clip", [False, True], ids=["", "unscaled and clipped"])
@pytest.mark.parametrize("kind", [SparseAdam, SGD])
def test_grad_scaler_acts_as_without_it(kind: type[FirstOrder], clip: bool) -> None:
    scaled, optimizer = train(kind, torch.amp.GradScaler("cpu", init_scale=1024.0), clip)
    plain, _ = train(kind, None, clip)
    for ours, theirs in zip(scaled.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)  # a power of two
    if kind is SparseAdam:
        assert optimizer.state[scaled[0].weight]["step"] == 7
        assert not clip or optimizer.grad_norm is None
        model, _ = train(torch.optim.SparseAdam, torch.amp.GradScaler("cpu", init_scale=1024.0), clip)
        torch.testing.assert_close(scaled[0].weight, model[0].weight, rtol=1e-5, atol=1e-6)  # float32, 7 steps
