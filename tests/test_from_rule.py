"""A plain function becomes an optimizer."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from cases import BACKENDS, assert_unmoved, give_grads, leaves, snapshot

import descend
from descend import FirstOrder, RuleError, from_rule
from descend.ops import abs as magnitude
from descend.ops import exp, maximum, minimum, sign, sqrt, where

SCALE = 0.5


def lion(param: Any, grad: Any, exp_avg: Any, lr: Any, beta1: Any, beta2: Any, weight_decay: Any) -> Any:
    update = sign(exp_avg + (1 - beta1) * (grad - exp_avg))
    exp_avg = exp_avg + (1 - beta2) * (grad - exp_avg)
    return param - lr * (update + weight_decay * param), exp_avg


Lion = from_rule(lion, "Lion", lr=1e-2, beta1=0.9, beta2=0.99, weight_decay=0.1)


class LionClass(FirstOrder):
    rule = staticmethod(lion)
    counts_steps = False

    def __init__(self, params: Any, lr: float = 1e-2, **ours: Any) -> None:
        super().__init__(params, dict(lr=lr, beta1=0.9, beta2=0.99, weight_decay=0.1), **ours)


def halved(x: Any, by: Any = 2.0) -> Any:
    return x / by


def everything(param: Any, grad: Any, seen: Any, lr: Any, step: Any) -> Any:
    seen = maximum(seen, magnitude(grad)) + SCALE
    small = where(seen > 1, minimum(seen, 3 * seen), exp(-seen))
    return param - lr * halved(grad) ** 2 * sqrt(small) / step, seen


def uncompilable(param: Any, grad: Any, lr: Any) -> Any:
    return param - lr * torch.tanh(grad)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("make", [Lion, LionClass])
def test_lion_is_the_papers(make: type[FirstOrder], backend: str) -> None:
    (param,) = leaves([(1023,)])
    expected, average = param.detach().clone(), torch.zeros(1023, dtype=torch.float64)
    optimizer = make([param], lr=0.02, backend=backend)
    for seed in range(5):
        give_grads([param], seed)
        optimizer.step()
        update = (0.9 * average + 0.1 * param.grad).sign()
        expected -= 0.02 * (update + 0.1 * expected)
        average = 0.99 * average + 0.01 * param.grad
    torch.testing.assert_close(param.detach(), expected, rtol=1e-12, atol=1e-12)  # float64 rounding of five steps
    assert list(optimizer.state[param]) == ["exp_avg"]
    torch.testing.assert_close(optimizer.state[param]["exp_avg"], average, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_operations_helpers_literals_and_constants_compile(dtype: torch.dtype) -> None:
    make = from_rule(everything, "Everything", lr=0.1)
    results = []
    for backend in BACKENDS:
        (param,) = leaves([(1023,)], dtype)
        optimizer = make([param], backend=backend)
        for seed in range(3):
            give_grads([param], seed)
            optimizer.step()
        results.append(param.detach())
        assert list(optimizer.state[param]) == ["step", "seen"]
    tolerance = 1e-5 if dtype == torch.float32 else 1e-13  # a few roundings a step, exp among them
    torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_closures_with_different_values_are_different_rules(backend: str) -> None:
    def make(factor: float, op: Any) -> type[FirstOrder]:
        def rule(param: Any, grad: Any, lr: Any) -> Any:
            return param - lr * factor * op(grad)

        return from_rule(rule, "Scaled", lr=1.0)

    for factor, op, expected in ((1.0, sign, -1.0), (2.0, sign, -2.0), (1.0, magnitude, -3.0)):
        param = torch.zeros(3, requires_grad=True)
        param.grad = torch.full((3,), 3.0)
        make(factor, op)([param], backend=backend).step()
        assert param.tolist() == [expected] * 3


def test_rule_that_cannot_be_compiled_says_so_and_moves_nothing() -> None:
    make = from_rule(uncompilable, "Uncompilable", lr=0.1)
    params = leaves([(3,)])
    give_grads(params, 0)
    optimizer = make(params)
    before = snapshot(optimizer)
    line = uncompilable.__code__.co_firstlineno + 1
    with pytest.raises(RuleError, match=rf"(?s)uncompilable.*line {line}\).*tanh.*backend='eager'"):
        optimizer.step()
    assert_unmoved(optimizer, before)
    expected = params[0].detach() - 0.1 * torch.tanh(params[0].grad)
    make(params, backend="eager").step()
    torch.testing.assert_close(params[0].detach(), expected)


def test_class_has_a_stable_name_and_pickles() -> None:
    (param,) = leaves([(3,)])
    give_grads([param], 0)
    optimizer = Lion([param], lr=0.5, max_norm=1.0)
    optimizer.step()
    for copied in (pickle.loads(pickle.dumps(optimizer)), copy.deepcopy(optimizer)):
        assert type(copied) is Lion
        assert copied.max_norm == 1.0
        (other,) = copied.param_groups[0]["params"]
        other.grad = param.grad.clone()
        copied.step()
    optimizer.step()
    assert torch.equal(other, param)
    assert repr(optimizer).startswith("Lion (")


def test_schedulers_clipping_and_checkpoints_follow() -> None:
    (param,) = leaves([(30,)])
    optimizer = Lion([param], max_norm=1.0, nonfinite="raise")
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    give_grads([param], 0)
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.005
    assert optimizer.grad_norm == pytest.approx(param.grad.norm().item(), rel=1e-12)
    other = Lion([param.detach().clone().requires_grad_()])
    other.load_state_dict(optimizer.state_dict())
    assert torch.equal(other.state_dict()["state"][0]["exp_avg"], optimizer.state[param]["exp_avg"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: from_rule(lion, "Lion"), "needs a default for .*beta1"),
        (lambda: from_rule(lion, "Lion", momentum=0.9), "defaults came for .*momentum"),
        (lambda: Lion([torch.zeros(1, requires_grad=True)], momentum=0.9), "no option .*momentum.*beta1"),
        (lambda: Lion([torch.zeros(1, requires_grad=True)], lr=-1), "Invalid learning rate: -1"),
        (lambda: Lion([torch.zeros(1, requires_grad=True)], 1, 2, 3, 4, 5), "at most 4 options"),
    ],
)
def test_wrong_options_are_refused(make: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_signature_defaults_are_options() -> None:
    def rule(param: Any, grad: Any, lr: Any = 0.25, *, scale: Any = 1.0) -> Any:
        return param - lr * grad

    def positional(param: Any, grad: Any, lr: Any = 0.25) -> Any:
        return param - lr * grad

    optimizer = descend.from_rule(positional, "Positional")([torch.zeros(1, requires_grad=True)])
    assert optimizer.param_groups[0]["lr"] == 0.25
    with pytest.raises(TypeError, match="rule takes positional arguments only, got scale"):
        descend.from_rule(rule, "KeywordOnly")
