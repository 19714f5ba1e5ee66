"""Energies of functions on a square grid: membranes, minimal surfaces, torsion, a journal bearing.

The unknowns are the inner grid points, row by row. Variants with bounds are obstacle problems.

Source: Averick, Carter, Moré & Xue 1992, The MINPACK-2 test problem collection, report ANL/MCS-P153.
"""

from __future__ import annotations

from math import pi, sqrt

import torch
from torch import Tensor
from torch.nn.functional import pad

from problems.problem import Function, Problem

UNIT = 1.0


def on_grid(x: Tensor, edge: Tensor | None = None) -> Tensor:
    """The unknowns as a square with a rim of zeros, or of what ``edge`` has there."""
    n = round(sqrt(len(x)))
    square = pad(x.reshape(n, n), (1, 1, 1, 1))
    return square if edge is None else square + edge.to(x)


def places(n: int, length: float = UNIT) -> tuple[Tensor, Tensor]:
    """Both coordinates of the inner points of a square, row by row."""
    line = torch.linspace(0, length, n + 2, dtype=torch.float64)[1:-1]
    across, down = torch.meshgrid(line, line, indexing="xy")
    return across.reshape(-1), down.reshape(-1)


def gradients(square: Tensor) -> tuple[Tensor, Tensor]:
    """Differences along the two directions, to the right and down."""
    return square.diff(dim=1), square.diff(dim=0)


def membrane(load: float) -> Function:
    """Half the squared slope minus the load: torsion and obstacle problems."""

    def fun(x: Tensor) -> Tensor:
        square = on_grid(x)
        right, down = gradients(square)
        return (right.square().sum() + down.square().sum()) / 2 - load * x.sum() / (len(square) - 1) ** 2

    return fun


def solid_fuel(heat: float) -> Function:
    """Bratu's steady combustion: as the membrane, with ``heat`` times exp(u) as the load."""

    def fun(x: Tensor) -> Tensor:
        square = on_grid(x)
        right, down = gradients(square)
        return (right.square().sum() + down.square().sum()) / 2 - heat * torch.exp(x).sum() / (len(square) - 1) ** 2

    return fun


def bearing(eccentricity: float, length: float) -> Function:
    """Pressure in a journal bearing: the film is thickest at the start of the first direction."""

    def fun(x: Tensor) -> Tensor:
        square = on_grid(x)
        right, down = gradients(square)
        step1, step2 = 2 * pi / (len(square) - 1), length / (len(square) - 1)
        angle = step1 * torch.arange(len(square), dtype=x.dtype, device=x.device)
        film = (1 + eccentricity * torch.cos(angle)) ** 3
        along = step2 / step1 * ((film[1:] + film[:-1]) / 2 * right**2).sum()
        across = step1 / step2 * (film * down**2).sum()
        return (along + across) / 2 - eccentricity * step1 * step2 * (torch.sin(angle) * square).sum()

    return fun


def minimal_surface(edge: Tensor) -> Function:
    """The area of a surface over the unit square, by two triangles in each cell."""

    def fun(x: Tensor) -> Tensor:
        square = on_grid(x, edge)
        cells = len(square) - 1
        right, down = gradients(square * cells)
        upper = torch.sqrt(1 + right[:-1] ** 2 + down[:, :-1] ** 2)
        lower = torch.sqrt(1 + right[1:] ** 2 + down[:, 1:] ** 2)
        return (upper + lower).sum() / (2 * cells**2)

    return fun


def frame(n: int) -> Tensor:
    """A rim that rises and falls, with zeros inside."""
    line = torch.linspace(0, 1, n + 2, dtype=torch.float64)
    edge = torch.zeros(n + 2, n + 2, dtype=torch.float64)
    edge[0], edge[-1] = torch.sin(pi * line), -torch.sin(pi * line)
    edge[:, 0], edge[:, -1] = -line * (1 - line), 2 * line * (1 - line)
    return edge


def problems() -> list[Problem]:
    """The energies without bounds."""

    def zeros(n: int) -> Tensor:
        return torch.zeros(n * n, dtype=torch.float64)

    return [
        *(Problem(f"membrane-{n * n}", membrane(5.0), zeros(n)) for n in (10, 30)),
        *(Problem(f"solid_fuel-{n * n}", solid_fuel(5.0), zeros(n)) for n in (10, 30)),
        *(Problem(f"minimal_surface-{n * n}", minimal_surface(frame(n)), zeros(n)) for n in (10, 30)),
    ]


def torsion(n: int, load: float) -> Problem:
    """A bar twisted until it yields: |u| is at most the distance to the rim."""
    across, down = places(n)
    distance = torch.stack((across, 1 - across, down, 1 - down)).amin(0)
    start = distance.clone()
    return Problem(f"torsion_{load:g}-{n * n}", membrane(load), start, None, -distance, distance)


def journal(n: int, eccentricity: float) -> Problem:
    """The pressure is not negative."""
    across, _ = places(n, 2 * pi)
    start = torch.sin(across).clamp(min=0)
    none = torch.full_like(start, torch.inf)
    return Problem(
        f"journal_{eccentricity:g}-{n * n}", bearing(eccentricity, 20.0), start, None, torch.zeros_like(start), none
    )


def obstacle(n: int, waves: float, thickness: float) -> Problem:
    """A membrane above a landscape of hills and, ``thickness`` higher, below another."""
    across, down = places(n)
    lower = (torch.sin(waves * across) * torch.sin((waves + 0.1) * down)) ** 3
    return Problem(f"obstacle_{waves:g}-{n * n}", membrane(1.0), lower.clone(), None, lower, lower + thickness)


def surface_over_plate(n: int) -> Problem:
    """A minimal surface that has to pass over a plate in the middle."""
    across, down = places(n)
    plate = (across - 0.5).abs().maximum((down - 0.5).abs()) < 0.25
    lower = torch.where(plate, 0.5, -torch.inf).double()
    none = torch.full_like(lower, torch.inf)
    start = lower.clamp(min=0)
    return Problem(f"surface_over_plate-{n * n}", minimal_surface(frame(n)), start, None, lower, none)


def bounded() -> list[Problem]:
    """The energies with bounds."""
    return [
        *(torsion(n, load) for n in (10, 20, 30) for load in (5.0, 20.0)),
        *(journal(n, eccentricity) for n in (10, 20) for eccentricity in (0.1, 0.9)),
        *(obstacle(n, waves, thickness) for n in (10, 25) for waves, thickness in ((3.2, 2000.0), (9.2, 0.02))),
        *(surface_over_plate(n) for n in (10, 20)),
    ]
