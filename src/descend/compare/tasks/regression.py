"""Logistic regression: a strictly convex problem, where second-order methods belong."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from descend.compare.tasks.catalog import SUMMARIES
from descend.compare.tasks.rates import rates
from descend.compare.tasks.task import Batch, Data, Task
from descend.reporting.errors import require

L2 = 1e-3  # the penalty is L2 / 2 times the squared norm of the weights, the bias excluded


def load(seed: int) -> Data:
    """Return scikit-learn's 1,797 handwritten digits, 64 numbers in [0, 1] each; a quarter is held out."""
    require("sklearn")
    from sklearn import datasets

    images, labels = datasets.load_digits(return_X_y=True)
    inputs = torch.from_numpy(images).double() / 16
    targets = torch.from_numpy(labels).long()
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed))
    test, train = order[: len(order) // 4], order[len(order) // 4 :]
    everything = inputs[train], targets[train]

    def sample(batch_size: int, generator: torch.Generator) -> Batch:
        if not batch_size:
            return everything
        rows = torch.randint(len(train), (batch_size,), generator=generator)
        return everything[0][rows], everything[1][rows]

    return Data(sample, (inputs[test], targets[test]))


def model() -> nn.Module:
    """Return a linear classifier of 650 parameters in float64. All are 0, where scikit-learn's solvers start."""
    linear = nn.Linear(64, 10, dtype=torch.float64)
    for param in linear.parameters():
        nn.init.zeros_(param)
    return linear


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean cross-entropy in nats and the penalty: scikit-learn's objective over C n, C = 1 / (n L2)."""
    inputs, targets = batch
    weight = model.get_parameter("weight")
    return cross_entropy(model(inputs), targets) + L2 / 2 * weight.square().sum()


TASK = Task(
    name="regression",
    summary=SUMMARIES["regression"],
    load=load,
    model=model,
    steps=200,
    batch_size=None,
    lr=rates(sgd=1.0, adam=5e-2, lion=5e-3),
    optimizers=(
        "adamw:weight_decay=0",
        "lbfgs",
        "torch.lbfgs",
        "newton",
        "minimize.l-bfgs",
        "minimize.newton-cg",
        "scipy.l-bfgs-b",
        "scipy.newton-cg",
        "scipy.trust-krylov",
        "sklearn.lbfgs",
        "sklearn.newton-cg",
        "sklearn.newton-cholesky",
    ),
    threads=1,  # of so small a matrix a second thread makes nothing faster
    loss=loss,
    loss_name="cross-entropy in nats and penalty",
)
