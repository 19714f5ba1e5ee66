"""A task in a file of the user's.

The file defines one function::

    def task():
        return model, data, loss

``model`` is an ``nn.Module``. ``data`` is a pair of tensors (inputs, targets) of one length, or a ``Dataset`` of such
pairs; a tenth is held out. ``loss(outputs, targets)`` returns a scalar tensor, given ``outputs = model(inputs)``.

The file may also set ``steps`` (default 300), ``batch_size`` (64; None for all data in each step, as solvers such as
``minimize.l-bfgs`` need it), ``lr`` (a number: Adam's rate, from which the others follow; or a dict by optimizer name),
``optimizers`` (a list of specs), and a function ``metric(outputs, targets)`` that returns a number, with
``metric_is_error = True`` if less of it is better.

The seed is set before ``task`` is called, and every optimizer starts from the weights that it returns.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from descend.compare.tasks.rates import rates
from descend.compare.tasks.task import Batch, Data, Score, Task
from descend.reporting.errors import UsageError
from descend.reporting.user_file import errors_located, run_file, shortened

HELD_OUT = 10  # one in so many samples
MOST_HELD_OUT = 2000
STEPS = 300
BATCH_SIZE = 64
RATES = {"sgd": 0.1, "adam": 2e-3}
OPTIMIZERS = ("sgd:momentum=0.9", "adam", "adamw", "torch.adamw")


def read_task(path: Path) -> Task:
    """Return the task that the file at ``path`` defines; its name is the file's.

    Raises:
        UsageError: if the file is missing, raises an exception or defines no valid task; it names file and line.
    """
    file = UserFile(path)
    metric = file.optional("metric", None, "a function of outputs and targets", callable)
    batch_size = file.optional("batch_size", BATCH_SIZE, "a whole number >= 1, or None", _is_size)
    return Task(
        name=path.stem,
        summary=f"the task of {path}",
        load=file.load,
        model=file.take_model,
        steps=file.optional("steps", STEPS, "a whole number >= 1", _is_count),
        batch_size=batch_size,
        lr=_rates(file.optional("lr", RATES, "a number > 0, or a dict of such by optimizer name", _is_lr)),
        optimizers=tuple(file.optional("optimizers", OPTIMIZERS, "a list of strings", _is_specs)),
        loss=file.loss,
        score=file.score,
        loss_name="loss",
        metric_name=None if metric is None else getattr(metric, "__name__", "metric").replace("_", " "),
        metric_is_error=file.optional("metric_is_error", False, "True or False", lambda value: value in (True, False)),
    )


@dataclass(frozen=True)
class Parts:
    """What the user's function returned, checked."""

    model: nn.Module
    data: Data
    loss: Callable[[Any, Any], Any]


