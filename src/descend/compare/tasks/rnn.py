"""A recurrent network whose gradients explode: clipping decides between learning and blowing up.

A sum over many steps is learned best by a network that starts as a memory, with the identity as its recurrent matrix
(Le et al. 2015, https://arxiv.org/abs/1504.00941). Its gradients then grow with powers of that matrix, as soon as it
has an eigenvalue above 1. Gradient descent either clips them (Pascanu et al. 2013, https://arxiv.org/abs/1211.5063), or
takes a step so long that the units die or the loss overflows; the error stays at that of always answering 1, or above.
So it went with each of six seeds: the mean error of the last 400 of 2,000 steps was 0.03 to 0.07 with ``max_norm=1.0``
and 0.165 to 0.169 without. Adam, which divides by the size of the gradients, learns better than both with or without.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from descend.compare.models import recurrent_net
from descend.compare.tasks.catalog import SUMMARIES
from descend.compare.tasks.rates import rates
from descend.compare.tasks.task import Batch, Data, Score, Task

LENGTH = 30
TEST_SEQUENCES = 1000
BASELINE = 1 / 6  # mean squared error of always answering 1: the variance of a sum of two


def draw(count: int, generator: torch.Generator) -> Batch:
    """Return sequences for the adding problem, of shape (count, ``LENGTH``, 2), and sums of shape (count, 1).

    The first entry of each step is a number in [0, 1), the second marks two steps, one in each half. The target is
    the sum of the two marked numbers: Hochreiter & Schmidhuber 1997, https://doi.org/10.1162/neco.1997.9.8.1735.
    """
    numbers, half = torch.rand(count, LENGTH, generator=generator), LENGTH // 2
    marks = torch.zeros(count, LENGTH)
    for start in (0, half):
        marks.scatter_(1, start + torch.randint(half, (count, 1), generator=generator), 1.0)
    return torch.stack([numbers, marks], dim=2), (numbers * marks).sum(1, keepdim=True)


def load(seed: int) -> Data:
    """Return fresh sequences for every batch, and 1,000 held-out ones."""
    # A sequence is never drawn twice, so nothing is held out but a seed that no run trains with.
    return Data(draw, draw(TEST_SEQUENCES, torch.Generator().manual_seed(-1 - seed)))


def model() -> nn.Module:
    """Return a recurrent net of 4,417 parameters, 64 rectified units that start as a memory."""
    return recurrent_net(inputs=2, width=64, outputs=1)


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean squared error."""
    inputs, targets = batch
    return mse_loss(model(inputs), targets)


@torch.no_grad()
def score(model: nn.Module, test: Batch) -> Score:
    """Return the mean squared error, and the same as a share of the error of always answering 1."""
    error = loss(model, test).item()
    return Score(error, error / BASELINE)


TASK = Task(
    name="rnn",
    summary=SUMMARIES["rnn"],
    load=load,
    model=model,
    steps=2000,
    batch_size=32,
    lr=rates(sgd=0.1, adam=1e-3, adagrad=2e-2, adafactor=5e-3),
    optimizers=("sgd:momentum=0.9,max_norm=1.0", "sgd:momentum=0.9", "adam:max_norm=1.0", "adam"),
    threads=1,  # each step waits for the one before it
    loss=loss,
    score=score,
    loss_name="mean squared error",
    metric_name="error / baseline",
    metric_is_error=True,
)
