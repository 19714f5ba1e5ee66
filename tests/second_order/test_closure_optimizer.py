"""What LBFGS, Newton and LeastSquares share: the step around the solver, groups and state."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from descend import LBFGS, LeastSquares, Newton
from descend.second_order.closure_optimizer import ClosureOptimizer

each_class = pytest.mark.parametrize("cls", [LBFGS, Newton, LeastSquares])


def make(cls: Any, **options: Any) -> tuple[Any, Callable[[], Tensor]]:
    param = nn.Parameter(torch.tensor([3.0, -1.0], dtype=torch.float64))
    return cls([param], **options), lambda: ((param - 1) ** 4).sum() + param.square().sum()


def position(optimizer: Any) -> list[float]:
    return optimizer.param_groups[0]["params"][0].tolist()


def test_base_is_abstract() -> None:
    with pytest.raises(TypeError, match="abstract"):
        ClosureOptimizer([torch.zeros(1)], {})


@each_class
def test_subclass_with_its_own_step_runs_hooks_once(cls: Any) -> None:
    class Own(cls):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    optimizer, closure = make(Own)
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    for _ in range(2):
        optimizer.step(closure)
    assert seen == ["pre", "post"] * 2
    assert optimizer.result is not None


@each_class
def test_compiled_program_calls_the_step(cls: Any) -> None:
    (optimizer, closure), (usual, other) = make(cls, max_iter=3), make(cls, max_iter=3)
    torch.compile(lambda: optimizer.step(closure), backend="eager")()
    usual.step(other)
    assert position(optimizer) == position(usual)


@each_class
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_step_may_be_called_wherever_gradients_are_off(cls: Any, context: Any) -> None:
    (optimizer, closure), (usual, other) = make(cls, max_iter=3), make(cls, max_iter=3)
    with context():
        optimizer.step(closure)
    usual.step(other)
    for _ in range(2):
        optimizer.step(closure)
        usual.step(other)
    assert position(optimizer) == position(usual)


@each_class
def test_grad_scaler_is_refused(cls: Any) -> None:
    (optimizer, closure), scaler = make(cls), torch.amp.GradScaler("cpu")
    scaler.scale(closure()).backward()
    with pytest.raises(RuntimeError, match=f"{cls.__name__} does not work with GradScaler"):
        scaler.step(optimizer)


@each_class
def test_refused_group_uses_nothing_up(cls: Any) -> None:
    optimizer, _ = make(cls)
    params = iter([torch.zeros(1, requires_grad=True)])
    group: dict[str, Any] = {"params": params, "max_iter": 7}
    with pytest.raises(ValueError, match="all groups are one problem with one max_iter, got 20 in group 0 and 7"):
        optimizer.add_param_group(group)
    assert len(list(params)) == 1
    assert set(group) == {"params", "max_iter"}


@each_class
def test_group_takes_the_first_ones_options(cls: Any) -> None:
    optimizer, _ = make(cls, max_iter=3)
    optimizer.param_groups[0]["max_iter"] = 5
    optimizer.add_param_group({"params": [torch.zeros(1, requires_grad=True)]})
    assert optimizer.param_groups[1]["max_iter"] == 5


def test_compiler_is_not_imported() -> None:
    program = """
import sys, torch, descend
for cls in (descend.LBFGS, descend.Newton, descend.LeastSquares):
    x = torch.ones(2, requires_grad=True)
    optimizer = cls([x])
    optimizer.zero_grad()
    optimizer.add_param_group({"params": [torch.ones(1, requires_grad=True)]})
    optimizer.step(lambda: x.square().sum())
print("torch._dynamo" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize("make", [partial(LBFGS, line_search_fn="hager_zhang"), LBFGS, Newton])
def test_interrupt_that_leaves_gradients_enabled_restores_parameters(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.full((3,), 2.0, requires_grad=True)
    optimizer, calls, leave = make([x]), 0, torch.enable_grad.__exit__

    def interrupted(self: Any, *arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        leave(self, *arguments)

    monkeypatch.setattr(torch.enable_grad, "__exit__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(lambda: (x**4).sum())
    monkeypatch.undo()
    assert x.tolist() == [2.0, 2.0, 2.0]
