"""Directions of many problems with bounds are the minimizers of single ones."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from descend.second_order.solvers import batched_box
from descend.second_order.solvers.batched_box import BoxedModels
from descend.second_order.solvers.box import CompactHessian, max_feasible_step, minimizer

HISTORY = 4
EVERYWHERE = np.arange(6)


class Boxes:
    """Six problems of n variables, each with a history of its own length, and with bounds near its point."""

    def __init__(self, numel: int, seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        self.x, self.grad = random.normal(size=(2, 6, numel))
        self.lower = self.x - random.uniform(0, 1, (6, numel)) * random.integers(0, 3, (6, numel))
        self.upper = self.x + random.uniform(0, 1, (6, numel)) * random.integers(0, 3, (6, numel))
        self.lower[3], self.upper[3] = -math.inf, math.inf
        self.many = BoxedModels(self.x, HISTORY)
        self.single = [CompactHessian(numel, HISTORY, torch.float64, torch.device("cpu")) for _ in range(6)]
        for pair in range(7):
            rows = EVERYWHERE[pair < np.array([0, 1, 3, 4, 5, 7])]
            s = random.normal(size=(len(rows), numel)) * random.integers(0, 2, (len(rows), numel))
            s[:, 0] = 1.0
            y = s * random.uniform(0.5, 2, (len(rows), numel)) + 0.1 * s.sum(1, keepdims=True)
            self.many.update(rows, s, y)
            for row, *one in zip(rows, s, y, strict=True):
                self.single[row].update(*map(torch.from_numpy, one))

    def directions(self) -> tuple[Any, Any]:
        limits = self.x, self.grad, self.lower, self.upper
        return self.many.directions(np.full(6, True), *limits, np.full(6, 0.7))


@pytest.mark.parametrize("little", [-1, math.inf], ids=["compiled", "python"])
@pytest.mark.parametrize("numel", [1, 2, 7, 40])
def test_directions_are_minimizers_in_boxes(numel: int, little: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batched_box, "LITTLE", little)
    boxes = Boxes(numel)
    low, high = boxes.lower - boxes.x, boxes.upper - boxes.x
    directions, ends = boxes.directions()
    assert ((low <= directions) & (directions <= high)).all()
    assert np.array_equal(directions[0], np.clip(-0.7 * boxes.grad[0], low[0], high[0]))
    for i in range(6):
        grad, *box = (torch.from_numpy(array[i]) for array in (boxes.grad, low, high))
        if i:
            expected = minimizer(boxes.single[i], grad, *box)
            assert np.allclose(directions[i], expected, rtol=1e-9, atol=1e-12)
        longest = max_feasible_step(torch.from_numpy(directions[i]), *box, boxes.single[i].space)
        assert ends[i] == pytest.approx(longest, rel=1e-12)


def test_directions_do_not_depend_on_compiler_or_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    threads, found = torch.get_num_threads(), []
    for little, count, work in ((math.inf, 1, 0), (-1, 1, 0), (-1, 3, 2**40)):
        monkeypatch.setattr(batched_box, "LITTLE", little)
        monkeypatch.setattr(batched_box, "WORK", work)
        torch.set_num_threads(count)
        try:
            found.append(np.column_stack(Boxes(5).directions()).tobytes())
        finally:
            torch.set_num_threads(threads)
    assert len(set(found)) == 1


@pytest.mark.parametrize("number", [0.0, math.nan, math.inf, 1e308, -1.0])
def test_directions_stay_in_the_box_whatever_was_learned(number: float) -> None:
    boxes = Boxes(4)
    for array in (boxes.many.learned.changes, boxes.many.learned.steps, boxes.many.learned.diagonal):
        before = array.copy()
        array[1:3, ..., 0] = number
        with np.errstate(all="ignore"):
            directions, ends = boxes.directions()
        assert ((boxes.lower - boxes.x <= directions) & (directions <= boxes.upper - boxes.x)).all()
        assert (ends >= 1).all()
        array[...] = before


def test_models_forget() -> None:
    boxes = Boxes(3)
    boxes.many.reset(np.array([5]))
    boxes.many.keep(np.array([0, 2, 5]))
    assert boxes.many.is_steepest.tolist() == [True, False, True]
    for name in ("x", "grad", "lower", "upper"):
        setattr(boxes, name, getattr(boxes, name)[[0, 2, 5]])
    directions, _ = boxes.many.directions(
        np.array([True, False, True]), boxes.x, boxes.grad, boxes.lower, boxes.upper, np.ones(3)
    )
    assert np.array_equal(
        directions[2], np.clip(-boxes.grad[2], boxes.lower[2] - boxes.x[2], boxes.upper[2] - boxes.x[2])
    )
