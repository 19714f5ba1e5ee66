"""Optimizers with one state for all parameters: what they learned belongs to an order of them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from descend import LBFGS, Newton

KINDS = [
    (LBFGS, dict(max_iter=3, line_search_fn="strong_wolfe")),
    (LBFGS, dict(max_iter=3, line_search_fn="hager_zhang")),
    (Newton, dict(max_iter=1, solver="cg")),
]
every_kind = pytest.mark.parametrize(("kind", "options"), KINDS, ids=["torch", "hager_zhang", "newton"])


def made(kind: Any, names: str, steps: int = 0, **options: Any) -> Any:
    """Parameters a, b, ... of two numbers each, given with their names, or without if these are in capitals."""
    params = [torch.full((2,), float(ord(name) % 7), dtype=torch.float64, requires_grad=True) for name in names]
    optimizer = kind(params if names.isupper() else list(zip(names, params, strict=True)), **options)
    for _ in range(steps):
        step(optimizer)
    return optimizer


def step(optimizer: Any) -> list[Tensor]:
    params = optimizer.param_groups[0]["params"]
    optimizer.step(lambda: sum(((param - i) ** 2 + 0.1 * param**4).sum() for i, param in enumerate(params)))
    return [param.detach().clone() for param in params]


LOADS = [
    ("abc", "abc", {}, None),
    ("abc", "abc", dict(match="name"), None),
    ("abc", "acb", dict(match="order"), None),
    ("ABC", "abc", {}, None),
    ("abc", "ABC", {}, None),
    ("abc", "acb", {}, "belongs to an order of the parameters: expected 'c' in place 1, .* has 'b'"),
    ("abc", "abd", {}, "the names differ: expected 'd'"),
    ("abc", "ab", dict(match="order"), "doesn't match the size"),
    ("ABC", "abc", dict(match="name"), "match='name' needs a name"),
    ("abc", "abc", dict(match="best"), "match must be one of"),
    ("abc", "abc", dict(hyperparameters="no"), "hyperparameters must be one of"),
]


@every_kind
@pytest.mark.parametrize(("source", "target", "choices", "message"), LOADS)
def test_order_is_that_of_the_names(
    kind: Any, options: dict[str, Any], source: str, target: str, choices: dict[str, str], message: str | None
) -> None:
    saved = made(kind, source, steps=2, **options).state_dict()
    optimizer = made(kind, target, **options)
    if message is None:
        assert optimizer.load_state_dict(saved, **choices) is None
        assert optimizer.state_dict()["state"][0]["func_evals"] == saved["state"][0]["func_evals"]
        step(optimizer)
    else:
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(saved, **choices)
        assert not optimizer.state


@every_kind
def test_current_hyperparameters_stay(kind: Any, options: dict[str, Any]) -> None:
    saved = made(kind, "ab", steps=1, **{**options, "tolerance_grad": 0.5}).state_dict()
    optimizer = made(kind, "ab", **{**options, "tolerance_grad": 0.25})
    optimizer.load_state_dict(saved, hyperparameters="current")
    assert optimizer.param_groups[0]["tolerance_grad"] == 0.25
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["tolerance_grad"] == 0.5


def model_of(names: str) -> torch.nn.Module:
    torch.manual_seed(0)
    layers = {name: torch.nn.Linear(1, 1, bias=False).double() for name in sorted(names)}
    return torch.nn.ModuleDict({name: layers[name] for name in names})


@pytest.mark.parametrize("named", [True, False])
@every_kind
def test_distributed_state_of_another_order_is_refused(kind: Any, options: dict[str, Any], named: bool) -> None:
    models = [model_of(names) for names in ("ab", "ab", "ba")]
    optimizers = [kind(model if named else model.parameters(), **options) for model in models]
    optimizers[0].init_state()
    step(optimizers[0])
    taken = get_optimizer_state_dict(models[0], optimizers[0])
    set_optimizer_state_dict(models[1], optimizers[1], copy.deepcopy(taken))
    message = "belongs to an order of the parameters" if named else "all state belongs to the first parameter"
    with pytest.raises(ValueError, match=message):
        set_optimizer_state_dict(models[2], optimizers[2], copy.deepcopy(taken))
