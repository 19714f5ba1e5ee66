"""What the optimizers of a comparison share."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from descend.compare.parallel import Way
from descend.compare.ranks import Ranks
from descend.compare.tasks.task import Data, Task


@dataclass(frozen=True)
class Problem:
    """A task with one seed.

    Args:
        task: what is learned.
        data: its data; the seed selects the held-out part.
        model: its model with the weights that every run starts from; runs train copies.
        steps: steps of each run.
        batch_size: samples in a batch; 0 for all data.
        seed: of weights, batches and held-out part.
        ranks: the processes that take part.
        way: how they share the work.
    """

    task: Task
    data: Data
    model: nn.Module
    steps: int
    batch_size: int
    seed: int
    ranks: Ranks
    way: Way
