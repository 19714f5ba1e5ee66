"""Adam that finds its learning rate: Prodigy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from descend import rules
from descend.core.checks import check_adam, check_not_negative
from descend.core.groups import ParamsT
from descend.core.options import Options
from descend.first_order.optimizer import FirstOrder


class Prodigy(FirstOrder):
    """Prodigy: Adam whose learning rate is ``lr`` times an estimate of how far the solution is, which only grows.

    Follows https://github.com/konstmish/prodigy, with its options, defaults and groups; ``slice_p`` is left out. All
    parameters share one estimate, ``d`` in each group. Leave ``lr`` at 1, or schedule it down from there. Groups may
    have different ``lr``; while it is 0, a group waits and has no part in the estimate. In a checkpoint ``p0`` is where
    training began.

    Args:
        params: a module, whose parameters then have names; or parameters, ``(name, parameter)`` pairs, or dicts that
            define groups, as in torch.
        lr: factor of the estimated learning rate, >= 0; a float or a tensor of one element. Default: 1.0.
        betas: decay of the averages of gradient and squared gradient, each in [0, 1). Default: (0.9, 0.999).
        beta3: decay of the sums that the estimate is made of, in [0, 1). Default: the root of ``betas[1]``.
        eps: times ``d`` is added to the denominator, >= 0. Default: 1e-8.
        weight_decay: >= 0, multiplied by ``d * lr`` if it is decoupled. Default: 0.
        decouple: decay as ``AdamW`` does; False for L2 regularization. Default: True.
        use_bias_correction: correct the bias of both averages. Default: False.
        safeguard_warmup: leave ``lr`` out of the denominator of the estimate, for a warmup. Default: False.
        d0: the first estimate, > 0. Parameters in float16 and bfloat16 do not move by the default, and the estimate
            stays there: take 1e-3. Default: 1e-6.
        d_coef: factor of the estimate, > 0: what to change if steps are too long or too short. Default: 1.
        growth_rate: largest factor by which the estimate grows in a step, > 0. Default: no limit.
        maximize: ascend instead. Default: False.
    Raises:
        ValueError: if an option is out of range.
    Example:
        >>> weight = torch.ones(2, requires_grad=True)
        >>> optimizer = Prodigy([weight])
        >>> for _ in range(50):
        ...     optimizer.zero_grad()
        ...     weight.square().sum().backward()
        ...     optimizer.step()
        >>> bool(weight.abs().max() < 0.5), optimizer.param_groups[0]["d"] > 0.01
        (True, True)

    Source:
        Mishchenko & Defazio 2024, Algorithm 4, https://arxiv.org/abs/2306.06101
    """

    rule = staticmethod(rules.prodigy)
    nonnegative_state = ("exp_avg_sq",)
    exact_state = ("s", "p0")
    sums_over = "all"
    group_state = ("d", "d_max", "d_numerator", "k")
    _sums: Sequence[float] | None = None  # of the present step

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        beta3: float | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0,
        decouple: bool = True,
        use_bias_correction: bool = False,
        safeguard_warmup: bool = False,
        d0: float = 1e-6,
        d_coef: float = 1.0,
        growth_rate: float = math.inf,
        *,
        maximize: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "beta3": beta3,
            "eps": eps,
            "weight_decay": weight_decay,
            "d": d0,
            "d0": d0,
            "d_max": d0,
            "d_numerator": 0.0,
            "d_coef": d_coef,
            "k": 0,
            "growth_rate": growth_rate,
            "use_bias_correction": use_bias_correction,
            "decouple": decouple,
            "safeguard_warmup": safeguard_warmup,
            "maximize": maximize,
        }
        super().__init__(params, defaults, **options)

    def scalars(self, group: Mapping[str, Any], step: float) -> tuple[Any, ...]:
        (beta1, beta2), d, k = group["betas"], group["d"], group["k"] + 1
        if group["lr"] == 0:  # nothing changes
            return 0.0, d, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0
        lr = d * group["lr"]
        if group["use_bias_correction"]:
            lr = lr * math.sqrt(1 - beta2**k) / (1 - beta1**k)
        pull = d / group["d0"] * lr  # over d0, so that the sums are not too small
        push = d / group["d0"] * d if group["safeguard_warmup"] else pull
        l2, decay = (0.0, lr * group["weight_decay"]) if group["decouple"] else (group["weight_decay"], 0.0)
        return lr, d, 1 - beta1, 1 - beta2, _beta3(group), pull, push, l2, decay

    def scalars_of_sums(self, group: Mapping[str, Any], sums: Sequence[float], numel: int) -> tuple[Any, ...]:
        self._sums = sums
        return (group["eps"] * _estimate(group, sums)["d"],)

    def end_step(self, groups: Sequence[dict[str, Any]]) -> None:
        if self._sums is None:  # no parameter had a gradient
            return
        estimate = _estimate(groups[0], self._sums)  # a group that has been added is still at d0
        self._sums = None
        for group in groups:
            group.update(estimate)

    def initial_state(self, name: str, param: Tensor, group: Mapping[str, Any]) -> Any:
        return param if name == "p0" else 0.0

    def dtype_of_state(self, name: str, param: Tensor) -> torch.dtype:
        dtype = super().dtype_of_state(name, param)
        # The distance from p0 is what counts, so p0 has all digits of the parameter.
        return torch.promote_types(dtype, param.dtype) if name == "p0" else dtype

    def check_options(self, options: Mapping[str, Any]) -> None:
        check_adam(self, options)
        for name in ("d0", "d_coef", "growth_rate"):
            check_not_negative(self, options, name)
            if options[name] == 0:
                raise ValueError(f"Invalid {name} value: 0 ({type(self).__name__}: {name} must be > 0)")
        if options["beta3"] is not None:
            check_not_negative(self, options, "beta3")
            if options["beta3"] >= 1:
                raise ValueError(
                    f"Invalid beta3 value: {options['beta3']} ({type(self).__name__}: beta3 must be in [0, 1))"
                )


def _beta3(group: Mapping[str, Any]) -> Any:
    return group["betas"][1] ** 0.5 if group["beta3"] is None else group["beta3"]


def _estimate(group: Mapping[str, Any], sums: Sequence[float]) -> dict[str, Any]:
    """What a group knows after the step: Algorithm 4; ``growth_rate`` is the implementation's own."""
    d, (pulled, denominator) = group["d"], sums
    if not denominator > 0:  # all gradients so far were zero
        return {"d": d}
    numerator = _beta3(group) * group["d_numerator"] + pulled
    found = group["d_coef"] * numerator / denominator
    d_max = max(group["d_max"], found)
    if d == group["d0"]:
        d = max(d, found)
    return {"d": min(d_max, d * group["growth_rate"]), "d_max": d_max, "d_numerator": numerator, "k": group["k"] + 1}
