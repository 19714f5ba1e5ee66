"""Handwritten digits."""

from __future__ import annotations

import torch
from torch import nn

from descend.compare.models import conv_net
from descend.compare.tasks.catalog import SUMMARIES
from descend.compare.tasks.rates import rates
from descend.compare.tasks.task import Batch, Data, Task
from descend.reporting.errors import require


def load(seed: int) -> Data:
    """Return scikit-learn's 1,797 handwritten digits, images of shape (1, 8, 8) in [0, 1]; a quarter is held out."""
    require("sklearn")
    from sklearn import datasets

    images, labels = datasets.load_digits(return_X_y=True)
    inputs = torch.from_numpy(images).float().view(-1, 1, 8, 8) / 16
    targets = torch.from_numpy(labels).long()
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed))
    test, train = order[: len(order) // 4], order[len(order) // 4 :]

    def sample(batch_size: int, generator: torch.Generator) -> Batch:
        rows = train[torch.randint(len(train), (batch_size,), generator=generator)]
        return inputs[rows], targets[rows]

    return Data(sample, (inputs[test], targets[test]))


def model() -> nn.Module:
    """Return a convolutional net of 34,000 parameters in 8 tensors."""
    return conv_net(classes=10)


TASK = Task(
    name="digits",
    summary=SUMMARIES["digits"],
    load=load,
    model=model,
    steps=500,
    batch_size=64,
    lr=rates(sgd=0.2, adam=2e-3),
    optimizers=("sgd", "adam:weight_decay=1e-3", "adamw", "torch.adamw"),
    # For so small a net, a second thread saves a quarter of the time, but makes it ten times as long once
    # another process needs that core, because the threads wait for each other at every layer.
    threads=1,
)
