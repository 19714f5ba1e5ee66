"""The step of each weight is divided by the size of its gradients: Adagrad, RMSprop, Adadelta."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from typing_extensions import Unpack

from descend import rules
from descend.core.checks import check_at_least_zero, check_eps, check_flags, check_lr, check_not_negative
from descend.core.groups import ParamsT
from descend.core.options import Options
from descend.first_order.optimizer import FirstOrder
from descend.state.make import ensure_state


class Adagrad(FirstOrder):
    """Adagrad: the step of each weight is divided by the root of the sum of its squared gradients.

    Drop-in for ``torch.optim.Adagrad``. Rare features keep long steps. The sum never shrinks, so steps never grow.

    Args:
        params: a module, whose parameters then have names; or parameters, ``(name, parameter)`` pairs, or dicts that
            define groups, as in torch.
        lr: step size, >= 0; a float or a tensor of one element. Default: 1e-2.
        lr_decay: ``lr`` is divided by ``1 + (step - 1) * lr_decay``; >= 0. Default: 0.
        weight_decay: L2 regularization, >= 0: adds ``weight_decay * param`` to the gradient. Default: 0.
        initial_accumulator_value: what each sum starts from, >= 0. Default: 0.
        eps: added to the denominator, >= 0, in units of the gradient. Default: 1e-10.
        foreach, fused: accepted and kept in the groups; the backend is chosen by ``backend``.
        maximize: ascend instead. Default: False.
        differentiable: let autograd see the step. Default: False.
    Raises:
        ValueError: if an option is out of range.
        RuntimeError: by ``step()``, for a sparse gradient with ``weight_decay`` unless ``sparse`` is ``"touched"``.
    Example:
        >>> weight = torch.ones(2, requires_grad=True)
        >>> optimizer = Adagrad([weight], lr=0.1)
        >>> weight.square().sum().backward()
        >>> optimizer.step()  # the first step is as long as lr
        >>> weight
        tensor([0.9000, 0.9000], requires_grad=True)

    Source:
        Duchi, Hazan & Singer 2011, https://jmlr.org/papers/v12/duchi11a.html
    """

    rule = staticmethod(rules.adagrad)
    decay = "l2"
    nonnegative_state = ("sum",)
    takes_sparse = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "lr_decay": lr_decay,
            "eps": eps,
            "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value,
            "foreach": foreach,
            "maximize": maximize,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults, **options)

    def scalars(self, group: Mapping[str, Any], step: float) -> tuple[Any, ...]:
        lr = group["lr"] / (1 + (step - 1) * group["lr_decay"])
        return lr, group["weight_decay"], group["eps"]

    def initial_state(self, name: str, param: torch.Tensor, group: Mapping[str, Any]) -> Any:
        return group["initial_accumulator_value"] if name == "sum" else 0.0

    def share_memory(self) -> None:
        """Move the sums to shared memory, so that several processes can update them; missing sums are made first."""
        self._driver.forget_plan()
        for group in self.param_groups:
            for param in group["params"] if "method" not in group else ():
                ensure_state(self, param, self.rule, group)["sum"].share_memory_()

    def meaning_of_sparse(self, param: torch.Tensor, group: Mapping[str, Any]) -> str:
        meaning = super().meaning_of_sparse(param, group)
        if meaning == "all" and group["weight_decay"] != 0:
            raise RuntimeError(
                "weight_decay option is not compatible with sparse gradients "
                f"(Adagrad: {self.name_of(param)} has one; sparse='touched' decays the rows that it names)"
            )
        # Without weight decay nothing happens to a row whose gradient is zero.
        return "touched" if meaning == "all" else meaning

    def check_options(self, options: Mapping[str, Any]) -> None:
        check_lr(self, options)
        check_not_negative(self, options, "lr_decay", "weight_decay", "initial_accumulator_value")
        check_eps(self, options)
        check_flags(options)


class RMSprop(FirstOrder):
    """RMSprop: the step of each weight is divided by the root mean square of its recent gradients.

    Drop-in for ``torch.optim.RMSprop``.

    Args:
        params: a module, whose parameters then have names; or parameters, ``(name, parameter)`` pairs, or dicts that
            define groups, as in torch.
        lr: step size, >= 0; a float or a tensor of one element. Default: 1e-2.
        alpha: decay of the averages, >= 0. Default: 0.99.
        eps: added to the denominator, >= 0, in units of the gradient. Default: 1e-8.
        weight_decay: L2 regularization, >= 0: adds ``weight_decay * param`` to the gradient. Default: 0.
        momentum: of the scaled gradients, >= 0. Default: 0.
        centered: divide by the standard deviation instead. Default: False.
        foreach: accepted and kept in the groups; the backend is chosen by ``backend``.
        capturable: keep step counts on the device, so that a CUDA graph can capture the step. Default: False.
        maximize: ascend instead. Default: False.
        differentiable: let autograd see the step. Default: False.
    Raises:
        ValueError: if an option is out of range.
    Example:
        >>> weight = torch.ones(2, requires_grad=True)
        >>> optimizer = RMSprop([weight], lr=0.1, alpha=0.75)
        >>> weight.square().sum().backward()
        >>> optimizer.step()  # the average starts at 0: the first step is lr / sqrt(1 - alpha)
        >>> weight
        tensor([0.8000, 0.8000], requires_grad=True)

    Source:
        Hinton 2012, https://www.cs.toronto.edu/~tijmen/csc321/slides/lecture_slides_lec6.pdf; centered: Graves 2013,
        https://arxiv.org/abs/1308.0850
    """

    decay = "l2"
    nonnegative_state = ("square_avg",)

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "alpha": alpha,
            "eps": eps,
            "centered": centered,
            "weight_decay": weight_decay,
            "capturable": capturable,
            "foreach": foreach,
            "maximize": maximize,
            "differentiable": differentiable,
        }
        super().__init__(params, defaults, **options)

    def rule_for(self, group: Mapping[str, Any]) -> Callable[..., Any]:
        if group["momentum"] > 0:
            return rules.rmsprop_centered_momentum if group["centered"] else rules.rmsprop_momentum
        return rules.rmsprop_centered if group["centered"] else rules.rmsprop

    def keeps_exact(self, name: str, group: Mapping[str, Any]) -> bool:
        # The variance is a difference of these two.
        return bool(group["centered"]) and name in ("square_avg", "grad_avg")

    def scalars(self, group: Mapping[str, Any], step: float) -> tuple[Any, ...]:
        scalars = group["lr"], 1 - group["alpha"], group["eps"], group["weight_decay"]
        return (*scalars, group["momentum"]) if group["momentum"] > 0 else scalars

    def check_options(self, options: Mapping[str, Any]) -> None:
        check_lr(self, options)
        check_eps(self, options)
        check_not_negative(self, options, "momentum", "weight_decay", "alpha")


class Adadelta(FirstOrder):
    """Adadelta: RMSprop whose steps are scaled by the root mean square of the recent changes of the weight.

    Drop-in for ``torch.optim.Adadelta``.

    Args:
        params: a module, whose parameters then have names; or parameters, ``(name, parameter)`` pairs, or dicts that
            define groups, as in torch.
        lr: factor of the steps, >= 0; a float or a tensor of one element. Default: 1.0.
        rho: decay of the averages, in [0, 1]. Default: 0.9.
        eps: added to both averages of squares, >= 0. Default: 1e-6.
        weight_decay: L2 regularization, >= 0: adds ``weight_decay * param`` to the gradient. Default: 0.
        foreach: accepted and kept in the groups; the backend is chosen by ``backend``.
        capturable: keep step counts on the device, so that a CUDA graph can capture the step. Default: False.
        maximize: ascend instead. Default: False.
        differentiable: let autograd see the step. Default: False.
    Raises:
        ValueError: if an option is out of range.
    Example:
        >>> weight = torch.ones(2, requires_grad=True)
        >>> optimizer = Adadelta([weight], eps=1e-2)
        >>> weight.square().sum().backward()
        >>> optimizer.step()  # sqrt(eps / (0.1 * 4 + eps)) * 2
        >>> weight
        tensor([0.6877, 0.6877], requires_grad=True)

    Source:
        Zeiler 2012, Algorithm 1, https://arxiv.org/abs/1212.5701
    """

    rule = staticmethod(rules.adadelta)
    decay = "l2"
    nonnegative_state = ("square_avg", "acc_delta")

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1.0,
        rho: float = 0.9,
        eps: float = 1e-6,
        weight_decay: float = 0,
        foreach: bool | None = None,
        *,
        capturable: bool = False,
        maximize: bool = False,
        differentiable: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "rho": rho,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "capturable": capturable,
            "foreach": foreach,
            "differentiable": differentiable,
        }
        super().__init__(params, defaults, **options)

    def scalars(self, group: Mapping[str, Any], step: float) -> tuple[Any, ...]:
        return group["lr"], 1 - group["rho"], group["eps"], group["weight_decay"]

    def check_options(self, options: Mapping[str, Any]) -> None:
        check_lr(self, options)
        check_at_least_zero(self, "rho value", "rho", options["rho"])
        if options["rho"] > 1:
            raise ValueError(f"Invalid rho value: {options['rho']} (Adadelta: rho must be in [0, 1])")
        check_eps(self, options)
        check_not_negative(self, options, "weight_decay")
