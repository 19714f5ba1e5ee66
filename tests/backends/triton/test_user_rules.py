"""Rules as users write them: what of Python a GPU kernel understands, and what is said of the rest."""

from __future__ import annotations

import importlib
import linecache
from pathlib import Path
from typing import Any

import pytest
import torch
from rule_runs import DOUBLE, SINGLE, Run, dtypes_of, values

from descend import from_rule
from descend.backends.backend import Declined
from descend.backends.triton.backend import TritonBackend
from descend.ops import abs, exp, log, maximum, minimum, sign, sqrt, where

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402

from descend.backends.triton import library  # noqa: E402

SM_90 = GPUTarget("cuda", 90, 32)
FACTOR = 0.1
POWER: int = 3


def square(x: Any, times: float = 1.0, *, plus: float = 0.25) -> Any:
    """A helper with defaults."""
    return times * x * x + plus


def cube(x: Any) -> Any:
    return square(x, plus=0.0) * x


def with_annotations(param: Any, grad: torch.Tensor, exp_avg: Any, lr: float = 0.1) -> tuple[Any, Any]:
    """A docstring
    on several lines.
    """
    update: Any = lr * grad
    step: Any
    step = update + exp_avg
    return param - step, exp_avg


def with_globals_and_helpers(param, grad, lr):
    return param - lr * (FACTOR * square(grad) + POWER * cube(grad) + square(grad, 2.0))


def with_every_operation(param, grad, exp_avg, lr):
    grad = sign(grad) * sqrt(abs(grad)) + exp(-abs(grad)) + log(abs(grad) + 1)
    grown = where(grad > exp_avg, maximum(grad, 0.5), minimum(exp_avg, 0.3))
    both = where((grad > 0.2) & (exp_avg < 0.4), 1, 0.1)
    return param - lr * grown * both, where(grad == 0, 0, where(grad > 1, 2, 0.1))


def with_powers(param, grad, lr):
    return param - lr * (grad + 1) ** 2 / (param**3 + 2)


def with_literals_alone(param, grad, lr):
    return param - lr * (sqrt(2) + maximum(0.1, 0.2) + sign(3) + where(lr > 0, 0.1, 0.2)) * grad


def made_by(factor: float, helper: Any) -> Any:
    def closure(param, grad, lr):
        return param - lr * factor * helper(grad)

    return closure


USERS = [
    with_annotations,
    with_globals_and_helpers,
    with_every_operation,
    with_powers,
    with_literals_alone,
    made_by(0.3, cube),
]


@pytest.mark.parametrize("dtype", [SINGLE, DOUBLE], ids=str)
@pytest.mark.parametrize("rule", USERS, ids=lambda rule: rule.__name__)
def test_users_rules_in_the_interpreter(rule: Any, dtype: torch.dtype, interpreter: None) -> None:
    run = Run(rule, dtypes_of(rule, dtype, dtype, dtype), [33])
    run.run()
    run.assert_as_expected(1e-6 if dtype == SINGLE else 1e-15)


@pytest.mark.parametrize("dtype", [SINGLE, DOUBLE], ids=str)
@pytest.mark.parametrize("rule", USERS, ids=lambda rule: rule.__name__)
def test_users_rules_compile(rule: Any, dtype: torch.dtype) -> None:
    library.update(rule, len(values(rule)), dtypes_of(rule, dtype, dtype, dtype)).compile_for(SM_90)


def test_closures_with_other_numbers_are_other_kernels(interpreter: None) -> None:
    for factor in (0.3, 0.7):
        run = Run(made_by(factor, square), [SINGLE] * 2, [3])
        run.run()
        run.assert_as_expected(1e-6)


def with_a_mistake(param, grad, lr):
    step = lr * grad
    return param - mistaken(step)


def mistaken(x):
    return x.no_such_thing


def with_a_circle(param, grad, lr):
    return with_a_circle_too(param, grad, lr)


def with_a_circle_too(param, grad, lr):
    return with_a_circle(param, grad, lr) if lr is None else param


def typed_at_a_prompt() -> Any:
    namespace: dict[str, Any] = {}
    exec("def typed(param, grad, lr):\n    return param - lr * grad", namespace)
    return namespace["typed"]


def compiles(rule: Any) -> None:
    kernel = library.update(rule, 1, (SINGLE, SINGLE))
    try:
        kernel.compile_for(SM_90)
    except Exception as error:
        raise Declined(library.explain(rule, error)) from error


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        (with_a_mistake, "no_such_thing"),
        (with_a_circle, "call each other in a circle"),
        (typed_at_a_prompt(), "was not read from a file"),
        (lambda param, grad, lr: param - lr * grad, "not made by def"),
    ],
    ids=["unknown", "circle", "prompt", "lambda"],
)
def test_reason_is_given(rule: Any, reason: str) -> None:
    with pytest.raises(Declined, match=f"the rule .* cannot be compiled for GPUs .*{reason}.*\n.*backend='foreach'"):
        compiles(rule)


def test_line_of_the_mistake_is_named() -> None:
    with pytest.raises(Declined) as caught:
        compiles(with_a_mistake)
    line = mistaken.__code__.co_firstlineno + 1
    assert f"({__file__}, line {line})" in str(caught.value)
    assert linecache.getline(__file__, line).strip() == "return x.no_such_thing"


def test_source_that_was_edited_is_not_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "edited_rule.py"
    file.write_text("def rule(param, grad, lr):\n    return param - lr * 0.1 * grad\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    rule = importlib.import_module("edited_rule").rule
    compiles(rule)
    library._update.cache_clear()
    file.write_text("def rule(param, grad, lr):\n    return param - lr * 0.25 * grad\n")
    with pytest.raises(Declined, match="has been edited"):
        compiles(rule)


def test_declined_rule_is_remembered_and_steps_elsewhere(interpreter: None) -> None:
    rule = typed_at_a_prompt()
    param = torch.ones(3, requires_grad=True)
    assert TritonBackend().why_not(rule, param, None, []) is None
    param.grad = torch.ones(3)
    optimizer = from_rule(rule, "Typed", lr=0.5)([param], backend="triton")
    with pytest.raises(RuntimeError, match="was not read from a file"):
        optimizer.step()
    assert "was not read from a file" in str(TritonBackend().why_not(rule, param, None, []))
    assert torch.equal(param, torch.ones(3))
