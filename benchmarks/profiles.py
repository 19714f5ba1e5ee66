"""Performance profiles: one picture of how often each solver is nearly the best."""

from __future__ import annotations

from pathlib import Path

from race import OURS, Outcomes

WIDEST = 16.0
"""How far a performance profile reaches, in multiples of the least cost."""


def plot_profiles(contests: dict[str, Outcomes], file: Path) -> None:
    """Draw for each solver which share of its problems it solves within a multiple of the least cost.

    Args:
        contests: title -> outcomes; each becomes a picture of its own, side by side in one file.
        file: where to; its ending names the format.

    Source: Dolan & Moré 2002, https://doi.org/10.1007/s101070100263
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(contests), figsize=(6 * len(contests), 4.5), squeeze=False, sharey=True)
    for axis, (title, results) in zip(axes[0], contests.items(), strict=True):
        for name in {name: None for solvers in results.values() for name in solvers}:
            reached = [solvers for solvers in results.values() if name in solvers and solvers[name].solved]
            least = [min(run.cost for run in solvers.values() if run.solved) for solvers in reached]
            factors = sorted(solvers[name].cost / best for solvers, best in zip(reached, least, strict=True))
            entered = sum(name in solvers for solvers in results.values())
            shares = [place / entered for place in range(len(factors) + 1)]
            factors, shares = [1.0, *factors, WIDEST], [*shares, shares[-1]]
            axis.step(factors, shares, where="post", label=name, linewidth=2 if name == OURS else 1)
        axis.set(xscale="log", xlim=(1, WIDEST), ylim=(0, 1), xlabel="cost over the least cost", title=title)
        axis.set_xticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
        axis.legend(loc="lower right")
    axes[0][0].set_ylabel("share of problems solved")
    figure.tight_layout()
    figure.savefig(file, dpi=120)
