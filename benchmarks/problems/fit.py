"""What a least-squares problem is, and what can be made of one: other starts, another precision, bounds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from problems.models import randn
from problems.problem import Function


class Certified(NamedTuple):
    """A solution that is known to many digits.

    Attributes:
        values: the parameters.
        deviations: standard deviations of the parameters.
        sum_of_squares: of the residuals there.
        canonical: maps parameters to the one of their equivalents that is compared: two peaks may have changed places.
    """

    values: Tensor
    deviations: Tensor
    sum_of_squares: float
    canonical: Function

    def digits(self, x: Tensor) -> float:
        """To how many significant digits every parameter agrees: the smallest -log10 of a relative error."""
        values = self.canonical(self.values)
        error = (self.canonical(x.detach().double()) - values).abs() / values.abs()
        return float(-error.max().clamp(min=1e-15).log10()) if bool(error.isfinite().all()) else 0.0


class Fit(NamedTuple):
    """Residuals whose sum of squares is to be minimized.

    Attributes:
        name: unique.
        residuals: maps a 1-d tensor of any floating dtype to one of that dtype; differentiable in both modes.
        x0: the start, in float64.
        lower, upper: bounds, where infinities are allowed; None without bounds.
        minima: sums of squares at local minimizers as far as they are known; None if none is.
        certified: a known solution; only this counts as solved then.
    """

    name: str
    residuals: Function
    x0: Tensor
    lower: Tensor | None = None
    upper: Tensor | None = None
    minima: tuple[float, ...] | None = None
    certified: Certified | None = None


def bounded_fit(name: str, residuals: Function, start: object, lower: object, upper: object) -> Fit:
    """A fit whose bounds may be numbers; the start is moved into them."""
    x0 = torch.as_tensor(start, dtype=torch.float64)
    low, high = (torch.as_tensor(bound, dtype=torch.float64).expand(len(x0)).clone() for bound in (lower, upper))
    return Fit(name, residuals, x0.clamp(low, high), low, high)


def moved(fit: Fit, seed: int, spread: float) -> Fit:
    """The same problem from another start: each variable times the exponential of a normal number.

    Args:
        seed: of the numbers.
        spread: their standard deviation.
    """
    factors = torch.exp(spread * randn(seed, len(fit.x0)))
    return fit._replace(name=f"{fit.name}-moved{seed}", x0=fit.x0 * factors)


def slots_sorted(x: Tensor, slots: Sequence[Sequence[int]]) -> Tensor:
    """Parameters of equal terms of a sum, the terms in ascending order of their first parameter.

    Args:
        x: all parameters.
        slots: for each term the places of its parameters; all have equally many.
    """
    places = torch.tensor(slots)
    terms = x[places]
    x = x.clone()
    x[places] = terms[terms[:, 0].argsort()]
    return x
