"""The adding problem."""

from __future__ import annotations

import math

import pytest
import torch
from task_runs import losses, problem_of, train

from descend.compare.tasks import rnn


def test_sequences_mark_one_number_in_each_half() -> None:
    inputs, targets = rnn.draw(200, torch.Generator().manual_seed(0))
    numbers, marks = inputs.unbind(2)
    assert inputs.shape == (200, rnn.LENGTH, 2)
    assert ((marks == 0) | (marks == 1)).all()
    for half in marks.chunk(2, dim=1):
        assert (half.sum(1) == 1).all()
    assert torch.equal(targets, (numbers * marks).sum(1, keepdim=True))
    assert marks.sum(0).count_nonzero() == rnn.LENGTH


def test_baseline_is_the_error_of_always_answering_one() -> None:
    _, targets = rnn.draw(200_000, torch.Generator().manual_seed(0))
    assert (targets - 1).square().mean().item() == pytest.approx(rnn.BASELINE, rel=0.01)
    one = torch.nn.Linear(2 * rnn.LENGTH, 1)
    torch.nn.init.zeros_(one.weight)
    torch.nn.init.ones_(one.bias)
    score = rnn.score(torch.nn.Sequential(torch.nn.Flatten(), one), rnn.draw(2000, torch.Generator().manual_seed(1)))
    assert score.metric == pytest.approx(1, abs=0.1)


def test_gradients_explode_unless_clipped() -> None:
    """Within 60 steps the unclipped loss has been above a thousand; the clipped one never above ten."""
    problem = problem_of(rnn.TASK)
    clipped, _, _ = train(problem, "sgd:momentum=0.9,max_norm=1.0", 60)
    free, _, _ = train(problem, "sgd:momentum=0.9", 60)
    assert clipped[0].loss == free[0].loss
    assert max(losses(clipped)) < 10
    assert not max(losses(free)) < 1000


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_clipping_decides(seed: int) -> None:
    problem = problem_of(rnn.TASK, seed)
    clipped, _, _ = train(problem, "sgd:momentum=0.9,max_norm=1.0", rnn.TASK.steps)
    free, _, _ = train(problem, "sgd:momentum=0.9", rnn.TASK.steps)
    assert sum(losses(clipped)[-200:]) / 200 < 0.5 * rnn.BASELINE
    late = sum(losses(free)[-200:]) / 200
    assert math.isnan(late) or late > 0.9 * rnn.BASELINE
