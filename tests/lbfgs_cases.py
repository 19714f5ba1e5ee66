"""Problems for LBFGS, and pairs of optimizers, ours and torch's, that solve them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from descend.second_order.lbfgs import LBFGS

Loss = Callable[[int], Tensor]
Problem = Callable[[torch.dtype], tuple[list[Tensor], Loss]]
TORCH_KEYS = ["func_evals", "n_iter", "d", "t", "old_dirs", "old_stps", "ro", "H_diag", "prev_flat_grad", "prev_loss"]
SEARCHES = (None, "strong_wolfe")


# A problem returns its parameters, and a function that computes the loss for the k-th call of ``step``.


def rosenbrock(dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Loss]:
    x = torch.tensor([-1.2, 1.0, -1.2, 1.0, 0.5], dtype=dtype, requires_grad=True)
    return [x], lambda k: (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def single(dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Loss]:
    x = torch.tensor(3.0, dtype=dtype, requires_grad=True)
    return [x], lambda k: (x - 1) ** 4 + torch.cos(3 * x)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def logistic(dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Loss]:
    """A new minibatch for each step."""
    data, noise = random(60, 7).to(dtype), random(60, seed=1).to(dtype)
    labels = (data[:, 0] + 0.5 * noise > 0).to(dtype)
    weight, bias = torch.zeros(7, dtype=dtype, requires_grad=True), torch.zeros(1, dtype=dtype, requires_grad=True)

    def loss(k: int) -> Tensor:
        rows = slice(10 * (k % 3), 10 * (k % 3) + 40)
        entropy = nn.functional.binary_cross_entropy_with_logits(data[rows] @ weight + bias, labels[rows])
        return entropy + 1e-3 * weight.square().sum()

    return [weight, bias], loss


def network(dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Loss]:
    """Four parameters, a new minibatch for each step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 3)).to(dtype)
    inputs, targets = random(40, 5).to(dtype), random(40, 3, seed=1).to(dtype)
    return list(model.parameters()), lambda k: (model(inputs[5 * k :]) - targets[5 * k :]).square().mean()


PROBLEMS: list[Problem] = [rosenbrock, single, logistic, network]


class Twin(NamedTuple):
    """An optimizer with its own copy of a problem; it records every point where the loss is evaluated."""

    optimizer: Any
    params: list[Tensor]
    loss: Loss
    points: list[Tensor]

    def closure(self, k: int = 0) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            self.optimizer.zero_grad()
            loss = self.loss(k)
            loss.backward()
            self.points.append(flat(self.params))
            return loss

        return closure

    def step(self, k: int = 0) -> Tensor:
        loss = self.optimizer.step(self.closure(k))
        self.points.append(flat(self.params))
        return loss

    @property
    def state(self) -> dict[str, Any]:
        return self.optimizer.state[self.params[0]]


def flat(params: list[Tensor]) -> Tensor:
    return torch.cat([param.detach().reshape(-1) for param in params]).clone()


def twin(cls: Any, problem: Problem, dtype: torch.dtype = torch.float64, **options: Any) -> Twin:
    torch.set_num_threads(1)  # with small matrices threads only wait for each other
    params, loss = problem(dtype)
    if isinstance(options.get("lr"), Tensor):
        options["lr"] = options["lr"].clone()
    return Twin(cls(params, **options), params, loss, [])


def twins(problem: Problem, **options: Any) -> tuple[Twin, Twin]:
    return twin(LBFGS, problem, **options), twin(torch.optim.LBFGS, problem, **options)


def assert_same_points(ours: list[Tensor], theirs: list[Tensor]) -> None:
    """Assert that both evaluated the loss at the same points, bit for bit."""
    assert len(ours) == len(theirs)
    assert [k for k, (a, b) in enumerate(zip(ours, theirs, strict=True)) if not torch.equal(a, b)] == []


def numbers(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [numbers(entry) for entry in value]
    return value.double().tolist() if isinstance(value, Tensor) else value
