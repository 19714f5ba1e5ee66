"""Optimizers whose step evaluates a closure several times: L-BFGS and Newton's method."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import descend
from descend.compare.contestant import full_name
from descend.compare.problem import Problem
from descend.compare.tasks.task import Batch, Loss
from descend.compare.trainer import Step
from descend.reporting.errors import UsageError

CLASSES: Mapping[str, type[Optimizer]] = {
    "lbfgs": descend.LBFGS,
    "newton": descend.Newton,
    "torch.lbfgs": torch.optim.LBFGS,
}

# Line searches that are safe far from a minimum.
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "lbfgs": {"max_eval": 41, "line_search_fn": "hager_zhang"},
    "newton": {},
    "torch.lbfgs": {"line_search_fn": "strong_wolfe"},
}
BATCH_ITERATIONS = 5
GOES_ON = (descend.Status.max_iter, descend.Status.max_eval)
NO_MOVE = "The step moved no parameter: the gradient is below tolerance_grad, or no step lowers the loss."


def check_alone(text: str, problem: Problem) -> None:
    """Raise a ``UsageError`` if several processes share the batches."""
    if problem.ranks.world > 1:
        raise UsageError(f"--optimizer {text} trains in one process: leave --nproc out.")


def no_lr(text: str) -> UsageError:
    """Return the error for a learning rate where a line search or a trust region finds the length of a step."""
    return UsageError(f"--optimizer {text} finds the length of its steps itself: it has no learning rate to vary.")


@dataclass(frozen=True)
class ClosureSpec:
    """One of ``CLASSES`` in a comparison; see ``Contestant``."""

    label: str
    text: str
    optimizer: type[Optimizer]
    options: Mapping[str, Any]
    lr: float | None = None
    is_sparse: bool = False

    @property
    def name(self) -> str:
        return full_name(self.optimizer)

    def with_lr(self, lr: float) -> NoReturn:
        """Raise a ``UsageError``: a line search finds the length of a step."""
        raise no_lr(self.text)

    def trainer(self, model: nn.Module, problem: Problem) -> ClosureTrainer:
        """Return what trains ``model`` in place.

        Raises:
            UsageError: if the optimizer rejects its options, or several processes share the batches.
        """
        check_alone(self.text, problem)
        options = {"max_iter": self._iterations(problem), **self.options}
        try:
            optimizer = self.optimizer(model.parameters(), **options)
        except Exception as error:  # an optimizer may reject an option with any exception
            raise UsageError(f"--optimizer {self.text}: {error}") from error
        return ClosureTrainer(model, problem.task.loss, optimizer, is_fixed=not problem.batch_size)

    def _iterations(self, problem: Problem) -> int:
        """Return the iterations of a step: one, so that a curve has a point for each, with two exceptions."""
        # On batches, L-BFGS must learn a batch's curvature on that batch: with one iteration each, the loss of digits
        # has not fallen after 40 steps. With max_iter=1, torch's never moves after the third step of regression.
        is_lbfgs = self.optimizer is not descend.Newton
        needs_more = is_lbfgs and (problem.batch_size or self.optimizer is torch.optim.LBFGS)
        return BATCH_ITERATIONS if needs_more else 1


class Evaluation(NamedTuple):
    """A loss and its gradients at some weights, all copies."""

    params: list[Tensor]
    loss: Tensor
    grads: list[Tensor | None]


class ClosureTrainer:
    """Takes steps on a closure over the step's batch.

    Where all steps have the same data, the loss at the end of one step is that at the start of the next. It is then
    remembered, not evaluated again; but not for Newton's method, which needs its graph.

    Args:
        model: what is trained.
        loss: the training loss of a batch.
        optimizer: of the model's parameters.
        is_fixed: whether all steps have the same data.
    """

    def __init__(self, model: nn.Module, loss: Loss, optimizer: Optimizer, *, is_fixed: bool) -> None:
        self.optimizers: Sequence[Optimizer] = [optimizer]
        self.stopped: str | None = None
        self._model, self._loss, self._optimizer, self._is_fixed = model, loss, optimizer, is_fixed
        self._params = list(model.parameters())
        self._remembered: list[Evaluation] = []  # the lowest and the last of a step: one of the two is where it ends
        self._evaluations, self._forward, self._backward = 0, 0.0, 0.0

    def step(self, batch: Batch) -> Step:
        """Take one step on ``batch``, of as many iterations as the optimizer's ``max_iter``."""
        self._evaluations, self._forward, self._backward = 0, 0.0, 0.0
        needs_graph = isinstance(self._optimizer, descend.Newton)
        before = [param.detach().clone() for param in self._params] if self._is_fixed else []
        started = time.perf_counter()
        evaluate = self._evaluate if needs_graph else self._differentiate
        closure: Any = functools.partial(evaluate, batch)  # torch's stub wants a float, its documentation a tensor
        loss: Any = self._optimizer.step(closure)
        seconds = time.perf_counter() - started
        parts = {"forward": self._forward, "optimizer": seconds - self._forward - self._backward}
        if not needs_graph:
            parts["backward"] = self._backward
        if self._is_fixed:
            self.stopped = self._why_stopped(before)
        result = getattr(self._optimizer, "result", None)
        return Step(loss.detach().item(), self._evaluations + (result.n_hvp if result else 0), parts)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Inside, the model has the weights that it should be judged by: it always has."""
        yield

    def _evaluate(self, batch: Batch) -> Tensor:
        started = time.perf_counter()
        with torch.enable_grad():
            loss = self._loss(self._model, batch)
        self._evaluations += 1
        self._forward += time.perf_counter() - started
        return loss

    def _differentiate(self, batch: Batch) -> Tensor:
        for known in self._remembered:
            if all(map(torch.equal, known.params, self._params)):
                for param, grad in zip(self._params, known.grads, strict=True):
                    param.grad = None if grad is None else grad.clone()
                return known.loss
        self._optimizer.zero_grad()
        loss = self._evaluate(batch)
        started = time.perf_counter()
        loss.backward()  # type: ignore[no-untyped-call]
        self._backward += time.perf_counter() - started
        if self._is_fixed:
            self._remember(loss.detach())
        return loss

    def _remember(self, loss: Tensor) -> None:
        grads = [None if param.grad is None else param.grad.clone() for param in self._params]
        last = Evaluation([param.detach().clone() for param in self._params], loss, grads)
        lowest = min([*self._remembered, last], key=lambda known: known.loss.item())
        self._remembered = [last] if lowest is last else [lowest, last]

    def _why_stopped(self, before: Sequence[Tensor]) -> str | None:
        result = getattr(self._optimizer, "result", None)
        if result is not None:
            return None if result.status in GOES_ON else result.message
        return NO_MOVE if all(map(torch.equal, before, self._params)) else None
