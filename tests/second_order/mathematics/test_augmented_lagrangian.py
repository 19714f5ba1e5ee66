"""The augmented Lagrangian's formulas against textbook versions and autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from descend.second_order.mathematics.augmented_lagrangian import (
    complementarity,
    first_penalty,
    largest,
    penalty_term,
    updated_multipliers,
    violations,
)

C = torch.tensor([0.5, -0.25, 0.5, -0.25, 3.0, 0.0, 0.0], dtype=torch.float64)
MULTIPLIERS = torch.tensor([2.0, -1.0, 2.0, 0.5, 1.0, 0.0, 3.0], dtype=torch.float64)
EQUAL = torch.tensor([True, True, False, False, False, False, False])


def textbook(c: Tensor, multipliers: Tensor, penalty: float) -> float:
    """Term by term: -m c + r c^2 / 2, and (max(0, m - r c)^2 - m^2) / 2r."""
    total = 0.0
    for value, multiplier, equal in zip(c.tolist(), multipliers.tolist(), EQUAL.tolist(), strict=True):
        if equal:
            total += -multiplier * value + penalty * value**2 / 2
        else:
            total += (max(0.0, multiplier - penalty * value) ** 2 - multiplier**2) / (2 * penalty)
    return total


@pytest.mark.parametrize("penalty", [0.1, 1.0, 10.0, 1e6])
def test_penalty_is_the_textbooks(penalty: float) -> None:
    term = penalty_term(C, MULTIPLIERS, penalty, EQUAL)
    assert term.item() == pytest.approx(textbook(C, MULTIPLIERS, penalty), rel=1e-12)


@pytest.mark.parametrize("penalty", [0.1, 1.0, 10.0])
def test_multipliers_are_the_penaltys_slope(penalty: float) -> None:
    c = C.clone().requires_grad_()
    (slope,) = torch.autograd.grad(penalty_term(c, MULTIPLIERS, penalty, EQUAL), c)
    assert torch.allclose(slope, -updated_multipliers(C, MULTIPLIERS, penalty, EQUAL), rtol=1e-14, atol=0)


def test_multipliers_of_inequalities_are_not_negative() -> None:
    assert bool((updated_multipliers(C, MULTIPLIERS, 10.0, EQUAL)[~EQUAL] >= 0).all())


def test_penalty_keeps_digits_where_it_cancels() -> None:
    # With (max(0, m - r c)^2 - m^2) / 2r the term would be lost in the rounding of m^2.
    c, multipliers = torch.tensor([1e-12], dtype=torch.float64), torch.tensor([1e6], dtype=torch.float64)
    term = penalty_term(c, multipliers, 1.0, torch.tensor([False])).item()
    assert term == pytest.approx(-1e-6, rel=1e-12)


def test_violations_and_complementarity() -> None:
    assert violations(C, EQUAL).tolist() == [0.5, -0.25, 0, -0.25, 0, 0, 0]
    assert complementarity(C, MULTIPLIERS, EQUAL).tolist() == [0.5, -0.25, 0.5, -0.25, 1, 0, 0]


def test_first_penalty_balances_both_parts_within_limits() -> None:
    assert first_penalty(3.0, 0.0) == 30.0
    assert first_penalty(-3.0, 20.0) == 3.0
    assert first_penalty(0.0, 1e30) == 1e-4
    assert first_penalty(1e30, 0.0) == 1e4


def test_largest_of_nothing_is_zero() -> None:
    assert largest(torch.zeros(0)) == 0.0
    assert largest(C) == 3.0
