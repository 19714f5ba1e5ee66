"""A table of a million rows, trained with dense and with sparse gradients on Python's own sources.

python examples/learn_sparse.py
"""

from __future__ import annotations

import gc
import os
import platform
import re
import time
import zlib
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from figures import BLUE, GREEN, ORANGE, Chapter, name_curve, new_figure, use_log_scale
from torch import Tensor, nn

import descend

WIDTH, BATCH, LR = 32, 256, 1e-3
MODES: dict[str, tuple[dict[str, Any], str]] = {
    "dense": ({}, ORANGE),
    "exact": ({"sparse": "exact", "state_pages": "touched"}, BLUE),
    "touched": ({"sparse": "touched", "state_pages": "touched"}, GREEN),
}


class Lines:
    """Lines of the standard library's modules, and the number of the module that each comes from.

    A line is the hashes of its words and of its pairs of neighbours.
    """

    def __init__(self, modules: int) -> None:
        paths = sorted(Path(os.__file__).parent.glob("*.py"))[:modules]
        self.lines: list[tuple[list[int], int]] = []
        for module, path in enumerate(paths):
            for line in path.read_text("utf-8").splitlines():
                words = re.findall(r"\w+", line)
                pairs = [f"{a} {b}" for a, b in pairwise(words)]
                if words:
                    self.lines.append(([zlib.crc32(token.encode()) for token in words + pairs], module))
        self.modules = len(paths)

    def batches(self, rows: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Random batches: row numbers, where each line begins among them, and modules."""
        generator = torch.Generator().manual_seed(0)
        while True:
            chosen = [self.lines[i] for i in torch.randint(len(self.lines), (BATCH,), generator=generator).tolist()]
            starts = torch.tensor([0] + [len(tokens) for tokens, _ in chosen[:-1]]).cumsum(0)
            tokens = torch.tensor([token % rows for line, _ in chosen for token in line])
            yield tokens, starts, torch.tensor([module for _, module in chosen])


class Classifier(nn.Module):
    """The mean of a line's rows, and a linear layer."""

    def __init__(self, rows: int, modules: int, is_sparse: bool, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.EmbeddingBag(rows, WIDTH, sparse=is_sparse, dtype=dtype)
        self.head = nn.Linear(WIDTH, modules, dtype=dtype)

    def forward(self, tokens: Tensor, starts: Tensor) -> Tensor:
        """Scores of the modules."""
        scores: Tensor = self.head(self.table(tokens, starts))
        return scores


class Training:
    """A model with its optimizer, step by step."""

    def __init__(self, lines: Lines, rows: int, mode: str, dtype: torch.dtype = torch.float32) -> None:
        options, _ = MODES[mode]
        self.model = Classifier(rows, lines.modules, mode != "dense", dtype)
        self.optimizer = descend.AdamW(self.model.parameters(), lr=LR, weight_decay=0.1, **options)
        if mode == "exact":
            self.optimizer.attach(self.model)
        self.batches = lines.batches(rows)

    def step(self) -> float:
        """Forward, backward and the optimizer's step; the seconds they took."""
        tokens, starts, modules = next(self.batches)
        began = time.perf_counter()
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.model(tokens, starts), modules).backward()
        self.optimizer.step()
        return time.perf_counter() - began

    def weights(self) -> Tensor:
        """The table, every row up to date."""
        return self.model.state_dict()["table.weight"].clone()


def resident() -> float:
    """Bytes of memory that the process occupies; NaN where the system does not say."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else float("nan")


def cost(chapter: Chapter, lines: Lines) -> None:
    """The fastest training step for tables of several sizes, in turns, and the memory of the largest."""
    sizes, warm, steps = ([1000, 2000], 1, 2) if chapter.quick else ([10_000, 100_000, 1_000_000], 5, 25)
    seconds: dict[tuple[str, int], float] = {}
    for rows in sizes:
        trainings, megabytes = {}, {}
        for mode in MODES:
            gc.collect()
            before = resident()
            trainings[mode] = Training(lines, rows, mode)
            for _ in range(warm):
                trainings[mode].step()
            megabytes[mode] = (resident() - before) / 1e6
        times: dict[str, list[float]] = {mode: [] for mode in MODES}
        for _ in range(steps):
            for mode, training in trainings.items():
                times[mode].append(training.step())
        for mode in MODES:
            seconds[mode, rows] = min(times[mode])
            chapter.say(f"{rows:,} rows, {mode}: {1e3 * seconds[mode, rows]:.1f} ms a training step")
    for mode in MODES:
        chapter.say(f"{sizes[-1]:,} rows, {mode}: {megabytes[mode]:.0f} MB for weights, gradients and state")
    figure, axes = new_figure("A step costs what it touches", "rows of the table", "milliseconds a training step")
    for mode, (_, color) in MODES.items():
        times_of_mode = [1e3 * seconds[mode, rows] for rows in sizes]
        axes.plot(sizes, times_of_mode, "o-", color=color, markersize=4, label=mode)
    axes.legend()
    use_log_scale(axes, "xy")
    chapter.save(figure, "cost")


def equality(chapter: Chapter, lines: Lines) -> None:
    """How far the weights are from those of the dense run, in units of the learning rate."""
    rows, checks, steps = (1000, 2, 3) if chapter.quick else (20_000, 10, 20)
    trainings = {mode: Training(lines, rows, mode, torch.float64) for mode in MODES}
    away: dict[str, list[float]] = {"exact": [], "touched": []}
    for _ in range(checks):
        for training in trainings.values():
            for _ in range(steps):
                training.step()
        dense = trainings["dense"].weights()
        for mode, distances in away.items():
            distances.append(float((trainings[mode].weights() - dense).abs().max()) / LR)
    figure, axes = new_figure("Exact is what dense computes", "step", "largest difference from dense / lr")
    for mode, distances in away.items():
        color = MODES[mode][1]
        axes.plot(range(steps, steps * checks + 1, steps), distances, "o-", color=color, markersize=4)
        name_curve(axes, steps, distances[0], mode, color, dx=8, dy=12 if mode == "exact" else -12)
        chapter.say(
            f"{mode}: after {steps * checks} steps no weight differs from dense by more than {distances[-1]:.3g} lr"
        )
    use_log_scale(axes, "y")
    chapter.save(figure, "equality")


def main(arguments: Sequence[str] | None = None) -> None:
    """Compute the chapter's figures."""
    chapter = Chapter("sparse", __file__, arguments)
    lines = Lines(10 if chapter.quick else 100)
    distinct = len({token for tokens, _ in lines.lines for token in tokens})
    source = f"{lines.modules} modules of Python {platform.python_version()}"
    chapter.say(f"{len(lines.lines):,} lines of {source}, {distinct:,} different words and pairs")
    equality(chapter, lines)
    cost(chapter, lines)
    chapter.close()


if __name__ == "__main__":
    main()
