"""The augmented Lagrangian of Powell, Hestenes and Rockafellar: penalty, multipliers, and how far from a solution.

Constraints are one vector c. Where ``equal``, c = 0 is asked for, elsewhere c >= 0. The Lagrangian is f - m'c, so that
multipliers m of inequalities are not negative, and m is the derivative of the optimal f with respect to the right-hand
side of c = 0 or c >= 0.

Source: Birgin & Martínez 2014, Practical Augmented Lagrangian Methods, chapter 4,
    https://doi.org/10.1137/1.9781611973365
"""

from __future__ import annotations

import torch
from torch import Tensor

LEAST_PENALTY, MOST_PENALTY = 1e-4, 1e4  # of the first subproblem


def penalty_term(c: Tensor, multipliers: Tensor, penalty: float, equal: Tensor) -> Tensor:
    """What the augmented Lagrangian adds to f, differentiable in c."""
    counts = equal | (penalty * c < multipliers)
    active = c * (penalty / 2 * c - multipliers)
    return torch.where(counts, active, -multipliers * multipliers / (2 * penalty)).sum()


def updated_multipliers(c: Tensor, multipliers: Tensor, penalty: float, equal: Tensor) -> Tensor:
    """First-order multipliers: with them the Lagrangian has the augmented Lagrangian's gradient."""
    moved = multipliers - penalty * c
    return torch.where(equal, moved, moved.clamp(min=0.0))


def violations(c: Tensor, equal: Tensor) -> Tensor:
    """By how much each constraint is violated: the entries of c, 0 where an inequality holds."""
    return torch.where(equal, c, c.clamp(max=0.0))


def complementarity(c: Tensor, multipliers: Tensor, equal: Tensor) -> Tensor:
    """Zero where a constraint holds, its multiplier has the right sign, and one of both is 0."""
    return torch.where(equal, c, torch.minimum(c, multipliers))


def first_penalty(value: float, squared_violation: float) -> float:
    """A penalty with which both parts of the augmented Lagrangian are of similar size.

    Source: Birgin & Martínez 2014, equation (12.1), with narrower limits.
    """
    balanced = 10 * max(1.0, abs(value)) / max(1.0, squared_violation / 2)
    return min(max(balanced, LEAST_PENALTY), MOST_PENALTY)


def largest(vector: Tensor) -> float:
    """The largest absolute entry; 0 for an empty vector."""
    return float(vector.abs().amax()) if vector.numel() else 0.0
