"""Adam made to converge for every beta2: ADOPT."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from typing_extensions import Unpack

from descend import rules
from descend.core.checks import check_adam, check_not_negative
from descend.core.groups import ParamsT
from descend.core.options import Options
from descend.first_order.optimizer import FirstOrder
from descend.ops import where


class ADOPT(FirstOrder):
    """ADOPT: Adam that divides each gradient by the average of the squares before it, then averages the quotients.

    Follows https://github.com/iShohei220/adopt, with its defaults; there ``decoupled_weight_decay`` is ``decouple``,
    and ``clip_exp`` a function. A parameter's first step only fills ``exp_avg_sq``: the parameter does not move.

    Args:
        params: a module, whose parameters then have names; or parameters, ``(name, parameter)`` pairs, or dicts that
            define groups, as in torch.
        lr: step size, >= 0; a float or a tensor of one element. Default: 1e-3.
        betas: decay of the averages of scaled gradient and squared gradient, each in [0, 1). Default: (0.9, 0.9999).
        eps: the least denominator, >= 0, in units of the gradient. Default: 1e-6.
        weight_decay: L2 regularization, >= 0: adds ``weight_decay * param`` to the gradient. Default: 0.
        decoupled_weight_decay: decay as ``AdamW`` does. Default: False.
        clip_exp: scaled gradients are clipped at ``(step - 1) ** clip_exp``, >= 0; ``math.inf`` does not clip.
            Default: 0.25.
        maximize: ascend instead. Default: False.
        capturable: keep step counts on the device, so that a CUDA graph can capture the step. Default: False.
        differentiable: let autograd see the step. Default: False.
    Raises:
        ValueError: if an option is out of range.
    Example:
        >>> weight = torch.ones(2, requires_grad=True)
        >>> optimizer = ADOPT([weight], lr=0.1)
        >>> for _ in range(2):
        ...     weight.grad = torch.tensor([1.0, 1000.0])
        ...     optimizer.step()
        >>> weight  # lr * (1 - betas[0])
        tensor([0.9900, 0.9900], requires_grad=True)

    Source:
        Taniguchi et al. 2024, Algorithm 2, https://arxiv.org/abs/2411.02853
    """

    rule = staticmethod(rules.adopt)
    nonnegative_state = ("exp_avg_sq",)

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.9999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        *,
        clip_exp: float = 0.25,
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
            "decoupled_weight_decay": decoupled_weight_decay,
            "clip_exp": clip_exp,
            "maximize": maximize,
            "capturable": capturable,
            "differentiable": differentiable,
        }
        super().__init__(params, defaults, **options)

    def scalars(self, group: Mapping[str, Any], step: float) -> tuple[Any, ...]:
        (beta1, beta2), clip_exp = group["betas"], group["clip_exp"]
        l2, decay = group["weight_decay"], 0.0
        if group["decoupled_weight_decay"]:
            l2, decay = 0.0, self.decoupled_decay(group, step)
        clip = math.inf if clip_exp == math.inf else (step - 1) ** clip_exp
        gain2, clip = where(step > 1, 1 - beta2, 1.0), where(step > 1, clip, 0.0)
        return group["lr"], 1 - beta1, gain2, group["eps"], l2, decay, clip

    def decoupled_decay(self, group: Mapping[str, Any], step: float) -> Any:
        return where(step > 1, super().decoupled_decay(group, step), 0.0)

    def check_options(self, options: Mapping[str, Any]) -> None:
        check_adam(self, options)
        check_not_negative(self, options, "clip_exp")
