"""An optimizer of one's own: a rule in, everything an optimizer needs out."""

from __future__ import annotations

import copy
import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import BACKENDS, assert_unmoved, give_grads, leaves, params_of, snapshot
from torch import Tensor

from descend import FirstOrder, RuleError, from_rule, warmup
from descend.ops import abs, exp, log, maximum, minimum, sign, sqrt, where


def lion(param, grad, exp_avg, lr, beta1, beta2, weight_decay):
    """Lion: Chen et al. 2023, https://arxiv.org/abs/2302.06675."""
    update = sign(exp_avg + (1 - beta1) * (grad - exp_avg))
    exp_avg = exp_avg + (1 - beta2) * (grad - exp_avg)
    return param - lr * (update + weight_decay * param), exp_avg


Lion = from_rule(lion, "Lion", lr=1e-2, beta1=0.9, beta2=0.99, weight_decay=0.1)


class LionByHand(torch.optim.Optimizer):
    """The paper's algorithm, as people write it."""

    def __init__(self, params: Any, lr: float = 1e-2, weight_decay: float = 0.1) -> None:
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                average = state.setdefault("exp_avg", torch.zeros_like(param))
                param.mul_(1 - group["lr"] * group["weight_decay"])
                param.add_(average.mul(0.9).add(param.grad, alpha=0.1).sign(), alpha=-group["lr"])
                average.mul_(0.99).add_(param.grad, alpha=0.01)


@pytest.mark.parametrize("backend", BACKENDS)
def test_lion_is_lion(backend: str) -> None:
    ours, theirs = Lion(leaves(), backend=backend, max_norm=2.0), LionByHand(leaves())
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9) for optimizer in (ours, theirs)]
    for seed in range(20):
        for optimizer in (ours, theirs):
            give_grads(params_of(optimizer), seed)
        torch.nn.utils.clip_grad_norm_(params_of(theirs), 2.0)
        for optimizer, scheduler in zip((ours, theirs), schedulers, strict=True):
            optimizer.step()
            scheduler.step()
    for a, b in zip(params_of(ours), params_of(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)  # float64, 20 steps
        torch.testing.assert_close(ours.state[a]["exp_avg"], theirs.state[b]["exp_avg"], rtol=1e-12, atol=1e-12)
    assert {placement.backend for placement in ours.backends()} == {backend}


def test_names_come_from_the_signature() -> None:
    optimizer = Lion(leaves(), 0.5, beta2=0.9)
    assert isinstance(optimizer, FirstOrder)
    assert (Lion.__name__, Lion.__module__) == ("Lion", __name__)
    assert optimizer.defaults == dict(lr=0.5, beta1=0.9, beta2=0.9, weight_decay=0.1, maximize=False)
    give_grads(params_of(optimizer), 0)
    optimizer.step()
    assert {tuple(state) for state in optimizer.state.values()} == {("exp_avg",)}


@pytest.mark.parametrize("way", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_own_optimizer_is_copied_and_goes_on(way: Callable[[Any], Any]) -> None:
    optimizer = Lion(leaves(), max_norm=1.0)
    give_grads(params_of(optimizer), 0)
    optimizer.step()
    twin = way(optimizer)
    for o in (optimizer, twin):
        give_grads(params_of(o), 1)
        o.step()
    assert type(twin) is Lion
    assert all(map(torch.equal, params_of(optimizer), params_of(twin)))


def test_groups_skipping_and_checkpoints_come_with_it() -> None:
    params = leaves()
    optimizer = Lion([{"params": params[:2]}, {"params": params[2:], "lr": 0.5}], nonfinite="skip")
    before = snapshot(optimizer)
    give_grads(params, 0)
    params[0].grad.fill_(math.nan)
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert_unmoved(optimizer, before)
    give_grads(params, 0)
    optimizer.step()
    other = leaves()
    loaded = Lion([{"params": other[:2]}, {"params": other[2:]}])
    loaded.load_state_dict(optimizer.state_dict())
    assert loaded.param_groups[1]["lr"] == 0.5


def halving(param, grad, total, lr, step, rate=2.0):
    total = total + grad
    return param - lr / step * total / rate, total


def test_step_and_defaults_of_the_signature_reach_the_rule() -> None:
    for backend in BACKENDS:
        (param,) = leaves([(3,)])
        start = param.detach().clone()
        optimizer = from_rule(halving, "Halving")([param], lr=1.0, backend=backend)
        for _ in range(3):
            param.grad = torch.ones(3, dtype=torch.float64)
            optimizer.step()
        torch.testing.assert_close(param.detach(), start - 1.5, rtol=1e-14, atol=1e-14)  # three roundings
        assert float(optimizer.state[param]["step"]) == 3


# What a rule may be made of.

SLOPE = 0.25
INTEGER = 2


def softened(x, by=0.5):
    return x / (abs(x) + by)


def twice(x):
    return INTEGER * softened(x)


def of_everything(param, grad, slow, fast, lr):
    slow = where(abs(grad) > 1, minimum(slow, grad), maximum(slow, grad))
    fast = log(exp(fast) + 1) - sqrt(abs(grad)) * SLOPE
    scaled = twice(slow) if INTEGER > 1 else slow
    return param - lr * (scaled + sign(fast) * 3 / 7 - -(grad**2) * 0.001), slow, fast


def with_closure(power: int, factor: float) -> Callable[..., Any]:
    def rule(param, grad, lr):
        return param - lr * factor * grad**power

    return rule


def with_conditions(param, grad, seen, lr):
    both = (grad > 0) & (param > 0)
    seen = where(both | (grad < -1), seen + 1, where(grad == 0, 0.0, seen))
    return where(both, param - lr * grad, param + lr * seen), seen


RULES = [of_everything, with_closure(2, 0.5), with_closure(3, 2), with_conditions]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 2**-7)]
)
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_compiled_rule_is_the_eager_rule(rule: Callable[..., Any], dtype: torch.dtype, tolerance: float) -> None:
    ends = []
    for backend in BACKENDS:
        params = leaves(dtype=dtype)
        optimizer = from_rule(rule, "Rule", lr=0.1)(params, backend=backend, state_dtype=torch.float32)
        for seed in range(4):
            give_grads(params, seed)
            optimizer.step()
        ends.append(params)
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)  # a few roundings of the dtype


