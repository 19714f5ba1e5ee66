"""An optimizer with ``sparse="exact"`` beside a dense one, and the error that its rows may have."""

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
ALLOWED = 0.01  # error each time a row catches up, as a share of the largest learning rate of the missed steps

LR = 0.1
OPTIONS: dict[str, Any] = dict(lr=LR, weight_decay=0.1)

ORDERS = ("model optimizer", "optimizer model")  # of saving, or of loading

Grad = tuple[Any, Tensor] | None  # rows and their values; None for no gradient


def random_tables(*shapes: tuple[int, int], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Return random weights, the same for the same shapes."""
    random = torch.Generator().manual_seed(7)
    return [torch.randn(shape, generator=random, dtype=torch.float64).to(dtype) for shape in shapes]


def embedding(table: Tensor, sparse: bool = True) -> nn.Embedding:
    """Return an embedding with a copy of ``table``."""
    return nn.Embedding.from_pretrained(table.detach().clone(), freeze=False, sparse=sparse)


class ErrorBound:
    """How far each row of a table in exact mode may be from that of the dense optimizer.

    The difference is at most ``absolute + relative() * the largest weight``, from three sources that add up:

    - Catching up approximates the missed steps. Each time a row catches up, this costs at most ``ALLOWED`` times the
      largest learning rate of the steps it missed. A row that never had a gradient only decays, which is exact.
    - Rounding of the averages changes each step with a gradient, by at most 100 eps times the learning rate: averages
      have fewer digits than eps says where they are subnormal.
    - Rounding of the weights. The exact optimizer rounds a row to the table's dtype whenever it writes it: at a step
      with a gradient, and when the row catches up. The dense optimizer, in float64, rounds at every step.

    Args:
        rows: of the table.
        eps: of the table's dtype.
    """

    def __init__(self, rows: int, eps: float) -> None:
        self.eps = eps
        self.lrs: list[float] = []  # of all steps so far
        self.current_at = np.zeros(rows)  # the step up to which each row is current
        self.absolute = np.zeros(rows)
        self.writes = np.zeros(rows)
        self.largest_grad = np.zeros(rows)

    def add_step(self, lr: float, rows: np.ndarray, grads: np.ndarray) -> None:
        """Count a step with gradients for ``rows``; ``grads`` are their largest absolute values."""
        self.lrs.append(lr)
        self.current_at[rows] = len(self.lrs)
        self.writes[rows] += 1
        self.largest_grad[rows] = np.maximum(self.largest_grad[rows], grads)
        self.absolute[rows] += 100 * self.eps * lr

    def add_catching_up(self, rows: np.ndarray, allowed: float) -> None:
        """Count that those of ``rows`` that are behind catch up, each with an error of up to ``allowed`` * lr."""
        for row in rows[self.current_at[rows] < len(self.lrs)]:
            if self.largest_grad[row]:
                self.absolute[row] += allowed * max(self.lrs[int(self.current_at[row]) :])
            self.writes[row] += 1
            self.current_at[row] = len(self.lrs)

    def forget_steps(self) -> None:
        """Count from zero, as optimizers do whose state was cleared. The weights keep the errors that they have."""
        self.lrs.clear()
        self.current_at[:] = self.largest_grad[:] = 0

    def relative(self) -> np.ndarray:
        """The bound on the rounding of each row, relative to the largest weight of the table."""
        return self.eps * self.writes + 2.0**-52 * len(self.lrs)


class ExactTwins:
    """Tables in exact mode, and float64 copies that a dense optimizer trains with the same gradients.

    ``assert_close`` allows what ``ErrorBound`` has added up in ``bounds``, one for each table.

    Args:
        tables: initial weights; each table gets a group of its own.
        dense: the dense optimizer.
        groups: options of the groups.
        ours: the class in exact mode.
        backend: of the exact optimizer.
        max_norm: of the exact optimizer; torch clips the gradients of the dense one.
        options: options of both.
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
        self.allowed = ALLOWED  # each time a row catches up, in units of lr
        self.bounds = [ErrorBound(len(table), torch.finfo(table.dtype).eps) for table in tables]

    def edit(self, change: Callable[[Any], Any]) -> None:
        """Do the same to both optimizers."""
        for optimizer in self.both:
            change(optimizer)

    def read(self, number: int, rows: Any) -> Tensor:
        """Look up rows of a table, as a forward pass does."""
        rows = torch.as_tensor(rows, dtype=torch.int64)
        self.bounds[number].add_catching_up(np.unique(rows.numpy()), self.allowed)
        with torch.no_grad():
            return self.layers[number](rows)

    def settle(self) -> None:
        """Bring all rows up to date."""
        self.ours.settle()
        for bound in self.bounds:
            bound.add_catching_up(np.arange(len(bound.writes)), self.allowed)

    def step(self, *grads: Grad) -> None:
        """Take a step with both optimizers, with a gradient for each table."""
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
            touched = np.unique(rows.numpy())
            sizes = theirs.grad.abs().amax(1).numpy()[touched]
            self.bounds[number].add_step(float(self.ours.param_groups[number]["lr"]), touched, sizes)
        if self.max_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.dense_weights, self.max_norm)
        for optimizer in self.both:
            optimizer.step()

    def assert_close(self) -> float:
        """Assert that all rows and averages are within the bounds of the dense optimizer's.

        Returns:
            The largest error as a share of ``ErrorBound.absolute``, over rows where that exceeds the rounding.
        """
        self.settle()
        worst = 0.0
        for number, (ours, theirs) in enumerate(zip(self.weights, self.dense_weights, strict=True)):
            bound = self.bounds[number]
            error = (ours.double() - theirs).detach().abs().amax(1).numpy()
            size = float(
                torch.cat([torch.ones(1), ours.detach().abs().flatten(), theirs.detach().abs().flatten()]).max()
            )
            rounding = bound.relative() * size
            assert np.isfinite(error).all()
            assert (error <= bound.absolute + rounding).all(), (number, error - bound.absolute - rounding)
            used = bound.absolute > rounding
            worst = max(worst, float((error[used] / bound.absolute[used]).max(initial=0.0)))
            if bound.lrs:
                self._assert_averages_close(number)
        return worst

    def _assert_averages_close(self, number: int) -> None:
        """Averages catch up by an exact factor, so only rounding separates them, relative to the largest gradient."""
        state, expected = self.ours.state[self.weights[number]], self.dense.state[self.dense_weights[number]]
        bound = self.bounds[number]
        assert float(state["step"]) == float(expected["step"]) == len(bound.lrs)
        largest = bound.largest_grad * min(1.0, self.max_norm or 1.0)
        tolerance = 20 * bound.eps + bound.relative()
        for name, power in (("exp_avg", 1), ("exp_avg_sq", 2)):
            error = (state[name].double() - expected[name]).abs().amax(1).numpy()
            least = torch.finfo(state[name].dtype).tiny
            assert (error <= tolerance * largest**power + least).all(), name
            assert not state[name][torch.from_numpy(bound.largest_grad == 0)].any()


