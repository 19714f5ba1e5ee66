"""Adam and AdamW."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from typing_extensions import Unpack

from descend import rules
from descend.core.checks import check_adam, check_flags, is_sequence
from descend.core.groups import ParamsT
from descend.core.options import Options
from descend.first_order.optimizer import FirstOrder


class Adam(FirstOrder):
    """Adam: step sizes from moving averages of the gradient and of its square, both bias-corrected.

    Drop-in for ``torch.optim.Adam``. ``weight_decay`` is L2 regularization: it joins the gradient, so that weights
    with large gradients decay less. ``AdamW`` decays all weights alike.

    Args:
        params: a module, whose parameters then have names; or parameters, ``(name, parameter)`` pairs, or dicts that
            define groups, as in torch.
        lr: step size, >= 0; a float or a tensor of one element. Default: 1e-3.
        betas: decay of the averages of gradient and squared gradient, each in [0, 1). Default: (0.9, 0.999).
        eps: added to the denominator, >= 0, in units of the gradient. Default: 1e-8.
        weight_decay: L2 regularization, >= 0. Default: 0.
        amsgrad: divide by the largest average so far. Default: False.
        maximize: ascend instead. Default: False.
        foreach, fused: accepted and kept in the groups; the backend is chosen by ``backend``.
        capturable: keep step counts on the device, so that a CUDA graph can capture the step. Default: False.
        differentiable: let autograd see the step. Default: False.
        decoupled_weight_decay: decay as ``AdamW`` does. Default: False.
    Raises:
        ValueError: if an option is out of range.
    Example:
        >>> weight = torch.ones(2, requires_grad=True)
        >>> optimizer = Adam([weight], lr=0.1)
        >>> weight.square().sum().backward()
        >>> optimizer.step()  # the first step of Adam is as long as lr
        >>> weight
        tensor([0.9000, 0.9000], requires_grad=True)

    Source:
        Kingma & Ba 2015, Algorithm 1, https://arxiv.org/abs/1412.6980
    """

    direction = staticmethod(rules.first_average)
    nonnegative_state = ("exp_avg_sq", "max_exp_avg_sq")
    catch_up_rules = (rules.coast, rules.decay)

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float | torch.Tensor, float | torch.Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(params, defaults, **options)

    def rule_for(self, group: Mapping[str, Any]) -> Callable[..., Any]:
        if group["amsgrad"]:
            return rules.adamw_amsgrad if group["decoupled_weight_decay"] else rules.adam_amsgrad
        return rules.adamw if group["decoupled_weight_decay"] else rules.adam

    def scalars(self, group: Mapping[str, Any], step: float) -> tuple[Any, ...]:
        beta1, beta2 = group["betas"]
        bias1, bias2 = 1 - beta1**step, 1 - beta2**step
        return group["lr"], 1 - beta1, 1 - beta2, group["eps"], group["weight_decay"], bias1, bias2

    def check_options(self, options: Mapping[str, Any]) -> None:
        _check_tensors(options)
        check_adam(self, options)
        check_flags(options)
        if self.sparse == "exact":
            self.check_exact(options)

    def check_exact(self, options: Mapping[str, Any]) -> None:
        beta1, beta2 = options["betas"]
        reasons = {
            "amsgrad": options["amsgrad"],
            f"betas={options['betas']}, where betas[0] >= betas[1]": not beta1 < beta2,
            "eps=0": options["eps"] == 0,
            "L2 regularization (weight_decay in Adam; AdamW's is no obstacle)": options["weight_decay"] != 0
            and not options["decoupled_weight_decay"],
        }
        if obstacles := [reason for reason, applies in reasons.items() if applies]:
            raise ValueError(
                f"{type(self).__name__}: sparse='exact' cannot catch up with {' and '.join(obstacles)}; 'touched' can."
            )


class AdamW(Adam):
    """Adam with decoupled weight decay: every weight shrinks by ``lr * weight_decay``, whatever its gradients.

    Drop-in for ``torch.optim.AdamW``.

    Args:
        params: a module, whose parameters then have names; or parameters, ``(name, parameter)`` pairs, or dicts that
            define groups, as in torch.
        lr: step size, >= 0; a float or a tensor of one element. Default: 1e-3.
        betas: decay of the averages of gradient and squared gradient, each in [0, 1). Default: (0.9, 0.999).
        eps: added to the denominator, >= 0, in units of the gradient. Default: 1e-8.
        weight_decay: decoupled, >= 0, multiplied by ``lr``. Default: 1e-2.
        amsgrad: divide by the largest average so far. Default: False.
        maximize: ascend instead. Default: False.
        foreach, fused: accepted and kept in the groups; the backend is chosen by ``backend``.
        capturable: keep step counts on the device, so that a CUDA graph can capture the step. Default: False.
        differentiable: let autograd see the step. Default: False.
    Raises:
        ValueError: if an option is out of range.
    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = AdamW(model, lr=1e-3, max_norm=1.0)  # or model.parameters(), as in torch
        >>> weight = torch.ones(2, requires_grad=True)
        >>> optimizer = AdamW([weight], lr=0.1, weight_decay=0.5, max_norm=1.0)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> weight
        tensor([0.8500, 0.8500], requires_grad=True)
        >>> round(optimizer.grad_norm, 4)
        2.8284

    Source:
        Loshchilov & Hutter 2019, Algorithm 2, https://arxiv.org/abs/1711.05101
    """

    fixed_options = MappingProxyType({"decoupled_weight_decay": True})

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float | torch.Tensor, float | torch.Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=True,
            **options,
        )


def _check_tensors(options: Mapping[str, Any]) -> None:
    """Raise torch's errors for options given as tensors."""
    betas = options["betas"]
    if not is_sequence(betas, 2) or len({isinstance(beta, torch.Tensor) for beta in betas}) != 1:
        raise ValueError(f"betas must be either both floats or both Tensors, got {betas!r}")
    for name, value in (("lr", options["lr"]), ("betas[0]", betas[0]), ("betas[1]", betas[1])):
        if isinstance(value, torch.Tensor):
            if options["foreach"] and not options["capturable"]:
                raise ValueError(f"{name} as a Tensor is not supported for capturable=False and foreach=True")
            if value.numel() != 1:
                raise ValueError(f"Tensor {name} must be 1-element, got shape {tuple(value.shape)}")
