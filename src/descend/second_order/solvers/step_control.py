"""How far to trust linear models of residuals: a region that grows and shrinks, or a damping."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from descend.second_order.mathematics.fit_rules import FIRST_RADIUS, radius_after, shortening
from descend.second_order.mathematics.gauss_newton import LinearModel
from descend.second_order.mathematics.trust_region import TrialStep


class StepControl(Protocol):
    """Chooses steps, and learns from how they went."""

    def begin(self, model: LinearModel, x: Tensor) -> None:
        """Start at ``x``."""

    def step(self, model: LinearModel) -> TrialStep:
        """The next trial."""

    def accept(self, trial: TrialStep, ratio: float) -> None:
        """Learn from a step that was taken; ``ratio``: fall of the cost by the predicted one."""

    def reject(self, trial: TrialStep, ratio: float) -> None:
        """Learn from one that was not; -inf where the residuals or the Jacobian were not finite."""

    def shorten(self, trial: TrialStep, factor: float) -> None:
        """Try the step again, so much shorter."""


class TrustRegion:
    """A radius in the norm |D s|, changed as in MINPACK.

    The first is half the length of the start, or all of the Gauss-Newton step from zero. MINPACK's, 100 times the
    start, often leads to where a model has faded to a constant.

    Args:
        radius: the last one of a run before; None without one.
    Source: Moré 1978, section 4, https://doi.org/10.1007/BFb0067700
    """

    def __init__(self, radius: float | None = None) -> None:
        self.radius = radius

    def begin(self, model: LinearModel, x: Tensor) -> None:
        if self.radius is None:
            self.radius = FIRST_RADIUS * model.length(x) or model.newton().norm or 1.0

    def step(self, model: LinearModel) -> TrialStep:
        assert self.radius is not None
        return model.step(self.radius)

    def accept(self, trial: TrialStep, ratio: float) -> None:
        self.radius = radius_after(self.radius, trial.norm, ratio, trial.on_boundary)

    def reject(self, trial: TrialStep, ratio: float) -> None:
        self.shorten(trial, shortening(ratio))

    def shorten(self, trial: TrialStep, factor: float) -> None:
        self.radius = factor * trial.norm


class Damping:
    """Nielsen's damping.

    Args:
        damping: the last one of a run before; None without one.
    Source: Madsen, Nielsen & Tingleff 2004, Algorithm 3.16, http://www2.imm.dtu.dk/pubdb/p.php?3215
    """

    FIRST = 1e-3  # times the largest diagonal entry of (J D^-1)'(J D^-1), which is 1

    def __init__(self, damping: float | None = None) -> None:
        self.damping = self.FIRST if damping is None else damping
        self.growth = 2.0

    def begin(self, model: LinearModel, x: Tensor) -> None:
        pass

    def step(self, model: LinearModel) -> TrialStep:
        return model.damped_step(self.damping)

    def accept(self, trial: TrialStep, ratio: float) -> None:
        self.damping *= max(1 / 3, 1 - (2 * min(ratio, 1.0) - 1) ** 3)
        self.growth = 2.0

    def reject(self, trial: TrialStep, ratio: float) -> None:
        self.damping *= self.growth
        self.growth *= 2

    def shorten(self, trial: TrialStep, factor: float) -> None:
        if factor < 1:
            self.damping *= 1 / factor**2