def test_rules_that_differ_in_what_they_refer_to_do_not_share_a_kernel() -> None:
    def make(f: Callable[..., Any], factor: float) -> Callable[..., Any]:
        def helper(x, more=factor):
            return x * more

        def rule(param, grad, lr):
            return param - lr * helper(f(grad))

        return rule

    ends = []
    for f, factor in ((sqrt, 1.0), (exp, 1.0), (sqrt, 2.0)):
        param = torch.zeros(1, requires_grad=True)
        param.grad = torch.ones(1)
        from_rule(make(f, factor), "Rule", lr=1.0)([param], backend="cpu").step()
        ends.append(param.item())
    assert ends == pytest.approx([-1.0, -math.e, -2.0], rel=1e-6)  # float32


# Rules that cannot be compiled.


def uncompilable(param, grad, average, lr):
    average = average + grad
    pieces = {"moved": param - lr * average}
    return torch.add(pieces["moved"], 0), average


def calling_in_a_circle(param, grad, lr):
    return param - lr * there(grad, 2)


def there(x, n):
    return x if isinstance(n, Tensor) or n < 1 else back(x, n - 1)


def back(x, n):
    return there(x, n)


@pytest.mark.parametrize("rule", [uncompilable, calling_in_a_circle], ids=lambda rule: rule.__name__)
def test_rule_that_cannot_be_compiled_says_so_and_nothing_has_moved(rule: Callable[..., Any]) -> None:
    optimizer_class = from_rule(rule, "Rule", lr=0.1)
    params = leaves()
    optimizer = optimizer_class(params)
    give_grads(params, 0)
    before = snapshot(optimizer)
    with pytest.raises(RuleError, match=r"backend='eager'") as caught:
        optimizer.step()
    assert rule.__name__ in str(caught.value)
    assert Path(__file__).name in str(caught.value)
    assert not re.search("\x1b|nopython", str(caught.value))  # Numba's colours, which it writes only where colorama is
    first = rule.__code__.co_firstlineno
    assert any(f"line {line}" in str(caught.value) for line in range(first, first + 5))
    assert_unmoved(optimizer, before)
    assert not optimizer.state
    with pytest.raises(RuleError):
        warmup(optimizer)
    eager = optimizer_class(params, backend="eager")
    eager.step()
    assert not all(map(torch.equal, params, before[0]))


def test_operations_agree_on_tensors_and_numbers() -> None:
    for x in (-2.0, -0.5, 0.0, 0.25, 3.0):
        number, tensor = x, torch.tensor(x, dtype=torch.float64)
        for op in (abs, exp, sign):
            assert float(op(tensor)) == pytest.approx(float(op(number)), rel=1e-15)  # libm against torch
        for op, expected in ((maximum, 0.1 if x < 0.1 else x), (minimum, x if x < 0.1 else 0.1)):
            assert float(op(tensor, 0.1)) == float(op(0.1, tensor)) == float(op(number, 0.1)) == expected
        assert float(where(tensor > 0, tensor, 7.0)) == float(where(number > 0, number, 7.0))
        assert float(where(tensor > 0, 0.1, 0.7)) == float(where(number > 0, 0.1, 0.7))  # no float32 on the way


@pytest.mark.parametrize("op", [maximum, minimum], ids=["maximum", "minimum"])
def test_nan_spreads_through_maximum_and_minimum_in_kernels(op: Callable[..., Any]) -> None:
    def rule(param, grad, lr):
        return op(param, lr * grad)

    for a, b in ((math.nan, 1.0), (1.0, math.nan), (math.nan, math.nan), (1.0, 2.0), (2.0, 1.0)):
        ends = []
        for backend in BACKENDS:
            param = torch.full((3,), a, requires_grad=True)
            param.grad = torch.full((3,), b)
            from_rule(rule, "Rule", lr=1.0)([param], backend=backend).step()
            ends.append(param.detach())
        torch.testing.assert_close(*ends, rtol=0, atol=0, equal_nan=True)
