"""A method that options have wrapped describes what the method inside describes, and what the options add."""

from __future__ import annotations

from types import FunctionType

import pytest
import torch

from descend import AdamW, Lion, Prodigy
from descend.core.method import Method
from descend.core.wrapping import Wrapped, wrapped


def test_everything_that_describes_is_asked_of_the_method_inside() -> None:
    describing = {name for name, each in vars(Method).items() if isinstance(each, FunctionType | property)}
    assert describing - vars(Wrapped).keys() == set()


def test_what_a_class_says_is_said_by_the_wrapped_method_too() -> None:
    for kind in (AdamW, Lion, Prodigy):
        optimizer = kind([torch.zeros(1)], ema=0.5)
        method = wrapped(optimizer)
        assert type(method).__name__ == kind.__name__
        assert method.kind is kind
        said = [name for name, annotation in Method.__annotations__.items() if "ClassVar" in annotation]
        assert len(said) > 10
        for name in said:
            expected = ("ema",) if name == "optional_state" else getattr(optimizer, name, None)
            assert getattr(method, name, None) == expected, name


def test_without_options_that_add_something_a_method_is_itself() -> None:
    optimizer = AdamW([torch.zeros(1)], max_norm=1.0)
    assert optimizer.method_of(optimizer.param_groups[0]) is optimizer


def test_the_wrapped_method_is_the_same_object_while_options_are() -> None:
    optimizer = AdamW([torch.zeros(1)], ema=0.5)
    (group,) = optimizer.param_groups
    first = optimizer.method_of(group)
    assert optimizer.method_of(group) is first
    assert optimizer.methods()[0][0] is first
    optimizer.ema = 0.75
    assert optimizer.method_of(group) is not first
    assert optimizer.method_of(group).rule_for(group) is first.rule_for(group)  # which does not depend on the number


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.complex64])
def test_averages_have_all_digits_of_their_parameters(dtype: torch.dtype) -> None:
    param = torch.ones(3, dtype=dtype)
    optimizer = AdamW([param], ema=0.5, state_dtype=None if dtype.is_complex else torch.bfloat16)
    (group,) = optimizer.param_groups
    method = optimizer.method_of(group)
    format = method.format_of_state("ema", param, group)
    assert format == torch.promote_types(dtype, torch.float32)
    spec = method.state_spec("ema", param, group, format)
    assert spec.shape == param.shape
    assert spec.start is param
    if not dtype.is_complex:
        assert method.format_of_state("exp_avg", param, group) == torch.bfloat16
