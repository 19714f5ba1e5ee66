"""What a task is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

Batch = tuple[Tensor, Tensor]
Loss = Callable[[nn.Module, Batch], Tensor]


@dataclass(frozen=True)
class Data:
    """A source of training batches, and one test batch.

    Args:
        sample: draws a batch (inputs, targets) of the given size with the given generator.
        test: held-out inputs and targets, which no training batch contains.
    """

    sample: Callable[[int, torch.Generator], Batch]
    test: Batch


class Score(NamedTuple):
    """How well a model does on held-out data.

    Args:
        loss: in the unit of the training loss.
        metric: what ``Task.metric_name`` names; None if it names nothing.
    """

    loss: float
    metric: float | None


def classification_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the cross-entropy in nats; the last dimension of the model's logits is the class."""
    inputs, targets = batch
    return cross_entropy(model(inputs).flatten(0, -2), targets.flatten())


@torch.no_grad()
def classification_score(model: nn.Module, test: Batch) -> Score:
    """Return the cross-entropy in nats, and the accuracy."""
    inputs, targets = test
    logits = model(inputs)
    loss = cross_entropy(logits.flatten(0, -2), targets.flatten())
    return Score(loss.item(), (logits.argmax(-1) == targets).float().mean().item())


@dataclass(frozen=True)
class Task:
    """Something to learn.

    Args:
        name: its name on the command line.
        summary: one line for ``--help``.
        load: reads the data; the seed selects the held-out part.
        model: builds the model from torch's global random state.
        steps: default number of steps.
        batch_size: default number of samples in a batch; None if each step uses all data.
        lr: learning rate by optimizer name, for specs that give none; other optimizers use their own default.
        optimizers: default specs.
        threads: default number of threads; None for torch's.
        loss: the training loss of a batch.
        score: judges the model on the held-out batch.
        loss_name: what the loss is, with its unit.
        metric_name: what ``score`` measures beside the loss; None for nothing.
        metric_is_error: whether less of it is better.
    """

    name: str
    summary: str
    load: Callable[[int], Data]
    model: Callable[[], nn.Module]
    steps: int
    batch_size: int | None
    lr: Mapping[str, float]
    optimizers: tuple[str, ...]
    threads: int | None = None
    loss: Loss = classification_loss
    score: Callable[[nn.Module, Batch], Score] = classification_score
    loss_name: str = "cross-entropy in nats"
    metric_name: str | None = "accuracy"
    metric_is_error: bool = False
