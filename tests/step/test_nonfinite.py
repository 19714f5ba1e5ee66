"""What ``nonfinite`` does with NaN and Inf in a gradient: step, skip or raise, and nothing half done."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import (
    CASES,
    EVERYWHERE,
    ON_GPU,
    Case,
    Twins,
    assert_unmoved,
    device,
    give_grads,
    leaves,
    one_in,
    params_of,
    rounding,
    snapshot,
)

from descend import SGD


@pytest.mark.parametrize(
    ("case", "backend", "first", "bad"), one_in(3, CASES, EVERYWHERE, (True, False), (math.nan, math.inf, -math.inf))
)
def test_skipped_step_moves_nothing(case: Case, backend: str, first: bool, bad: float) -> None:
    params = leaves()
    optimizer = case.ours(params, **case.options, nonfinite="skip", backend=backend)
    if not first:
        give_grads(params, 0)
        optimizer.step()
    before = snapshot(optimizer)
    give_grads(params, 1)
    params[2].grad[3, 2] = bad
    for skipped in (1, 2):
        optimizer.step()
        assert optimizer.skipped_steps == skipped
        if first and device().type != "cpu":  # state is made before the device has decided
            assert all(map(torch.equal, params, before[0]))
        else:
            assert_unmoved(optimizer, before)
            assert not first or not optimizer.state
    give_grads(params, 2)
    optimizer.step()
    assert optimizer.skipped_steps == 2
    plain = case.ours(leaves(), **case.options, backend=backend)
    for seed in (2,) if first else (0, 2):
        give_grads(params_of(plain), seed)
        plain.step()
    allowed = rounding(1e-8)  # NAdam keeps a product in float32
    torch.testing.assert_close(params, params_of(plain), rtol=allowed, atol=allowed)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("backend", ["auto", ON_GPU])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_raised_step_moves_nothing_and_names_the_parameters(case: Case, backend: str, first: bool) -> None:
    names = ["a", "b", "c", "d"]
    params = leaves()
    options = dict(case.options, nonfinite="raise", max_norm=1.0, backend=backend)
    optimizer = case.ours(list(zip(names, params, strict=True)), **options)
    if not first:
        give_grads(params, 0)
        optimizer.step()
    before = snapshot(optimizer)
    give_grads(params, 1)
    params[0].grad.fill_(math.inf)
    params[3].grad[100] = math.nan
    with pytest.raises(FloatingPointError, match=rf"{case.ours.__name__}: NaN or Inf in the gradient of a, d\."):
        optimizer.step()
    assert_unmoved(optimizer, before)
    assert optimizer.skipped_steps == 0


def test_unnamed_parameters_are_named_by_their_place() -> None:
    params = leaves()
    optimizer = SGD([{"params": params[:2]}, {"params": params[2:]}], nonfinite="raise")
    give_grads(params, 0)
    params[3].grad[0] = math.nan
    with pytest.raises(FloatingPointError, match=r"param_groups\[1\]\['params'\]\[1\]"):
        optimizer.step()


def test_nonfinite_step_is_torchs() -> None:
    twins = Twins(CASES[5], nonfinite="step", max_norm=None)

    def grads(params: Any, seed: int) -> None:
        give_grads(params, seed)
        params[2].grad[1, 1] = math.nan

    twins.step(0)
    twins.step(1, grads)
    twins.step(2)
    twins.assert_equal()
