"""Sparse gradients of many kinds, and a reference for ``sparse="touched"`` that does not use the library."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from cases import Case, device, leaves, params_of
from torch import Tensor

from descend import SGD, Adam, AdamW, FirstOrder, from_rule


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Torch's sparse operations wake all threads for a handful of numbers; tests that need threads set their own."""
    torch.set_num_threads(1)


def table(rows: int = 9, dim: int = 4, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return a random table, the same for the same shape."""
    return leaves([(rows, dim)], dtype)[0]


def versions(optimizer: FirstOrder) -> list[int]:
    """Return the version counter of each parameter."""
    return [param._version for param in params_of(optimizer)]


def coo(indices: Any, values: Tensor, shape: Sequence[int], coalesced: bool | None = None) -> Tensor:
    """Return a sparse tensor without checking it; ``indices`` of one sparse dimension may be a plain list."""
    indices = torch.as_tensor(indices, dtype=torch.int64)
    indices = indices[None] if indices.dim() == 1 else indices
    made = torch.sparse_coo_tensor(indices, values, tuple(shape), is_coalesced=coalesced, check_invariants=False)
    return made.to(device())


def random_indices(sizes: Sequence[int], count: int, random: torch.Generator) -> Tensor:
    """Return random indices; some of them repeat if ``count`` is not small."""
    return torch.stack([torch.randint(max(size, 1), (count,), generator=random) for size in sizes])


def zipf_indices(rows: int, count: int, random: torch.Generator) -> Tensor:
    """Return random rows: that of rank r has a probability proportional to r**-1.2, and ranks are shuffled."""
    weights = torch.arange(1, rows + 1, dtype=torch.float64) ** -1.2
    ranks = torch.multinomial(weights, count, replacement=True, generator=random)
    return torch.randperm(rows, generator=random)[ranks]


def random_sparse(
    shape: Sequence[int], count: int, seed: int, dtype: torch.dtype = torch.float64, sparse_dim: int = 1
) -> Tensor:
    """Return a sparse tensor with ``count`` random rows at random indices, the same for the same seed."""
    random = torch.Generator().manual_seed(1000 + seed)
    indices = random_indices(shape[:sparse_dim], count, random)
    values = torch.randn((count, *shape[sparse_dim:]), generator=random, dtype=torch.float64)
    return coo(indices, values.to(dtype), shape)


def give_sparse_grads(params: Sequence[Tensor], seed: int) -> None:
    """Set sparse gradients for parameters with rows and dense ones for the others, the same for the same seed."""
    random = torch.Generator().manual_seed(2000 + seed)
    for number, param in enumerate(params):
        if param.dim() > 1 and param.numel():
            grad = random_sparse(param.shape, 3 + len(param) // 2, 10 * seed + number, param.dtype)
        else:
            grad = torch.randn(param.shape, generator=random, dtype=torch.float64).to(param.dtype)
        param.grad = grad.to(param.device)


def summed(grad: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
    """Return the distinct indices of a sparse gradient, and its values there, summed in float64 on the CPU."""
    grad = grad.cpu()
    grad = grad if grad.is_sparse else grad.to_sparse()
    indices, values = grad._indices(), grad._values()
    wide = torch.promote_types(values.dtype, torch.float64)
    places, owner = torch.unique(indices, dim=1, return_inverse=True)
    total = torch.zeros((places.shape[1], *values.shape[1:]), dtype=wide)
    total.index_add_(0, owner, values.to(wide))
    return tuple(places), total


class ByHand:
    """A float64 table on the CPU; its touched rows are gathered into a small tensor, which a dense optimizer updates.

    Their rows of the state are gathered too. The step count is that of the whole table.

    Args:
        table: initial values.
        theirs: the dense optimizer, torch's or a similar one.
        options: its options.
    """

    def __init__(self, table: Tensor, theirs: Callable[..., Any], options: dict[str, Any]) -> None:
        self.table = table.detach().clone().cpu().to(torch.promote_types(table.dtype, torch.float64))
        self.state: dict[str, Any] = {}
        self._make = lambda rows: theirs([rows], **options)

    def step(self, grad: Tensor, scale: float = 1.0) -> None:
        """Take a step with a sparse gradient."""
        index, total = summed(grad)
        rows = self.table[index].clone().requires_grad_()
        rows.grad = total * scale
        optimizer = self._make(rows)
        for name, value in self.state.items():
            is_table = isinstance(value, Tensor) and value.shape == self.table.shape
            optimizer.state[rows][name] = value[index].clone() if is_table else value
        optimizer.step()
        self.table[index] = rows.detach()
        for name, value in optimizer.state[rows].items():
            if isinstance(value, Tensor) and value.shape == rows.shape:
                self.state.setdefault(name, torch.zeros_like(self.table))[index] = value
            else:
                self.state[name] = value

    def assert_equal(self, optimizer: FirstOrder, param: Tensor, rtol: float = 1e-12, atol: float = 1e-12) -> None:
        """Assert that parameter and state agree; the default tolerance covers float64 rounding over tens of steps."""
        torch.testing.assert_close(param.detach().cpu(), self.table.to(param.dtype), rtol=rtol, atol=atol)
        found = optimizer.state[param]
        assert found.keys() == self.state.keys()
        for name, value in self.state.items():
            ours = torch.as_tensor(found[name]).cpu()
            torch.testing.assert_close(ours, torch.as_tensor(value).to(ours.dtype), rtol=rtol, atol=atol, msg=name)


def signs(param, grad, exp_avg, lr, beta, weight_decay):
    """A user's rule: bounded steps along the momentum, with weight decay."""
    exp_avg = beta * exp_avg + (1 - beta) * grad
    return param - lr * (exp_avg / (1 + exp_avg * exp_avg) + weight_decay * param), exp_avg


Signs = from_rule(signs, "Signs", lr=0.1, beta=0.5, weight_decay=0.1)


class SignsByHand(torch.optim.Optimizer):
    """The same method as an ordinary optimizer class."""

    def __init__(self, params: Any, lr: float = 0.1, beta: float = 0.5, weight_decay: float = 0.1) -> None:
        super().__init__(params, dict(lr=lr, beta=beta, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                average = self.state[param].setdefault("exp_avg", torch.zeros_like(param))
                average.mul_(group["beta"]).add_(param.grad, alpha=1 - group["beta"])
                decayed = param * group["weight_decay"]
                param.sub_(group["lr"] * (average / (1 + average.square()) + decayed))


class Touched(NamedTuple):
    """An optimizer with ``sparse="touched"``, a dense one for the gathered rows, and the options of both."""

    ours: type[FirstOrder]
    theirs: Callable[..., Any]
    options: dict[str, Any]

    def __str__(self) -> str:
        return "-".join([self.ours.__name__, *(f"{key}={value}" for key, value in self.options.items())])


TOUCHED = [
    Touched(SGD, torch.optim.SGD, dict(lr=0.1, weight_decay=0.1)),
    Touched(SGD, torch.optim.SGD, dict(lr=0.1, momentum=0.9, dampening=0.5, maximize=True)),
    Touched(SGD, torch.optim.SGD, dict(lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1)),
    Touched(Adam, torch.optim.Adam, dict(lr=0.01, weight_decay=0.1)),
    Touched(Adam, torch.optim.Adam, dict(lr=0.01, amsgrad=True, maximize=True)),
    Touched(AdamW, torch.optim.AdamW, dict(lr=0.01, weight_decay=0.1)),
    Touched(AdamW, torch.optim.AdamW, dict(lr=0.01, weight_decay=0.1, amsgrad=True)),
    Touched(Signs, SignsByHand, dict(lr=0.05)),
]

ADAMW, NESTEROV = TOUCHED[5], TOUCHED[2]

# Without weight decay, because torch's SGD with weight decay does not take sparse gradients.
SGD_CASES = [
    Case(SGD, torch.optim.SGD, dict(lr=0.1)),
    Case(SGD, torch.optim.SGD, dict(lr=0.1, momentum=0.9, dampening=0.5)),
    Case(SGD, torch.optim.SGD, dict(lr=0.1, momentum=0.9, nesterov=True, maximize=True)),
]