class TableReader(nn.Module):
    """A module that owns a table and reads all of it, without a gradient."""

    def __init__(self, table: nn.Embedding) -> None:
        super().__init__()
        self.table = table.weight

    def forward(self, vectors: Tensor) -> Tensor:
        return vectors @ self.table.detach().T


class TiedEmbeddings(nn.Module):
    """Two embeddings that share one weight, and a module that reads all of it."""

    def __init__(self, table: Tensor, sparse: bool = True) -> None:
        super().__init__()
        self.source = embedding(table, sparse)
        self.target = embedding(table, sparse)
        self.target.weight = self.source.weight
        self.neighbours = TableReader(self.source)

    def forward(self, rows: Tensor) -> Tensor:
        return self.source(rows) * self.target(rows.flip(0) + 1)


def exact_adamw(model: nn.Module, **options: Any) -> AdamW:
    """Return an optimizer in exact mode, attached to the model."""
    optimizer = AdamW(model.parameters(), sparse="exact", **{**OPTIONS, **options})
    optimizer.attach(model)
    return optimizer


def train(optimizer: Any, model: Callable[[Tensor], Tensor], rows: Any, steps: int = 1) -> None:
    """Take steps that touch ``rows``."""
    for _ in range(steps):
        optimizer.zero_grad()
        output = model(torch.as_tensor(rows))
        (output.square() + output).sum().backward()
        optimizer.step()


