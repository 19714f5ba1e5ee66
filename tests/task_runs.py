"""A task made ready for a trainer, and a run of one."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn

from descend.compare import specs
from descend.compare.parallel import ALONE
from descend.compare.problem import Problem
from descend.compare.ranks import Alone
from descend.compare.tasks.task import Task
from descend.compare.trainer import Step, Trainer


def problem_of(task: Task, seed: int = 0, batch_size: int | None = None) -> Problem:
    torch.manual_seed(seed)
    data = task.load(seed)
    size = batch_size or task.batch_size or 0
    return Problem(task, data, task.model(), task.steps, size, seed, Alone(), ALONE)


def train(problem: Problem, text: str, steps: int) -> tuple[list[Step], Trainer, nn.Module]:
    """Take ``steps`` steps, or as many as the optimizer wants; return them, its trainer and the model."""
    [spec] = specs.parse_all([text], problem.task.lr)
    model = copy.deepcopy(problem.model)
    trainer, generator = spec.trainer(model, problem), torch.Generator().manual_seed(problem.seed)
    taken: list[Step] = []
    while len(taken) < steps and not trainer.stopped:
        taken.append(trainer.step(problem.data.sample(problem.batch_size, generator)))
    return taken, trainer, model


def losses(steps: Sequence[Step]) -> list[float]:
    return [step.loss for step in steps]
