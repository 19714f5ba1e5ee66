"""Find minima of many functions, or from many starts, at once."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch

from descend.second_order.mathematics.arrays import array_of, tensor_of
from descend.second_order.mathematics.batched_directions import CompactInverses, DenseInverses, ManyDirections
from descend.second_order.mathematics.space import Array
from descend.second_order.problem.batched_objective import BatchedObjective
from descend.second_order.problem.batched_structure import BatchedStructure
from descend.second_order.problem.bounds import bounds_of
from descend.second_order.solvers.batched_descent import batched_descent
from descend.second_order.solvers.batched_result import BatchedResult, BestResult
from descend.second_order.solvers.batched_run import STATUSES, BatchedRun
from descend.second_order.solvers.result import Progress, X

METHODS = ("l-bfgs", "bfgs")


def minimize_batched(
    who: str,
    fun: Callable[..., Any],
    x0: X,
    *,
    method: str,
    bounds: Any,
    tol: Callable[[float], float],
    max_iter: int,
    max_eval: int | None,
    callback: Callable[[Progress], Any] | None,
    jac: Callable[..., Any] | bool | None,
    history_size: int,
    args: tuple[Any, ...],
) -> BatchedResult[X]:
    """``minimize(..., batched=True)``: its arguments, already checked; ``tol`` maps the precision to the tolerance."""
    began = time.perf_counter()
    if method not in METHODS:
        raise ValueError(f"{who}: with batched, method must be one of {METHODS}, got {method!r}.")
    with torch.inference_mode(False), torch.no_grad():
        structure = BatchedStructure(x0, who)
        flat = structure.flatten(structure.whole.leaves)
        limits = None
        if bounds is not None:
            lower, upper = bounds_of(bounds, structure.whole, who)
            limits = tuple(structure.flatten(structure.whole.split(end)) for end in (lower, upper))
            flat.clamp_(*limits)
        objective = BatchedObjective(who, fun, structure, args, jac, limits)
        run = BatchedRun(
            objective,
            tol=tol(structure.whole.eps),
            max_iter=max_iter,
            max_eval=math.inf if max_eval is None else max_eval,
            callback=None,
        )
        x = array_of(flat)
        if structure.count:
            run.start(x)
            learner: ManyDirections = DenseInverses(x) if method == "bfgs" else CompactInverses(x, history_size)
            batched_descent(run, learner)
        return result_of(run, structure, x, began)


def result_of(run: BatchedRun, structure: BatchedStructure, x: Array, began: float) -> BatchedResult[Any]:
    """The results of a run that has ended."""
    ends = run.ends
    return BatchedResult(
        x=structure.unflatten(tensor_of(ends.x)),
        fun=tensor_of(ends.value),
        grad=structure.unflatten(tensor_of(ends.grad)),
        status=[STATUSES[code] for code in ends.status.tolist()],
        grad_norm=tensor_of(ends.norm),
        n_iter=tensor_of(ends.n_iter),
        n_eval=tensor_of(ends.n_eval),
        n_hvp=torch.zeros(structure.count, dtype=torch.int64),
        n_calls=run.objective.n_calls,
        time=time.perf_counter() - began,
        _rounds=run.history,
        _row_of=lambda tree, i: tree,
    )
