"""The runs behind docs/which-optimizer.md: reads what ``descend compare --sweep`` has written; prints and draws it.

Usage: ``python examples/which_optimizer.py runs/digits [runs/text ...] [--figure docs/which-optimizer-digits.svg]``.
The commands that make the runs are on the page. Of each optimizer: its best learning rate, by the median of the final
test losses over the seeds; the losses there; and the rates that are nearly as good. ``--curves`` draws the test losses
at that rate against the steps, ``--figure`` the final ones against the rate.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from figures import BLUE, GREEN, INK, ORANGE, PURPLE, new_figure, use_log_scale, with_dark_scheme
from matplotlib.figure import Figure

NEARLY = 0.05  # nats above the best loss
Losses = dict[float, list[float]]  # by learning rate, of each seed; inf for a run that diverged
Curves = dict[float, list[dict[int, float]]]  # by learning rate, of each seed that finished: test losses by step


def read(folder: Path) -> tuple[str, dict[str, Losses], dict[str, Curves]]:
    """The task's name, and the test losses by optimizer and rate: the last ones, and all of them."""
    head, *runs = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    losses: dict[str, Losses] = defaultdict(lambda: defaultdict(list))
    curves: dict[str, Curves] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        is_number = run["status"] == "finished" and run["test_losses"] and run["test_losses"][-1] is not None
        losses[run["label"]][run["lr"]].append(run["test_losses"][-1] if is_number else float("inf"))
        if is_number:
            curves[run["label"]][run["lr"]].append(dict(zip(run["test_steps"], run["test_losses"], strict=True)))
    return head["task"], {label: dict(sorted(by_rate.items())) for label, by_rate in losses.items()}, curves


def median(values: list[float]) -> float:
    return statistics.median(values)


def best_rate(by_rate: Losses) -> float:
    return min(by_rate, key=lambda rate: median(by_rate[rate]))


def rows(optimizers: dict[str, Losses]) -> list[str]:
    """A Markdown table, best optimizer first."""
    table = []
    for label, by_rate in optimizers.items():
        best = best_rate(by_rate)
        least = median(by_rate[best])
        near = [rate for rate in by_rate if median(by_rate[rate]) <= least + NEARLY]
        spread = f"{min(by_rate[best]):.3f} to {max(by_rate[best]):.3f}"
        nearly = f"{min(near):.2g} to {max(near):.2g}" if len(near) > 1 else f"{best:.2g} alone"
        table.append((least, f"| `{label}` | {best:.2g} | {least:.3f} | {spread} | {nearly} |"))
    head = "| optimizer | best `lr` | test loss, median | over the seeds | rates within 0.05 |"
    return [head, "|---|---|---|---|---|", *(row for _, row in sorted(table))]


def draw(task: str, optimizers: dict[str, Losses], path: Path) -> None:
    """The median test loss against the learning rate."""
    figure, axes = new_figure(f"{task}: held-out loss", "learning rate", "")
    for (label, by_rate), color in zip(optimizers.items(), (BLUE, ORANGE, GREEN, PURPLE, INK), strict=False):
        points = [(rate, median(losses)) for rate, losses in by_rate.items() if median(losses) < 10]
        axes.plot(*zip(*points, strict=True), color=color, marker="o", markersize=3.5, label=label)
    use_log_scale(axes, "xy")
    axes.legend(loc="upper center", fontsize="small")
    save(figure, path)


def draw_curves(task: str, best: dict[str, tuple[float, list[dict[int, float]]]], path: Path) -> None:
    """The test loss of each optimizer at its best rate, against the steps: the median, and the range of the seeds."""
    figure, axes = new_figure(f"{task}: held-out loss", "step", "")
    for (label, (rate, seeds)), color in zip(best.items(), (BLUE, ORANGE, GREEN, PURPLE, INK), strict=False):
        steps = sorted(set.intersection(*map(set, seeds)))
        each = [[seed[step] for seed in seeds] for step in steps]
        axes.fill_between(
            steps, [min(found) for found in each], [max(found) for found in each], color=color, alpha=0.15
        )
        name = label if "lr=" in label else f"{label}, lr {rate:g}"
        axes.plot(steps, list(map(median, each)), color=color, label=name)
    axes.legend(loc="upper right", fontsize="small")
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path, metadata={"Date": None})
    path.write_text(with_dark_scheme(path.read_text("utf-8")), "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="The tables of docs/which-optimizer.md.")
    parser.add_argument("folders", nargs="+", type=Path, help="written by descend compare --sweep")
    parser.add_argument("--figure", type=Path, help="draw the losses of the first task")
    parser.add_argument("--curves", type=Path, help="draw the first task's losses against the steps")
    parser.add_argument("--show", nargs="*", help="the optimizers drawn, in this order. Default: all")
    options: Any = parser.parse_args()
    tasks: dict[str, dict[str, Losses]] = {}
    curves: dict[str, dict[str, Curves]] = {}
    for task, optimizers, found in map(read, options.folders):
        tasks.setdefault(task, {}).update(optimizers)
        curves.setdefault(task, {}).update(found)
    for task, optimizers in tasks.items():
        print(f"{task}:\n", *rows(optimizers), "", sep="\n")
    task, optimizers = next(iter(tasks.items()))
    shown = {name: optimizers[name] for name in options.show or optimizers}
    if options.figure:
        draw(task, shown, options.figure)
    if options.curves:
        rates = {name: best_rate(by_rate) for name, by_rate in shown.items()}
        draw_curves(task, {name: (rate, curves[task][name][rate]) for name, rate in rates.items()}, options.curves)


if __name__ == "__main__":
    main()
