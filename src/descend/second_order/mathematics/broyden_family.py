"""Members of Broyden's family of quasi-Newton updates, scaled or not, as numbers chosen from two ratios.

With s = x_new - x, y = grad_new - grad and B = H^-1, the update of an approximate Hessian is

    B+ = tau (B - B s s' B / s'B s + theta w w') + y y' / s'y,    w = sqrt(s'B s) (y / s'y - B s / s'B s)

and that of its inverse

    H+ = (H - H y y' H / y'H y + phi v v') / tau + s s' / s'y,    v = sqrt(y'H y) (s / s'y - H y / y'H y)

where phi = (1 - theta) / (1 + a theta) and a = (s'B s) (y'H y) / (s'y)^2 - 1 >= 0. H+ y = s for all of them. H+ is
positive definite if H is, tau > 0 and 1 + a theta > 0.

Source: Al-Baali 1998, https://doi.org/10.1023/A:1022608410710, in the notation of Urbán, Stefanou & Pons 2024,
https://doi.org/10.1016/j.jcp.2024.113656.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

LEAST = 2.0**-52  # of a, which rounding may make negative


class Ratios(NamedTuple):
    """What a choice depends on.

    Attributes:
        b: s'B s / s'y, > 0: by how much the model's curvature along s exceeds the measured one.
        h: y'H y / s'y, > 0: the same for the inverse, along y.
        numel: number of variables.
    """

    b: float
    h: float
    numel: int

    @property
    def a(self) -> float:
        """The square of the tangent of the angle between s and y in the metric of the model; >= 0."""
        return max(self.b * self.h - 1, LEAST)


class Member(NamedTuple):
    """An update.

    Attributes:
        theta: 0 for BFGS, 1 for DFP.
        sigma: 1 + a theta, by which the member changes the determinant of B+; > 0.
        tau: factor of the kept part of B; > 0.
    """

    theta: float = 0.0
    sigma: float = 1.0
    tau: float = 1.0


Choice = Callable[[Ratios], Member]


def bfgs(ratios: Ratios) -> Member:
    """BFGS: no scaling."""
    return Member()


def self_scaled_bfgs(ratios: Ratios) -> Member:
    """BFGS of a model whose curvature along s is lowered to the measured one, if it exceeds that.

    Source: Al-Baali 1998, after Oren & Luenberger 1974, who raise it, too; Urbán et al. 2024, equation 11.
    """
    return Member(tau=min(1.0, 1 / ratios.b))


def self_scaled_broyden(ratios: Ratios) -> Member:
    """The member with theta = (1 - b) / b, as far as limits on the change of the determinant allow, and its scaling.

    Source: Urbán et al. 2024, equations 13 to 23; "SSBroyden2" in their programs.
    """
    a, b = ratios.a, ratios.b
    # rho- = min(1, h (1 - c)) with c = sqrt(a / (1 + a)); 1 - c is multiplied out, as it may be tiny.
    least_rho = min(1.0, ratios.h / ((1 + a) * (1 + math.sqrt(a / (1 + a)))))
    least_theta, largest_theta = (least_rho - 1) / a, 1 / least_rho
    theta = max(least_theta, min(largest_theta, (1 - b) / b))
    sigma = max(1 + a * theta, least_rho)  # equal where theta is the least one, but for rounding
    # The n - 1 eigenvalues that tau scales make up for what theta has done to the determinant.
    rho, spread = min(1.0, 1 / b), sigma ** (-1 / max(1, ratios.numel - 1))
    tau = min(rho * spread, sigma) if theta <= 0 else rho * min(spread, 1 / theta)
    return Member(theta, sigma, tau)
