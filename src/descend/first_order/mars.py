"""AdamW of a gradient whose noise is reduced: MARS."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from typing_extensions import Unpack

from descend import rules
from descend.core.checks import check_adam, check_not_negative
from descend.core.groups import ParamsT
from descend.core.options import Options
from descend.first_order.optimizer import FirstOrder


class MARS(FirstOrder):
    """MARS-AdamW: AdamW of a gradient that is extrapolated along its last change, then clipped tensor by tensor.

    Follows https://github.com/AGI-Arena/MARS, with its defaults. A parameter's first step takes the gradient before it
    as zero. There, parameters that are no matrices take steps of AdamW with options of their own, unless
    ``optimize_1d``. Here all of a group take steps of MARS; give the others a group with ``method="adamw"``.

    Args:
        params: a module, whose parameters then have names; or parameters, ``(name, parameter)`` pairs, or dicts that
            define groups, as in torch.
        lr: step size, >= 0; a float or a tensor of one element. Default: 3e-3.
        betas: decay of the averages of corrected gradient and its square, each in [0, 1). Default: (0.95, 0.99).
        eps: added to the denominator, >= 0, in units of the gradient. Default: 1e-8.
        weight_decay: decoupled, >= 0, multiplied by ``lr``. Default: 0.
        gamma: ``gamma * betas[0] / (1 - betas[0])`` times its last change is added to each gradient; >= 0.
            Default: 0.025.
        maximize: ascend instead. Default: False.
    Raises:
        ValueError: if an option is out of range.
    Example:
        >>> weight = torch.ones(2, requires_grad=True)
        >>> optimizer = MARS([weight], lr=0.1)
        >>> weight.square().sum().backward()
        >>> optimizer.step()  # the first step is as long as lr
        >>> weight
        tensor([0.9000, 0.9000], requires_grad=True)

    Source:
        Yuan et al. 2024, Algorithm 2, https://arxiv.org/abs/2411.10438
    """

    rule = staticmethod(rules.mars)
    decay = "decoupled"
    nonnegative_state = ("exp_avg_sq",)

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 3e-3,
        betas: tuple[float, float] = (0.95, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        gamma: float = 0.025,
        *,
        maximize: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "gamma": gamma,
            "maximize": maximize,
        }
        super().__init__(params, defaults, **options)

    def scalars(self, group: Mapping[str, Any], step: float) -> tuple[Any, ...]:
        beta1, beta2 = group["betas"]
        correction = group["gamma"] * beta1 / (1 - beta1)
        bias1, bias2 = 1 - beta1**step, 1 - beta2**step
        return group["lr"], 1 - beta1, 1 - beta2, group["eps"], group["weight_decay"], bias1, bias2, correction

    def scalars_of_rows(self, group: Mapping[str, Any], sums: np.ndarray, numels: np.ndarray) -> Any:
        return 1 / np.fmax(np.sqrt(sums), 1.0)

    def check_options(self, options: Mapping[str, Any]) -> None:
        check_adam(self, options)
        check_not_negative(self, options, "gamma")
