"""Logistic regression: all solvers, ours and others', reach the same minimum, and their work is counted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from task_runs import losses, problem_of, train

from descend.compare.problem import Problem
from descend.compare.tasks import regression

SOLVERS = {  # steps that suffice
    "lbfgs": 200,
    "torch.lbfgs:tolerance_change=0": 100,
    "newton": 30,
    "minimize.l-bfgs:tol=1e-8": 300,
    "minimize.newton-cg:tol=1e-8": 50,
    "scipy.l-bfgs-b": 400,
    "scipy.newton-cg": 50,
    "scipy.trust-ncg": 50,
    "scipy.trust-krylov": 50,
    "sklearn.lbfgs": 400,
    "sklearn.newton-cg": 50,
    "sklearn.newton-cholesky": 50,
}
COUNTED = ("lbfgs", "newton", "minimize.newton-cg", "scipy.trust-krylov", "sklearn.newton-cg")


@pytest.fixture(scope="module")
def problem() -> Problem:
    return problem_of(regression.TASK)


@pytest.fixture(scope="module")
def minimum(problem: Problem) -> float:
    """The least loss, by Newton's method with a dense Hessian, written out in NumPy."""
    images, labels = (part.numpy() for part in problem.data.sample(0, torch.Generator()))
    ones = np.hstack([images, np.ones((len(images), 1))])
    one_hot = np.eye(10)[labels]
    penalty = regression.L2 * np.array([1.0] * 64 + [0.0])
    weights = np.zeros((10, 65))
    for _ in range(30):
        scores = ones @ weights.T
        scores -= scores.max(axis=1, keepdims=True)
        chances = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
        gradient = (chances - one_hot).T @ ones / len(ones) + penalty * weights
        hessian = np.zeros((10, 65, 10, 65))
        for i in range(10):
            for j in range(10):
                factor = chances[:, i] * ((i == j) - chances[:, j])
                hessian[i, :, j] = (ones * factor[:, None]).T @ ones / len(ones)
            hessian[i, :, i] += np.diag(penalty)
        # The biases' common shift changes nothing: the shortest step leaves it alone.
        step = np.linalg.lstsq(hessian.reshape(650, 650), gradient.reshape(-1), rcond=1e-12)[0]
        weights -= step.reshape(10, 65)
        if abs(step).max() < 1e-9:
            break
    loss = -np.log(chances[np.arange(len(labels)), labels]).mean()
    return float(loss + regression.L2 / 2 * np.square(weights[:, :64]).sum())


@pytest.mark.parametrize("text", SOLVERS)
def test_every_solver_reaches_the_minimum_and_stops(text: str, problem: Problem, minimum: float) -> None:
    steps, trainer, model = train(problem, text, SOLVERS[text])
    assert trainer.stopped
    assert steps[0].loss == pytest.approx(np.log(10), rel=1e-12)
    assert steps[-1].loss == pytest.approx(minimum, rel=1e-8)
    everything = problem.data.sample(0, torch.Generator())
    assert regression.loss(model, everything).item() == pytest.approx(minimum, rel=1e-8)
    assert all(step.evaluations >= 0 for step in steps)
    assert sum(step.evaluations for step in steps) >= len(steps) - 1


@pytest.mark.parametrize("text", COUNTED)
def test_evaluations_are_those_that_happened(text: str, problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted by torch: forward passes of the model, and products as passes that differentiate twice."""
    points = set()
    forward = torch.nn.Linear.forward

    def counted(self: torch.nn.Linear, inputs: torch.Tensor) -> torch.Tensor:
        points.add(self.weight.detach().numpy().tobytes())
        return forward(self, inputs)

    monkeypatch.setattr(torch.nn.Linear, "forward", counted)
    steps, _, _ = train(problem, text, 6)
    total = sum(step.evaluations for step in steps)
    if text.startswith("sklearn"):  # does not call the model
        assert len(points) == 1
        assert total > len(steps)
    elif text == "lbfgs":
        assert total == len(points)
    else:
        assert total > len(points)


def test_adamw_approaches_the_minimum(problem: Problem, minimum: float) -> None:
    steps, _, _ = train(problem, "adamw:weight_decay=0", 200)
    assert minimum < losses(steps)[-1] < 1.01 * minimum


def test_batches_are_drawn_if_asked_for(problem: Problem) -> None:
    inputs, targets = problem.data.sample(7, torch.Generator().manual_seed(0))
    assert (inputs.shape, targets.shape) == ((7, 64), (7,))
    assert problem.data.sample(0, torch.Generator()) is problem.data.sample(0, torch.Generator())
