"""Relatives of Adam: Adamax, NAdam, RAdam."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from typing_extensions import Unpack

from descend import rules
from descend.core.checks import check_adam, check_not_negative
from descend.core.groups import ParamsT
from descend.core.memory import wide
from descend.core.options import Options
from descend.first_order.optimizer import FirstOrder
from descend.ops import where


class Adamax(FirstOrder):
    """Adamax: Adam with the largest recent gradient in place of the root mean square.

    Drop-in for ``torch.optim.Adamax``.

    Args:
        params: a module, whose parameters then have names; or parameters, ``(name, parameter)`` pairs, or dicts that
            define groups, as in torch.
        lr: step size, >= 0; a float or a tensor of one element. Default: 2e-3.
        betas: decay of the average and of the largest gradient, each in [0, 1). Default: (0.9, 0.999).
        eps: added to each gradient's size, >= 0, in units of the gradient. Default: 1e-8.
        weight_decay: L2 regularization, >= 0: adds ``weight_decay * param`` to the gradient. Default: 0.
        foreach: accepted and kept in the groups; the backend is chosen by ``backend``.
        capturable: keep step counts on the device, so that a CUDA graph can capture the step. Default: False.
        maximize: ascend instead. Default: False.
        differentiable: let autograd see the step. Default: False.
    Raises:
        ValueError: if an option is out of range.
    Example:
        >>> weight = torch.ones(2, requires_grad=True)
        >>> optimizer = Adamax([weight], lr=0.1)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> weight
        tensor([0.9000, 0.9000], requires_grad=True)

    Source:
        Kingma & Ba 2015, Algorithm 2, https://arxiv.org/abs/1412.6980
    """

    direction = staticmethod(rules.first_average)
    decay = "l2"
    rule = staticmethod(rules.adamax)
    nonnegative_state = ("exp_inf",)

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "foreach": foreach,
            "maximize": maximize,
            "differentiable": differentiable,
            "capturable": capturable,
        }
        super().__init__(params, defaults, **options)

    def scalars(self, group: Mapping[str, Any], step: float) -> tuple[Any, ...]:
        beta1, beta2 = group["betas"]
        return group["lr"], 1 - beta1, beta2, group["eps"], group["weight_decay"], 1 - beta1**step

    def check_options(self, options: Mapping[str, Any]) -> None:
        check_adam(self, options)


class NAdam(FirstOrder):
    """NAdam: Adam that looks one step ahead, as Nesterov's momentum does.

    Drop-in for ``torch.optim.NAdam``.

    Args:
        params: a module, whose parameters then have names; or parameters, ``(name, parameter)`` pairs, or dicts that
            define groups, as in torch.
        lr: step size, >= 0; a float or a tensor of one element. Default: 2e-3.
        betas: decay of the averages of gradient and squared gradient, each in [0, 1). Default: (0.9, 0.999).
        eps: added to the denominator, >= 0, in units of the gradient. Default: 1e-8.
        weight_decay: L2 regularization, >= 0. Default: 0.
        momentum_decay: the momentum of a step is ``betas[0] * (1 - 0.5 * 0.96 ** (step * momentum_decay))``, >= 0. It
            grows from half of ``betas[0]`` to ``betas[0]``. Default: 4e-3.
        decoupled_weight_decay: decay as ``AdamW`` does. Default: False.
        foreach: accepted and kept in the groups; the backend is chosen by ``backend``.
        capturable: keep step counts on the device, so that a CUDA graph can capture the step. Default: False.
        maximize: ascend instead. Default: False.
        differentiable: let autograd see the step. Default: False.
    Raises:
        ValueError: if an option is out of range.
    Example:
        >>> weight = torch.ones(2, requires_grad=True)
        >>> optimizer = NAdam([weight], lr=0.1)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> weight
        tensor([0.8944, 0.8944], requires_grad=True)

    Source:
        Dozat 2016, Algorithm 2, https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ
    """

    scalar_state = ("mu_product",)
    nonnegative_state = ("exp_avg_sq", "mu_product")
    capturable_needs = "params, mu_products and state_steps"

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum_decay: float = 4e-3,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "momentum_decay": momentum_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
        }
        super().__init__(params, defaults, **options)

    def rule_for(self, group: Mapping[str, Any]) -> Callable[..., Any]:
        return rules.nadamw if group["decoupled_weight_decay"] else rules.nadam

    def scalars_and_state(
        self, group: Mapping[str, Any], step: float, scalar_state: Sequence[torch.Tensor]
    ) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        lr, (beta1, beta2) = group["lr"], group["betas"]
        mu, mu_next = (beta1 * (1 - 0.5 * 0.96 ** (at * group["momentum_decay"])) for at in (step, step + 1))
        last = scalar_state[0]
        # As in torch, where mu is a number: the product has the digits of the state.
        mu_product = last * (mu.to(last.dtype) if isinstance(mu, torch.Tensor) else mu)
        product = wide(mu_product)
        grad_lr, avg_lr = lr * (1 - mu) / (1 - product), lr * mu_next / (1 - product * mu_next)
        scalars = 1 - beta1, 1 - beta2, group["eps"], _decay(group), 1 - beta2**step, grad_lr, avg_lr
        return scalars, (mu_product,)

    def initial_state(self, name: str, param: torch.Tensor, group: Mapping[str, Any]) -> Any:
        return 1.0 if name == "mu_product" else 0.0

    def check_options(self, options: Mapping[str, Any]) -> None:
        check_adam(self, options)
        check_not_negative(self, options, "momentum_decay")


class RAdam(FirstOrder):
    """RAdam: Adam without its denominator until enough gradients make that reliable; then it is phased in.

    Drop-in for ``torch.optim.RAdam``. The effect is similar to that of a learning rate warmup.

    Args:
        params: a module, whose parameters then have names; or parameters, ``(name, parameter)`` pairs, or dicts that
            define groups, as in torch.
        lr: step size, >= 0; a float or a tensor of one element. Default: 1e-3.
        betas: decay of the averages of gradient and squared gradient, each in [0, 1). Default: (0.9, 0.999).
        eps: added to the denominator, >= 0, in units of the gradient. Default: 1e-8.
        weight_decay: L2 regularization, >= 0. Default: 0.
        decoupled_weight_decay: decay as ``AdamW`` does. Default: False.
        foreach: accepted and kept in the groups; the backend is chosen by ``backend``.
        capturable: keep step counts on the device, so that a CUDA graph can capture the step. Default: False.
        maximize: ascend instead. Default: False.
        differentiable: let autograd see the step. Default: False.
    Raises:
        ValueError: if an option is out of range.
    Example:
        >>> weight = torch.ones(2, requires_grad=True)
        >>> optimizer = RAdam([weight], lr=0.1)
        >>> weight.square().sum().backward()
        >>> optimizer.step()  # gradient descent in the first steps
        >>> weight
        tensor([0.8000, 0.8000], requires_grad=True)

    Source:
        Liu et al. 2020, Algorithm 2, https://arxiv.org/abs/1908.03265
    """

    direction = staticmethod(rules.first_average)
    nonnegative_state = ("exp_avg_sq",)

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "decoupled_weight_decay": decoupled_weight_decay,
            "differentiable": differentiable,
        }
        super().__init__(params, defaults, **options)

    def rule_for(self, group: Mapping[str, Any]) -> Callable[..., Any]:
        return rules.radamw if group["decoupled_weight_decay"] else rules.radam

    def scalars(self, group: Mapping[str, Any], step: float) -> tuple[Any, ...]:
        beta1, beta2 = group["betas"]
        bias1, bias2 = 1 - beta1**step, 1 - beta2**step
        most = 2 / (1 - beta2) - 1
        length = most - 2 * step * beta2**step / bias2  # of a simple average with the variance of exp_avg_sq
        rectification = 0.0
        if most > 5:
            r_squared = (length - 4) * (length - 2) * most / ((most - 4) * (most - 2) * length)
            rectification = where(length > 5, r_squared * bias2, 0.0) ** 0.5
        return group["lr"], 1 - beta1, 1 - beta2, group["eps"], _decay(group), bias1, rectification

    def check_options(self, options: Mapping[str, Any]) -> None:
        check_adam(self, options)


def _decay(group: Mapping[str, Any]) -> Any:
    """The rule's weight decay: multiplied by ``lr`` if it is decoupled."""
    return group["lr"] * group["weight_decay"] if group["decoupled_weight_decay"] else group["weight_decay"]
