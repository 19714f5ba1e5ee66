"""Options of every optimizer: one value, checked, copied and documented in one place."""

from __future__ import annotations

import dataclasses
import pickle
from typing import Any, get_type_hints

import pytest
import torch

import descend
from descend import AdamW, FirstOrder, from_rule
from descend.core.optimizer import MethodOptimizer
from descend.core.options import Options, StepOptions

FIELDS = [field.name for field in dataclasses.fields(StepOptions)]


def test_every_option_has_one_type() -> None:
    value, given, attributes = get_type_hints(StepOptions), get_type_hints(Options), get_type_hints(MethodOptimizer)
    assert given.keys() == {*FIELDS, "groups"}
    for name in FIELDS:
        assert value[name] == given[name] == attributes[name]


def test_every_option_is_documented_once_in_every_class() -> None:
    kinds = [kind for kind in map(vars(descend.public).get, descend.__all__) if isinstance(kind, type)]
    kinds = [kind for kind in kinds if issubclass(kind, FirstOrder)]
    assert len(kinds) >= 15
    for kind in [*kinds, from_rule(lambda param, grad, lr: param - lr * grad, "Own")]:
        for name in (*FIELDS, "groups"):
            assert (kind.__doc__ or "").count(f"\n    {name}: ") == 1, f"{name} in {kind.__name__}"


def test_options_are_not_in_the_groups() -> None:
    assert not AdamW([torch.zeros(1)]).defaults.keys() & {*FIELDS, "groups"}


def test_docstring_of_an_own_optimizer_says_what_its_rule_and_its_numbers_are() -> None:
    def halve(param: Any, grad: Any, lr: Any, factor: Any = 0.5) -> Any:
        """Shrinks."""
        return factor * param

    documentation = from_rule(halve, "Halve", lr=0.1).__doc__ or ""
    assert documentation.startswith("Shrinks.\n\nArgs:\n")
    assert "    factor: a number of the rule. Default: 0.5.\n" in documentation


def test_options_compare_and_pickle() -> None:
    options = StepOptions(max_norm=1.0, sparse="touched")
    assert pickle.loads(pickle.dumps(options)) == options != StepOptions()
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.max_norm = 2.0  # type: ignore[misc]


def test_attributes_are_the_options() -> None:
    optimizer = AdamW([torch.zeros(1)], max_norm=1.0)
    optimizer.max_norm = 2.0
    assert optimizer.options == StepOptions(max_norm=2.0)


def test_state_of_pickles_made_before_options_were_one_value() -> None:
    optimizer = AdamW([torch.zeros(1)], max_norm=1.0, nonfinite="skip")
    state = optimizer.__getstate__()
    assert state["max_norm"] == 1.0
    again = AdamW.__new__(AdamW)
    again.__setstate__(state)
    assert again.options == optimizer.options


def test_state_brings_its_options_to_an_optimizer_that_has_others() -> None:
    optimizer, other = AdamW([torch.zeros(1)], max_norm=1.0), AdamW([torch.zeros(1)], max_norm=2.0, nonfinite="skip")
    optimizer.__setstate__(other.__getstate__())
    assert optimizer.options == other.options
    optimizer.load_state_dict(AdamW([torch.zeros(1)]).state_dict())
    assert optimizer.options == other.options
