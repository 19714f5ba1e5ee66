"""Curves fitted to made-up data with bounds, of which some are active at the solution."""

from __future__ import annotations

from collections.abc import Callable
from math import inf, pi

import torch
from torch import Tensor

from problems.fit import Fit, bounded_fit
from problems.models import rand, randn
from problems.more import ramp
from problems.nist import peak
from problems.problem import Function, count, data

Curve = Callable[[Tensor, Tensor], Tensor]
"""Maps parameters and abscissae to ordinates."""


def decay(p: Tensor, t: Tensor) -> Tensor:
    return p[0] * torch.exp(-p[1] * t) + p[2]


def two_decays(p: Tensor, t: Tensor) -> Tensor:
    return p[0] * torch.exp(-p[1] * t) + p[2] * torch.exp(-p[3] * t) + p[4]


def michaelis(p: Tensor, t: Tensor) -> Tensor:
    return p[0] * t / (p[1] + t)


def hill(p: Tensor, t: Tensor) -> Tensor:
    """Dose and response: lowest, highest, logarithm of the half dose, steepness."""
    return p[0] + (p[1] - p[0]) * torch.sigmoid(p[3] * (t.log() - p[2]))


def growth(p: Tensor, t: Tensor) -> Tensor:
    return p[0] / (1 + torch.exp(-p[1] * (t - p[2])))


def oscillation(p: Tensor, t: Tensor) -> Tensor:
    return p[0] * torch.exp(-p[1] * t) * torch.cos(p[2] * t + p[3]) + p[4]


def arrhenius(p: Tensor, t: Tensor) -> Tensor:
    """Logarithm of a rate; prefactor and energy differ by many orders of magnitude."""
    return p[0].log() - p[1] / (8.314 * t)


def peaks(p: Tensor, t: Tensor) -> Tensor:
    """Gaussian peaks on a sloping line."""
    heights, centres, widths = p[2:].reshape(-1, 3).T
    line = p[0] + p[1] * t
    return line + peak(heights, centres, widths, t[:, None]).sum(1)


def lines(p: Tensor, t: Tensor) -> Tensor:
    """Lorentz lines."""
    heights, centres, widths = p.reshape(-1, 3).T
    terms: Tensor = heights / (1 + ((t[:, None] - centres) / widths) ** 2)
    return terms.sum(1)


def polynomial(p: Tensor, t: Tensor) -> Tensor:
    return t[:, None] ** count(p, first=0) @ p


def predators(p: Tensor, t: Tensor) -> Tensor:
    """Lotka & Volterra's equations by Runge & Kutta's fourth-order steps; the prey, then the predators."""

    def rates(state: Tensor) -> Tensor:
        prey, hunters = state
        return torch.stack((p[0] * prey - p[1] * prey * hunters, p[3] * prey * hunters - p[2] * hunters))

    state, step, states = t.new_tensor([1.0, 0.5]), 0.25, []
    for _ in range(len(t)):
        first = rates(state)
        second = rates(state + step / 2 * first)
        third = rates(state + step / 2 * second)
        fourth = rates(state + step * third)
        state = state + step / 6 * (first + 2 * second + 2 * third + fourth)
        states.append(state)
    return torch.stack(states).T.reshape(-1)


def fitted(curve: Curve, truth: Tensor, t: Tensor, noise: float, seed: int) -> Function:
    """Residuals of a curve against its own values at the truth with normal errors."""
    y = curve(truth, t)
    y = y + noise * randn(seed, len(y))
    return lambda p: curve(p, t.to(p)) - y.to(p)


