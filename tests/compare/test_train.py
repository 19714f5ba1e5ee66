"""What a run makes of its losses."""

from __future__ import annotations

import dataclasses
import math

import pytest
from task_runs import problem_of

from descend.compare import specs
from descend.compare.records import WINDOW, Run, smooth
from descend.compare.tasks import regression
from descend.compare.train import diverged_at, train
from descend.compare.train import test_steps as points

DIVERGENCE: dict[str, tuple[list[float], int | None]] = {
    "none": ([], None),
    "learning": ([2.0, 1.0, 0.5], None),
    "nan": ([2.0, 1.0, math.nan, 1.0], 3),
    "inf": ([2.0, math.inf], 2),
    "nine times": ([2.0] + [18.0] * 50, None),
    "eleven times, to the end": ([2.0] * 30 + [22.0] * 50, 31),
    "there and back": ([2.0] + [1e6] * 10 + [1.0] * 30, None),
    "a spike at the end": ([2.0] * 30 + [1e6], None),
    "noisy": ([2.0] + [40.0, 40.0, 5.0] * 20, 2),
    "few steps": ([2.0, 30.0, 40.0], 2),
    "a first loss of 0": ([0.0] + [1.0] * 50, None),
}


@pytest.mark.parametrize("name", DIVERGENCE)
def test_hopeless_loss_is_a_divergence(name: str) -> None:
    losses, step = DIVERGENCE[name]
    assert diverged_at(losses) == step


def test_final_loss_is_the_end_of_the_smooth_curve() -> None:
    losses = [float(i % 7) for i in range(60)]
    run = Run("a", "a", "A", {}, None, 0, "finished", losses=losses)
    assert run.final_loss == pytest.approx(smooth(losses)[-1]) == pytest.approx(sum(losses[-WINDOW:]) / WINDOW)
    run.window = 1
    assert run.final_loss == losses[-1]
    run.status = "diverged"
    assert run.final_loss is None


@pytest.mark.parametrize("steps", [1, 3, 9, 10, 47, 50, 300, 1001])
def test_held_out_data_are_evaluated_about_ten_times(steps: int) -> None:
    found = points(steps)
    assert found[-1] == steps
    assert 1 <= len(found) <= 10
    assert found == sorted({*found})
    assert len(found) == 10 or steps < 50


@pytest.mark.parametrize(("text", "is_known"), [("adam", True), ("scipy.l-bfgs-b", False)])
def test_parts_and_state_of_a_solver_are_not_known(text: str, is_known: bool) -> None:
    [spec] = specs.parse_all([text], regression.TASK.lr)
    run = Run(text, text, spec.name, {}, spec.lr, 0, window=1)
    problem = dataclasses.replace(problem_of(regression.TASK), steps=3)
    assert train(problem, spec, run, lambda run: None)
    assert run.status == "finished"
    assert bool(run.parts) == is_known
    assert (run.state_bytes != (None,)) == is_known