def embedding_behind(**options: Any) -> tuple[nn.Embedding, AdamW, Tensor]:
    """Return an embedding whose rows 1 to 3 are 30 steps behind, its optimizer, and the dense optimizer's weight."""
    (table,) = random_tables((6, 2))
    layer, dense = embedding(table), embedding(table, sparse=False)
    ours, theirs = exact_adamw(layer, **options), torch.optim.AdamW(dense.parameters(), **OPTIONS)
    for model, optimizer in ((layer, ours), (dense, theirs)):
        train(optimizer, model, [0, 1, 2, 3], steps=4)
        train(optimizer, model, [0], steps=30)
    assert (layer.weight - dense.weight).abs().max() > 0.1
    return layer, ours, dense.weight.detach()


def assert_current(weight: Tensor, expected: Tensor) -> None:
    """Assert that rows are up to date: they differ by no more than catching up once allows."""
    torch.testing.assert_close(weight.detach(), expected, rtol=0, atol=ALLOWED * LR)


class Run:
    """A table in exact mode, and a dense copy that torch trains with the same rows."""

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
        """Return a run with this run's dense table beside a new, untrained table in exact mode."""
        new = Run(len(self.dense.weight), self.layer.weight.dtype, self.ours.backend, **{**self.options, **options})
        with torch.no_grad():
            new.layer.weight.uniform_()
        new.dense, new.theirs = self.dense, self.theirs
        return new

    def assert_close(self, catch_ups: int = 1) -> None:
        """Assert that weights and averages agree after each row has caught up at most ``catch_ups`` times."""
        self.ours.settle()
        tolerance = catch_ups * ALLOWED * LR + 100 * torch.finfo(self.layer.weight.dtype).eps
        torch.testing.assert_close(self.layer.weight.double(), self.dense.weight, rtol=0, atol=tolerance)
        state, expected = self.ours.state[self.layer.weight], self.theirs.state[self.dense.weight]
        assert float(state["step"]) == float(expected["step"])
        for name in ("exp_avg", "exp_avg_sq"):
            rtol = 1000 * torch.finfo(self.layer.weight.dtype).eps
            torch.testing.assert_close(state[name].double(), expected[name].double(), rtol=rtol, atol=1e-9)


def run_behind() -> Run:
    """Return a run whose rows 1 to 3 are 30 steps behind."""
    return Run().train([0, 1, 2, 3], steps=4).train([0], steps=30)


def through_file(value: Any) -> Any:
    """Return ``value`` after saving and loading it."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def save(run: Run, order: str) -> tuple[Any, Any]:
    """Return state dicts of model and optimizer, made and saved in this order, one after the other."""
    saved = {}
    for name in order.split():
        saved[name] = through_file((run.layer if name == "model" else run.ours).state_dict())
    return saved["model"], saved["optimizer"]


def load(run: Run, saved: tuple[Any, Any], order: str, **options: Any) -> Run:
    """Return a new run that has loaded both state dicts, in this order."""
    new = run.replaced(**options)
    for name in order.split():
        if name == "model":
            new.layer.load_state_dict(saved[0])
        else:
            new.ours.load_state_dict(saved[1])
    return new


def snapshot(optimizer: Any) -> Any:
    """Return copies of parameters and state, taken without a state dict, because that may bring rows up to date."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    states = [dict(optimizer.state[param]) if param in optimizer.state else {} for param in params]
    return copy.deepcopy(([param.detach() for param in params], states))


def assert_unmoved(optimizer: Any, before: Any) -> None:
    """Assert that parameters and state are bit for bit those of the snapshot ``before``."""
    params, states = snapshot(optimizer)
    assert all(map(torch.equal, params, before[0]))
    assert_same_bits(dict(enumerate(states)), dict(enumerate(before[1])))