class UserFile:
    """A file that has been executed, and what its function ``task`` returned last."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._module: ModuleType = run_file(path)
        self._task: Callable[[], Any] = getattr(self._module, "task", lambda: None)
        if not (hasattr(self._module, "task") and callable(self._task)):
            raise UsageError(f"{path} defines no function task(): it must return model, data and loss.")
        self._parts: Parts | None = None

    def optional(self, name: str, default: Any, allowed: str, is_valid: Callable[[Any], bool]) -> Any:
        """Return what the file sets ``name`` to, or ``default``; raise a ``UsageError`` if that is not ``allowed``."""
        if not hasattr(self._module, name):
            return default
        value = getattr(self._module, name)
        if not is_valid(value):
            raise UsageError(f"{self.path}: {name} must be {allowed}, got {value!r}.")
        return value

    def load(self, seed: int) -> Data:
        """Call the user's function, check what it returns, and return its data; the seed selects the held-out part."""
        torch.manual_seed(seed)
        with errors_located(self.path):
            returned = self._task()
        self._parts = self._checked(returned, seed)
        return self._parts.data

    def take_model(self) -> nn.Module:
        """Return the model that was made by the last ``load``."""
        if self._parts is None:
            self.load(0)
        assert self._parts is not None
        return self._parts.model

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the user's loss of a batch."""
        assert self._parts is not None
        inputs, targets = batch
        loss: Tensor = self._parts.loss(model(inputs), targets)
        return loss

    @torch.no_grad()
    def score(self, model: nn.Module, test: Batch) -> Score:
        """Return the user's loss of held-out data, and the user's metric if there is one."""
        assert self._parts is not None
        inputs, targets = test
        outputs = model(inputs)
        metric = getattr(self._module, "metric", None)
        return Score(
            float(self._parts.loss(outputs, targets)), None if metric is None else float(metric(outputs, targets))
        )

    def _checked(self, returned: Any, seed: int) -> Parts:
        """Return what the user's function returned; raise a ``UsageError`` if a step could not be taken with it."""
        if not (isinstance(returned, tuple | list) and len(returned) == 3):
            raise self._wrong("must return model, data and loss", returned)
        model, data, loss = returned
        if not isinstance(model, nn.Module):
            raise self._wrong("must return an nn.Module first", model)
        if not any(param.requires_grad for param in model.parameters()):
            raise self._wrong("must return a model that has parameters to train", model)
        if not callable(loss):
            raise self._wrong("must return loss(outputs, targets), a function, third", loss)
        parts = Parts(model, self._split(data, seed), loss)
        self._try(parts)
        return parts

    def _split(self, data: Any, seed: int) -> Data:
        if isinstance(data, tuple | list) and len(data) == 2 and all(isinstance(part, Tensor) for part in data):
            inputs, targets = data
            if not (inputs.ndim and targets.ndim and len(inputs) == len(targets)):
                shapes = f"{tuple(inputs.shape)} and {tuple(targets.shape)}"
                raise self._wrong("must return inputs and targets of one length", f"shapes {shapes}")
            count = len(inputs)

            def pick(rows: Tensor) -> Batch:
                return inputs[rows], targets[rows]

        elif isinstance(data, Dataset) and hasattr(data, "__len__"):
            count = len(cast(Sized, data))

            def pick(rows: Tensor) -> Batch:
                with errors_located(self.path):
                    batch = default_collate([data[row] for row in rows.tolist()])
                if not (isinstance(batch, list | tuple) and len(batch) == 2):
                    raise self._wrong("must return a Dataset of pairs (input, target)", data[0])
                return batch[0], batch[1]
        else:
            raise self._wrong("must return a pair of tensors or a Dataset with a length second", data)
        if count < 2:
            raise self._wrong("must return at least two samples, as a tenth is held out", f"{count}")
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        held_out = max(1, count // HELD_OUT)
        test, train = order[: min(held_out, MOST_HELD_OUT)], order[held_out:]
        everything: list[Batch] = []  # read once

        def sample(batch_size: int, generator: torch.Generator) -> Batch:
            if batch_size:
                return pick(train[torch.randint(len(train), (batch_size,), generator=generator)])
            if not everything:
                everything.append(pick(train))
            return everything[0]

        return Data(sample, pick(test))

    def _try(self, parts: Parts) -> None:
        """Evaluate the loss once, on a copy of the model; raise a ``UsageError`` if that cannot be trained with."""
        self._parts = parts
        rows, model = parts.data.sample(2, torch.Generator()), copy.deepcopy(parts.model)
        state = torch.get_rng_state()
        with errors_located(self.path, "the loss of a batch"), torch.enable_grad():
            value = self.loss(model, rows)
        if isinstance(value, Tensor) and value.numel() == 1:
            with errors_located(self.path, "the score of a batch"):
                self.score(model.eval(), rows)
        torch.set_rng_state(state)
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
            got = f"shape {tuple(value.shape)}, {value.dtype}" if isinstance(value, Tensor) else value
            raise self._wrong("must return a loss(outputs, targets) whose value is a scalar tensor", got)
        if not value.requires_grad:
            raise self._wrong("must return a loss that depends on the model's parameters", "a value without a graph")

    def _wrong(self, problem: str, got: Any) -> UsageError:
        code = getattr(self._task, "__code__", None)
        line = f":{code.co_firstlineno}" if code else ""
        text = got if isinstance(got, str) else f"{type(got).__name__} {got!r}"
        return UsageError(f"{self.path}{line}: task() {problem}, got {shortened(text)}.")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_size(value: Any) -> bool:
    return value is None or _is_count(value)


def _is_rate(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")


def _is_lr(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(name, str) for name in value) and all(map(_is_rate, value.values()))
    return _is_rate(value)


def _is_specs(value: Any) -> bool:
    return isinstance(value, Sequence) and bool(value) and all(isinstance(text, str) for text in value)


def _rates(lr: float | Mapping[str, float]) -> Mapping[str, float]:
    if isinstance(lr, Mapping):
        return rates(**{**RATES, **lr})
    return rates(sgd=RATES["sgd"] * lr / RATES["adam"], adam=lr)
