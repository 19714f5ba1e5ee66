"""What torch gets wrong, for every optimizer that it could happen to: see docs/differences.md."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from cases import assert_same_bits, give_grads, leaves, params_of, state_of
from programs import FIRST_ORDER, OURS, TWINS, advance, build
from torch import Tensor

FUSED = [name for name in FIRST_ORDER if name in TWINS and "fused" in inspect.signature(TWINS[name][1]).parameters]
AMSGRAD = [name for name in FIRST_ORDER if "amsgrad" in inspect.signature(FIRST_ORDER[name]).parameters]


def arguments_of(name: str) -> dict[str, Any]:
    return {key: value.default for key, value in inspect.signature(OURS[name]).parameters.items()}


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda values: values.t().contiguous().t(),
    "strided": lambda values: torch.stack([values, torch.full_like(values, 1e9)], dim=-1)[..., 0],
    "expanded": lambda values: values[:1, :1].expand(values.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", FUSED)
def test_fused_heeds_strides(name: str, layout: str) -> None:
    results = []
    for kind, flags in zip(TWINS[name], (dict(fused=True), dict(foreach=False)), strict=True):
        optimizer = build(kind, leaves([(5, 4)]), **flags)
        (param,) = params_of(optimizer)
        for seed in range(3):
            give_grads([param], seed)
            assert param.grad is not None
            param.grad = LAYOUTS[layout](param.grad)
            optimizer.step()
        results.append(param.detach())
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)  # float64, three steps


@pytest.mark.parametrize("name", AMSGRAD)
def test_amsgrad_turned_on_in_mid_run_starts_with_a_maximum_of_zero(name: str) -> None:
    optimizer = build(FIRST_ORDER[name], leaves([(3, 2)]))
    (param,) = params_of(optimizer)
    advance(optimizer, 0)
    optimizer.param_groups[0]["amsgrad"] = True
    advance(optimizer, 1)
    state = optimizer.state[param]
    assert torch.equal(state["max_exp_avg_sq"], state["exp_avg_sq"])
    theirs = build(TWINS[name][1], leaves([(3, 2)]), foreach=False)
    advance(theirs, 0)
    theirs.param_groups[0]["amsgrad"] = True
    with pytest.raises(KeyError):
        advance(theirs, 1)


@pytest.mark.parametrize("name", OURS)
def test_loaded_state_is_not_shared(name: str) -> None:
    source, target = (build(OURS[name], leaves([(3, 2), (4, 1)])) for _ in range(2))
    advance(source, 0)
    target.load_state_dict(source.state_dict())
    before = copy.deepcopy(state_of(source))
    for seed in range(1, 4):
        advance(target, seed)
    target.param_groups[0]["lr"] = 77.0
    after = state_of(source)
    if name in FIRST_ORDER:
        assert_same_bits(after, before)
    assert str(after) == str(before)
    assert source.param_groups[0].get("lr") != 77.0


@pytest.mark.parametrize("name", FIRST_ORDER)
def test_deepcopy_keeps_what_is_not_in_the_groups(name: str) -> None:
    options = dict(max_norm=0.5, nonfinite="skip", backend="eager", state_dtype=torch.float64)
    optimizer = build(FIRST_ORDER[name], leaves([(3, 2)]), **options)
    advance(optimizer, 0)
    twin = copy.deepcopy(optimizer)
    assert {key: getattr(twin, key) for key in options} == options
    advance(optimizer, 1)
    advance(twin, 1)
    assert torch.equal(*params_of(optimizer), *params_of(twin))


@pytest.mark.parametrize("name", FIRST_ORDER)
def test_float16_with_default_options_stays_finite(name: str) -> None:
    param = torch.linspace(-1, 1, 8).view(4, 2).half().requires_grad_()
    options = dict(d0=1e-2) if name == "Prodigy" else {}  # float16 rounds steps of 1e-6 away, and with them progress
    optimizer = build(FIRST_ORDER[name], [param], **options)
    before = param.detach().clone()
    for grad in (1.0, 0.0, 1e-4, 1.0):  # ADOPT's first step moves nothing
        param.grad = torch.full_like(param, grad)
        param.grad[0] = 0.0
        optimizer.step()
    assert param.isfinite().all()
    assert not torch.equal(param, before)
    assert {value.dtype for value in optimizer.state[param].values() if isinstance(value, Tensor)} <= {torch.float32}


@pytest.mark.parametrize("name", [name for name in FIRST_ORDER if "betas" in arguments_of(name)])
def test_averages_of_bfloat16_decay_with_wider_state(name: str) -> None:
    param = torch.ones(4).bfloat16().requires_grad_()
    optimizer = build(FIRST_ORDER[name], [param], state_dtype=torch.float32)
    averages = []
    for step in range(20):
        param.grad = torch.full_like(param, 1.0 if step < 2 else 0.0)
        optimizer.step()
        state = optimizer.state[param]
        if step > 1:  # ADOPT averages from its second step on, and Adan also what the gradient's change adds
            averages.append({key: float(state[key][0]) for key in ("exp_avg", "exp_avg_sq") if key in state})
    for key in averages[0]:
        values = [average[key] for average in averages]
        assert all(later < earlier for earlier, later in pairwise(values)), key


@pytest.mark.parametrize("name", OURS)
def test_what_the_constructor_refuses_a_group_refuses_too(name: str) -> None:
    refused = 0
    for key, default in arguments_of(name).items():
        if not isinstance(default, int | float) or isinstance(default, bool):
            continue
        try:
            OURS[name](leaves([(3, 2)]), **{key: -1})
        except ValueError as error:
            if key not in OURS[name](leaves([(3, 2)])).param_groups[0]:
                continue  # an option of the whole optimizer
            refused += 1
            with pytest.raises(ValueError, match=str(error).split("(")[0].split(",")[0].strip()[:20]):
                OURS[name]([{"params": leaves([(3, 2)]), key: -1}])
            optimizer = OURS[name](leaves([(3, 2)]))
            with pytest.raises(ValueError, match=str(error).split("(")[0].split(",")[0].strip()[:20]):
                optimizer.add_param_group({"params": leaves([(4, 1)]), key: -1})
            assert len(optimizer.param_groups) == 1
    assert refused
