"""The direction of a step is the sign of the gradient, or of its average: Lion and Rprop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from typing_extensions import Unpack

from descend import rules
from descend.core.checks import check_betas, check_kind, check_lr, check_not_negative
from descend.core.groups import ParamsT
from descend.core.options import Options
from descend.first_order.optimizer import FirstOrder


class Lion(FirstOrder):
    """Lion: every weight moves by ``lr``, along the sign of an average of its gradients.

    Steps are longer than Adam's: the paper uses an ``lr`` 3 to 10 times smaller than for Adam, and a ``weight_decay``
    larger by the same factor. The state is one average, half of Adam's.

    Args:
        params: a module, whose parameters then have names; or parameters, ``(name, parameter)`` pairs, or dicts that
            define groups, as in torch.
        lr: step size, >= 0; a float or a tensor of one element. Default: 1e-4.
        betas: decay of the average used for the step, and of the average kept as state, each in [0, 1).
            Default: (0.9, 0.99).
        weight_decay: decoupled, >= 0, multiplied by ``lr``. Default: 0.
        maximize: ascend instead. Default: False.
        differentiable: let autograd see the step. Default: False.
    Raises:
        ValueError: if an option is out of range.
    Example:
        >>> weight = torch.ones(2, requires_grad=True)
        >>> optimizer = Lion([weight], lr=0.1)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> weight
        tensor([0.9000, 0.9000], requires_grad=True)

    Source:
        Chen et al. 2023, Algorithm 2, https://arxiv.org/abs/2302.06675
    """

    rule = staticmethod(rules.lion)
    decay = "decoupled"
    counts_steps = False

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "differentiable": differentiable,
        }
        super().__init__(params, defaults, **options)

    def scalars(self, group: Mapping[str, Any], step: float) -> tuple[Any, ...]:
        beta1, beta2 = group["betas"]
        return group["lr"], 1 - beta1, 1 - beta2, group["weight_decay"]

    def check_options(self, options: Mapping[str, Any]) -> None:
        check_lr(self, options)
        check_betas(self, options)
        check_not_negative(self, options, "weight_decay")


class Rprop(FirstOrder):
    """Rprop: each weight has its own step size, which grows while the gradient keeps its sign and shrinks otherwise.

    Drop-in for ``torch.optim.Rprop``. Use it with gradients of the whole data set: signs of small batches are noise.

    Args:
        params: a module, whose parameters then have names; or parameters, ``(name, parameter)`` pairs, or dicts that
            define groups, as in torch.
        lr: step size of a weight's first step, >= 0; a float or a tensor of one element. Default: 1e-2.
        etas: factors by which steps shrink, in (0, 1), and grow, > 1. Default: (0.5, 1.2).
        step_sizes: shortest and longest step. Default: (1e-6, 50).
        foreach: accepted and kept in the groups; the backend is chosen by ``backend``.
        capturable: keep step counts on the device, so that a CUDA graph can capture the step. Default: False.
        maximize: ascend instead. Default: False.
        differentiable: let autograd see the step. Default: False.
    Raises:
        ValueError: if an option is out of range.
    Example:
        >>> weight = torch.ones(2, requires_grad=True)
        >>> optimizer = Rprop([weight], lr=0.1)
        >>> for _ in range(2):  # by 0.1, then by 0.12
        ...     weight.grad = torch.tensor([1.0, 1000.0])
        ...     optimizer.step()
        >>> weight
        tensor([0.7800, 0.7800], requires_grad=True)

    Source:
        Riedmiller & Braun 1993, https://doi.org/10.1109/ICNN.1993.298623; Igel & Hüsken 2000 (iRprop-)
    """

    rule = staticmethod(rules.rprop)
    nonnegative_state = ("step_size",)
    exact_state = ("prev", "step_size")
    decay = "none"

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-2,
        etas: tuple[float, float] = (0.5, 1.2),
        step_sizes: tuple[float, float] = (1e-6, 50),
        *,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "etas": etas,
            "step_sizes": step_sizes,
            "foreach": foreach,
            "maximize": maximize,
            "differentiable": differentiable,
            "capturable": capturable,
        }
        super().__init__(params, defaults, **options)

    def scalars(self, group: Mapping[str, Any], step: float) -> tuple[Any, ...]:
        return (*group["etas"], *group["step_sizes"])

    def initial_state(self, name: str, param: torch.Tensor, group: Mapping[str, Any]) -> Any:
        return group["lr"] if name == "step_size" else 0.0

    def check_options(self, options: Mapping[str, Any]) -> None:
        check_lr(self, options)
        check_kind(self, options, "etas")
        smaller, larger = options["etas"]
        if not 0 < smaller < 1 < larger:
            raise ValueError(f"Invalid eta values: {smaller}, {larger} (Rprop: need 0 < etas[0] < 1 < etas[1])")
