"""A network that solves a differential equation: Raissi et al. 2019, https://doi.org/10.1016/j.jcp.2018.10.045."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.quasirandom import SobolEngine

from descend.compare.models import BurgersNet
from descend.compare.tasks.catalog import SUMMARIES
from descend.compare.tasks.rates import rates
from descend.compare.tasks.task import Batch, Data, Score, Task

VISCOSITY = 0.01 / math.pi
POINTS = 1000
GRID = (201, 26)  # held-out points along x and t
NODES = 100  # of the quadrature, at which the reference is exact to 1e-12


def reference(x: NDArray[np.float64], t: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return u(x, t) for u_t + u u_x = VISCOSITY u_xx on [-1, 1] with u(x, 0) = -sin(pi x) and u(-1, t) = u(1, t) = 0.

    The Cole-Hopf transformation makes it the heat equation, whose solution is an integral against a Gaussian; that is
    computed by Gauss-Hermite quadrature, as in Basdevant et al. 1986, https://doi.org/10.1016/0045-7930(86)90036-8.

    Args:
        x: positions; shape (n,).
        t: times, >= 0; shape (n,).
    """
    nodes, weights = np.polynomial.hermite.hermgauss(NODES)
    y = x[:, None] - np.sqrt(4 * VISCOSITY * t)[:, None] * nodes
    exponent = -np.cos(np.pi * y) / (2 * np.pi * VISCOSITY)
    density = weights * np.exp(exponent - exponent.max(axis=1, keepdims=True))
    u: NDArray[np.float64] = -(np.sin(np.pi * y) * density).sum(axis=1) / density.sum(axis=1)
    return u


def load(seed: int) -> Data:
    """Return 1,000 scattered points (x, t) at which the equation shall hold, and a grid with the reference solution.

    Half of the points are at abs(x) < 1/8: the solution becomes a shock at x = 0, of a width of 0.01, and a network
    can satisfy the equation at points further apart than that without being near the solution.
    """
    engine = SobolEngine(2, scramble=True, seed=seed)  # type: ignore[no-untyped-call]
    unit = engine.draw(POINTS, dtype=torch.float64)
    points = torch.stack([(2 * unit[:, 0] - 1) ** 3, unit[:, 1]], dim=1)
    everything = points, torch.zeros(POINTS, dtype=torch.float64)

    def sample(batch_size: int, generator: torch.Generator) -> Batch:
        if not batch_size:
            return everything
        rows = torch.randint(POINTS, (batch_size,), generator=generator)
        return everything[0][rows], everything[1][rows]

    x, t = (axis.ravel() for axis in np.meshgrid(np.linspace(-1, 1, GRID[0]), np.linspace(0, 1, GRID[1])))
    return Data(sample, (torch.from_numpy(np.stack([x, t], axis=1)), torch.from_numpy(reference(x, t))))


def model() -> nn.Module:
    """Return a network of 921 parameters in float64: three hidden layers of 20 with tanh."""
    return BurgersNet(width=20, depth=3).double()


def residual(model: nn.Module, points: Tensor) -> Tensor:
    """Return u_t + u u_x - VISCOSITY u_xx at ``points``, with a graph; shape (n,).

    It holds second derivatives by the points, so that a gradient by the weights differentiates three times, and a
    product with the Hessian four times.
    """
    with torch.enable_grad():
        points = points.detach().requires_grad_()
        u = model(points)
        (gradient,) = torch.autograd.grad(u.sum(), points, create_graph=True)
        u_x, u_t = gradient.unbind(1)
        (second,) = torch.autograd.grad(u_x.sum(), points, create_graph=True)
        out: Tensor = u_t + u * u_x - VISCOSITY * second[:, 0]
        return out


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean square of the residual, which the targets say is 0."""
    points, targets = batch
    return (residual(model, points) - targets).square().mean()


def score(model: nn.Module, test: Batch) -> Score:
    """Return the mean square of the residual, and the relative error of the solution in the 2-norm."""
    points, exact = test
    error = torch.linalg.vector_norm(model(points).detach() - exact) / torch.linalg.vector_norm(exact)
    return Score(residual(model, points).square().mean().item(), error.item())


TASK = Task(
    name="pinn",
    summary=SUMMARIES["pinn"],
    load=load,
    model=model,
    steps=3000,
    batch_size=None,
    lr=rates(sgd=1e-2, adam=5e-3),
    optimizers=(
        "adam",
        "adam:steps=300+lbfgs",
        "adam:steps=300+scipy.l-bfgs-b",
        "adam:steps=300+minimize.bfgs",
        "adam:steps=300+minimize.ss-broyden",
    ),
    threads=1,
    loss=loss,
    score=score,
    loss_name="mean squared residual",
    metric_name="relative error",
    metric_is_error=True,
)
