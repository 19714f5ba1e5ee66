"""An ``optimizer=`` for ``botorch.fit.fit_gpytorch_mll``."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from descend.fit.flatness import FTOL, SEVERAL, Flatness, is_flat
from descend.second_order.function_problem import FunctionProblem
from descend.second_order.problem.objective import Point
from descend.second_order.solvers.box import CompactHessian, bounded_descent
from descend.second_order.solvers.result import MESSAGES, Status
from descend.second_order.solvers.run import Run

WHO = "fit_gpytorch_mll_descend"
Closure = Callable[..., tuple[Tensor, Sequence[Tensor | None]]]
OPTIONS = {"gtol": 1e-5, "ftol": None, "maxiter": 15_000, "maxfun": 15_000, "maxcor": 10}
AMPLIFICATION = 100.0  # of rounding errors, by factorizations of ill-conditioned kernel matrices
NEGLIGIBLE = 100.0  # times ftol: a decrease after which a fit that rounding ends need not be repeated
SOLVED = "The gradient is within gtol."
FLAT = "The last iterations hardly lowered the loss, and rounding allows no more."


def fit_gpytorch_mll_descend(
    mll: Any,
    parameters: dict[str, Tensor] | None = None,
    bounds: dict[str, tuple[Any, Any]] | None = None,
    closure: Closure | None = None,
    closure_kwargs: dict[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    callback: Callable[[dict[str, Tensor], Any], Any] | None = None,
    timeout_sec: float | None = None,
) -> Any:
    """Maximize a marginal log likelihood by L-BFGS, with the bounds of its parameters, as BoTorch's optimizers do.

    It takes the place of ``botorch.optim.fit.fit_gpytorch_mll_scipy``, with its arguments and its result:

        fit_gpytorch_mll(mll, optimizer=fit_gpytorch_mll_descend, optimizer_kwargs={"options": {"gtol": 1e-6}})

    The likelihood must be in training mode and deterministic: no mini-batches. Parameters of batched models with
    several outputs are one problem. ``NotPSDError``, ``NanError`` and failed factorizations away from the start are
    walls: a shorter step is tried. The module is left at the best point evaluated, whatever happens.

    Args:
        mll: a ``gpytorch.mlls.MarginalLogLikelihood``.
        parameters: tensors to optimize, by name. Default: those of ``mll`` that require gradients.
        bounds: (lower, upper) by name, None or infinite where there is no bound; they replace those that constraints of
            the parameters imply. Default: the latter.
        closure: returns the loss and its gradients, in the order of ``parameters``. Default:
            ``botorch.optim.closures.get_loss_closure_with_grads(mll, parameters)``.
        closure_kwargs: keyword arguments of ``closure``.
        options: ``gtol``: converged when the largest entry of the (projected) gradient is at most this; 1e-5 by
            default. ``ftol``: end when an iteration lowers the loss by less than this, relative to max(1, abs(loss));
            by default, when three in a row lower it by less than 2.2e-9. ``maxiter`` and ``maxfun``: iterations and
            evaluations at most; 15,000. ``maxcor``: steps from which the Hessian is approximated; 10.
        callback: called after each iteration with ``parameters``, set to the iterate, and an ``OptimizationResult``;
            stops the run by raising ``StopIteration``.
        timeout_sec: seconds after which the run ends with an iteration. Default: no limit.
    Returns:
        A ``botorch.optim.core.OptimizationResult``: ``SUCCESS`` where the solver converged, ``STOPPED`` at a limit or
        by ``callback``, else ``FAILURE``, with BoTorch's ``OptimizationWarning``, at which ``fit_gpytorch_mll``
        starts anew from parameters drawn from their priors.
    Raises:
        ValueError, TypeError: if ``options`` or ``bounds`` are not as above; before anything is evaluated.
        NotPSDError: from the start.
        ImportError: without BoTorch.

    Source:
        ``minimize``; Rasmussen & Williams 2006, section 5.4.1, for the likelihood.
    """
    try:
        from botorch.optim.closures import get_loss_closure_with_grads
        from botorch.optim.core import OptimizationResult, OptimizationStatus
        from botorch.optim.utils import get_parameters_and_bounds
    except ImportError as error:
        raise ImportError(f"{WHO} fits BoTorch's models: pip install 'descend[botorch]'.") from error
    settings = _options(options)
    found, default_bounds = get_parameters_and_bounds(mll)
    if parameters is None:
        parameters = {name: parameter for name, parameter in found.items() if parameter.requires_grad}
    closure = get_loss_closure_with_grads(mll, parameters=parameters) if closure is None else closure
    fit = _Fit(partial(closure, **(closure_kwargs or {})), parameters, {**default_bounds, **(bounds or {})}, settings)

    def report(step: int, value: float) -> None:
        if callback is not None:
            callback(parameters, OptimizationResult(step, value, OptimizationStatus.RUNNING, fit.seconds))

    status, message = fit.run(report, math.inf if timeout_sec is None else timeout_sec)
    result = OptimizationResult(fit.step, fit.value, OptimizationStatus[status], fit.seconds, message)
    if status == "FAILURE":
        from botorch.exceptions.warnings import OptimizationWarning

        warnings.warn(f"{WHO}: {message}", OptimizationWarning, stacklevel=2)
    return result


def _options(given: Mapping[str, Any] | None) -> dict[str, Any]:
    unknown = set(given or {}) - set(OPTIONS)
    if unknown:
        raise ValueError(f"{WHO}: options must be among {', '.join(OPTIONS)}, got {', '.join(map(str, unknown))}.")
    settings = {**OPTIONS, **(given or {})}
    for name, least in (("gtol", 0), ("ftol", 0), ("maxiter", 0), ("maxfun", 1), ("maxcor", 1)):
        value = settings[name]
        is_tolerance = name.endswith("tol")
        if not (isinstance(value, int | float if is_tolerance else int) and least <= value < math.inf) and not (
            name == "ftol" and value is None
        ):
            what = "a finite number" if is_tolerance else "an integer"
            raise ValueError(f"{WHO}: option {name} must be {what} >= {least}, got {value!r}.")
    return settings


class _Fit:
    """One run on a closure's parameters.

    Args:
        closure: returns the loss and its gradients at the parameters' present values.
        parameters: to be optimized, by name.
        bounds: by the parameters' names; others are ignored.
        settings: of ``OPTIONS``.
    """

    def __init__(
        self,
        closure: Closure,
        parameters: dict[str, Tensor],
        bounds: Mapping[str, tuple[Any, Any]],
        settings: Mapping[str, Any],
    ) -> None:
        from linear_operator.utils.errors import NanError, NotPSDError

        self.began = time.monotonic()
        self.closure, self.parameters, self.settings = closure, list(parameters.values()), settings
        self.nan_errors = (NanError, torch.linalg.LinAlgError)  # type: ignore[attr-defined]
        # The solver's vectors are short, so a GPU would only wait for the next one.
        start = [parameter.detach().cpu().clone() for parameter in self.parameters]
        sides = [[bounds.get(name, (None, None))[side] for name in parameters] for side in (0, 1)]
        with torch.inference_mode(False), torch.no_grad():
            self.problem = FunctionProblem(
                WHO, self._loss, start, (sides[0], sides[1]), jac=True, domain_errors=(NotPSDError,)
            )
        self.problem.objective.eps *= AMPLIFICATION
        eps = self.problem.structure.eps
        is_given = settings["ftol"] is not None
        self.flatness = Flatness(settings["ftol"] if is_given else max(FTOL, eps), 1 if is_given else SEVERAL)
        self.is_halted = self.is_late = False

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def _loss(self, values: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        self._set(values)
        try:
            loss, grads = self.closure()
        except self.nan_errors:
            return torch.tensor(math.nan), [torch.full_like(value, math.nan) for value in values]
        pairs = zip(grads, values, strict=False)  # the closure may have further gradients
        return loss.detach().cpu(), [torch.zeros_like(x) if grad is None else grad.cpu() for grad, x in pairs]

    def _set(self, values: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for parameter, value in zip(self.parameters, values, strict=True):
                parameter.copy_(value)

    def run(self, report: Callable[[int, float], None], timeout: float) -> tuple[str, str]:
        """Run the solver; return BoTorch's name for how it ended, and why.

        Args:
            report: called after each iteration with its number and the loss.
            timeout: seconds.
        """

        def after_iteration(run: Run, point: Point) -> bool:
            self._set(self.problem.split_tree(point.x))
            try:
                with torch.enable_grad():
                    report(run.n_iter, point.value)
            except StopIteration:
                self.is_halted = True
            self.is_late = self.seconds > timeout
            return self.flatness.look(run) or self.is_halted or self.is_late

        run = Run(
            self.problem.objective,
            tol=self.settings["gtol"],
            max_iter=self.settings["maxiter"],
            max_eval=self.settings["maxfun"],
            callback=after_iteration,
        )
        try:
            with torch.inference_mode(False), torch.no_grad():
                status = self._solve(run)
        finally:
            self._set(self.problem.split_tree(run.best.x if run.history else self.problem.start))
        self.step, self.value = run.n_iter, run.best.value
        return self._verdict(run, status)

    def _solve(self, run: Run) -> Status:
        x = self.problem.start
        point = run.start(x, scale=0.0)  # so that gtol is absolute
        return bounded_descent(run, point, CompactHessian(len(x), self.settings["maxcor"], x.dtype, x.device))

    def _verdict(self, run: Run, status: Status) -> tuple[str, str]:
        if status is Status.converged:
            return "SUCCESS", SOLVED
        if self.is_halted:
            return "STOPPED", "The callback raised StopIteration."
        is_late = self.is_late and status is Status.stopped_by_callback
        if is_late and not self.flatness.is_reached:
            return "STOPPED", f"Optimization timed out after {self.seconds} seconds."
        if status in (Status.max_iter, Status.max_eval):
            return "STOPPED", MESSAGES[status]
        is_rounding = status in (Status.precision_limit, Status.line_search_failed)
        if self.flatness.is_reached or (is_rounding and is_flat(run, NEGLIGIBLE * self.flatness.ftol)):
            return "SUCCESS", FLAT
        return "FAILURE", MESSAGES[status]
