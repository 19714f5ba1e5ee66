"""Constraints by an augmented Lagrangian: a sequence of problems without them, each from the last one's solution.

Source:
    Birgin & Martínez 2014, Practical Augmented Lagrangian Methods, Algorithm 4.1 and chapter 12,
    https://doi.org/10.1137/1.9781611973365; Conn, Gould & Toint 1991, https://doi.org/10.1137/0728030;
    Andreani, Birgin, Martínez & Schuverdt 2007, https://doi.org/10.1137/060654797
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from descend.second_order.mathematics.augmented_lagrangian import complementarity, first_penalty, largest, violations
from descend.second_order.problem.constrained_functions import Values
from descend.second_order.problem.constrained_objective import Candidate, ConstrainedObjective
from descend.second_order.problem.objective import Point
from descend.second_order.solvers.budget import Budget, Limits
from descend.second_order.solvers.kkt_newton import newton_end, residual
from descend.second_order.solvers.result import Iteration, Status
from descend.second_order.solvers.run import Descend, Run

MAX_OUTER = 100
MOST_MULTIPLIER = 1e12  # larger estimates are cut
SUFFICIENT = 0.5  # fall of the infeasibility below which the penalty grows
GROWTH = 10.0  # of the penalty
LARGEST_PENALTY = 1e16
ROUNDING = 0.8  # power of the precision below which a gradient is mostly rounding
EARLY = 0.5  # tolerance of the first subproblem where Newton's method may end it, as f is scaled to a gradient of 1
TIGHTENING = 0.1  # of the subproblems' tolerance
FAR = 1e10  # growth of the variables by which a subproblem has no minimum
MAX_FAR = 8  # such subproblems
IDLE = 3  # subproblems in a row that move nothing
SUSPICIOUS = 1e4  # growth of the penalty after which the violation alone is minimized
MAX_RESTORED = 3  # times
STATIONARY = 1e-3  # gradient of half the squared violation, relative to the violation
ENDS = (Status.max_iter, Status.max_eval, Status.stopped_by_callback)


class _SubRun(Run):
    """A run on one subproblem, as part of the whole."""

    def __init__(self, whole: AugmentedLagrangian, tol: float) -> None:
        self.whole, self.n_iter_before = whole, whole.n_iter
        super().__init__(
            whole.objective,
            tol=tol,
            max_iter=whole.limits.max_iter - whole.n_iter,
            max_eval=whole.evaluations_left,
            callback=self._report,
        )

    def _record(self, point: Point, step: float) -> None:
        self.whole.n_iter = self.n_iter_before + self.n_iter
        if self.n_iter or not self.whole.history:
            self.whole.record(point, step)

    def _report(self, run: Run, point: Point) -> bool:
        return self.whole.report(point)


class AugmentedLagrangian(Budget):
    """One minimization with constraints.

    Args:
        objective: f and the constraints.
        new_descent: makes a descent, which minimizes a subproblem from a point. The curvature that it has learned is
            kept until the penalty changes.
        limits: those of the whole run.
    Attributes:
        candidate: the best point.
        least: tolerance of the subproblems, and of feasibility: that of the whole, if it is not below rounding.
        n_outer: subproblems.
    """

    def __init__(self, objective: ConstrainedObjective, new_descent: Callable[[], Descend], limits: Limits) -> None:
        self.objective, self.new_descent, self.limits = objective, new_descent, limits
        self.descend, self.penalty_learned = new_descent(), math.nan
        super().__init__(objective, limits.max_eval)
        self.n_iter = self.n_outer = self.n_negative_curvature = 0
        self.history: list[Iteration] = []
        self.is_stopped = False
        self.least = objective.feasible = max(limits.tol, objective.eps**ROUNDING)
        self._end: Candidate | None = None

    @property
    def candidate(self) -> Candidate:
        candidate = self._end or self.objective.best
        assert candidate is not None
        return candidate

    @property
    def best(self) -> Point:
        return self.candidate.point

    def record(self, point: Point, step: float) -> None:
        """Add an iteration that ended at a point to the history."""
        values: Values = point.graph
        norm = point.norm / self.objective.fun_scale
        self.history.append(Iteration(values.value, norm, step, self.n_eval, self.n_hvp))

    def report(self, point: Point) -> bool:
        """Show an iteration to the callback; whether it asks to stop."""
        if self.limits.callback is not None:
            values, scale = point.graph, self.objective.fun_scale
            shown = point._replace(value=values.value, grad=point.grad / scale, norm=point.norm / scale)
            self.is_stopped = self.is_stopped or self.limits.callback(self, shown)
        return self.is_stopped

    def run(self, x: Tensor) -> Status:
        """Minimize from ``x``; the result is in ``candidate``."""
        objective = self.objective
        point = objective.evaluate(x)
        if not point.is_finite:
            self._end = Candidate(point, objective.multipliers)
            self.record(point, 0.0)
            return Status.non_finite
        objective.set_scales(point.graph)
        return self._iterate(point.graph)

    def _iterate(self, values: Values) -> Status:
        objective, least = self.objective, self.least
        squares = float(violations(objective.scaled(values), objective.equal).square().sum())
        penalty = first = first_penalty(objective.fun_scale * values.value, squares)
        multipliers, tolerance = objective.multipliers, max(least, EARLY if objective.is_small else math.sqrt(least))
        progress, n_idle, n_far, n_restored = math.inf, 0, 0, 0
        while True:
            objective.set_multipliers(multipliers, penalty)
            status, point = self._minimize(values, tolerance)
            if status in ENDS:
                return status
            if status is Status.unbounded or _is_far(point, values):
                n_far += 1
                if n_far > MAX_FAR or point.graph.violation <= least:
                    return status
                penalty = min(penalty * GROWTH**2, LARGEST_PENALTY)
                continue
            n_idle = n_idle + 1 if torch.equal(point.x, values.x) and tolerance <= least else 0
            values = point.graph
            candidate = Candidate(point, objective.first_order_multipliers(values))
            if (end := self._finished(candidate)) is not None:
                return end
            is_last = n_idle >= IDLE or self.n_outer >= MAX_OUTER
            infeasible = largest(complementarity(objective.scaled(values), multipliers / penalty, objective.equal))
            is_slow = infeasible > SUFFICIENT * progress and values.violation > least
            is_suspicious = is_slow and penalty > SUSPICIOUS * first and n_restored < MAX_RESTORED
            if is_suspicious or (is_last and values.violation > least):
                n_restored += 1
                end, values = self._restore(values)
                if end is not None:
                    return end
            if is_last:
                return Status.precision_limit if status is Status.converged else status
            penalty = min(penalty * GROWTH, LARGEST_PENALTY) if is_slow else penalty
            progress = infeasible
            multipliers = candidate.multipliers.clamp(-MOST_MULTIPLIER, MOST_MULTIPLIER)
            tolerance = max(least, TIGHTENING * min(tolerance, point.norm))

    def _finished(self, candidate: Candidate) -> Status | None:
        """Whether a subproblem's solution, or its refinement by Newton's method, meets the tolerance."""
        tol = self.limits.tol
        if residual(self.objective, candidate) <= tol:
            self._end = candidate
        elif self.objective.is_small:
            self._end = newton_end(
                self.objective,
                candidate,
                target=tol,
                floor=self.least,
                may_go_on=self._may_go_on,
                report=self._advance,
            )
        if self._end is not None:
            return Status.converged if residual(self.objective, self._end) <= tol else Status.precision_limit
        return Status.stopped_by_callback if self.is_stopped else None

    def _may_go_on(self) -> bool:
        return not self.is_stopped and self.n_iter < self.limits.max_iter and self.evaluations_left >= 1

    def _advance(self, candidate: Candidate, step: float) -> None:
        self.n_iter += 1
        self.record(candidate.point, step)
        self.report(candidate.point)

    def _restore(self, values: Values) -> tuple[Status | None, Values]:
        """Minimize the violation alone; say if it has a local minimum that is not zero."""
        objective, tol = self.objective, self.least
        objective.set_multipliers(torch.zeros_like(objective.multipliers), 1.0, fun_weight=0.0)
        self.penalty_learned = math.nan
        try:
            status, point = self._minimize(values, STATIONARY * tol * values.violation)
        finally:
            objective.set_multipliers(objective.multipliers, 1.0)
            self.penalty_learned = math.nan
        if status in ENDS:
            return status, values
        violation = point.graph.violation
        is_stationary = violation > tol and point.norm <= STATIONARY * violation
        return (Status.infeasible if is_stationary else None), point.graph

    def _minimize(self, values: Values, tolerance: float) -> tuple[Status, Point]:
        """Minimize one subproblem from a point where the values are known."""
        self.n_outer += 1
        self.objective.remember(values)
        run = _SubRun(self, tolerance)
        if run.evaluations_left < 1 and not self.objective.is_known(values.x):
            return Status.max_eval, self.best
        start = run.start(values.x, scale=1.0)
        if self.objective.penalty != self.penalty_learned:
            self.descend, self.penalty_learned = self.new_descent(), self.objective.penalty
        status = self.descend(run, start)
        self.n_negative_curvature += run.n_negative_curvature
        return status, run.best


def _is_far(point: Point, start: Values) -> bool:
    return largest(point.x) > FAR * max(1.0, largest(start.x))
