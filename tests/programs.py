"""All public optimizers, one way to take a step with any of them, and small models to train."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from cases import give_grads, params_of
from torch import Tensor, nn
from torch.optim import Optimizer

import descend

WITH_CLOSURE = ("LBFGS", "LeastSquares", "Newton")  # their step needs a closure
# Options that exercise more of a class than its defaults.
OPTIONS: dict[str, dict[str, Any]] = {
    "SGD": dict(momentum=0.9),
    "RMSprop": dict(momentum=0.9),
    "LBFGS": dict(max_iter=3, history_size=4),
    "LeastSquares": dict(max_iter=2),
    "Newton": dict(max_iter=2),
}


def public_classes() -> dict[str, Any]:
    """Return every optimizer class of this library by name, without base classes and torch's own."""
    found = {name: getattr(descend, name) for name in descend.__all__}
    return {
        name: value
        for name, value in found.items()
        if isinstance(value, type)
        and issubclass(value, Optimizer)
        and value is not descend.FirstOrder
        and value.__module__.startswith("descend")
    }


OURS = public_classes()
FIRST_ORDER = {name: kind for name, kind in OURS.items() if name not in (*WITH_CLOSURE, "SparseAdam")}
TWINS = {name: (kind, getattr(torch.optim, name)) for name, kind in OURS.items() if hasattr(torch.optim, name)}

EXACT_TWINS = {name: kinds for name, kinds in TWINS.items() if name != "Muon"}  # torch's multiplies in bfloat16


def params_for(kind: Any, model: nn.Module) -> Any:
    """Return what a program gives an optimizer of its model: Muon sorts the parameters of a module."""
    return model if issubclass(kind, descend.Muon) else model.parameters()


def build(kind: Any, params: Any, **options: Any) -> Any:
    """Return an optimizer with its entry of ``OPTIONS``."""
    return kind(params, **{**OPTIONS.get(kind.__name__, {}), **options})


def advance(optimizer: Any, seed: int) -> Any:
    """Take a step with new gradients, or with a new problem for classes that need a closure; fixed by the seed."""
    params = params_of(optimizer)
    names = {base.__name__ for base in type(optimizer).__mro__}
    if names & set(WITH_CLOSURE):
        return optimizer.step(_closure(params, seed, must_go_backward="LBFGS" in names))
    give_grads(params, seed)
    if "SparseAdam" in names:
        for param in params:
            assert param.grad is not None
            param.grad = param.grad.to_sparse(1)
    return optimizer.step()


def _closure(params: list[Tensor], seed: int, must_go_backward: bool) -> Callable[[], Tensor]:
    random = torch.Generator().manual_seed(seed)
    targets = [torch.randn(param.shape, generator=random, dtype=torch.float64).to(param.dtype) for param in params]

    def closure() -> Tensor:
        for param in params:
            param.grad = None
        loss = torch.stack([((p - t) ** 2 + (p - t) ** 4).sum() for p, t in zip(params, targets, strict=True)]).sum()
        if must_go_backward:
            loss.backward()
        return loss

    return closure


def network(seed: int = 0) -> nn.Sequential:
    """Return a small classifier with four inputs and two classes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def batch(seed: int, size: int = 16) -> tuple[Tensor, Tensor]:
    """Return random inputs and their classes."""
    inputs = torch.randn(size, 4, generator=torch.Generator().manual_seed(seed))
    return inputs, (inputs[:, 0] * inputs[:, 1] > 0).long()


def loss_of(model: nn.Module, seed: int) -> Tensor:
    """Return the loss of a model on the batch of a seed."""
    inputs, classes = batch(seed)
    return nn.functional.cross_entropy(model(inputs), classes)


class Words(nn.Module):
    """A small classifier of bags of words whose embedding table has sparse gradients."""

    def __init__(self, is_sparse: bool = True) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.table = nn.EmbeddingBag(60, 4, sparse=is_sparse)
            self.head = nn.Linear(4, 2)

    def forward(self, words: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": nn.functional.cross_entropy(self.head(self.table(words)), labels)}


def bags(size: int = 32) -> tuple[Tensor, Tensor]:
    """Return bags of three words and their classes; most words are rare."""
    words = (60 * torch.rand(size, 3, generator=torch.Generator().manual_seed(0)) ** 3).long()
    return words, words.sum(1) % 2


def exact_adamw(model: Words, **options: Any) -> descend.AdamW:
    """Return an AdamW in exact mode, attached to the table."""
    optimizer = descend.AdamW(model.parameters(), lr=0.01, weight_decay=0.1, sparse="exact", **options)
    optimizer.attach(model.table)
    return optimizer


def assert_same_model(ours: nn.Module, theirs: nn.Module) -> None:
    """Assert that two models have the same parameters and buffers, bit for bit."""
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
