"""Derivatives of the minimizers of many problems, by the implicit function theorem."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from descend.second_order.mathematics.arrays import array_of, tensor_of
from descend.second_order.problem.batched_objective import BatchedObjective
from descend.second_order.problem.objective import backward_twice
from descend.second_order.solvers.implicit_function import Solution, with_graph
from descend.second_order.solvers.result import Status


class _ManyProblems:
    """The curvature of problems that do not depend on one another: the Hessian of their sum has blocks."""

    def __init__(self, who: str) -> None:
        self.who = who

    def product(self, graph: Any, vector: Tensor) -> Tensor:
        try:
            gradient, leaf = graph
            return backward_twice(gradient, leaf, vector)
        except RuntimeError as error:
            raise RuntimeError(f"{self.who}: fun cannot be differentiated twice ({error}).") from error

    def hessians(self, graph: Any) -> Tensor:
        """By one product for each variable, with its unit vector in all problems."""
        rows = []
        for i in range(graph[1].shape[1]):
            unit = torch.zeros_like(graph[1])
            unit[:, i] = 1.0
            rows.append(self.product(graph, unit))
        hessians = torch.stack(rows, 1) if rows else graph[1].new_zeros(len(graph[1]), 0, 0)
        return (hessians + hessians.mT) / 2


def differentiable_solutions(
    objective: BatchedObjective,
    x: Tensor,
    statuses: list[Status],
    lower: Tensor | None = None,
    upper: Tensor | None = None,
) -> Tensor:
    """A copy of ``x``, (B, n), that autograd takes for a function of what the objective's gradients depend on.

    One evaluation. The copy requires no gradient if the objective's depend on no tensor that does.

    Args:
        objective: what was minimized, with all of its problems, and keeping the graph.
        x: where the solver stopped.
        statuses: why; backward raises an error where derivatives of a problem are asked for that has not converged.
        lower, upper: bounds as functions of what they were computed from, if derivatives by them are wanted; (B, n).
    """
    who, bounds = objective.who, None
    grad = tensor_of(objective.evaluate(array_of(x))[1])
    if objective.lower is not None:
        bounds = tensor_of(objective.lower), tensor_of(objective.upper)
    graph = objective.graphs[-1]
    solution = Solution(who, _ManyProblems(who), x, grad, bounds, statuses, objective.eps)
    return with_graph(solution, (graph.grad, graph.leaf), lower, upper)
