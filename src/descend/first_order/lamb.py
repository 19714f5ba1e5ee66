"""AdamW whose steps are as long as the norm of each parameter asks for: LAMB."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from typing_extensions import Unpack

from descend import rules
from descend.core.checks import check_adam, check_not_negative
from descend.core.groups import ParamsT
from descend.core.options import Options
from descend.core.update import number
from descend.first_order.optimizer import FirstOrder


class LAMB(FirstOrder):
    """LAMB: AdamW whose step of each parameter is scaled to ``lr`` times the norm of that parameter.

    For large batches. The factor, the trust ratio, is 1 where the norm of the parameter or of its update is 0. Norms
    are those before the step, also of parameters that share memory. Apex clips gradients at a global norm of 1 first:
    ``max_norm=1.0``.

    Args:
        params: a module, whose parameters then have names; or parameters, ``(name, parameter)`` pairs, or dicts that
            define groups, as in torch.
        lr: step size relative to the norm of the parameter, >= 0; a float or a tensor of one element. Default: 1e-3.
        betas: decay of the averages of gradient and squared gradient, each in [0, 1). Default: (0.9, 0.999).
        eps: added to the denominator, >= 0, in units of the gradient. Default: 1e-6.
        weight_decay: of the update before it is scaled, >= 0. Default: 0.01.
        bias_correction: correct the bias of both averages. Default: True.
        always_adapt: scale the steps of all groups. False: groups with ``weight_decay=0``, often those of biases and
            norms, take steps of AdamW, as in apex and timm. Default: True, as in the paper.
        clamp_value: largest norm of a parameter that counts, >= 0; 10 in some implementations. Default: no limit.
        maximize: ascend instead. Default: False.
    Raises:
        ValueError: if an option is out of range.
    Example:
        >>> weight = torch.tensor([3.0, 4.0], requires_grad=True)
        >>> optimizer = LAMB([weight], lr=0.1, weight_decay=0)
        >>> weight.sum().backward()
        >>> optimizer.step()  # as long as lr * 5
        >>> weight
        tensor([2.6464, 3.6464], requires_grad=True)

    Source:
        You et al. 2020, Algorithm 2, https://arxiv.org/abs/1904.00962
    """

    nonnegative_state = ("exp_avg_sq",)

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        bias_correction: bool = True,
        *,
        always_adapt: bool = True,
        clamp_value: float = math.inf,
        maximize: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": bias_correction,
            "always_adapt": always_adapt,
            "clamp_value": clamp_value,
            "maximize": maximize,
        }
        super().__init__(params, defaults, **options)

    def rule_for(self, group: Mapping[str, Any]) -> Callable[..., Any]:
        return rules.lamb if group["always_adapt"] or group["weight_decay"] != 0 else rules.adamw

    def scalars(self, group: Mapping[str, Any], step: float) -> tuple[Any, ...]:
        beta1, beta2 = group["betas"]
        bias1, bias2 = (1 - beta1**step, 1 - beta2**step) if group["bias_correction"] else (1.0, 1.0)
        scalars = 1 - beta1, 1 - beta2, group["eps"], group["weight_decay"], bias1, bias2
        return scalars if self.rule_for(group) is rules.lamb else (group["lr"], *scalars)

    def scalars_of_rows(self, group: Mapping[str, Any], sums: np.ndarray, numels: np.ndarray) -> Any:
        norms, update_norms = np.sqrt(sums).T
        with np.errstate(all="ignore"):  # norms of 0 are replaced below, and those that are not finite are no error
            trust_ratios = np.minimum(norms, group["clamp_value"]) / update_norms
            trust_ratios[(norms == 0) | (update_norms == 0)] = 1.0
            return number(group["lr"]) * trust_ratios[:, None]

    def check_options(self, options: Mapping[str, Any]) -> None:
        check_adam(self, options)
        check_not_negative(self, options, "clamp_value")
