"""Adam with one average more: a slow one in AdEMAMix, that of the gradient's changes in Adan."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from typing_extensions import Unpack

from descend import rules
from descend.core.checks import check_adam, check_not_negative
from descend.core.composition import Decay
from descend.core.groups import ParamsT
from descend.core.options import Options
from descend.first_order.optimizer import FirstOrder
from descend.ops import exp, where


class AdEMAMix(FirstOrder):
    """AdEMAMix: AdamW that adds a slow average of the gradient to the fast one, so that old gradients still count.

    Follows https://github.com/apple/ml-ademamix, with its options and defaults. A slow average is too large a part of
    early steps, hence the two schedules. With them the paper recommends ``alpha`` from 4 to 10, and the length of the
    whole training for both.

    Args:
        params: a module, whose parameters then have names; or parameters, ``(name, parameter)`` pairs, or dicts that
            define groups, as in torch.
        lr: step size, >= 0; a float or a tensor of one element. Default: 1e-3.
        betas: decay of the fast average of the gradient, of the average of its square, and of the slow average, each
            in [0, 1). Default: (0.9, 0.999, 0.9999).
        alpha: weight of the slow average, >= 0. Default: 2.
        beta3_warmup: steps during which the half-life of the slow average grows from that of ``betas[0]`` to that of
            ``betas[2]``, linearly; None for no schedule. Default: None.
        alpha_warmup: steps during which ``alpha`` grows from 0, linearly; None for no schedule. Default: None.
        eps: added to the denominator, >= 0, in units of the gradient. Default: 1e-8.
        weight_decay: decoupled, >= 0, multiplied by ``lr``. Default: 0.
        maximize: ascend instead. Default: False.
        capturable: keep step counts on the device, so that a CUDA graph can capture the step. Default: False.
        differentiable: let autograd see the step. Default: False.
    Raises:
        ValueError: if an option is out of range.
    Example:
        >>> weight = torch.ones(2, requires_grad=True)
        >>> optimizer = AdEMAMix([weight], lr=0.1, betas=(0.9, 0.999, 0.99), alpha=5.0)
        >>> weight.square().sum().backward()
        >>> optimizer.step()  # lr * (1 + alpha * (1 - betas[2]))
        >>> weight
        tensor([0.8950, 0.8950], requires_grad=True)

    Source:
        Pagliardini, Ablin & Grangier 2024, Algorithm 1, https://arxiv.org/abs/2409.03137
    """

    rule = staticmethod(rules.ademamix)
    decay = "decoupled"
    nonnegative_state = ("exp_avg_sq",)

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        alpha: float = 2.0,
        beta3_warmup: int | None = None,
        alpha_warmup: int | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0,
        *,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "alpha": alpha,
            "beta3_warmup": beta3_warmup,
            "alpha_warmup": alpha_warmup,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "capturable": capturable,
            "differentiable": differentiable,
        }
        super().__init__(params, defaults, **options)

    def scalars(self, group: Mapping[str, Any], step: float) -> tuple[Any, ...]:
        beta1, beta2, beta3 = group["betas"]
        gains = 1 - beta1, 1 - beta2, 1 - _slow_beta(step, group["beta3_warmup"], beta1, beta3)
        alpha = group["alpha"] * _progress(step, group["alpha_warmup"])
        return group["lr"], *gains, alpha, group["eps"], group["weight_decay"], 1 - beta1**step, 1 - beta2**step

    def check_options(self, options: Mapping[str, Any]) -> None:
        check_adam(self, options)
        check_not_negative(self, options, "alpha")
        check_not_negative(
            self, options, *(name for name in ("beta3_warmup", "alpha_warmup") if options[name] is not None)
        )


def _progress(step: Any, warmup: int | None) -> Any:
    """The part of a warmup that lies behind, from 0 to 1."""
    return where(step < warmup, step / warmup, 1.0) if warmup else 1.0


def _slow_beta(step: Any, warmup: int | None, first: float, last: float) -> Any:
    """beta3 of a step: Appendix A.1 of the paper; the half-life of ``beta`` is ``-log(2) / log(beta)``."""
    if not warmup or last == 0:
        return last
    done = _progress(step, warmup)
    inverse = (1 - done) * (1 / math.log(first) if first else 0.0) + done / math.log(last)
    return where(step < warmup, exp(1 / inverse), last)


class Adan(FirstOrder):
    """Adan: Nesterov momentum for Adam, made of an average of the gradient and one of its changes.

    Follows https://github.com/sail-sg/Adan, with its options and defaults; ``max_norm`` is its ``max_grad_norm``. Each
    parameter counts its own steps, so one that joins later starts as all do: without a change.

    Args:
        params: a module, whose parameters then have names; or parameters, ``(name, parameter)`` pairs, or dicts that
            define groups, as in torch.
        lr: step size, >= 0; a float or a tensor of one element. Default: 1e-3.
        betas: decay of the averages of the gradient, of its changes, and of the square of both together, each in
            [0, 1); one minus the paper's. Default: (0.98, 0.92, 0.99).
        eps: added to the denominator, >= 0, in units of the gradient. Default: 1e-8.
        weight_decay: decoupled, >= 0, multiplied by ``lr``. Default: 0.
        no_prox: decay before the step, as ``AdamW`` does, instead of dividing by ``1 + lr * weight_decay`` after it.
            Default: False.
        maximize: ascend instead. Default: False.
        capturable: keep step counts on the device, so that a CUDA graph can capture the step. Default: False.
        differentiable: let autograd see the step. Default: False.
    Raises:
        ValueError: if an option is out of range.
    Example:
        >>> weight = torch.ones(2, requires_grad=True)
        >>> optimizer = Adan([weight], lr=0.1)
        >>> weight.square().sum().backward()
        >>> optimizer.step()  # the first step is as long as lr
        >>> weight
        tensor([0.9000, 0.9000], requires_grad=True)

    Source:
        Xie et al. 2022, Algorithm 1, https://arxiv.org/abs/2208.06677
    """

    rule = staticmethod(rules.adan)
    nonnegative_state = ("exp_avg_sq",)

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float, float] = (0.98, 0.92, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        no_prox: bool = False,
        *,
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
            "no_prox": no_prox,
            "maximize": maximize,
            "capturable": capturable,
            "differentiable": differentiable,
        }
        super().__init__(params, defaults, **options)

    def scalars(self, group: Mapping[str, Any], step: float) -> tuple[Any, ...]:
        lr, (beta1, beta2, beta3) = group["lr"], group["betas"]
        avg_lr, diff_lr = lr / (1 - beta1**step), lr * beta2 / (1 - beta2**step)
        decay = lr * group["weight_decay"]
        shrinks = (1 - decay, 1.0) if group["no_prox"] else (1.0, 1 / (1 + decay))
        gains = 1 - beta1, 1 - beta2, 1 - beta3
        return *gains, group["eps"], 1 - beta3**step, avg_lr, diff_lr, *shrinks, where(step > 1, 0.0, 1.0)

    def decay_of(self, group: Mapping[str, Any]) -> Decay | None:
        return "decoupled" if group["no_prox"] else None

    def check_options(self, options: Mapping[str, Any]) -> None:
        check_adam(self, options)
