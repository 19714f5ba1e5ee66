"""Gradient descent, L-BFGS and Newton in one valley and on real data, and what a dense Newton step costs.

python examples/learn_second_order.py
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from figures import BLUE, GREEN, INK, ORANGE, PALE, Chapter, name_curve, new_figure, use_log_scale
from sklearn.datasets import load_breast_cancer
from torch import Tensor

import descend

Method = Literal["gd", "l-bfgs", "newton"]
METHODS: dict[Method, tuple[str, str]] = {
    "gd": ("gradient descent", ORANGE),
    "l-bfgs": ("L-BFGS", BLUE),
    "newton": ("Newton", GREEN),
}


def rosenbrock(x: Tensor) -> Tensor:
    """Rosenbrock 1960: a curved valley, steep across and nearly flat along."""
    return 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2


def valley(chapter: Chapter) -> None:
    """The three paths through one valley."""
    figure, axes = new_figure("Three ways through a valley", "x", "y")
    figure.set_figheight(4.2)
    x, y = torch.meshgrid(torch.linspace(-1.6, 1.4, 120), torch.linspace(-0.6, 2.2, 120), indexing="xy")
    levels = [0.1 * 4**k for k in range(8)]
    axes.contour(x, y, rosenbrock(torch.stack([x, y])), levels=levels, colors=PALE, linewidths=0.8)
    start = torch.tensor([-1.2, 1.0], dtype=torch.float64)
    for method, (name, color) in METHODS.items():
        path = [start]
        result = descend.minimize(
            rosenbrock,
            start,
            method=method,
            max_iter=50 if chapter.quick else None,
            callback=lambda p, path=path: path.append(p.x),
        )
        drawn = path[:1]
        for point in path[1:]:
            if torch.dist(point, drawn[-1]) > 0.01:  # what the eye can tell apart
                drawn.append(point)
        xs, ys = torch.stack(drawn).unbind(1)
        axes.plot(xs, ys, ".-", color=color, label=name, linewidth=1.2, markersize=4)
        chapter.say(f"{name}: {result.n_iter} iterations, {result.n_eval} evaluations, f = {result.fun:.0e}")
    axes.plot(1, 1, "*", color=INK, markersize=10)
    axes.grid(False)
    axes.legend(loc="lower left")
    chapter.save(figure, "valley")


def logistic_regression() -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """The loss of a logistic regression on 569 tumours with 30 measurements each, and where it starts."""
    data = load_breast_cancer()
    inputs, labels = torch.tensor(data.data), torch.tensor(data.target, dtype=torch.float64)
    inputs = (inputs - inputs.mean(0)) / inputs.std(0)

    def loss(weights: Tensor) -> Tensor:
        scores = inputs @ weights[1:] + weights[0]
        fit = torch.nn.functional.binary_cross_entropy_with_logits(scores, labels)
        return fit + 1e-4 * weights.square().sum()

    return loss, torch.zeros(31, dtype=torch.float64)


def real_data(chapter: Chapter) -> None:
    """The distance from the minimum after each evaluation."""
    loss, start = logistic_regression()
    best = descend.minimize(loss, start, method="newton", tol=1e-12).fun
    figure, axes = new_figure(
        "A logistic regression with 31 weights", "evaluations of loss and gradient", "loss above the minimum"
    )
    for method, (name, color) in METHODS.items():
        seen: list[tuple[int, float]] = [(1, float(loss(start)) - best)]
        descend.minimize(
            loss,
            start,
            method=method,
            tol=1e-10,
            max_eval=100 if chapter.quick else 3000,
            callback=lambda p, seen=seen: seen.append((p.n_eval, p.fun - best)),
        )
        seen = [(evaluations, max(above, 1e-15)) for evaluations, above in seen]
        axes.plot(*zip(*seen, strict=True), color=color)
        name_curve(axes, *seen[-1], name, color, dx=-40 if method == "gd" else 4, dy=8)
        reached = next((evaluations for evaluations, above in seen if above <= 1e-9), None)
        chapter.say(f"{name}: within 1e-9 of the minimum after {reached} evaluations")
    use_log_scale(axes, "xy")
    chapter.save(figure, "regression")


def chained_rosenbrock(x: Tensor) -> Tensor:
    """Rosenbrock's valley in any number of dimensions."""
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def seconds_per_iteration(method: Method, variables: int) -> float:
    """The shortest time between two iterations."""
    times: list[float] = []
    start = torch.full((variables,), -0.5, dtype=torch.float64)
    descend.minimize(
        chained_rosenbrock, start, method=method, max_iter=3, callback=lambda _: times.append(time.perf_counter())
    )
    return min(late - early for early, late in pairwise(times))


def cost(chapter: Chapter) -> None:
    """The time of an iteration on one thread against the number of variables."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    figure, axes = new_figure("What an iteration costs", "variables N", "seconds an iteration")
    for method, sizes in (
        ("l-bfgs", [100, 1000] if chapter.quick else [100, 1000, 10_000, 100_000]),
        ("newton", [50, 100] if chapter.quick else [100, 200, 400, 800, 1600]),
    ):
        name, color = METHODS[method]
        seconds_per_iteration(method, sizes[0])
        times = [seconds_per_iteration(method, size) for size in sizes]
        axes.plot(sizes, times, "o-", color=color, markersize=4)
        name_curve(axes, sizes[-1], times[-1], name, color, dx=-50, dy=6)
        for size, seconds in zip(sizes, times, strict=True):
            chapter.say(f"{name}, N = {size:,}: {1e3 * seconds:,.1f} ms an iteration")
        power, _ = np.polyfit(np.log(sizes[-3:]), np.log(times[-3:]), 1)
        chapter.say(f"{name}: the largest {len(sizes[-3:])} grow as N^{power:.1f}")
    torch.set_num_threads(threads)
    use_log_scale(axes, "xy")
    chapter.save(figure, "cost")


def main(arguments: Sequence[str] | None = None) -> None:
    """Compute the chapter's figures."""
    chapter = Chapter("second-order", __file__, arguments)
    valley(chapter)
    real_data(chapter)
    cost(chapter)
    chapter.close()


if __name__ == "__main__":
    main()
