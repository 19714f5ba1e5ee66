"""SOAP: Adam in a basis in which the gradient's entries are nearly uncorrelated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from typing_extensions import Unpack

from descend import matrix_rules
from descend.core.checks import check_adam
from descend.core.groups import ParamsT
from descend.core.options import Options
from descend.first_order.optimizer import FirstOrder


class SOAP(FirstOrder):
    """SOAP: Adam in the eigenbases of Shampoo's averages, which power iteration follows slowly.

    For each dimension of a parameter, the Gram matrix of its gradients is averaged (a *factor*). Adam runs in the
    coordinates in which the factors are diagonal. The first step of a parameter begins factors and bases and leaves
    the parameter where it is. Every ``precondition_frequency``-th of the steps after it, the bases take a step of
    power iteration, which costs several times as much as another step. The state of an ``m x n`` matrix holds about
    ``2 m n + 1.5 (m*m + n*n)`` numbers, those of the second term in float32 or wider. Eigenvectors are LAPACK's, whose
    last bits depend on the number of threads. A gradient with NaN or Inf makes bases NaN: see ``nonfinite``.

    Args:
        params: a module, whose parameters then have names; or parameters, ``(name, parameter)`` pairs, or dicts that
            define groups, as in torch.
        lr: step size, >= 0; a float or a tensor of one element. Default: 3e-3.
        betas: decay of the averages of gradient and squared gradient, each in [0, 1). Default: (0.95, 0.95).
        shampoo_beta: decay of the factors, in [0, 1). Default: ``betas[1]``.
        eps: added to the denominator, >= 0, in units of the gradient. Default: 1e-8.
        weight_decay: decoupled, >= 0, multiplied by ``lr``. Default: 0.01.
        precondition_frequency: steps between two changes of the bases, >= 1. Default: 10.
        max_precond_dim: longer dimensions have no factor: Adam runs in their own coordinates. Default: 10000.
        precondition_1d: whether vectors have a factor. Default: False.
        flatten: whether all dimensions after the first count as one, so that a convolution is a matrix of outputs x
            rest; else each dimension has a factor, as in the authors' code. Default: False.
        maximize: ascend instead. Default: False.
    Raises:
        ValueError: if an option is out of range.
        RuntimeError: by ``step()``, for complex parameters, sparse gradients and sharded parameters.
    Example:
        >>> weight = torch.ones(2, 2, requires_grad=True)
        >>> optimizer = SOAP([weight], lr=0.1, weight_decay=0)
        >>> for _ in range(2):  # the first step moves nothing
        ...     optimizer.zero_grad()
        ...     weight.square().sum().backward()
        ...     optimizer.step()
        >>> weight
        tensor([[0.9500, 0.9500],
                [0.9500, 0.9500]], requires_grad=True)

    Source:
        Vyas et al. 2024, https://arxiv.org/abs/2409.11321, and the authors' code, https://github.com/nikhilvyas/SOAP
    """

    nonnegative_state = ("exp_avg_sq",)
    decay = "decoupled"

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 3e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        shampoo_beta: float | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        precondition_frequency: int = 10,
        max_precond_dim: int = 10000,
        precondition_1d: bool = False,
        *,
        flatten: bool = False,
        maximize: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "shampoo_beta": shampoo_beta,
            "eps": eps,
            "weight_decay": weight_decay,
            "precondition_frequency": precondition_frequency,
            "max_precond_dim": max_precond_dim,
            "precondition_1d": precondition_1d,
            "flatten": flatten,
            "maximize": maximize,
        }
        super().__init__(params, defaults, **options)

    def rule_for(self, group: Mapping[str, Any]) -> Callable[..., Any]:
        return matrix_rules.soap(group["max_precond_dim"], group["precondition_1d"], group["flatten"])

    def scalars(self, group: Mapping[str, Any], step: float) -> tuple[Any, ...]:
        beta1, beta2 = group["betas"]
        shampoo_beta = beta2 if group["shampoo_beta"] is None else group["shampoo_beta"]
        gains = 1 - beta1, 1 - beta2, 1 - shampoo_beta
        moved = step - 1  # by the steps before the first, which moves nothing, Adam has taken one less
        bias1, bias2 = 1 - beta1**moved, 1 - beta2**moved
        turns = moved > 0 and moved % group["precondition_frequency"] == 0
        return group["lr"], *gains, group["eps"], group["weight_decay"], bias1, bias2, moved == 0, turns

    def state_shape(self, name: str, param: torch.Tensor, group: Mapping[str, Any]) -> torch.Size:
        if name not in ("factors", "bases"):
            return param.shape
        options = group["max_precond_dim"], group["precondition_1d"], group["flatten"]
        shape, dims = matrix_rules.preconditioned(param.shape, *options)
        size = matrix_rules.factors_size if name == "factors" else matrix_rules.bases_size
        return torch.Size([size(shape, dims)])

    def dtype_of_state(self, name: str, param: torch.Tensor) -> torch.dtype:
        dtype = super().dtype_of_state(name, param)
        is_free = name not in ("factors", "bases") and self.options.state_dtype_of(name) is not None
        return dtype if is_free else torch.promote_types(dtype, torch.float32)

    def may_decide_on_device(self, group: Mapping[str, Any]) -> bool:
        return False  # the host decides whether a step turns the bases

    def check_param(self, param: torch.Tensor, group: Mapping[str, Any]) -> None:
        super().check_param(param, group)
        if param.is_complex():
            raise RuntimeError(f"SOAP does not support complex parameters ({self.name_of(param)} is one)")

    def meaning_of_sparse(self, param: torch.Tensor, group: Mapping[str, Any]) -> str:
        raise RuntimeError(
            f"SOAP does not support sparse gradients ({self.name_of(param)} has one: make it dense, or give it a "
            "method of elements)"
        )

    def check_options(self, options: Mapping[str, Any]) -> None:
        check_adam(self, options)
        beta = options["shampoo_beta"]
        if beta is not None and not 0 <= beta < 1:
            raise ValueError(f"SOAP: shampoo_beta must be None or in [0, 1), got {beta}.")
        for name, least in (("precondition_frequency", 1), ("max_precond_dim", 0)):
            if options[name] < least or options[name] % 1:
                raise ValueError(f"SOAP: {name} must be a whole number >= {least}, got {options[name]}.")
