"""Families of functions of many problems at once, for the tests of `minimize(batched=...)`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from descend import Result, minimize

Fun = Callable[..., Tensor]


def bowls(x: Tensor, centers: Tensor) -> Tensor:
    return (x - centers).square().sum(1)


def valleys(x: Tensor, steepness: Tensor) -> Tensor:
    """Rosenbrock's function, more or less steep."""
    return (steepness * (x[:, 1:] - x[:, :-1] ** 2) ** 2 + (1 - x[:, :-1]) ** 2).sum(1)


def waves(x: Tensor, phases: Tensor) -> Tensor:
    """Many local minima."""
    return torch.sin(3 * x + phases).sum(1) + 0.02 * (x - 1).square().sum(1)


def quartics(x: Tensor, centers: Tensor) -> Tensor:
    """Singular Hessians at the minima."""
    return ((x - centers) ** 4).sum(1)


def logarithms(x: Tensor, factors: Tensor) -> Tensor:
    """NaN if any x <= 0, and steep close to 0."""
    return (x - factors * x.log()).sum(1) + x.square().sum(1)


def decays(x: Tensor, data: Tensor) -> Tensor:
    """Fits of exponentials, 30 points each."""
    times = torch.linspace(0, 4, data.shape[1], dtype=data.dtype)
    model = x[:, :1] * torch.exp(-x[:, 1:2].square() * times) + x[:, 2:]
    return (model - data).square().sum(1)


class Family(NamedTuple):
    """Problems: a function, starts (B, n), and data whose first dimension is B."""

    fun: Fun
    x0: Tensor
    data: Tensor

    def __str__(self) -> str:
        return f"{self.fun.__name__}-{'x'.join(map(str, self.x0.shape))}"

    def single(self, i: int, **options: Any) -> Result:
        """The i-th problem by itself."""
        datum = self.data[i : i + 1]
        return minimize(lambda x: self.fun(x[None], datum)[0], self.x0[i], **options)

    def of(self, rows: Any) -> Family:
        return Family(self.fun, self.x0[rows], self.data[rows])

    def to(self, dtype: torch.dtype) -> Family:
        return Family(self.fun, self.x0.to(dtype), self.data.to(dtype))


def random(*shape: int, seed: int = 0, low: float = -2.0, high: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + math.prod(shape))
    return torch.rand(shape, generator=generator, dtype=torch.float64) * (high - low) + low


def observations(count: int) -> Tensor:
    """Decays with noise."""
    scale, rate, shift = random(3, count, 1, seed=7, low=0.5, high=2.0)
    return scale * torch.exp(-rate * torch.linspace(0, 4, 30, dtype=torch.float64)) + shift + 0.01 * random(count, 30)


FAMILIES = [
    Family(bowls, random(3, 3), random(3, 3, seed=1)),
    Family(valleys, random(11, 2), 10 ** random(11, 1, low=0.0, high=3.0)),
    Family(valleys, random(5, 10), 10 ** random(5, 1, low=0.0, high=2.0)),
    Family(waves, random(9, 3, high=6.0), random(9, 1)),
    Family(quartics, random(3, 2), random(3, 2, seed=1)),
    Family(logarithms, random(5, 2, low=0.1, high=3.0), random(5, 1, low=0.01, high=1.0)),
    Family(decays, random(5, 3, low=0.5, high=2.0), observations(5)),
]
