"""Closures of every kind, and hostile ones: errors, NaN and infinity, noise."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from lbfgs_cases import (
    SEARCHES,
    Loss,
    Twin,
    assert_same_points,
    flat,
    network,
    random,
    rosenbrock,
    twin,
    twins,
)
from torch import Tensor, nn

from descend import Newton
from descend.second_order.lbfgs import HAS_MAXIMIZE, LBFGS

# Closures.


def silent(twin: Twin) -> Callable[[], Any]:
    return lambda: twin.loss(0)


def zeroing(twin: Twin) -> Callable[[], Any]:
    def closure() -> Tensor:
        twin.optimizer.zero_grad(set_to_none=False)
        return twin.loss(0)

    return closure


def by_autograd(twin: Twin) -> Callable[[], Any]:
    def closure() -> Tensor:
        loss = twin.loss(0)
        for param, grad in zip(twin.params, torch.autograd.grad(loss, twin.params), strict=True):
            param.grad = grad
        return loss

    return closure


def of_numbers(twin: Twin) -> Callable[[], Any]:
    """Gradients written past autograd, the loss a number."""

    def closure() -> float:
        loss = twin.loss(0)
        for param, grad in zip(twin.params, torch.autograd.grad(loss, twin.params), strict=True):
            if param.grad is None:
                param.grad = torch.zeros_like(param)
            param.grad.numpy()[...] = grad.numpy()
        return loss.item()

    return closure


@pytest.mark.parametrize("context", [nullcontext, torch.no_grad, torch.inference_mode], ids=lambda c: c.__name__)
@pytest.mark.parametrize("line_search_fn", SEARCHES)
@pytest.mark.parametrize("kind", [silent, zeroing, by_autograd, of_numbers], ids=lambda f: f.__name__)
def test_closure_of_any_kind_gives_the_same_steps(
    kind: Callable[[Twin], Any], line_search_fn: str | None, context: Callable[[], Any]
) -> None:
    options = dict(max_iter=6, line_search_fn=line_search_fn)
    ours, usual = twin(LBFGS, network, **options), twin(LBFGS, network, **options)
    for _ in range(3):
        with context():
            loss = ours.optimizer.step(kind(ours))
        assert torch.as_tensor(loss, dtype=torch.float64).item() == usual.step().item()
    assert torch.equal(flat(ours.params), flat(usual.params))
    if line_search_fn is None:
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(ours.params, usual.params, strict=True))


def test_zero_gradient_after_backward_is_believed() -> None:
    x = torch.zeros(2, requires_grad=True)
    optimizer = LBFGS([x])

    def closure() -> Tensor:
        optimizer.zero_grad(set_to_none=False)
        loss = x.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 0
    assert optimizer.result.status == "converged"


@pytest.mark.parametrize("loss", [2, 2.0, torch.tensor(2), torch.tensor([[2.0]])], ids=repr)
def test_loss_may_be_any_real_scalar(loss: Any) -> None:
    x = torch.ones(1, requires_grad=True)

    def closure() -> Any:
        x.grad = torch.zeros(1)
        return loss

    optimizer = LBFGS([x])
    assert optimizer.step(closure) is loss
    assert optimizer.result.fun == 2.0


def stale(optimizer: LBFGS, x: Tensor) -> Any:
    x.grad = torch.ones_like(x)
    return lambda: float(x.detach().sum())


def used_up(optimizer: LBFGS, x: Tensor) -> Any:
    loss = x.square().sum()
    loss.backward()
    return lambda: loss


HOSTILE: list[tuple[str, Callable[[LBFGS, Tensor], Any], type[Exception], str]] = [
    ("none", lambda o, x: lambda: None, TypeError, "got None"),
    ("string", lambda o, x: lambda: "1.0", TypeError, "got str"),
    ("tuple", lambda o, x: lambda: (x.sum(), 1), TypeError, "got tuple"),
    ("complex number", lambda o, x: lambda: 1j, TypeError, "got complex"),
    ("complex tensor", lambda o, x: lambda: x.sum() * 1j, TypeError, "complex64 tensor"),
    ("vector", lambda o, x: lambda: x * 2, ValueError, r"shape \(3,\). Reduce it"),
    ("empty", lambda o, x: lambda: x[:0], ValueError, r"shape \(0,\)"),
    ("no function", lambda o, x: 1.0, TypeError, "closure must be a function"),
]
WITHOUT_GRADIENT: list[tuple[str, Callable[[LBFGS, Tensor], Any], type[Exception], str]] = [
    ("detached", lambda o, x: lambda: x.detach().sum(), RuntimeError, "gave no gradient"),
    ("number", lambda o, x: lambda: 1.0, RuntimeError, "gave no gradient"),
    ("unrelated", lambda o, x: lambda: torch.ones(2, requires_grad=True).sum(), RuntimeError, "does not depend"),
    ("stale gradient", stale, RuntimeError, "did not compute the gradient at the new parameters"),
    ("graph used up", used_up, RuntimeError, "compute the loss anew"),
]
ERRORS = [
    *(
        pytest.param(*row[1:], line_search_fn, id=f"{row[0]}, {line_search_fn}")
        for row in HOSTILE
        for line_search_fn in SEARCHES
    ),
    *(pytest.param(*row[1:], "hager_zhang", id=row[0]) for row in WITHOUT_GRADIENT),
]


@pytest.mark.parametrize(("hostile", "kind", "message", "line_search_fn"), ERRORS)
def test_hostile_closure_gets_a_clear_error_and_moves_nothing(
    hostile: Callable[[LBFGS, Tensor], Any], kind: type[Exception], message: str, line_search_fn: str | None
) -> None:
    x = torch.full((3,), 2.0, requires_grad=True)
    optimizer = LBFGS([x], line_search_fn=line_search_fn)
    with pytest.raises(kind, match=message):
        optimizer.step(hostile(optimizer, x))
    assert x.tolist() == [2.0] * 3
    x.grad = None
    optimizer.step(lambda: ((x - 1) ** 2).sum())
    optimizer.step(lambda: ((x - 1) ** 2).sum())
    torch.testing.assert_close(x.detach(), torch.ones(3))


# What torch takes: gradients that the closure does not compute.


def without_gradients(params: list[Tensor]) -> Callable[[], Any]:
    return lambda: 1


def unrelated(params: list[Tensor]) -> Callable[[], Any]:
    return lambda: torch.ones(2, requires_grad=True).sum()


def spent(params: list[Tensor]) -> Callable[[], Any]:
    loss = sum(param.square().sum() for param in params)
    torch.autograd.grad(loss, params)
    return lambda: loss


MISSING = [(without_gradients, "gave no gradient"), (unrelated, "does not depend"), (spent, "graph is used up")]


def torch_and_ours(line_search_fn: str | None, **options: Any) -> list[tuple[Any, list[Tensor]]]:
    made = []
    for cls in (torch.optim.LBFGS, LBFGS):
        params = [random(4, seed=k).requires_grad_() for k in range(2)]
        made.append((cls(params, line_search_fn=line_search_fn, **options), params))
    return made


@pytest.mark.parametrize("line_search_fn", SEARCHES)
@pytest.mark.parametrize(("closure_of", "message"), MISSING, ids=lambda value: getattr(value, "__name__", ""))
def test_missing_gradients_are_zero_and_warned_about(
    closure_of: Callable[[list[Tensor]], Any], message: str, line_search_fn: str | None
) -> None:
    (theirs, their_params), (ours, params) = torch_and_ours(line_search_fn)
    with pytest.warns(UserWarning, match=message) as record:
        loss = ours.step(closure_of(params))
    assert record[0].filename == __file__
    assert torch.equal(torch.as_tensor(loss), torch.as_tensor(theirs.step(closure_of(their_params))))
    assert all(map(torch.equal, params, their_params))
    assert ours.result.status == "converged"
    assert all(param.grad is None for param in params)


def constant(params: list[Tensor]) -> Callable[[], Any]:
    loss = torch.tensor(3.0)
    return lambda: loss


KINDS = [constant, without_gradients, unrelated, spent]


@pytest.mark.parametrize("line_search_fn", SEARCHES)
@pytest.mark.parametrize("is_partly_none", [False, True])
@pytest.mark.parametrize("closure_of", KINDS, ids=lambda f: f.__name__)
def test_gradients_that_were_set_once_are_used_as_in_torch(
    closure_of: Callable[[list[Tensor]], Any], is_partly_none: bool, line_search_fn: str | None
) -> None:
    made = torch_and_ours(line_search_fn, lr=0.1, max_iter=3)
    for optimizer, params in made:
        for k, param in enumerate(params):
            param.grad = None if k and is_partly_none else random(4, seed=7 + k)
        closure = closure_of(params)
        for _ in range(3):
            optimizer.step(closure)
    assert all(map(torch.equal, made[0][1], made[1][1]))
    has_moved = not torch.equal(made[1][1][0], random(4))
    assert has_moved == (line_search_fn is None)  # a search finds no lower value


@pytest.mark.parametrize("line_search_fn", SEARCHES)
def test_hooks_and_maximize_work_with_any_closure(line_search_fn: str | None) -> None:
    x = torch.ones(2, requires_grad=True)
    x.grad = torch.ones(2)
    optimizer = LBFGS([x], maximize=True, lr=0.5, max_iter=1, line_search_fn=line_search_fn)
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    assert optimizer.step(lambda: 1) == 1
    assert seen == ["pre", "post"]
    assert bool((x > 1).all()) == (line_search_fn is None)  # a search finds no higher value


@pytest.mark.parametrize("cls", [LBFGS, Newton, *([torch.optim.LBFGS] if HAS_MAXIMIZE else [])])
def test_step_without_parameters_returns_the_loss(cls: Any) -> None:
    optimizer = cls([{"params": []}])
    calls = []
    assert optimizer.step(lambda: calls.append(torch.is_grad_enabled()) or 5.0) == 5.0
    assert calls == [True]


def failing(closure: Callable[[], Any], call: int, error: BaseException) -> Callable[[], Any]:
    """The closure, but the ``call``-th time it raises."""
    calls = 0

    def closure_that_fails() -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise error
        return closure()

    return closure_that_fails


@pytest.mark.parametrize("call", range(1, 14))
@pytest.mark.parametrize("line_search_fn", SEARCHES)
@pytest.mark.parametrize("error", [ValueError("here"), KeyboardInterrupt("here")], ids=repr)
def test_after_a_closure_that_raises_the_next_step_goes_on(
    error: BaseException, line_search_fn: str | None, call: int
) -> None:
    options = dict(lr=0.5, max_iter=40, max_eval=100, line_search_fn=line_search_fn)
    ours, usual = twin(LBFGS, rosenbrock, **options), twin(LBFGS, rosenbrock, **options)
    usual.step()
    start = flat(ours.params)
    with pytest.raises(type(error), match="here"):
        ours.optimizer.step(failing(ours.closure(), call, error))
    stayed, before = flat(ours.params), list(ours.points)
    assert stayed.tolist() in [point.tolist() for point in (start, *before)]
    if line_search_fn is None and before:
        assert torch.equal(stayed, before[-1])
    ours.points.clear()
    ours.step()
    assert torch.equal(ours.points[0], stayed)
    # From here on the same points as if nothing had happened.
    place = next(k for k, point in enumerate(usual.points) if torch.equal(point, ours.points[1]))
    assert place <= max(call - 1, 1)
    common = min(len(usual.points) - place, len(ours.points) - 1) - 1
    assert common > 10
    assert_same_points(ours.points[1:][:common], usual.points[place:][:common])


# NaN and infinity.


def logarithm(x: Tensor) -> Tensor:
    return (x - 3 * torch.log(x)).sum()


def root(x: Tensor) -> Tensor:
    return (torch.sqrt(x) + 0.5 / torch.sqrt(x)).sum()


def cliff(x: Tensor) -> Tensor:
    return torch.where(x > 0.1, 1 / x + x, torch.full_like(x, math.inf)).sum()


def overflow(x: Tensor) -> Tensor:
    return torch.exp(30 * (x - 2) ** 2).sum()


def below(x: Tensor) -> Tensor:
    return torch.where(x > -50, x.square(), -torch.full_like(x, math.inf)).sum() - 1000 * x.sum()


def unbounded(x: Tensor) -> Tensor:
    return -(x**3).sum()


def saturated(x: Tensor) -> Tensor:
    return torch.sigmoid(-x).sum()


NONFINITE = [logarithm, root, cliff, overflow, below, unbounded, saturated]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("lr", [1, 1e30])
@pytest.mark.parametrize("max_iter", [1, 20])
@pytest.mark.parametrize("line_search_fn", SEARCHES)
@pytest.mark.parametrize("fun", NONFINITE, ids=lambda f: f.__name__)
def test_parameters_stay_finite(
    fun: Callable[[Tensor], Tensor], line_search_fn: str | None, max_iter: int, lr: float, dtype: torch.dtype
) -> None:
    x = torch.tensor([0.9, 2.0, 4.0], dtype=dtype, requires_grad=True)
    optimizer = LBFGS([x], lr=lr, max_iter=max_iter, line_search_fn=line_search_fn)
    for _ in range(6):
        optimizer.step(lambda: fun(x))
        assert torch.isfinite(x).all()
        assert optimizer.result.status in list(type(optimizer.result.status))


@pytest.mark.parametrize("fun", [logarithm, root, cliff], ids=lambda f: f.__name__)
@pytest.mark.parametrize("line_search_fn", SEARCHES)
def test_nonfinite_steps_are_shortened_and_the_minimum_is_found(
    fun: Callable[[Tensor], Tensor], line_search_fn: str | None
) -> None:
    x = torch.tensor([0.9, 2.0, 4.0], dtype=torch.float64, requires_grad=True)
    optimizer = LBFGS([x], lr=8, max_iter=5, line_search_fn=line_search_fn)
    optimizer.step(lambda: fun(x))
    optimizer.param_groups[0].update(lr=1, max_iter=100, max_eval=200)
    optimizer.step(lambda: fun(x))
    minimum = {logarithm: 3.0, root: 0.5, cliff: 1.0}[fun]
    torch.testing.assert_close(x.detach(), torch.full((3,), minimum, dtype=torch.float64), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("line_search_fn", SEARCHES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_start_that_is_not_finite_moves_nothing(bad: float, line_search_fn: str | None) -> None:
    x = torch.ones(2, requires_grad=True)
    optimizer = LBFGS([x], line_search_fn=line_search_fn)
    loss = optimizer.step(lambda: x.sum() * bad)
    assert x.tolist() == [1.0, 1.0]
    assert not torch.isfinite(loss)
    assert optimizer.result.status == "non_finite"
    optimizer.step(lambda: (x - 3).square().sum())
    optimizer.step(lambda: (x - 3).square().sum())
    torch.testing.assert_close(x.detach(), torch.full((2,), 3.0))


def bounded_domain(dtype: torch.dtype) -> tuple[list[Tensor], Loss]:
    x = torch.tensor([0.5, -0.3, 0.8], dtype=dtype, requires_grad=True)
    return [x], lambda k: ((x - 1) ** 4 + x**2).sum() / (x.square().sum() < 25).to(dtype)


def test_infinite_trials_from_which_torch_recovers_are_torchs() -> None:
    ours, theirs = twins(bounded_domain, lr=200, max_iter=4, max_eval=60, line_search_fn="strong_wolfe")
    for k in range(3):
        ours.step(k)
        theirs.step(k)
    assert sum(bool(point.square().sum() >= 25) for point in theirs.points) > 5
    assert torch.isfinite(theirs.points[-1]).all()
    assert_same_points(ours.points, theirs.points)


# Random closures.


def noisy_steps(line_search_fn: str | None, closure_of: Callable[[Tensor, Tensor], Any]) -> None:
    x, batch = torch.full((20,), 2.0, requires_grad=True), torch.ones(20)
    optimizer = LBFGS([x], lr=0.1, max_iter=2, line_search_fn=line_search_fn)
    for _ in range(6):
        batch.copy_(torch.rand(20))
        optimizer.step(lambda: closure_of(x, batch))


def test_dropout_warns_once() -> None:
    with pytest.warns(UserWarning, match="draws random numbers") as record:
        noisy_steps("strong_wolfe", lambda x, batch: nn.functional.dropout(x - 1, 0.5).square().sum())
    assert len(record) == 1
    assert record[0].filename == __file__


def seeded(x: Tensor, batch: Tensor) -> Tensor:
    torch.manual_seed(0)
    return nn.functional.dropout(x - 1, 0.5).square().sum()


def loader(x: Tensor, batch: Tensor) -> Tensor:
    rows = torch.utils.data.DataLoader(range(20), batch_size=5, shuffle=True)
    return sum((x[row] - 1).square().sum() for row in rows)


@pytest.mark.parametrize(
    "closure_of", [lambda x, batch: (x - batch).square().sum(), seeded, loader], ids=["minibatch", "seeded", "loader"]
)
@pytest.mark.parametrize("line_search_fn", SEARCHES)
def test_closures_that_are_functions_do_not_warn(line_search_fn: str | None, closure_of: Any) -> None:
    noisy_steps(line_search_fn, closure_of)
