"""Adafactor: squared gradients averaged over rows and columns instead of element by element."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from typing_extensions import Unpack

from descend import matrix_rules
from descend.core.checks import check_kind
from descend.core.groups import ParamsT
from descend.core.options import Options
from descend.first_order.optimizer import FirstOrder


class Adafactor(FirstOrder):
    """Adafactor: Adam without momentum, whose state for a matrix is one number for each row and each column.

    Drop-in for ``torch.optim.Adafactor``. Steps are relative to the size of the weights, and shorten with time.
    Parameters of more dimensions are stacks of matrices; of vectors and single numbers, all squares are kept.

    Args:
        params: a module, whose parameters then have names; or parameters, ``(name, parameter)`` pairs, or dicts that
            define groups, as in torch.
        lr: largest relative step size, >= 0; a float or a tensor of one element. Default: 1e-2.
        beta2_decay: <= 0; the squares of step ``t`` have the weight ``t**beta2_decay`` in their average. Default: -0.8.
        eps: lower bounds, >= 0: of the denominator, and of the size of a weight when steps are scaled by it. None: the
            eps of the dtype of the group's first parameter with a gradient, as in torch. Default: (None, 1e-3).
        d: steps are shortened so that the root mean square of a scaled gradient is at most ``d``, >= 1. Default: 1.
        weight_decay: decoupled, >= 0, multiplied by ``lr``. Default: 0.
        foreach: accepted and kept in the groups; the backend is chosen by ``backend``.
        maximize: ascend instead. Default: False.
    Raises:
        ValueError: if an option is out of range.
        RuntimeError: by ``step()``, for complex parameters, sparse gradients and sharded parameters.
    Example:
        >>> weight = torch.ones(2, 3, requires_grad=True)
        >>> optimizer = Adafactor([weight], lr=0.1)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> weight[0]
        tensor([0.9000, 0.9000, 0.9000], grad_fn=<SelectBackward0>)
        >>> [tuple(optimizer.state[weight][name].shape) for name in ("row_var", "col_var")]
        [(2, 1), (1, 3)]

    Source:
        Shazeer & Stern 2018, Algorithm 4, https://arxiv.org/abs/1804.04235, in PyTorch's variant
    """

    rule = staticmethod(matrix_rules.adafactor)
    nonnegative_state = ("row_var", "col_var", "variance")

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-2,
        beta2_decay: float = -0.8,
        eps: tuple[float | None, float] = (None, 1e-3),
        d: float = 1.0,
        weight_decay: float = 0.0,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "beta2_decay": beta2_decay,
            "eps": eps,
            "d": d,
            "weight_decay": weight_decay,
            "foreach": foreach,
            "maximize": maximize,
        }
        super().__init__(params, defaults, **options)

    def rule_of(self, param: torch.Tensor, group: Mapping[str, Any]) -> Callable[..., Any]:
        return matrix_rules.adafactor if param.dim() > 1 else matrix_rules.adafactor_vector

    def scalars(self, group: Mapping[str, Any], step: float) -> tuple[Any, ...]:
        lr, (eps1, eps2) = group["lr"], group["eps"]
        if eps1 is None:
            params = [param for param in group["params"] if param.grad is not None] or group["params"]
            eps1 = torch.finfo(params[0].dtype).eps
        gain, step_size = step ** group["beta2_decay"], min(lr, step**-0.5)
        return lr, gain, step_size, group["weight_decay"], eps1, eps2, group["d"]

    def state_shape(self, name: str, param: torch.Tensor, group: Mapping[str, Any]) -> torch.Size:
        shape = list(param.shape)
        if name != "variance":
            shape[-1 if name == "row_var" else -2] = 1
        return torch.Size(shape)

    def may_decide_on_device(self, group: Mapping[str, Any]) -> bool:
        return False  # the scalars are the host's

    def check_param(self, param: torch.Tensor, group: Mapping[str, Any]) -> None:
        super().check_param(param, group)
        if param.is_complex():
            raise RuntimeError(f"Adafactor does not support complex parameters ({self.name_of(param)} is one)")

    def meaning_of_sparse(self, param: torch.Tensor, group: Mapping[str, Any]) -> str:
        raise RuntimeError(
            f"Adafactor does not support sparse gradients ({self.name_of(param)} has one: make it dense, or give it "
            "a method of elements)"
        )

    def check_options(self, options: Mapping[str, Any]) -> None:
        if isinstance(options["lr"], torch.Tensor) and options["lr"].numel() != 1:
            raise ValueError(f"Tensor lr must be 1-element (Adafactor: got shape {tuple(options['lr'].shape)})")
        check_kind(self, options, "eps")
        eps1, eps2 = options["eps"]
        for what, value, is_valid in (
            ("Learning rate should be >= 0", options["lr"], options["lr"] >= 0),
            ("beta2_decay should be <= 0", options["beta2_decay"], options["beta2_decay"] <= 0),
            ("epsilon1 should be >= 0", eps1, eps1 is None or eps1 >= 0),
            ("epsilon2 should be >= 0", eps2, eps2 >= 0),
            ("Clipping threshold d should be >= 1", options["d"], options["d"] >= 1),
            ("weight_decay should be >= 0", options["weight_decay"], options["weight_decay"] >= 0),
        ):
            if not is_valid:
                raise ValueError(f"{what} but is: {value}")
