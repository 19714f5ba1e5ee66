"""The solver of ``minimize`` as an optimizer's step. Its model of the curvature carries over from call to call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from descend.second_order.mathematics.directions import CompactInverse
from descend.second_order.problem.parameter_objective import ClosureObjective
from descend.second_order.problem.parameters import ClosureFunction, Evaluation, FlatParameters
from descend.second_order.solvers.box import CompactHessian, bounded_descent
from descend.second_order.solvers.compiled_history import compact_inverse
from descend.second_order.solvers.descent import line_search_descent
from descend.second_order.solvers.result import Status
from descend.second_order.solvers.run import Run
from descend.second_order.solvers.torch_lbfgs import LBFGSOptions


class KeptLearner:
    """What an optimizer has learned, kept between its steps, so that its memory is not allocated again."""

    def __init__(self) -> None:
        self._learner: CompactInverse | CompactHessian | None = None
        self._made_for: Any = None
        self._state: Any = None

    def take(
        self, point: FlatParameters, history_size: int, has_bounds: bool, state: Mapping[str, Any] | None
    ) -> CompactInverse | CompactHessian:
        """The learner in a ``state``: the kept one if that is its own, else a new one; empty if none fits."""
        sizes = point.numel, history_size, point.dtype, point.device
        wanted = (*sizes, has_bounds, point.space.is_shared)
        if self._learner is not None and state is self._state and wanted == self._made_for and not wanted[-1]:
            return self._learner
        make: Any = CompactHessian if has_bounds else compact_inverse
        learner: CompactInverse | CompactHessian = make(*sizes, point.space)
        if learner.accepts(state):
            assert state is not None
            learner.load(state)
        self._learner, self._made_for = learner, wanted
        return learner

    def state(self) -> dict[str, Any]:
        """The learner's state, by which ``take`` knows it again."""
        assert self._learner is not None
        self._state = state = self._learner.state()
        return state


def modern_step(
    function: ClosureFunction,
    first: Callable[[], Evaluation],
    point: FlatParameters,
    bounds: tuple[Tensor, Tensor] | None,
    options: LBFGSOptions,
    state: dict[str, Any],
    kept: KeptLearner,
) -> tuple[Any, Run, Status]:
    """Take up to ``max_iter`` iterations, and set the parameters to the best point.

    Args:
        function: the closure.
        first: the first evaluation.
        point: the parameters.
        bounds: flat lower and upper bounds.
        options: torch's.
        state: counters, and ``"scale"`` and ``"learned"`` from the step before; updated.
        kept: the learner of the step before.
    Returns:
        The closure's first loss, the run, and why it stopped.
    """
    objective = ClosureObjective(function, first, point, bounds)
    lr = float(options.lr)
    # With lr=0, as at the start of a warm-up, nothing moves, although the first iteration's step is independent of lr.
    max_iter = options.max_iter if lr else 0
    run = Run(objective, tol=options.tolerance_grad, max_iter=max_iter, max_eval=max(1, options.max_eval))
    learner = kept.take(point, options.history_size, bounds is not None, state.get("learned"))
    x = point.gather()
    try:
        start = run.start(x if bounds is None else x.clamp(*bounds), state.get("scale"))
        if isinstance(learner, CompactInverse):
            status = line_search_descent(run, start, learner, lr)
        else:
            status = bounded_descent(run, start, learner, lr)
    finally:
        point.restore_(run.best.x if run.history else x)
        state["func_evals"] += function.n_eval
        state["n_iter"] += run.n_iter
        state["learned"] = kept.state()
    if start.is_finite:
        state.setdefault("scale", start.norm)
    return objective.first_loss, run, status
