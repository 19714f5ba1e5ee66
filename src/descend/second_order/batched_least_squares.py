"""Fit many models, or one from many starts, at once."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from descend.second_order.batched import reporter
from descend.second_order.mathematics.arrays import array_of, tensor_of
from descend.second_order.mathematics.robust_losses import Rho
from descend.second_order.problem.arguments import check_args
from descend.second_order.problem.batched_residuals import BatchedResiduals
from descend.second_order.problem.batched_structure import BatchedStructure
from descend.second_order.problem.bounds import bounds_of
from descend.second_order.solvers.batched_least_squares import BatchedFits, batched_least_squares_descent
from descend.second_order.solvers.batched_least_squares_result import BatchedLeastSquaresResult
from descend.second_order.solvers.batched_run import STATUSES
from descend.second_order.solvers.result import Progress, X


def least_squares_batched(
    who: str,
    residuals: Callable[..., Any],
    x0: X,
    args: tuple[Any, ...],
    *,
    bounds: Any,
    rho: Rho | None,
    loss_scale: float,
    tol: Callable[[float], float],
    max_iter: float,
    max_eval: float,
    callback: Callable[[Progress], Any] | None,
) -> BatchedLeastSquaresResult[X]:
    """``least_squares(..., batched=True)``, with its arguments; ``tol`` maps the precision to the tolerance."""
    began = time.perf_counter()
    check_args(who, args)
    with torch.inference_mode(False), torch.no_grad():
        structure = BatchedStructure(x0, who)
        flat, limits = structure.flatten(structure.whole.leaves), None
        if bounds is not None:
            lower, upper = (
                structure.flatten(structure.whole.split(end)) for end in bounds_of(bounds, structure.whole, who)
            )
            limits = lower, upper
            flat.clamp_(lower, upper)
        loss = None if rho is None else elementwise(rho)
        objective = BatchedResiduals(who, residuals, structure, args, limits, loss, loss_scale)
        run = BatchedFits(
            objective,
            array_of(flat),
            tol=tol(structure.whole.eps),
            max_iter=max_iter,
            max_eval=max_eval,
            callback=None if callback is None else reporter(who, structure, callback),
        )
        fits = flat.new_zeros(0, 0, structure.numel + 2)
        if structure.count:
            run.start()
            batched_least_squares_descent(run)
            fits = tensor_of(run.end_fits)
        ends = {name: tensor_of(array) for name, array in vars(run.ends).items()}
    return BatchedLeastSquaresResult(
        x=structure.unflatten(ends["x"]),
        fun=ends["value"],
        grad=structure.unflatten(ends["grad"]),
        status=[STATUSES[code] for code in ends["status"].tolist()],
        grad_norm=ends["norm"],
        n_iter=ends["n_iter"],
        n_eval=ends["n_eval"],
        n_hvp=ends["n_hvp"],
        n_negative_curvature=ends["n_negative_curvature"],
        n_calls=objective.n_calls,
        time=time.perf_counter() - began,
        rounds=run.history,
        residuals=objective.tree_of(fits[:, :, -1]),
        jac=fits[:, :, :-2],
        _rows=fits[:, :, -2],
        _unflatten=structure.row,
    )


def elementwise(rho: Rho) -> Rho:
    """A loss of vectors as one of tensors of any shape."""

    def of_any_shape(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        value, first, second = (part.reshape(z.shape) for part in rho(z.reshape(-1)))
        return value, first, second

    return of_any_shape
