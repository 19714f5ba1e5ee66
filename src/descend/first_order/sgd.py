"""Gradient descent: plain, with momentum, and averaged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from typing_extensions import Unpack

from descend import rules
from descend.core.checks import check_flags, check_lr, check_not_negative
from descend.core.groups import ParamsT
from descend.core.memory import wide
from descend.core.options import Options
from descend.first_order.optimizer import FirstOrder
from descend.ops import where


class SGD(FirstOrder):
    """Gradient descent, with momentum (heavy ball or Nesterov), dampening and weight decay if wanted.

    Drop-in for ``torch.optim.SGD``. Weight decay and L2 regularization are the same thing here; in Adam they are not.

    Args:
        params: a module, whose parameters then have names; or parameters, ``(name, parameter)`` pairs, or dicts that
            define groups, as in torch.
        lr: step size, >= 0; a float or a tensor of one element. Default: 1e-3.
        momentum: part of the buffer that a step keeps, >= 0. Default: 0.
        dampening: 1 minus the weight of a new gradient in the buffer, from the second step on. Default: 0.
        weight_decay: L2 regularization, >= 0: adds ``weight_decay * param`` to the gradient. Default: 0.
        nesterov: look ahead; needs momentum > 0 and no dampening. Default: False.
        maximize: ascend instead. Default: False.
        foreach, fused: accepted and kept in the groups; the backend is chosen by ``backend``.
        differentiable: let autograd see the step. Default: False.
    Raises:
        ValueError: if an option is out of range.
    Example:
        >>> weight = torch.ones(2, requires_grad=True)
        >>> optimizer = SGD([weight], lr=0.1, momentum=0.9)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> weight
        tensor([0.8000, 0.8000], requires_grad=True)

    Source:
        Sutskever et al. 2013, https://proceedings.mlr.press/v28/sutskever13.html
    """

    decay = "l2"
    counts_steps = False
    takes_sparse = True
    foreach_is_differentiable = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | torch.Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults, **options)

    def rule_for(self, group: Mapping[str, Any]) -> Callable[..., Any]:
        if group["momentum"] == 0:
            return rules.sgd
        return rules.nesterov if group["nesterov"] else rules.momentum

    def meaning_of_sparse(self, param: torch.Tensor, group: Mapping[str, Any]) -> str:
        meaning = super().meaning_of_sparse(param, group)
        # Without momentum and weight decay nothing happens to a row whose gradient is zero.
        return "touched" if meaning == "all" and group["momentum"] == 0 and group["weight_decay"] == 0 else meaning

    def scalars(self, group: Mapping[str, Any], step: float) -> tuple[Any, ...]:
        lr, weight_decay, momentum = group["lr"], group["weight_decay"], group["momentum"]
        if momentum == 0:
            return lr, weight_decay
        # The buffer starts as the first gradient, undamped.
        decay, gain = (0.0, 1.0) if step == 1 else (momentum, 1 - group["dampening"])
        return (lr, weight_decay, decay, gain, momentum) if group["nesterov"] else (lr, weight_decay, decay, gain)

    def may_decide_on_device(self, group: Mapping[str, Any]) -> bool:
        # Undamped or not: the host must know whether a step was the first.
        return super().may_decide_on_device(group) and (group["momentum"] == 0 or group["dampening"] == 0)

    def check_options(self, options: Mapping[str, Any]) -> None:
        check_lr(self, options)
        check_not_negative(self, options, "momentum", "weight_decay")
        if options["nesterov"] and (options["momentum"] <= 0 or options["dampening"] != 0):
            raise ValueError(
                "Nesterov momentum requires a momentum and zero dampening "
                f"(SGD: got momentum={options['momentum']}, dampening={options['dampening']})"
            )
        check_flags(options)


class ASGD(FirstOrder):
    """Averaged gradient descent: step sizes shrink slowly, and the average of the weights is kept.

    Drop-in for ``torch.optim.ASGD``. The average is ``optimizer.state[param]["ax"]``. The step size is
    ``lr / (1 + lambd * lr * step) ** alpha``. It is computed at the end of each step for the next one, so a change of
    ``lr`` takes effect one step later, as in torch.

    Args:
        params: a module, whose parameters then have names; or parameters, ``(name, parameter)`` pairs, or dicts that
            define groups, as in torch.
        lr: first step size, >= 0; a float or a tensor of one element. Default: 1e-2.
        lambd: rate at which step sizes shrink, and decay of the weights; >= 0. Default: 1e-4.
        alpha: power with which step sizes shrink, >= 0. Default: 0.75.
        t0: number of steps before averaging begins; until then the average is the weight itself. Default: 1e6.
        weight_decay: L2 regularization, >= 0: adds ``weight_decay * param`` to the gradient. Default: 0.
        maximize: ascend instead. Default: False.
        foreach: accepted and kept in the groups; the backend is chosen by ``backend``.
        capturable: keep step counts on the device, so that a CUDA graph can capture the step. Default: False.
        differentiable: let autograd see the step. Default: False.
    Raises:
        ValueError: if an option is out of range.
    Example:
        >>> weight = torch.ones(2, requires_grad=True)
        >>> optimizer = ASGD([weight], lr=0.1, lambd=0.0, t0=0)
        >>> for _ in range(3):  # to 0.9, 0.8, 0.7
        ...     weight.grad = torch.ones(2)
        ...     optimizer.step()
        >>> optimizer.state[weight]["ax"]
        tensor([0.7500, 0.7500])

    Source:
        Polyak & Juditsky 1992, https://doi.org/10.1137/0330046; Xu 2011, https://arxiv.org/abs/1107.2490
    """

    rule = staticmethod(rules.asgd)
    decay = "l2"
    state_follows_param = True
    scalar_state = ("eta", "mu")
    nonnegative_state = ("eta", "mu")
    exact_state = ("ax",)
    capturable_needs = "params, mus, etas, and state_steps"

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-2,
        lambd: float = 1e-4,
        alpha: float = 0.75,
        t0: float = 1e6,
        weight_decay: float = 0,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "lambd": lambd,
            "alpha": alpha,
            "t0": t0,
            "weight_decay": weight_decay,
            "foreach": foreach,
            "maximize": maximize,
            "differentiable": differentiable,
            "capturable": capturable,
        }
        super().__init__(params, defaults, **options)

    def scalars_and_state(
        self, group: Mapping[str, Any], step: float, scalar_state: Sequence[torch.Tensor]
    ) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        eta, mu = map(wide, scalar_state)
        lr, lambd = group["lr"], group["lambd"]
        averaged = step - group["t0"]
        eta_next, mu_next = lr / (1 + lambd * lr * step) ** group["alpha"], 1 / where(averaged > 1, averaged, 1.0)
        return (eta, lambd, group["weight_decay"], mu), (eta_next, mu_next)

    def initial_state(self, name: str, param: torch.Tensor, group: Mapping[str, Any]) -> Any:
        return {"eta": group["lr"], "mu": 1.0}.get(name, 0.0)

    def check_options(self, options: Mapping[str, Any]) -> None:
        check_lr(self, options)
        check_not_negative(self, options, "lambd", "alpha", "weight_decay")
