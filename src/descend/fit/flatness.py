"""Whether iterations still lower the function."""

from __future__ import annotations

from descend.second_order.solvers.run import Run

FTOL = 10_000_000 * 2.0**-52  # SciPy's default for L-BFGS-B
SEVERAL = 3  # iterations in a row after which a function whose gradient has few digits is taken as solved


class Flatness:
    """Counts iterations that lower the value by at most ``ftol``, relative to max(1, abs(value)).

    Args:
        ftol: relative decrease.
        patience: such iterations in a row after which a run is to end; infinite for never.
    """

    def __init__(self, ftol: float, patience: float) -> None:
        self.ftol, self.patience = ftol, patience
        self.in_a_row = 0

    def look(self, run: Run) -> bool:
        """Take the last iteration into account; return whether the run is to end."""
        self.in_a_row = self.in_a_row + 1 if is_flat(run, self.ftol) else 0
        return self.is_reached

    @property
    def is_reached(self) -> bool:
        return self.in_a_row >= self.patience


def is_flat(run: Run, ftol: float) -> bool:
    """Whether there was an iteration, and the last one lowered the value by at most ``ftol``, as SciPy counts it."""
    if not run.n_iter:
        return False
    before, after = run.history[-2].fun, run.history[-1].fun
    return before - after <= ftol * max(abs(before), abs(after), 1.0)
