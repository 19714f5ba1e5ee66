"""Clipping and gradients that are not finite, in the step and as functions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import (
    CASES,
    DENSE_BACKENDS,
    DENSE_EVERYWHERE,
    SHAPES,
    Case,
    Twins,
    device,
    give_grads,
    leaves,
    one_in,
    params_of,
)
from torch import Tensor
from torch.nn import utils

import descend
from descend import SGD, AdamW

ORDERS = (1, 2, 3, math.inf, 0.5)


@pytest.mark.parametrize(("case", "backend", "max_norm"), one_in(2, CASES, DENSE_EVERYWHERE, (0.5, 1e4)))
def test_clipping_in_the_step_is_clip_grad_norm_before_it(case: Case, backend: str, max_norm: float) -> None:
    def groups() -> list[dict[str, Any]]:
        return [{"params": leaves()}, {"params": leaves([(5,), (2, 2)], seed=1), "lr": 0.03}]

    twins = Twins(case, groups, max_norm=max_norm, backend=backend)
    for seed in range(5):
        for optimizer in twins.both:
            give_grads(params_of(optimizer), seed)
        norm = utils.clip_grad_norm_(params_of(twins.theirs), max_norm)
        for optimizer in twins.both:
            optimizer.step()
        assert twins.ours.grad_norm == pytest.approx(float(norm), rel=1e-14)  # float64, other sums
    twins.assert_equal()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_clipping_in_the_step_rounds_once(dtype: torch.dtype) -> None:
    clipped = leaves([(1000,)], dtype)
    exact = [param.detach().double().requires_grad_() for param in clipped]
    optimizers = SGD(clipped, lr=0.1, max_norm=1.0), SGD(exact, lr=0.1, max_norm=1.0)
    give_grads(clipped, 0)
    exact[0].grad = clipped[0].grad.double()
    for optimizer in optimizers:
        optimizer.step()
    assert torch.equal(clipped[0].detach(), exact[0].detach().to(dtype))


@pytest.mark.parametrize("backend", DENSE_EVERYWHERE)
def test_nan_norm_spreads_as_clamp_does(backend: str) -> None:
    twins = Twins(CASES[0], lambda: leaves([(3,), (2,)]), max_norm=1.0, backend=backend)

    def grads(params: Any, seed: int) -> None:
        give_grads(params, seed)
        params[0].grad[1] = torch.nan

    for optimizer in twins.both:
        grads(params_of(optimizer), 0)
    utils.clip_grad_norm_(params_of(twins.theirs), 1.0)
    twins.edit(lambda optimizer: optimizer.step())
    assert math.isnan(twins.ours.grad_norm)
    assert all(bool(param.isnan().all()) for optimizer in twins.both for param in params_of(optimizer))


@pytest.mark.parametrize("backend", DENSE_EVERYWHERE)
@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        (torch.float16, 6e4),
        (torch.float32, 1e20),
        (torch.float32, 3e38),
        (torch.float64, 1e200),
        (torch.bfloat16, 1e38),
    ],
    ids=str,
)
def test_finite_gradients_whose_squares_overflow_are_finite(dtype: torch.dtype, size: float, backend: str) -> None:
    param = torch.zeros(100, dtype=dtype, device=device(), requires_grad=True)
    param.grad = torch.full_like(param, size)
    optimizer = SGD([param], lr=1.0, max_norm=1.0, nonfinite="raise", backend=backend)
    optimizer.step()
    expected = float(param.grad[0]) * 10
    assert optimizer.grad_norm == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(param.detach(), torch.full_like(param, -0.1))
    if expected < 1e38 or dtype == torch.float64:  # the functions return float32 for narrower gradients
        assert float(descend.clip_grad_norm_([param], 1.0)) == pytest.approx(expected, rel=1e-6)
        torch.testing.assert_close(param.grad, torch.full_like(param, 0.1), rtol=1e-2, atol=0)  # bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_many_small_gradients_are_summed_exactly(dtype: torch.dtype) -> None:
    grad = torch.full((2**24,), 1e-3, dtype=dtype)
    expected = 4096 * float(grad[0].double())
    assert float(descend.get_total_norm([grad])) == pytest.approx(expected, rel=1e-7)  # float32; torch: 4.055
    param = torch.zeros(2**24, dtype=dtype, requires_grad=True)
    param.grad = grad
    optimizer = SGD([param], max_norm=1.0)
    optimizer.step()
    assert optimizer.grad_norm == pytest.approx(expected, rel=1e-12)  # float64 throughout


@pytest.mark.parametrize("options", [{}, dict(max_norm=1.0), dict(nonfinite="skip"), dict(nonfinite="raise")], ids=str)
def test_grad_norm_is_known_where_it_is_asked_for(options: dict[str, Any]) -> None:
    params = leaves()
    optimizer = SGD(params, **options)
    assert optimizer.grad_norm is None
    give_grads(params, 0)
    optimizer.step()
    assert (optimizer.grad_norm is not None) == bool(options)
    optimizer.zero_grad()
    optimizer.step()
    assert optimizer.grad_norm == (0.0 if options else None)


# The functions.


def random_grads(dtype: torch.dtype) -> list[Tensor]:
    params = leaves([shape for shape in SHAPES if shape != (0,)] + [(40_000,), (3, 5)], dtype)
    give_grads(params, 0)
    params[-1].grad = torch.randn(5, 3, dtype=torch.float64).to(dtype).t()
    return params


def equal_grads(dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    torch.manual_seed(0)
    ours = random_grads(dtype)
    torch.manual_seed(0)
    return ours, random_grads(dtype)


# One rounding of the result's dtype; torch sums float32 in float32.
NORM_TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 1e-2}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", NORM_TOLERANCE, ids=str)
def test_clip_grad_norm_is_torchs(dtype: torch.dtype, order: float) -> None:
    ours, theirs = equal_grads(dtype)
    grads = [param.grad for param in ours]
    close: Callable[..., None] = lambda a, b: torch.testing.assert_close(  # noqa: E731
        a, b, rtol=NORM_TOLERANCE[dtype], atol=NORM_TOLERANCE[dtype] / 100, check_dtype=dtype != torch.bfloat16
    )
    close(descend.get_total_norm(grads, order), utils.get_total_norm(grads, order))
    close(descend.clip_grad_norm_(ours, 1.5, order), utils.clip_grad_norm_(theirs, 1.5, order))
    for a, b in zip(ours, theirs, strict=True):
        assert a.grad.dtype == b.grad.dtype
        close(a.grad, b.grad)


@pytest.mark.parametrize("order", ORDERS)
def test_empty_gradients_add_nothing(order: float) -> None:  # torch refuses them for inf
    grads = [torch.zeros(0), torch.tensor([3.0]), torch.zeros(0, 4)]
    assert float(descend.get_total_norm(grads, order)) == 3.0
    assert float(descend.get_total_norm(grads[:1], order)) == 0.0
    assert float(descend.get_total_norm([torch.zeros(3)], order)) == 0.0
    # Of order 2 the squares are summed first: these would be 0, as in torch.
    tiny = torch.full((16,), 1e-150 if order == 2 else 1e-200, dtype=torch.float64)
    assert float(descend.get_total_norm([tiny], order)) == pytest.approx(
        float(tiny[0]) * 16 ** (1 / order), rel=1e-14, abs=0
    )


def test_clip_grad_norm_leaves_small_gradients_alone() -> None:
    ours, _ = equal_grads(torch.float32)
    before = [(param.grad.clone(), param.grad._version) for param in ours]
    descend.clip_grad_norm_(ours, 1e6)
    for param, (grad, version) in zip(ours, before, strict=True):
        assert torch.equal(param.grad, grad)
        assert param.grad._version == version  # not even multiplied by 1


@pytest.mark.parametrize("dtype", NORM_TOLERANCE, ids=str)
def test_clip_grad_value_is_torchs(dtype: torch.dtype) -> None:
    ours, theirs = equal_grads(dtype)
    assert descend.clip_grad_value_(ours, 0.3) is utils.clip_grad_value_(theirs, 0.3) is None
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(ours, theirs, strict=True))


def test_clip_grads_with_norm_is_torchs() -> None:
    ours, theirs = equal_grads(torch.float64)
    for norm in (10.0, 0.1, math.inf):
        descend.clip_grads_with_norm_(ours, 1.0, torch.tensor(norm))
        utils.clip_grads_with_norm_(theirs, 1.0, torch.tensor(norm))
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-7, atol=0)  # torch divides in float32 here


def test_nan_norm_makes_all_gradients_nan_as_in_torch() -> None:
    ours, _ = equal_grads(torch.float32)
    ours[1].grad[0, 0] = math.nan
    assert math.isnan(descend.clip_grad_norm_(ours, 1.0))
    assert all(bool(param.grad.isnan().all()) for param in ours)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_error_if_nonfinite_comes_before_anything_is_scaled(bad: float, order: float) -> None:
    ours, _ = equal_grads(torch.float32)
    ours[1].grad[0, 0] = bad
    before = [param.grad.clone() for param in ours]
    message = (
        rf"The total norm of order {float(order)} for gradients from `parameters` is non-finite \({bad}\), "
        r"so it cannot be clipped\. Look for the cause, or pass `error_if_nonfinite=False` to clip anyway\."
    )
    with pytest.raises(RuntimeError, match=message):
        descend.clip_grad_norm_(ours, 1.0, order, error_if_nonfinite=True)
    torch.testing.assert_close([param.grad for param in ours], before, rtol=0, atol=0, equal_nan=True)


def test_functions_take_what_torchs_take() -> None:
    (param,) = leaves([(3,)])
    assert float(descend.clip_grad_norm_(param, 1.0)) == 0
    assert descend.clip_grad_norm_([], 1.0).equal(utils.clip_grad_norm_([], 1.0))
    assert descend.get_total_norm([]).equal(utils.get_total_norm([]))
    descend.clip_grad_value_([], 1.0)
    descend.clip_grads_with_norm_([], 1.0, torch.tensor(1.0))
    give_grads([param], 0)
    for clip in (descend.clip_grad_norm_, utils.clip_grad_norm_):
        assert clip((p for p in [param]), max_norm=1e9, norm_type=2, foreach=True).dtype == torch.float64
    assert descend.clip_grad_norm_([param], 1e9, "inf") == utils.clip_grad_norm_([param], 1e9, "inf")
    descend.clip_grad_value_(param, 0.25)
    assert param.grad.abs().max() == 0.25
    assert descend.clip_grad_norm_([param], 0.0) > 0
    assert not bool(param.grad.any())
    assert descend.get_total_norm(torch.tensor(-3.0)) == 3
    assert math.isnan(descend.get_total_norm([torch.tensor(math.nan)]))


def test_gradients_of_gradients_are_clipped_as_in_torch() -> None:
    for module in (descend, utils):
        (param,) = leaves([(2,)])
        for clip, expected in (
            (lambda p, m=module: m.clip_grad_norm_(p, 2.0**0.5), 1.0),
            (lambda p, m=module: m.clip_grads_with_norm_(p, 1.0, torch.tensor(10.0)), 0.2),
            (lambda p, m=module: m.clip_grad_value_(p, 0.5), 0.5),
        ):
            param.grad = torch.full((2,), 2.0, dtype=torch.float64, requires_grad=True)
            clip(param)
            torch.testing.assert_close(param.grad.tolist(), [expected] * 2, rtol=1e-6, atol=0)  # 1e-6 is added
            assert param.grad.is_leaf
        assert not module.get_total_norm([param.grad.square()]).requires_grad


@pytest.mark.parametrize("order", ORDERS)
def test_norms_of_another_device_stay_there_and_need_no_values(order: float) -> None:
    param = torch.ones(3, device="meta", requires_grad=True)
    param.grad = torch.ones(3, device="meta")
    grads = [torch.zeros(0, device="meta"), param.grad]
    assert descend.get_total_norm(grads, order).is_meta
    assert descend.get_total_norm(grads[:1], order).is_meta
    assert descend.clip_grad_norm_(param, 1.0, order).is_meta
    with torch.device("meta"):  # what is made where nobody says so
        assert descend.get_total_norm([torch.ones(3, device="cpu")], order).is_cpu


def test_norm_of_complex_gradients_is_torchs() -> None:
    grads = [torch.tensor([3 + 4j, 1j], dtype=torch.complex128), torch.ones(2, dtype=torch.float64)]
    for order in ORDERS:
        torch.testing.assert_close(descend.get_total_norm(grads, order), utils.get_total_norm(grads, order))


def test_sparse_gradients_are_clipped_with_duplicates_summed() -> None:
    (param,) = leaves([(5, 2)], torch.float32)
    param.grad = torch.sparse_coo_tensor(torch.tensor([[1, 1]]), torch.ones(2, 2), (5, 2))
    assert float(descend.clip_grad_norm_(param, 1.0)) == pytest.approx(math.sqrt(8))  # float32
    assert float(param.grad.to_dense().norm()) == pytest.approx(1.0, rel=1e-5)  # 1e-6 is added to the norm


@pytest.mark.parametrize("limit", [-1.0, -math.inf, math.nan])
def test_negative_limits_are_errors_and_scale_nothing(limit: float) -> None:
    ours, _ = equal_grads(torch.float32)
    before = [param.grad.clone() for param in ours]
    for name, clip in (
        ("max_norm", lambda: descend.clip_grad_norm_(ours, limit)),
        ("clip_value", lambda: descend.clip_grad_value_(ours, limit)),
        ("max_norm", lambda: descend.clip_grads_with_norm_(ours, limit, torch.tensor(1.0))),
        ("max_norm", lambda: AdamW(ours, max_norm=limit)),
        ("norm_type", lambda: descend.clip_grad_norm_(ours, 1.0, norm_type=-abs(limit))),
        ("norm_type", lambda: descend.clip_grad_norm_(ours, 1.0, norm_type=0)),
    ):
        with pytest.raises(ValueError, match=f"{name} must be"):
            clip()
    assert all(torch.equal(param.grad, grad) for param, grad in zip(ours, before, strict=True))


@pytest.mark.parametrize("order", ORDERS)
def test_norms_do_not_depend_on_the_number_of_threads(order: float) -> None:
    values = torch.randn(1_000_003, dtype=torch.float64)
    norms = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        norms.append(float(descend.get_total_norm([values, torch.tensor(math.e)], order)))
    assert norms == norms[:1] * 3


def test_norms_do_not_depend_on_layout_or_backend() -> None:
    values = torch.randn(300, 200)
    norms = {float(descend.get_total_norm(list(values.split(rows)))) for rows in (1, 7, 300)}
    norms |= {
        float(descend.get_total_norm([values.t()])),
        float(descend.get_total_norm([values[:, ::2], values[:, 1::2]])),
    }
    assert max(norms) - min(norms) < 1e-4 * 2**-10  # one rounding to float32 of sums in float64
    param = values.clone().requires_grad_()
    param.grad = values
    by_backend = []
    for backend in DENSE_BACKENDS:
        optimizer = SGD([param], lr=0.0, max_norm=1.0, backend=backend)
        optimizer.step()
        by_backend.append(optimizer.grad_norm)
    assert by_backend == pytest.approx(by_backend[:1] * len(DENSE_BACKENDS), rel=1e-14)  # float64, the same chunks


@pytest.mark.parametrize("clip", [descend.clip_grad_norm_, utils.clip_grad_norm_])
def test_an_exhausted_generator_is_warned_of_as_in_torch(clip: Callable[..., Any]) -> None:
    params = (param for param in leaves())
    list(params)
    with pytest.warns(
        UserWarning, match="`parameters` is an empty generator, no gradient clipping will occur"
    ) as caught:
        assert clip(params, 1.0) == 0
    assert caught[0].filename == __file__ or clip is utils.clip_grad_norm_
    for nothing in ([], (), iter([])):
        assert clip(nothing, 1.0) == 0
