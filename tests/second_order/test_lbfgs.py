"""LBFGS takes torch's steps, bit for bit, and behaves as the rest of a torch program expects."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cases import one_in
from lbfgs_cases import (
    PROBLEMS,
    SEARCHES,
    TORCH_KEYS,
    Loss,
    Problem,
    assert_same_points,
    network,
    numbers,
    rosenbrock,
    single,
    twin,
    twins,
)
from torch import Tensor
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from descend.second_order.lbfgs import HAS_MAXIMIZE, LBFGS

# Torch's trajectory.


OPTIONS: list[dict[str, Any]] = [
    dict(),
    dict(lr=0.05, history_size=3),
    dict(lr=0.5, max_iter=1),
    dict(max_iter=7, history_size=1),
    dict(max_iter=40, max_eval=50, tolerance_grad=-1, tolerance_change=-1),
    dict(max_iter=15, max_eval=5),
    dict(tolerance_change=1e-3),
    dict(tolerance_grad=0.1),
    dict(lr=torch.tensor(0.3), max_iter=6),
    dict(lr=torch.tensor([0.7], dtype=torch.float64), history_size=4),
]


@pytest.mark.parametrize(("problem", "line_search_fn", "options"), one_in(2, PROBLEMS, SEARCHES, OPTIONS))
def test_trajectory_is_torchs_bit_for_bit(
    problem: Problem, line_search_fn: str | None, options: dict[str, Any]
) -> None:
    ours, theirs = twins(problem, line_search_fn=line_search_fn, **options)
    for k in range(4):
        loss = ours.step(k)
        assert torch.equal(loss, theirs.step(k))
    assert_same_points(ours.points, theirs.points)
    assert all(torch.isfinite(point).all() for point in theirs.points)
    assert set(ours.state) == set(theirs.state)
    for name in set(theirs.state) - {"al"}:
        assert numbers(ours.state[name]) == numbers(theirs.state[name]), name


@pytest.mark.skipif(not HAS_MAXIMIZE, reason="torch's LBFGS maximizes from 2.14 on")
@pytest.mark.parametrize("line_search_fn", SEARCHES)
def test_maximize_is_torchs_bit_for_bit(line_search_fn: str | None) -> None:
    def negative(dtype: torch.dtype) -> tuple[list[Tensor], Loss]:
        params, loss = network(dtype)
        return params, lambda k: -loss(k)

    ours, theirs = twins(negative, maximize=True, max_iter=5, line_search_fn=line_search_fn)
    for k in range(3):
        assert torch.equal(ours.step(k), theirs.step(k))
    assert_same_points(ours.points, theirs.points)
    assert numbers(ours.state["prev_loss"]) == numbers(theirs.state["prev_loss"])


@pytest.mark.parametrize("line_search_fn", SEARCHES)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_float32_is_torchs_within_rounding(problem: Problem, line_search_fn: str | None) -> None:
    ours, theirs = twins(problem, dtype=torch.float32, lr=0.5, max_iter=6, line_search_fn=line_search_fn)
    for k in range(2):
        torch.testing.assert_close(ours.step(k), theirs.step(k), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(ours.points, theirs.points, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("lr", [1, 0.05, torch.tensor(0.3)], ids=repr)
@pytest.mark.parametrize("line_search_fn", SEARCHES)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_state_has_torchs_types(problem: Problem, line_search_fn: str | None, lr: Any) -> None:
    ours, theirs = twins(problem, lr=lr, max_iter=4, line_search_fn=line_search_fn)
    for k in range(3):
        ours.step(k)
        theirs.step(k)
        for name in TORCH_KEYS:
            assert type(ours.state[name]) is type(theirs.state[name]), name
            if isinstance(ours.state[name], list):
                assert [type(entry) for entry in ours.state[name]] == [type(entry) for entry in theirs.state[name]]


def test_scheduled_tensor_lr_leaves_the_last_step_as_it_was() -> None:
    """Torch keeps the learning rate itself as ``t``."""
    ours, theirs = twins(network, lr=torch.tensor(0.5, dtype=torch.float64), max_iter=3)
    for k in range(3):
        ours.step(k)
        theirs.step(k)
        ours.optimizer.param_groups[0]["lr"].fill_(0.25)
        theirs.optimizer.param_groups[0]["lr"] = torch.tensor(0.25, dtype=torch.float64)
    assert_same_points(ours.points, theirs.points)


@pytest.mark.parametrize("line_search_fn", [*SEARCHES, "hager_zhang"])
def test_zero_lr_moves_nothing(line_search_fn: str | None) -> None:
    param = torch.full((3,), 2.0, dtype=torch.float64, requires_grad=True)
    optimizer = LBFGS([param], lr=0, line_search_fn=line_search_fn, history_size=np.int64(4))
    for _ in range(2):  # a warm-up begins like this
        optimizer.step(lambda: ((param - 1) ** 4).sum())
        assert param.tolist() == [2.0, 2.0, 2.0]
    if line_search_fn == "hager_zhang":
        assert optimizer.result.message == "lr is 0, so that nothing moves."
    optimizer.param_groups[0]["lr"] = 1.0
    optimizer.step(lambda: ((param - 1) ** 4).sum())
    assert param.tolist() != [2.0, 2.0, 2.0]


@pytest.mark.parametrize("line_search_fn", SEARCHES)
def test_closure_that_moves_parameters_is_followed_as_in_torch(line_search_fn: str | None) -> None:
    """Style transfer clamps the image in the closure."""

    def clamped(dtype: torch.dtype) -> tuple[list[Tensor], Loss]:
        x = torch.tensor([0.9, 0.2, 0.4], dtype=dtype, requires_grad=True)

        def loss(k: int) -> Tensor:
            x.data.clamp_(0, 1)
            return ((x - torch.tensor([2.0, -1.0, 0.5])) ** 4).sum()

        return [x], loss

    ours, theirs = twins(clamped, lr=0.5, max_iter=8, line_search_fn=line_search_fn)
    for k in range(3):
        ours.step(k)
        theirs.step(k)
    assert_same_points(ours.points, theirs.points)


# Result.


@pytest.mark.parametrize(
    ("options", "status"),
    [
        (dict(max_iter=100, max_eval=1000, tolerance_change=0), "converged"),
        (dict(max_iter=3, max_eval=20), "max_iter"),
        (dict(max_iter=30, max_eval=4), "max_eval"),
        (dict(max_iter=100, max_eval=1000, tolerance_change=0.1), "precision_limit"),
    ],
    ids=str,
)
def test_result_says_why_it_stopped(options: dict[str, Any], status: str) -> None:
    ours = twin(LBFGS, rosenbrock, line_search_fn="strong_wolfe", **options)
    assert ours.optimizer.result is None
    ours.step()
    result = ours.optimizer.result
    assert result.status == status
    assert result.success == (status == "converged")
    assert result.message
    assert result.fun == ours.loss(0).item()
    assert result.x[0] is ours.params[0]
    assert result.grad_norm == result.grad[0].abs().max()
    assert (result.n_iter, result.n_eval) == (ours.state["n_iter"], ours.state["func_evals"])
    assert len(result.history) == result.n_iter + 1
    assert (result.history[-1].fun, result.history[-1].grad_norm) == (result.fun, result.grad_norm)


# The rest of a torch program.


@pytest.mark.parametrize("line_search_fn", SEARCHES)
def test_scheduler_acts_as_with_torch(line_search_fn: str | None) -> None:
    ours, theirs = twins(network, max_iter=2, line_search_fn=line_search_fn)
    schedulers = [lr_scheduler.ExponentialLR(both.optimizer, gamma=0.7) for both in (ours, theirs)]
    for k in range(4):
        ours.step(k)
        theirs.step(k)
        for scheduler in schedulers:
            scheduler.step()
    assert_same_points(ours.points, theirs.points)


class Tampering(LBFGS):
    """A subclass with a step of its own."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


@pytest.mark.parametrize("cls", [LBFGS, Tampering])
def test_hooks_run_once_in_torchs_order(cls: Any) -> None:
    ours = twin(cls, single)
    seen: list[tuple[str, bool, int]] = []

    def note(name: str) -> Callable[..., None]:
        return lambda opt, args, kwargs: seen.append((name, args[0] is opt is ours.optimizer, len(args)))

    handles = [
        ours.optimizer.register_step_pre_hook(note("pre")),
        ours.optimizer.register_step_post_hook(note("post")),
        register_optimizer_step_pre_hook(note("global pre")),
        register_optimizer_step_post_hook(note("global post")),
    ]
    ours.step()
    for handle in handles:
        handle.remove()
    ours.step()
    assert seen == [(name, True, 2) for name in ("global pre", "pre", "post", "global post")]


def test_profiler_shows_the_class() -> None:
    ours = twin(LBFGS, single)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        ours.step()
    assert "Optimizer.step#LBFGS.step" in {event.name for event in profile.events()}


def test_grad_scaler_that_is_off_is_let_through() -> None:
    ours = twin(LBFGS, single)
    torch.amp.GradScaler("cpu", enabled=False).step(ours.optimizer, ours.closure())
    assert ours.optimizer.result is not None
