"""Newton's step on the KKT conditions against the solution of the whole linear system."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from descend.second_order.mathematics.kkt import kkt_step


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def positive(n: int) -> Tensor:
    factor = random(n, n, seed=1)
    return factor @ factor.T + torch.eye(n)


@pytest.mark.parametrize(("n", "m"), [(1, 0), (1, 1), (4, 2), (5, 5), (6, 0)])
def test_step_solves_the_whole_system(n: int, m: int) -> None:
    hessian, jacobian, grad, c = positive(n), random(m, n, seed=2), random(n, seed=3), random(m, seed=4)
    step = kkt_step(hessian, jacobian, grad, c, torch.ones(m).bool(), torch.ones(n).bool())
    system = torch.cat([torch.cat([hessian, -jacobian.T], 1), torch.cat([jacobian, torch.zeros(m, m)], 1)])
    expected = torch.linalg.solve(system, torch.cat([-grad, -c]))
    assert torch.allclose(step.step, expected[:n], rtol=1e-9, atol=1e-9)
    assert torch.allclose(step.multipliers, expected[n:], rtol=1e-9, atol=1e-9)
    assert step.is_minimum


def test_inactive_constraints_and_fixed_variables_take_no_part() -> None:
    hessian, jacobian, grad, c = positive(5), random(3, 5, seed=2), random(5, seed=3), random(3, seed=4)
    active, free = torch.tensor([True, False, True]), torch.tensor([True, True, False, True, True])
    step = kkt_step(hessian, jacobian, grad, c, active, free)
    inner = kkt_step(
        hessian[free][:, free], jacobian[active][:, free], grad[free], c[active], torch.ones(2).bool(), free[free]
    )
    assert step.step[2] == 0
    assert step.multipliers[1] == 0
    assert torch.allclose(step.step[free], inner.step)
    assert torch.allclose(step.multipliers[active], inner.multipliers)


def test_held_variables_take_the_others_with_them() -> None:
    hessian, jacobian, grad, c = positive(5), random(2, 5, seed=2), random(5, seed=3), random(2, seed=4)
    free, held = torch.tensor([True, True, False, True, True]), random(5, seed=5)
    active = torch.ones(2).bool()
    step = kkt_step(hessian, jacobian, grad, c, active, free, held)
    assert step.step[2] == held[2]
    assert torch.allclose(jacobian @ step.step, -c)
    slope = grad + hessian @ step.step - jacobian.T @ step.multipliers
    assert torch.allclose(slope[free], torch.zeros(4).double())


def test_dependent_constraints_share_the_shortest_multipliers() -> None:
    hessian, row, grad = positive(4), random(1, 4, seed=2), random(4, seed=3)
    one = kkt_step(hessian, row, grad, random(1), torch.ones(1).bool(), torch.ones(4).bool())
    two = kkt_step(hessian, row.repeat(2, 1), grad, random(1).repeat(2), torch.ones(2).bool(), torch.ones(4).bool())
    assert torch.allclose(one.step, two.step)
    assert torch.allclose(two.multipliers, one.multipliers.repeat(2) / 2)


def test_negative_curvature_is_reversed_and_told() -> None:
    hessian, grad = torch.diag(torch.tensor([2.0, -4.0], dtype=torch.float64)), torch.tensor([1.0, 1.0]).double()
    step = kkt_step(hessian, torch.zeros(0, 2).double(), grad, torch.zeros(0).double(), torch.zeros(0).bool(), grad > 0)
    assert step.step.tolist() == [-0.5, -0.25]
    assert not step.is_minimum


def test_negative_curvature_across_the_constraints_does_not_matter() -> None:
    hessian = torch.diag(torch.tensor([2.0, -4.0], dtype=torch.float64))
    jacobian, c = torch.tensor([[0.0, 1.0]]).double(), torch.tensor([0.5]).double()
    step = kkt_step(hessian, jacobian, torch.ones(2).double(), c, torch.ones(1).bool(), torch.ones(2).bool())
    assert step.step.tolist() == [-0.5, -0.5]
    assert step.multipliers.tolist() == [3.0]  # g + Hs along the second variable
    assert step.is_minimum
