"""Rules as users write them: what of Python a GPU kernel understands, and what is said of the rest."""

from __future__ import annotations

import importlib
import linecache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from rule_runs import DOUBLE, SINGLE, Run, dtypes_of, values

from descend import from_rule
from descend.backends.backend import Declined
from descend.backends.triton.backend import TritonBackend
from descend.ops import abs, exp, log, maximum, minimum, sign, sqrt, where

triton = pytest.importorskip("triton")

from triton import knobs  # noqa: E402
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


def with_a_remainder(param, grad, lr):
    return param - lr * (grad % 0.3)


def with_a_sum_of_comparisons(param, grad, lr):
    few, many = grad > 0.5, grad > 0.1
    return param - lr * (few + many)


def with_a_number_or_another(param, grad, lr):
    return param - (lr or 0.5) * grad


def with_a_sum_over_elements(param, grad, lr):
    return param - lr * grad.sum()


def with_a_choice_of_literals(param, grad, lr):
    return param - (0.1 if lr > 0.5 else 0.2) * grad


def with_joined_comparisons(param, grad, lr):
    return param - (lr if lr > 0.1 and not lr > 0.5 else 2 * lr) * grad


def typed_at_a_prompt() -> Any:
    namespace: dict[str, Any] = {}
    exec("def typed(param, grad, lr):\n    return param - lr * grad", namespace)
    return namespace["typed"]


def compiles(rule: Any, dtype: torch.dtype = SINGLE) -> Any:
    kernel = library.update(rule, 1, (dtype, dtype))
    try:
        return kernel.compile_for(SM_90)
    except Exception as error:
        raise Declined(library.explain(rule, error)) from error


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        (with_a_mistake, "no_such_thing"),
        (with_a_circle, "call each other in a circle"),
        (typed_at_a_prompt(), "was not read from a file"),
        (lambda param, grad, lr: param - lr * grad, "not made by def"),
        (with_a_remainder, "the sign of the first number"),
        (with_a_sum_of_comparisons, "comparisons cannot be added"),
        (with_a_number_or_another, "lr or 0.5: `and` and `or` may only join comparisons"),
        (with_a_sum_over_elements, "one element at a time"),
    ],
    ids=["unknown", "circle", "prompt", "lambda", "remainder", "comparisons", "or", "sum"],
)
def test_reason_is_given(rule: Any, reason: str) -> None:
    with pytest.raises(Declined, match=f"the rule .* cannot be compiled for GPUs .*{reason}.*\n.*backend='foreach'"):
        compiles(rule)


def test_literals_that_would_lose_digits_are_declined_in_float64_alone() -> None:
    compiles(with_a_choice_of_literals)
    with pytest.raises(Declined, match="would be rounded to float32"):
        compiles(with_a_choice_of_literals, DOUBLE)


def test_joined_comparisons_compile(interpreter: None) -> None:
    run = Run(with_joined_comparisons, [SINGLE] * 2, [3])
    run.run()
    run.assert_as_expected(1e-6)
    knobs.runtime.interpret = False
    compiles(with_joined_comparisons)


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


def test_closure_that_was_edited_is_not_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rule = "    def rule(param, grad, lr):\n        return param - lr * factor * 0.1 * grad\n"
    text = f"def make(factor):\n{rule}    return rule\n"
    file = tmp_path / "edited_closure.py"
    file.write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    make = importlib.import_module("edited_closure").make
    compiles(make(2.0))
    file.write_text(text.replace("0.1", "0.25"))
    with pytest.raises(Declined, match="has been edited"):
        compiles(make(2.0))


settings = ModuleType("settings")


def with_a_number_of_a_module(param, grad, lr):
    return param - lr * settings.factor * grad


def with_a_tensor_named_like_a_module(param, grad, settings):
    return param - settings.factor * grad


def with_a_helper_in_a_closure(factor: float) -> Any:
    def helper(x):
        return factor * x

    def rule(param, grad, lr):
        return param - lr * helper(grad)

    return rule


def test_argument_named_like_a_module_is_not_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "factor", 0.25, raising=False)
    with pytest.raises(Declined, match="no attribute 'factor'"):
        compiles(with_a_tensor_named_like_a_module)


def test_kernels_with_other_numbers_are_others_on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    of_module, of_closure = [], []
    for factor in (np.float64(0.25), np.float64(0.75)):
        monkeypatch.setattr(settings, "factor", factor, raising=False)
        library._update.cache_clear()
        of_module.append(compiles(with_a_number_of_a_module))
        of_closure.append(compiles(with_a_helper_in_a_closure(factor)))
    for first, second in (of_module, of_closure):
        assert first.hash != second.hash
        assert first.asm["ptx"] != second.asm["ptx"]


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
