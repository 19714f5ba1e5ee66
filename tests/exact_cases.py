"""An optimizer with ``sparse="exact"`` beside a dense one, and how far its rows may be from the dense one's."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from cases import assert_same_bits
from sparse_cases import coo
from torch import Tensor, nn

from descend import Adam, AdamW

BETAS = ((0.9, 0.999), (0.9, 0.95), (0.95, 0.99), (0.0, 0.99))
ALLOWED = 0.01  # of the largest learning rate of the steps that a row has missed, each time it has missed some

LR = 0.1
OPTIONS: dict[str, Any] = dict(lr=LR, weight_decay=0.1)

ORDERS = ("model optimizer", "optimizer model")  # of saving, or of loading

Grad = tuple[Any, Tensor] | None  # rows and their values; None where there is no gradient


def random_tables(*shapes: tuple[int, int], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    random = torch.Generator().manual_seed(7)
    return [torch.randn(shape, generator=random, dtype=torch.float64).to(dtype) for shape in shapes]


def embedding(table: Tensor, sparse: bool = True) -> nn.Embedding:
    """An embedding with a copy of ``table``."""
    return nn.Embedding.from_pretrained(table.detach().clone(), freeze=False, sparse=sparse)


class ExactTwins:
    """Tables in exact mode, and float64 copies that a dense optimizer trains with the same gradients.

    Args:
        tables: where to begin; each gets a group of its own.
        dense: the dense optimizer.
        groups: options of the groups.
        ours: the class in exact mode.
        backend: of ours.
        max_norm: of ours; the dense gradients are clipped by torch.
        options: what both get.
    """

    def __init__(
        self,
        tables: Sequence[Tensor],
        dense: Callable[..., Any] = torch.optim.AdamW,
        groups: Sequence[dict[str, Any]] | None = None,
        ours: type[Adam] = AdamW,
        backend: str = "auto",
        max_norm: float | None = None,
        **options: Any,
    ) -> None:
        groups = groups or [{}] * len(tables)
        self.layers = nn.ModuleList(embedding(table) for table in tables)
        self.weights = [layer.weight for layer in self.layers]
        self.dense_weights = [table.double().clone().requires_grad_() for table in tables]
        ours_groups = [{"params": [weight], **group} for weight, group in zip(self.weights, groups, strict=True)]
        theirs_groups = [
            {"params": [weight], **group} for weight, group in zip(self.dense_weights, groups, strict=True)
        ]
        self.ours = ours(ours_groups, sparse="exact", backend=backend, max_norm=max_norm, **options)
        self.ours.attach(self.layers)
        self.dense = dense(theirs_groups, **options)
        self.both = (self.ours, self.dense)
        self.max_norm = max_norm
        self.may_err = ALLOWED
        self.lrs: list[list[float]] = [[] for _ in tables]
        # Of each row: the step it is current at, what it may be off by, how often it was written, its largest gradient.
        self.last, self.allowed, self.written, self.largest = (
            [np.zeros(len(table)) for table in tables] for _ in range(4)
        )

    def edit(self, change: Callable[[Any], Any]) -> None:
        """Do the same to both optimizers."""
        for optimizer in self.both:
            change(optimizer)

    def read(self, number: int, rows: Any) -> Tensor:
        """Look up rows of a table, as a forward pass does."""
        rows = torch.as_tensor(rows, dtype=torch.int64)
        self._note_settled(number, np.unique(rows.numpy()))
        with torch.no_grad():
            return self.layers[number](rows)

    def settle(self) -> None:
        """Bring all rows up to date."""
        self.ours.settle()
        for number, last in enumerate(self.last):
            self._note_settled(number, np.arange(len(last)))

    def step(self, *grads: Grad) -> None:
        """A step of both with a gradient for each table."""
        for number, grad in enumerate(grads):
            ours, theirs = self.weights[number], self.dense_weights[number]
            if grad is None:
                ours.grad = theirs.grad = None
                continue
            rows, values = torch.as_tensor(grad[0], dtype=torch.int64), grad[1]
            if len(rows):
                self.read(number, rows)
            ours.grad = coo(rows, values.to(ours.dtype), ours.shape)
            theirs.grad = torch.zeros_like(theirs).index_add_(0, rows, values.to(ours.dtype).double())
            lr = float(self.ours.param_groups[number]["lr"])
            self.lrs[number].append(lr)
            touched, size = np.unique(rows.numpy()), theirs.grad.abs().amax(1).numpy()
            self.last[number][touched] = len(self.lrs[number])
            self.written[number][touched] += 1
            self.largest[number][touched] = np.maximum(self.largest[number], size)[touched]
            # The smallest numbers of float32 are further apart than its digits tell.
            self.allowed[number][touched] += 100 * torch.finfo(ours.dtype).eps * lr
        if self.max_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.dense_weights, self.max_norm)
        for optimizer in self.both:
            optimizer.step()

    def _note_settled(self, number: int, rows: np.ndarray) -> None:
        lrs, last = self.lrs[number], self.last[number]
        for row in rows[last[rows] < len(lrs)]:
            if self.largest[number][row]:
                self.allowed[number][row] += self.may_err * max(lrs[int(last[row]) :])
            self.written[number][row] += 1
            last[row] = len(lrs)

    def assert_close(self) -> float:
        """All rows and averages are what the dense optimizer has.

        Returns:
            The largest error, as a multiple of what is allowed.
        """
        self.settle()
        worst = 0.0
        for number, (ours, theirs) in enumerate(zip(self.weights, self.dense_weights, strict=True)):
            # The dense optimizer rounds at every step.
            steps = len(self.lrs[number])
            eps = torch.finfo(ours.dtype).eps
            error = (ours.double() - theirs).detach().abs().amax(1).numpy()
            size = float(
                torch.cat([torch.ones(1), ours.detach().abs().flatten(), theirs.detach().abs().flatten()]).max()
            )
            rounding = (eps * self.written[number] + 2.0**-52 * steps) * size
            assert np.isfinite(error).all()
            assert (error <= self.allowed[number] + rounding).all(), (number, error - self.allowed[number] - rounding)
            used = self.allowed[number] > rounding
            worst = max(worst, float((error[used] / self.allowed[number][used]).max(initial=0.0)))
            if steps:
                self._assert_averages_close(number, eps * (20 + self.written[number]) + 2.0**-52 * steps)
        return worst

    def _assert_averages_close(self, number: int, tolerance: np.ndarray) -> None:
        state, expected = self.ours.state[self.weights[number]], self.dense.state[self.dense_weights[number]]
        assert float(state["step"]) == float(expected["step"]) == len(self.lrs[number])
        largest = self.largest[number] * min(1.0, self.max_norm or 1.0)
        for name, power in (("exp_avg", 1), ("exp_avg_sq", 2)):
            error = (state[name].double() - expected[name]).abs().amax(1).numpy()
            least = torch.finfo(state[name].dtype).tiny
            assert (error <= tolerance * largest**power + least).all(), name
            assert not state[name][torch.from_numpy(self.largest[number] == 0)].any()


class Neighbours(nn.Module):
    """Owns the table and reads all of it, without a gradient."""

    def __init__(self, table: nn.Embedding) -> None:
        super().__init__()
        self.table = table.weight

    def forward(self, vectors: Tensor) -> Tensor:
        return vectors @ self.table.detach().T


class Both(nn.Module):
    """Two embeddings with one weight, and a module that reads all of it."""

    def __init__(self, table: Tensor, sparse: bool = True) -> None:
        super().__init__()
        self.source = embedding(table, sparse)
        self.target = embedding(table, sparse)
        self.target.weight = self.source.weight
        self.neighbours = Neighbours(self.source)

    def forward(self, rows: Tensor) -> Tensor:
        return self.source(rows) * self.target(rows.flip(0) + 1)


def exact(model: nn.Module, **options: Any) -> AdamW:
    """An optimizer in exact mode, attached."""
    optimizer = AdamW(model.parameters(), sparse="exact", **{**OPTIONS, **options})
    optimizer.attach(model)
    return optimizer


def train(optimizer: Any, model: Callable[[Tensor], Tensor], rows: Any, steps: int = 1) -> None:
    """Steps that touch ``rows``."""
    for _ in range(steps):
        optimizer.zero_grad()
        output = model(torch.as_tensor(rows))
        (output.square() + output).sum().backward()
        optimizer.step()


def behind(**options: Any) -> tuple[nn.Embedding, AdamW, Tensor]:
    """An embedding of which rows 1 to 3 are 30 steps behind, its optimizer, and what its rows should be."""
    (table,) = random_tables((6, 2))
    layer, dense = embedding(table), embedding(table, sparse=False)
    ours, theirs = exact(layer, **options), torch.optim.AdamW(dense.parameters(), **OPTIONS)
    for model, optimizer in ((layer, ours), (dense, theirs)):
        train(optimizer, model, [0, 1, 2, 3], steps=4)
        train(optimizer, model, [0], steps=30)
    assert (layer.weight - dense.weight).abs().max() > 0.1
    return layer, ours, dense.weight.detach()


def assert_current(weight: Tensor, expected: Tensor) -> None:
    """As far apart as one coast may leave them."""
    torch.testing.assert_close(weight.detach(), expected, rtol=0, atol=ALLOWED * LR)


class Run:
    """A table in exact mode and a dense one that torch trains."""

    def __init__(
        self, rows: int = 6, dtype: torch.dtype = torch.float64, backend: str = "auto", **options: Any
    ) -> None:
        (table,) = random_tables((rows, 2), dtype=dtype)
        self.options = {**OPTIONS, **options}
        self.layer, self.dense = embedding(table), embedding(table.double(), sparse=False)
        self.ours: Any = AdamW(self.layer.parameters(), sparse="exact", backend=backend, **self.options)
        self.ours.attach(self.layer)
        self.theirs = torch.optim.AdamW(self.dense.parameters(), **self.options)

    def train(self, rows: Any, steps: int = 1) -> Run:
        train(self.ours, self.layer, rows, steps)
        train(self.theirs, self.dense, rows, steps)
        return self

    def replaced(self, **options: Any) -> Run:
        """The same dense table, beside an untrained one in exact mode."""
        new = Run(len(self.dense.weight), self.layer.weight.dtype, self.ours.backend, **{**self.options, **options})
        with torch.no_grad():
            new.layer.weight.uniform_()
        new.dense, new.theirs = self.dense, self.theirs
        return new

    def assert_close(self, coasts: int = 1) -> None:
        self.ours.settle()
        tolerance = coasts * ALLOWED * LR + 100 * torch.finfo(self.layer.weight.dtype).eps
        torch.testing.assert_close(self.layer.weight.double(), self.dense.weight, rtol=0, atol=tolerance)
        state, expected = self.ours.state[self.layer.weight], self.theirs.state[self.dense.weight]
        assert float(state["step"]) == float(expected["step"])
        for name in ("exp_avg", "exp_avg_sq"):
            rtol = 1000 * torch.finfo(self.layer.weight.dtype).eps
            torch.testing.assert_close(state[name].double(), expected[name].double(), rtol=rtol, atol=1e-9)


def usual() -> Run:
    """Rows 1 to 3 are 30 steps behind."""
    return Run().train([0, 1, 2, 3], steps=4).train([0], steps=30)


def through_file(value: Any) -> Any:
    """Saved and loaded."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def save(run: Run, order: str) -> tuple[Any, Any]:
    """State dicts of model and optimizer, each written before the next one is made."""
    saved = {}
    for name in order.split():
        saved[name] = through_file((run.layer if name == "model" else run.ours).state_dict())
    return saved["model"], saved["optimizer"]


def load(run: Run, saved: tuple[Any, Any], order: str, **options: Any) -> Run:
    """Both loaded by new ones."""
    new = run.replaced(**options)
    for name in order.split():
        if name == "model":
            new.layer.load_state_dict(saved[0])
        else:
            new.ours.load_state_dict(saved[1])
    return new


def snapshot(optimizer: Any) -> Any:
    """Copies of parameters and state, taken without a state dict, which may bring rows up to date."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    states = [dict(optimizer.state[param]) if param in optimizer.state else {} for param in params]
    return copy.deepcopy(([param.detach() for param in params], states))


def assert_unmoved(optimizer: Any, before: Any) -> None:
    """Parameters and state are bit for bit what ``snapshot`` found."""
    params, states = snapshot(optimizer)
    assert all(map(torch.equal, params, before[0]))
    assert_same_bits(dict(enumerate(states)), dict(enumerate(before[1])))
