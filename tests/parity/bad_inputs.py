"""Mistakes that programs make, and whose errors their tests match."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

NAN = float("nan")


class BadInput(NamedTuple):
    """A mistake: its name, the arguments that a class must have for it, and what is tried."""

    name: str
    arguments: tuple[str, ...]
    attempt: Callable[[Any], Any]

    def applies(self, optimizer_class: type[Optimizer]) -> bool:
        """Whether the class has the arguments that this mistake is about."""
        return set(self.arguments) <= set(inspect.signature(optimizer_class).parameters)


def params(*shapes: tuple[int, ...]) -> list[Tensor]:
    """New parameters."""
    return [torch.ones(shape, requires_grad=True) for shape in shapes or ((3, 2),)]


def option(**options: Any) -> BadInput:
    """A bad option given to the constructor."""
    name = ", ".join(f"{key}={value!r}" for key, value in options.items())
    return BadInput(f"`{name}`", tuple(options), lambda optimizer_class: optimizer_class(params(), **options))


def parameters(name: str, given: Callable[[], Any]) -> BadInput:
    """Bad parameters given to the constructor."""
    return BadInput(f"parameters: {name}", (), lambda optimizer_class: optimizer_class(given()))


def later(name: str, attempt: Callable[[Optimizer], Any], *arguments: str) -> BadInput:
    """Something bad done to an optimizer that is all right."""
    return BadInput(name, arguments, lambda optimizer_class: attempt(optimizer_class(params())))


def gradient(name: str, grad: Callable[[Tensor], Tensor], made: Callable[[], Tensor], **options: Any) -> BadInput:
    """A step with a gradient, a parameter or an option that may not be supported."""

    def attempt(optimizer_class: Any) -> None:
        param = made()

        def closure() -> Tensor:
            param.grad = grad(param)
            return param.detach().abs().sum()

        optimizer_class([param], **options).step(closure)

    return BadInput(f"step: {name}", tuple(options), attempt)


def _plain() -> Tensor:
    return torch.ones(3, 2, requires_grad=True)


def _not_leaf() -> Tensor:
    made = _plain().clone()
    made.retain_grad()
    return made


def _load(change: Callable[[dict[str, Any]], Any]) -> Callable[[Optimizer], None]:
    def attempt(optimizer: Optimizer) -> None:
        saved = optimizer.state_dict()
        change(saved)
        optimizer.load_state_dict(saved)

    return attempt


_NUMBERS = (
    *("eps", "weight_decay", "momentum", "rho", "lr_decay", "initial_accumulator_value", "alpha", "momentum_decay"),
    *("lambd", "t0", "dampening", "max_iter", "tolerance_grad", "history_size"),
)

BAD_INPUTS = (
    option(lr=-1.0),
    option(lr=NAN),
    option(lr=torch.ones(2)),
    option(lr=torch.tensor(0.1), foreach=True),
    *(option(**{name: -1.0}) for name in _NUMBERS),
    option(betas=(1.0, 0.9)),
    option(betas=(-0.1, 0.9)),
    option(betas=(0.9, 1.0)),
    option(betas=(0.9, torch.tensor(0.9))),
    option(betas=(torch.ones(2), torch.tensor(0.9))),
    option(betas=(0, 0.9)),
    option(betas=(0.9,)),
    option(betas=(0.5, 0.9, 0.999)),
    option(etas=(0.5, 1.2, 1.5)),
    option(lr="0.1"),
    option(lr=torch.tensor(True)),
    option(etas=(1.5, 1.2)),
    option(step_sizes=(1.0, 0.5)),
    option(nesterov=True),
    option(nesterov=True, momentum=0.9, dampening=0.5),
    option(line_search_fn="newton"),
    option(history_size=True),
    option(fused=True, foreach=True),
    option(fused=True, differentiable=True),
    BadInput("`lr=-1.0`, and None as parameters", ("lr",), lambda optimizer_class: optimizer_class(None, lr=-1.0)),
    BadInput("an unknown option", (), lambda optimizer_class: optimizer_class(params(), speed=1.0)),
    parameters("none", list),
    parameters("a tensor", lambda: params()[0]),
    parameters("no tensors", lambda: [1.0, 2.0]),
    parameters("a string", lambda: "weights"),
    parameters("a set", lambda: [{"params": set(params())}]),
    parameters("a dict without params", lambda: [{"lr": 0.1}]),
    parameters("not a leaf", lambda: [params()[0] * 2]),
    parameters("integers", lambda: [torch.ones(2, dtype=torch.int64)]),
    parameters("named here and there", lambda: [("weight", params()[0]), params()[0]]),
    parameters("named twice alike", lambda: [("weight", params()[0]), ("weight", params()[0])]),
    parameters("in two groups", lambda: [{"params": (shared := params())}, {"params": shared}]),
    parameters("twice in a group", lambda: params() * 2),
    parameters("sparse", lambda: [torch.eye(3).to_sparse().requires_grad_()]),
    parameters("complex", lambda: [torch.ones(2, dtype=torch.complex64, requires_grad=True)]),
    later("`add_param_group`: not a dict", lambda optimizer: optimizer.add_param_group(params())),
    later("`add_param_group`: a parameter again", lambda o: o.add_param_group({"params": o.param_groups[0]["params"]})),
    later("`add_param_group`: `lr=-1.0`", lambda o: o.add_param_group({"params": params(), "lr": -1.0}), "lr"),
    later("`load_state_dict`: a group more", _load(lambda saved: saved["param_groups"].append({"params": [9]}))),
    later("`load_state_dict`: a parameter more", _load(lambda saved: saved["param_groups"][0]["params"].append(9))),
    later("`load_state_dict`: no groups", _load(lambda saved: saved.pop("param_groups"))),
    later("`load_state_dict`: no state", _load(lambda saved: saved.pop("state"))),
    gradient("a sparse gradient", lambda param: torch.ones_like(param).to_sparse(1), _plain),
    gradient(
        "a sparse parameter", lambda param: param.detach().clone(), lambda: torch.eye(3).to_sparse().requires_grad_()
    ),
    gradient("a dense gradient", torch.ones_like, _plain),
    gradient("`capturable` on the CPU", torch.ones_like, _plain, capturable=True),
    gradient("`foreach` and `differentiable`", torch.ones_like, _not_leaf, foreach=True, differentiable=True),
    gradient("a complex parameter", torch.ones_like, lambda: torch.ones(2, dtype=torch.complex64, requires_grad=True)),
    gradient(
        "`fused`, a complex parameter",
        torch.ones_like,
        lambda: torch.ones(2, dtype=torch.complex64, requires_grad=True),
        fused=True,
    ),
    gradient(
        "`fused`, a parameter on meta",
        torch.ones_like,
        lambda: torch.ones(2, device="meta", requires_grad=True),
        fused=True,
    ),
)