def fits() -> list[Fit]:
    time = ramp(40) / 10
    doses = torch.logspace(-2, 2, 24, dtype=torch.float64)
    axis = torch.linspace(0, 10, 120, dtype=torch.float64)
    warm = torch.linspace(300, 500, 30, dtype=torch.float64)
    made = (
        ("decay", decay, (2, 1, 0), time, 0.02, (1, 0.1, 0.5), 0, inf),
        ("decay_capped", decay, (2, 1, 0.3), time, 0.02, (1, 0.1, 0.5), (0, 0, 0), (1.5, 5, 1)),
        ("two_decays", two_decays, (1, 0.4, 2, 3, 0), time, 0.01, (1, 1, 1, 2, 0.1), 0, (10, 2, 10, 2.5, 1)),
        ("two_decays_far", two_decays, (1, 0.4, 2, 3, 0), time, 0.01, (9, 1.9, 0.1, 0, 1), 0, (10, 2, 10, 20, 1)),
        ("michaelis", michaelis, (3, 0.8), doses, 0.05, (1, 10), 0, (10, 20)),
        ("michaelis_cut", michaelis, (3, 0.8), doses, 0.05, (1, 0.1), (0, 0), (10, 0.5)),
        ("hill", hill, (0, 5, 0.5, 1.5), doses, 0.1, (1, 1, -3, 4), (0, 0, -5, 0.1), (2, 10, 5, 4)),
        ("hill_steep", hill, (0.2, 5, 0.5, 6), doses, 0.1, (0, 9, 3, 0.2), (0, 0, -5, 0.1), (2, 10, 5, 4)),
        ("growth", growth, (10, 2, 2), time, 0.1, (1, 0.1, 0), 0, inf),
        ("growth_capped", growth, (10, 2, 2), time, 0.1, (1, 0.1, 0), 0, (9, 10, 4)),
        (
            "oscillation", oscillation, (2, 0.3, 4, 0.5, 0), time, 0.05,
            (1, 1, 3.5, 1, 0), (0, 0, 1, 0, 0), (9, 9, 9, pi, 1),
        ),
        (
            "oscillation_cut", oscillation, (2, 0.3, 4, -0.2, 0), time, 0.05,
            (1, 1, 3.5, 1, 0), (0, 0, 1, 0, 0), (9, 9, 9, pi, 1),
        ),
        ("arrhenius", arrhenius, (1e10, 5e4), warm, 0.05, (1e8, 2e4), (1, 0), (1e14, 2e5)),
        ("arrhenius_cut", arrhenius, (1e10, 5e4), warm, 0.05, (1e8, 2e4), (1, 0), (5e9, 2e5)),
        (
            "peaks", peaks, (1, 0.1, 3, 3, 0.7, 2, 6, 1.0), axis, 0.1,
            (0, 0, 1, 2, 1, 1, 7, 1), (0, -1, 0, 0, 0.1, 0, 5, 0.1), (5, 1, 9, 5, 3, 9, 9, 3),
        ),
        (
            "peaks_cut", peaks, (1, 0.1, 3, 3, 0.7, 2, 4.5, 1.0), axis, 0.1,
            (0, 0, 1, 2, 1, 1, 7, 1), (0, -1, 0, 0, 0.1, 0, 5, 0.1), (5, 1, 9, 5, 0.6, 9, 9, 3),
        ),
        (
            "lines", lines, (3, 2, 0.3, 1, 5, 0.6, 2, 7.5, 0.4), axis, 0.05,
            (1, 1.5, 1, 1, 4, 1, 1, 8, 1), (0, 0, 0.05) * 3, (9, 10, 2) * 3,
        ),
        (
            "lines_cut", lines, (3, 2, 0.3, 1, 5, 0.6, 2, 5.6, 0.4), axis, 0.05,
            (1, 1.5, 1, 1, 4, 1, 1, 8, 1), (0, 0, 0.05) * 3, (2.5, 10, 2) * 3,
        ),
        ("polynomial", polynomial, (1, 0, 0.5, 0, 0.2, 0), axis / 5, 0.1, (1,) * 6, 0, inf),
        ("polynomial_high", polynomial, (1, -0.2, 0.5, 0, 0.2, 0, 0.1, 0, 0, 0), axis / 5, 0.1, (0,) * 10, 0, 1),
        ("predators", predators, (0.6, 1.2, 0.8, 0.7), time, 0.02, (1, 1, 1, 1), 0, 3),
        ("predators_cut", predators, (0.6, 1.2, 0.8, 0.7), time, 0.02, (0.3, 0.5, 1, 1), 0, 1),
    )  # fmt: skip
    return [
        *(
            bounded_fit(f"{name}-{len(start)}", fitted(curve, data(*truth), t, noise, seed), start, lower, upper)
            for seed, (name, curve, truth, t, noise, start, lower, upper) in enumerate(made)
        ),
        *nonnegative(),
    ]


def nonnegative() -> list[Fit]:
    """Linear least squares without negative parameters: one iteration where no bound is met."""
    matrix, targets = rand(1, 60, 20), rand(2, 60)
    hilbert = 1 / (ramp(10)[:, None] + ramp(10) - 1)
    wanted = hilbert @ randn(3, 10)
    return [
        bounded_fit("nonnegative-20", lambda p: matrix.to(p) @ p - targets.to(p), torch.ones(20), 0, inf),
        bounded_fit("nonnegative_hilbert-10", lambda p: hilbert.to(p) @ p - wanted.to(p), torch.ones(10), 0, inf),
    ]
