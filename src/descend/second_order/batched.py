"""Find minima of many functions, or from many starts, at once."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from descend.second_order.mathematics.arrays import array_of, full, replaced, take, tensor_of
from descend.second_order.mathematics.batched_directions import CompactInverses, DenseInverses
from descend.second_order.mathematics.space import Array
from descend.second_order.problem.arguments import check_args
from descend.second_order.problem.batched_objective import BatchedObjective
from descend.second_order.problem.batched_structure import BatchedStructure
from descend.second_order.problem.bounds import bounds_of, differentiable_bounds
from descend.second_order.problem.domain import DomainErrors
from descend.second_order.problem.objective import DENSE_COPIES, free_memory
from descend.second_order.solvers.batched_descent import batched_bounded_descent, batched_descent
from descend.second_order.solvers.batched_implicit_function import differentiable_solutions
from descend.second_order.solvers.batched_newton import BatchedNewton, batched_newton_descent
from descend.second_order.solvers.batched_result import BatchedResult
from descend.second_order.solvers.batched_run import STATUSES, BatchedRun
from descend.second_order.solvers.batched_search import BatchedSearches
from descend.second_order.solvers.result import Progress, X

METHODS = ("l-bfgs", "bfgs", "newton")


def minimize_batched(
    who: str,
    fun: Callable[..., Any],
    x0: X,
    args: tuple[Any, ...],
    *,
    method: str,
    bounds: Any,
    tol: Callable[[float], float],
    max_iter: float,
    max_eval: float,
    callback: Callable[[Progress], Any] | None,
    jac: Callable[..., Any] | bool | None,
    hvp: Callable[..., Any] | None,
    history_size: int,
    domain_errors: DomainErrors,
    differentiable: bool,
) -> BatchedResult[X]:
    """``minimize(..., batched=True)``, with its arguments; ``tol`` maps the precision to the tolerance."""
    began, records_graph = time.perf_counter(), torch.is_grad_enabled()
    if method not in METHODS:
        raise ValueError(
            f"{who}: batched needs a method of {METHODS}, got {method!r}. Or minimize the problems one by one."
        )
    if hvp is not None:
        raise ValueError(f"{who}: hvp is for single problems. Leave it out: with batched, autograd gives the Hessians.")
    check_args(who, args)
    with torch.inference_mode(False), torch.no_grad():
        structure = BatchedStructure(x0, who)
        if method != "l-bfgs":
            check_dense_fits(who, structure)
        flat, limits = structure.flatten(structure.whole.leaves), None
        if bounds is not None:
            ends = bounds_of(bounds, structure.whole, who)
            limits = (
                structure.flatten(structure.whole.split(ends[0])),
                structure.flatten(structure.whole.split(ends[1])),
            )
            flat.clamp_(*limits)
        objective = BatchedObjective(who, fun, structure, args, jac, limits, domain_errors, method == "newton")
        options: dict[str, Any] = dict(
            tol=tol(structure.whole.eps),
            max_iter=max_iter,
            max_eval=max_eval,
            callback=None if callback is None else reporter(who, structure, callback),
        )
        run = (BatchedNewton if method == "newton" else BatchedSearches)(objective, array_of(flat), **options)
        if structure.count:
            run.start()
            solve(run, method, history_size)
        ends_of = {name: tensor_of(array) for name, array in vars(run.ends).items()}
        x, statuses = ends_of["x"], [STATUSES[code] for code in ends_of["status"].tolist()]
        n_calls, n_eval = objective.n_calls, ends_of["n_eval"]
        if differentiable and structure.count:
            final = BatchedObjective(who, fun, structure, args, jac, limits, domain_errors, keeps_graph=True)
            with torch.set_grad_enabled(records_graph):
                whole = differentiable_bounds(bounds, structure.whole, who)
                rows = [None if end is None else structure.flatten(structure.whole.split(end)) for end in whole]
                x = differentiable_solutions(final, x, statuses, *rows)
            n_calls, n_eval = n_calls + final.n_calls, n_eval + 1
    return BatchedResult(
        x=structure.unflatten(x),
        fun=ends_of["value"],
        grad=structure.unflatten(ends_of["grad"]),
        status=statuses,
        grad_norm=ends_of["norm"],
        n_iter=ends_of["n_iter"],
        n_eval=n_eval,
        n_hvp=ends_of["n_hvp"],
        n_negative_curvature=ends_of["n_negative_curvature"],
        n_calls=n_calls,
        time=time.perf_counter() - began,
        rounds=run.history,
    )


def check_dense_fits(who: str, structure: BatchedStructure) -> None:
    """Raise ``MemoryError`` if a dense matrix for every problem would not fit into memory."""
    whole = structure.whole
    needed = DENSE_COPIES * structure.count * structure.numel**2 * torch.finfo(whole.dtype).bits // 8
    available = free_memory(whole.device)
    if needed > available:
        raise MemoryError(
            f"{who}: dense matrices for {structure.count:,} problems of {structure.numel:,} variables need "
            f"{needed / 2**30:,.1f} GiB, {available / 2**30:,.1f} GiB are free. Use method='l-bfgs', or fewer problems."
        )


def solve(run: BatchedRun, method: str, history_size: int) -> None:
    """Go on from the start until every problem has a reason to stop."""
    if isinstance(run, BatchedNewton):
        batched_newton_descent(run)
    elif isinstance(run, BatchedSearches):
        if method == "bfgs":
            batched_descent(run, DenseInverses(run.x))
        elif run.objective.lower is None:
            batched_descent(run, CompactInverses(run.x, history_size))
        else:
            batched_bounded_descent(run, CompactInverses(run.x, history_size, learns_from_all=False))


def reporter(
    who: str, structure: BatchedStructure, callback: Callable[[Progress], Any]
) -> Callable[[BatchedRun], Array]:
    """The user's callback as a ``BatchedRun`` calls it."""

    def report(run: BatchedRun) -> Array:
        rows, ends = run.objective.rows, run.ends
        now = [(ends.x, run.x), (ends.value, run.value), (ends.grad, run.grad), (ends.norm, run.norm)]
        now += [(ends.n_iter, run.n_iter), (ends.n_eval, run.n_eval), (ends.n_hvp, run.n_hvp)]
        x, value, grad, norm, *counts = (tensor_of(replaced(*pair, rows)) for pair in now)
        numbers: list[Any] = [norm, *counts]
        values: Any = value
        try:
            with torch.enable_grad():
                answer = callback(Progress(structure.unflatten(x), values, structure.unflatten(grad), *numbers))
        except StopIteration:
            answer = True
        if not isinstance(answer, torch.Tensor) or not answer.dim():
            return full(run.x, run.count, bool(answer))
        if answer.shape != (structure.count,):
            raise ValueError(
                f"{who}: callback must return a truth value, or a tensor of {structure.count} of them, one for each "
                f"problem; got shape {tuple(answer.shape)}."
            )
        return take(array_of(answer.to(x.device).bool()), rows)

    return report
