"""Optimizers with one state for all parameters: what they learned belongs to an order of them."""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from descend import LBFGS, LeastSquares, Newton

KINDS = [
    (LBFGS, dict(max_iter=3, line_search_fn="strong_wolfe")),
    (LBFGS, dict(max_iter=3, line_search_fn="hager_zhang")),
    (Newton, dict(max_iter=1, solver="cg")),
    (LeastSquares, dict(max_iter=1)),
]
every_kind = pytest.mark.parametrize(
    ("kind", "options"), KINDS, ids=["torch", "hager_zhang", "newton", "least squares"]
)


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
    ("abc", "acb", {}, "order of the parameters: expected 'c' in place 1, .* has 'b'. Give the .* in that order.$"),
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
        assert "".join(optimizer.param_groups[0].get("param_names", source)) in (source, target)
        assert ("param_names" in optimizer.param_groups[0]) is not (source + target).isupper()
        step(optimizer)
    else:
        with pytest.raises(ValueError, match=message) as caught:
            optimizer.load_state_dict(saved, **choices)
        assert kind.__name__ in str(caught.value)
        assert not optimizer.state


@every_kind
def test_current_hyperparameters_stay(kind: Any, options: dict[str, Any]) -> None:
    tolerance = "tol" if kind is LeastSquares else "tolerance_grad"
    saved = made(kind, "ab", steps=1, **{**options, tolerance: 0.5}).state_dict()
    optimizer = made(kind, "ab", **{**options, tolerance: 0.25})
    optimizer.load_state_dict(saved, hyperparameters="current")
    assert optimizer.param_groups[0][tolerance] == 0.25
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0][tolerance] == 0.5


# What is damaged, how, and what is said; None where it is no damage.
TORCHS, LEARNING = dict(line_search_fn="strong_wolfe"), dict(line_search_fn="hager_zhang")
BOUNDED = dict(line_search_fn="hager_zhang", bounds=(-9.0, 9.0))
DAMAGES: list[tuple[dict[str, Any], Callable[[dict[str, Any]], Any], str | None]] = [
    (TORCHS, lambda d: [d.pop(name) for name in ("ro", "prev_flat_grad")], "loaded state lacks prev_flat_grad, ro."),
    (TORCHS, lambda d: d.update(al=None), "loaded al must be a list, got NoneType."),
    (TORCHS, lambda d: d.update(old_dirs=3), "loaded old_dirs must be a list, got int."),
    (TORCHS, lambda d: d.update(ro=["x"] * len(d["ro"])), "loaded ro must be a number, got 'x'."),
    (TORCHS, lambda d: d.update(t=True), "loaded t must be a number, got True."),
    (TORCHS, lambda d: d.update(t=10**400), "loaded t must be a number, got 1000"),
    (TORCHS, lambda d: d.update(t=sys.float_info.max), None),
    (TORCHS, lambda d: d.update(n_iter="1"), "loaded n_iter must be a number >= 0, got '1'."),
    (
        TORCHS,
        lambda d: d.update(d=0.5),
        "loaded d has shape float, the parameters together have 4 entries. Is it the state of other parameters?",
    ),
    (LEARNING, lambda d: d.update(learned=3), "loaded learned must be a dictionary of tensors."),
    (LEARNING, lambda d: d["learned"].pop("gram"), "loaded learned must be a dictionary of tensors."),
    (LEARNING, lambda d: d["learned"].update(steps=torch.zeros(())), "loaded steps has shape (), expected (0, 4)."),
    (LEARNING, lambda d: d["learned"].update(gram=torch.zeros(2)), "loaded gram has shape (2,), expected (100, 100)."),
    (LEARNING, lambda d: d["learned"].update(count=-1), "loaded count must be an integer >= 0, got -1."),
    (LEARNING, lambda d: d["learned"].update(count=2**63), f"loaded count must be an integer >= 0, got {2**63}."),
    (LEARNING, lambda d: d["learned"].update(is_new=None), "loaded is_new must be an integer >= 0, got None."),
    (LEARNING, lambda d: d["learned"].update(count=2**63 - 1), None),
    (LEARNING, lambda d: d["learned"].update(count=0, is_new=False), None),
    (BOUNDED, lambda d: None, None),
    (BOUNDED, lambda d: d["learned"].update(changes=torch.zeros(1, 4)), "loaded changes has shape (1, 4), expected"),
]


@pytest.mark.parametrize(("options", "damage", "message"), DAMAGES)
def test_damage_of_what_was_learned_is_named(
    options: dict[str, Any], damage: Callable[[dict[str, Any]], Any], message: str | None
) -> None:
    saved = copy.deepcopy(made(LBFGS, "ab", steps=2, max_iter=3, **options).state_dict())
    damage(saved["state"][0])
    optimizer = made(LBFGS, "ab", **options)
    if message is None:
        optimizer.load_state_dict(saved)
    else:
        with pytest.raises(ValueError, match=re.escape(f"LBFGS: the {message}")):
            optimizer.load_state_dict(saved)
        assert not optimizer.state


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("max_iter", -1, "Invalid max_iter value: -1 (LBFGS: "),
        ("max_iter", 10**400, "LBFGS: the options of group 0 of the loaded state dict cannot be used: int too large"),
        ("bounds", torch.ones(2), "LBFGS: the options of group 0 of the loaded state dict cannot be used: Boolean"),
    ],
    ids=str,
)
def test_damage_of_options_is_named(name: str, value: Any, message: str) -> None:
    saved = made(LBFGS, "ab", **LEARNING).state_dict()
    saved["param_groups"][0][name] = value
    optimizer = made(LBFGS, "ab", lr=0.5, **LEARNING)
    with pytest.raises(ValueError, match=re.escape(message)):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize(
    ("saved_dtype", "dtype", "expected"),
    [
        (torch.float8_e4m3fn, torch.float64, torch.float64),
        (torch.bfloat16, torch.float64, torch.float64),
        (torch.bfloat16, torch.float16, torch.float32),
        (torch.float64, torch.float32, torch.float64),
    ],
    ids=str,
)
def test_vectors_are_widened_and_the_rest_is_kept(
    saved_dtype: torch.dtype, dtype: torch.dtype, expected: torch.dtype
) -> None:
    saved = copy.deepcopy(made(LBFGS, "ab", steps=1).state_dict())
    saved["state"][0].update(d=torch.ones(4, dtype=saved_dtype), func_evals=torch.tensor(3))
    saved["state"]["global"] = {"x": 1}
    params = [torch.ones(2, dtype=dtype, requires_grad=True) for _ in "ab"]
    optimizer = LBFGS(params)
    optimizer.load_state_dict(saved)
    state = optimizer.state[params[0]]
    assert (state["d"].dtype, state["d"].tolist()) == (expected, [1.0] * 4)
    assert (state["func_evals"].dtype, int(state["func_evals"])) == (torch.int64, 3)
    assert optimizer.state["global"] == {"x": 1}
    assert optimizer.state[params[1]] == {}


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
    message = (
        "belongs to an order of the parameters"
        if named
        else f"{kind.__name__}: all state belongs to the first parameter, .* for 'a.weight'. "
        "Is it another optimizer's, or of parameters in another order.$"
    )
    with pytest.raises(ValueError, match=message):
        set_optimizer_state_dict(models[2], optimizers[2], copy.deepcopy(taken))
