"""What a test problem is, and what can be made of one: other units, another precision, bounds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

Function = Callable[[Tensor], Tensor]


class Problem(NamedTuple):
    """A smooth function to minimize, and where from.

    Attributes:
        name: unique; ends in the number of variables and, where there are several versions, in what
            sets this one apart, as in "rosenbrock-10-box".
        fun: maps a 1-d tensor of any floating dtype to a scalar of that dtype; twice differentiable.
        x0: the start, in float64.
        minima: values at local minimizers as far as they are known; None if none is.
        lower, upper: bounds, where infinities are allowed; None without bounds.
    """

    name: str
    fun: Function
    x0: Tensor
    minima: tuple[float, ...] | None = None
    lower: Tensor | None = None
    upper: Tensor | None = None


class Family(NamedTuple):
    """One formula at several sizes.

    Attributes:
        start: makes x0 for a number of variables.
        minima: for each number of variables what ``Problem.minima`` is; its keys are the sizes.
    """

    name: str
    fun: Function
    start: Callable[[int], Tensor]
    minima: Mapping[int, tuple[float, ...] | None]

    def problems(self) -> list[Problem]:
        return [Problem(f"{self.name}-{n}", self.fun, self.start(n), minima) for n, minima in self.minima.items()]


def squares(residuals: Function) -> Function:
    """The sum of squares of a vector of residuals."""
    return lambda x: residuals(x).square().sum()


def data(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def count(x: Tensor, first: int = 1) -> Tensor:
    """As many whole numbers as x has elements, in its dtype."""
    return torch.arange(first, first + len(x), dtype=x.dtype, device=x.device)


def repeat(*pattern: float) -> Callable[[int], Tensor]:
    """A start that repeats the pattern as often as fits."""
    return lambda n: data(*pattern).repeat(-(-n // len(pattern)))[:n]


def sizes(*numbers: int, minima: tuple[float, ...] | None = (0.0,)) -> dict[int, tuple[float, ...] | None]:
    """The same minima at each size; by default zero, which a consistent system of equations has."""
    return dict.fromkeys(numbers, minima)


def every(families: Iterable[Family]) -> list[Problem]:
    return [problem for family in families for problem in family.problems()]


def scaled(problem: Problem, suffix: str, factor_x: Tensor | float = 1.0, factor_f: float = 1.0) -> Problem:
    """The same problem in other units.

    Args:
        suffix: what the name of the new problem ends in.
        factor_x: units per old unit, > 0, of all variables or of each.
        factor_f: the same for values, > 0.
    """
    factors = torch.as_tensor(factor_x, dtype=torch.float64)

    def fun(x: Tensor) -> Tensor:
        return factor_f * problem.fun(x / factors.to(x))

    return Problem(
        f"{problem.name}-{suffix}",
        fun,
        problem.x0 * factors,
        None if problem.minima is None else tuple(factor_f * value for value in problem.minima),
        None if problem.lower is None else problem.lower * factors,
        None if problem.upper is None else problem.upper * factors,
    )


def rounded(problem: Problem) -> Problem:
    """The same problem in float32: start and bounds are rounded, and ``fun`` follows its argument."""
    return problem._replace(
        x0=problem.x0.float(),
        lower=None if problem.lower is None else problem.lower.float(),
        upper=None if problem.upper is None else problem.upper.float(),
    )


def boxed(problem: Problem, suffix: str, lower: Tensor | float, upper: Tensor | float) -> Problem:
    """The same function with bounds; the start is moved into them, and known minima are forgotten."""
    low = torch.as_tensor(lower, dtype=torch.float64).expand(problem.x0.shape).clone()
    high = torch.as_tensor(upper, dtype=torch.float64).expand(problem.x0.shape).clone()
    return Problem(f"{problem.name}-{suffix}", problem.fun, problem.x0.clamp(low, high), None, low, high)
