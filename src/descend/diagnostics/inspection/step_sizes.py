"""Effective step sizes: what a parameter moves for an averaged gradient of one, lr / (sqrt(v_hat) + eps)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from descend.diagnostics.inspection.optimizers import Param
from descend.diagnostics.inspection.stored import number, pieces

QUANTILES = (0.01, 0.25, 0.5, 0.75, 0.99)


@dataclass(frozen=True)
class Scaling:
    """lr / (sqrt(v / bias2) + eps) of one parameter at its step, in float64.

    Attributes:
        second: the name of v in the state.
        lr: the learning rate at that step.
        bias2: the correction of v; 1 for methods that do not correct it.
        eps: what is added to the corrected root.
    """

    second: str
    lr: float
    bias2: float
    eps: float

    def __call__(self, squares: Tensor) -> Tensor:
        return self.lr / ((squares / self.bias2).sqrt_() + self.eps)


def scaling_of(method: str, param: Param, options: Mapping[str, Any]) -> Scaling | None:
    """How ``method`` scales the gradient; None if it does not, has not stepped, or its options are unusable."""
    if method in ("ADOPT", "LAMB", "Prodigy"):  # their steps are no such quotient, or have a factor that is not saved
        return None
    lr, eps = number(options.get("lr")), number(options.get("eps"))
    step = number(options.get("k")) if method == "AdamW schedule-free" else param.step
    if step is None:  # some optimizers count in the group
        step = number(options.get("step"))
    if lr is None or eps is None or not step or step < 0 or not math.isfinite(lr + eps + step):
        return None
    if "square_avg" in param.tensors:
        centered = options.get("centered") or "acc_delta" in param.tensors
        return None if centered else Scaling("square_avg", lr, 1.0, eps)
    if "sum" in param.tensors:
        return Scaling("sum", lr / (1 + (step - 1) * (number(options.get("lr_decay")) or 0.0)), 1.0, eps)
    second = "max_exp_avg_sq" if "max_exp_avg_sq" in param.tensors else "exp_avg_sq"
    betas = options.get("betas")
    beta2 = number(betas[1]) if isinstance(betas, list) and len(betas) == 2 else None
    if second not in param.tensors or beta2 is None or not 0 <= beta2 < 1:
        return None
    bias2 = 1 - beta2**step
    if method == "AdamW schedule-free":
        lr = number(options.get("scheduled_lr")) or lr
    if method == "RAdam":
        # Liu et al. 2020, Algorithm 2: until the variance of v is finite, v is not used.
        limit = 2 / (1 - beta2) - 1
        rho = limit - 2 * step * beta2**step / bias2
        if rho <= 5:
            return None
        lr *= math.sqrt((rho - 4) * (rho - 2) * limit / ((limit - 4) * (limit - 2) * rho))
    # torch's RAdam and SparseAdam add eps before the correction.
    return Scaling(second, lr, bias2, eps / math.sqrt(bias2) if method in ("RAdam", "SparseAdam") else eps)


def below_eps(scaling: Scaling, squares: Tensor) -> tuple[int, int]:
    """How many corrected roots of v are smaller than eps, and how many are finite and positive."""
    limit = scaling.eps**2 * scaling.bias2
    below = total = 0
    for piece in pieces(squares):
        values = piece.to(torch.float64)
        values = values[(values > 0) & torch.isfinite(values)]
        total += values.numel()
        below += int((values < limit).sum())
    return below, total
