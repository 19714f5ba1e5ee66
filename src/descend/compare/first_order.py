"""Training with optimizers that take a step from one gradient."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise

import torch
from torch import nn
from torch.optim import Optimizer

import descend
from descend.compare.tasks.task import Batch, Loss
from descend.compare.trainer import Step


class FirstOrderTrainer:
    """Forward, backward, and one step of each optimizer.

    Settling the rows of ``sparse="exact"`` before they are read happens in the forward pass, and counts as time in the
    optimizer.

    Args:
        model: what is trained, wrapped as the ranks need it.
        loss: the training loss of a batch.
        optimizers: the optimizers of the model's parameters.
        max_norm: clips the gradients' joint norm before the step, with torch's function, which is part "norm";
            None for optimizers that clip as they step, or not at all.
    """

    def __init__(
        self, model: nn.Module, loss: Loss, optimizers: Sequence[Optimizer], max_norm: float | None = None
    ) -> None:
        self.optimizers = optimizers
        self.stopped: str | None = None
        self._model, self._loss, self._max_norm = model, loss, max_norm
        self._settling = 0.0
        for module in model.modules():
            if isinstance(module, nn.Embedding | nn.EmbeddingBag):
                module.register_forward_pre_hook(self._settling_starts, prepend=True)
                module.register_forward_pre_hook(self._settling_ends)

    def step(self, batch: Batch) -> Step:
        """Take one step on ``batch``."""
        self._settling = 0.0
        times = [time.perf_counter()]
        loss = self._loss(self._model, batch)
        times.append(time.perf_counter())
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        times.append(time.perf_counter())
        if self._max_norm is not None:
            torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._max_norm)
        times.append(time.perf_counter())
        for optimizer in self.optimizers:
            optimizer.step()
        times.append(time.perf_counter())
        forward, backward, norm, step = (end - start for start, end in pairwise(times))
        parts = {"forward": forward - self._settling, "backward": backward, "optimizer": step + self._settling}
        if self._max_norm is not None:
            parts["norm"] = norm
        return Step(loss.item(), 1, parts)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Inside, the model has the weights that it should be judged by: averages, where an optimizer keeps some."""
        schedule_free = [optimizer for optimizer in self.optimizers if isinstance(optimizer, descend.AdamWScheduleFree)]
        # There and back again is not exact, and looking must not change anything.
        weights = [(param, param.detach().clone()) for param in self._model.parameters()] if schedule_free else []
        for optimizer in schedule_free:
            optimizer.eval()
        try:
            with ExitStack() as stack:
                for each in self.optimizers:
                    if isinstance(each, descend.FirstOrder) and each.options.ema is not None:
                        stack.enter_context(each.averaged())
                yield
        finally:
            for optimizer in schedule_free:
                optimizer.train()
            for param, weight in weights:
                param.data.copy_(weight)

    def _settling_starts(self, *_: object) -> None:
        self._settling -= time.perf_counter()

    def _settling_ends(self, *_: object) -> None:
        self._settling += time.perf_counter()
