"""Judges other than torch: formulas written out in numpy, and what the papers say about the methods."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from cases import BACKENDS, CASES, Case, give_grads, leaves

from descend import SGD, Adam, AdamW, FirstOrder, Lion, RMSprop, Rprop, clip_grad_norm_

PARAM = np.array([0.5, -1.0, 2.0, 0.0])
GRADS = [np.array([0.1, -3.0, 1e-3, 2.0]), np.array([-0.2, 1.0, 5e-3, 0.0]), np.array([0.4, 0.5, -1e-3, -1.0])]


def assert_walks(optimizer_class: type[FirstOrder], options: dict[str, object], expected: np.ndarray) -> None:
    """Three steps along ``GRADS`` end at ``expected``, on every backend."""
    for backend in BACKENDS:
        param = torch.tensor(PARAM, requires_grad=True)
        optimizer = optimizer_class([param], backend=backend, **options)
        for grad in GRADS:
            param.grad = torch.tensor(grad)
            optimizer.step()
        # A few roundings of float64.
        np.testing.assert_allclose(param.detach().numpy(), expected, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("optimizer_class", [Adam, AdamW])
def test_adam_is_algorithm_1_of_the_paper(optimizer_class: type[FirstOrder], decay: float) -> None:
    theta, m, v = PARAM.copy(), 0.0, 0.0
    for t, grad in enumerate(GRADS, start=1):
        if optimizer_class is AdamW:
            theta = theta - 0.1 * decay * theta
        else:
            grad = grad + decay * theta
        m = 0.9 * m + (1 - 0.9) * grad
        v = 0.99 * v + (1 - 0.99) * grad**2
        m_hat = m / (1 - 0.9**t)
        v_hat = v / (1 - 0.99**t)
        theta = theta - 0.1 * m_hat / (np.sqrt(v_hat) + 1e-8)
    assert_walks(optimizer_class, dict(lr=0.1, betas=(0.9, 0.99), weight_decay=decay), theta)


def test_amsgrad_divides_by_the_largest_average() -> None:
    theta, m, v, largest = PARAM.copy(), 0.0, 0.0, np.zeros(4)
    for t, grad in enumerate(GRADS, start=1):
        m = 0.9 * m + (1 - 0.9) * grad
        v = 0.5 * v + (1 - 0.5) * grad**2
        largest = np.maximum(largest, v)  # as torch: the largest before bias correction
        theta = theta - 0.1 * m / (1 - 0.9**t) / (np.sqrt(largest / (1 - 0.5**t)) + 1e-8)
    assert_walks(Adam, dict(lr=0.1, betas=(0.9, 0.5), amsgrad=True), theta)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("dampening", [0.0, 0.25])
def test_momentum_is_a_geometric_sum(nesterov: bool, dampening: float) -> None:
    if nesterov and dampening:
        return  # refused by torch and here
    theta, buffer = PARAM.copy(), None
    for grad in GRADS:
        buffer = grad if buffer is None else 0.9 * buffer + (1 - dampening) * grad
        theta = theta - 0.1 * (grad + 0.9 * buffer if nesterov else buffer)
    assert_walks(SGD, dict(lr=0.1, momentum=0.9, dampening=dampening, nesterov=nesterov), theta)


def test_lion_is_algorithm_2_of_the_paper() -> None:
    theta, m = PARAM.copy(), np.zeros(4)
    for grad in GRADS:
        c = 0.9 * m + (1 - 0.9) * grad
        theta = theta - 0.1 * (np.sign(c) + 0.2 * theta)
        m = 0.99 * m + (1 - 0.99) * grad
    assert_walks(Lion, dict(lr=0.1, weight_decay=0.2), theta)


def test_rprop_grows_while_signs_agree_and_rests_where_they_change() -> None:
    # Steps of the four weights: 1 and then 0.5 after a change; growth to 1.2; a sign that comes back after a rest.
    steps = np.array([[1.0, 0.0, 0.5], [-1.0, 0.0, 0.5], [1.0, 1.2, 0.0], [1.0, 0.0, -1.0]])
    assert_walks(Rprop, dict(lr=0.1), PARAM - 0.1 * steps.sum(axis=1))


# The five claims of the field.


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("optimizer_class", [Adam, AdamW])
def test_bias_correction_makes_the_first_step_as_long_as_lr(optimizer_class: type[FirstOrder], scale: float) -> None:
    param = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    param.grad = scale * torch.tensor([1.0, -2.0, 3.0, -4.0, 5.0], dtype=torch.float64)
    optimizer_class([param], lr=0.1, eps=1e-20, weight_decay=0).step()
    # Only rounding: eps is far below the gradients.
    torch.testing.assert_close(param.detach(), -0.1 * param.grad.sign(), rtol=1e-12, atol=0)


def test_decay_and_l2_coincide_for_sgd() -> None:
    decayed, regularised = leaves([(6,)]), leaves([(6,)])
    for seed in range(5):
        give_grads(decayed, seed)
        give_grads(regularised, seed)
        regularised[0].grad += 0.1 * regularised[0].detach()
        SGD(decayed, lr=0.1, weight_decay=0.1).step()
        SGD(regularised, lr=0.1).step()
    torch.testing.assert_close(decayed[0], regularised[0], rtol=1e-14, atol=1e-15)  # the same sums, rounded elsewhere


def test_decay_and_l2_differ_for_adam() -> None:
    ends = []
    for decoupled in (False, True):
        params = leaves([(6,)])
        optimizer = Adam(params, lr=0.1, weight_decay=0.1, decoupled_weight_decay=decoupled)
        for seed in range(5):
            give_grads(params, seed)
            optimizer.step()
        ends.append(params[0].detach())
    assert (ends[0] - ends[1]).abs().max() > 0.01


@pytest.mark.parametrize("scale", [0.0, 1e-4, 1.0, 1e4])
def test_adamw_decay_does_not_depend_on_the_gradients_scale(scale: float) -> None:
    ends = []
    for decay in (0.0, 0.5):
        param = torch.tensor([3.0, -2.0], dtype=torch.float64, requires_grad=True)
        optimizer = AdamW([param], lr=0.1, weight_decay=decay)
        param.grad = scale * torch.tensor([1.0, 2.0], dtype=torch.float64)
        optimizer.step()
        ends.append(param.detach())
    # Rounding only: param * lr * weight_decay is all that decay removes.
    torch.testing.assert_close(ends[0] - ends[1], torch.tensor([0.15, -0.1], dtype=torch.float64), rtol=1e-13, atol=0)


@pytest.mark.parametrize("max_norm", [0.01, 1.0, 100.0])
def test_clipping_keeps_the_direction_and_bounds_the_norm(max_norm: float) -> None:
    for clip in (True, False):  # in the step, and as a function
        params = leaves([(4,), (3, 3)])
        give_grads(params, 0)
        grads = torch.cat([p.grad.flatten() for p in params])
        before = torch.cat([p.detach().clone().flatten() for p in params])
        if not clip:
            clip_grad_norm_(params, max_norm)
        SGD(params, lr=1.0, max_norm=max_norm if clip else None).step()
        moved = before - torch.cat([p.detach().flatten() for p in params])
        assert moved.norm() <= max_norm * (1 + 1e-12)
        assert math.isclose(float(moved.norm()), min(max_norm, float(grads.norm())), rel_tol=1e-5)  # torch adds 1e-6
        cosine = torch.nn.functional.cosine_similarity(moved, grads, dim=0)
        assert abs(float(cosine) - 1) < 1e-12


def test_scheduler_scales_adamw_decay() -> None:
    param = torch.ones(3, dtype=torch.float64, requires_grad=True)
    optimizer = AdamW([param], lr=0.1, weight_decay=0.5)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.1)
    expected = 1.0
    for lr in (0.1, 0.01, 0.001):
        param.grad = torch.zeros_like(param)
        optimizer.step()
        scheduler.step()
        expected *= 1 - lr * 0.5
        torch.testing.assert_close(param.detach(), torch.full_like(param, expected), rtol=1e-14, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("alpha", [0.0, 0.9])
def test_centered_rmsprop_has_no_negative_variance(alpha: float, backend: str) -> None:
    params = [torch.ones(1000, dtype=torch.float32, requires_grad=True)]
    optimizer = RMSprop(params, alpha=alpha, centered=True, backend=backend)
    grad = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    for _ in range(300):
        params[0].grad = grad.clone()
        optimizer.step()
    assert bool(params[0].isfinite().all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_zero_gradients_move_nothing_without_decay(case: Case, backend: str) -> None:
    params = leaves()
    none = {name: 0 for name in ("weight_decay", "lambd") if case.takes(name)}
    optimizer = case.ours(params, **{**case.options, **none}, backend=backend)
    for _ in range(2):
        for param in params:
            param.grad = torch.zeros_like(param)
        optimizer.step()
    torch.testing.assert_close(params, leaves(), rtol=1e-15, atol=0)  # the average of a number with itself rounds


@pytest.mark.parametrize("case", CASES, ids=str)
def test_maximize_is_minimizing_the_negative(case: Case) -> None:
    if case.options.get("weight_decay"):
        return  # decay keeps its sign
    up, down = leaves(), leaves()
    climbing, descending = case.ours(up, **case.options, maximize=True), case.ours(down, **case.options)
    for seed in range(3):
        give_grads(up, seed)
        for a, b in zip(up, down, strict=True):
            b.grad = -a.grad
        climbing.step()
        descending.step()
    assert all(map(torch.equal, up, down))
