"""Adagrad for embeddings, with one number of state for each row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from typing_extensions import Unpack

from descend import rules
from descend.core.checks import check_eps, check_lr, check_not_negative
from descend.core.groups import ParamsT
from descend.core.options import Options
from descend.first_order.optimizer import FirstOrder


class RowwiseAdagrad(FirstOrder):
    """Adagrad with one sum for each row of a table: the step of a row is divided by the root of that sum.

    The sum grows by the mean of the row's squared gradients. So the state of a table of n rows is n numbers, where
    Adagrad has as many as the table and Adam twice as many; a step reads and writes that much less. The results are
    those of FBGEMM's ``EXACT_ROWWISE_ADAGRAD`` on CPUs.

    A row is what an index of the first dimension names, whatever dimensions follow. A parameter of one dimension has
    rows of one element, where this is Adagrad; a parameter without dimensions is one row.

    A sparse gradient moves the rows that it names. Others stay as they are, and do not decay. A dense gradient names
    all rows: those where it is zero move by their decay alone.

    Args:
        params: a module, whose parameters then have names; or parameters, ``(name, parameter)`` pairs, or dicts that
            define groups, as in torch.
        lr: step size, >= 0; a float or a tensor of one element. Default: 1e-2.
        eps: added to the denominator, >= 0, in units of the gradient. Default: 1e-8.
        weight_decay: >= 0. Default: 0.
        decoupled_weight_decay: False for L2 regularization, which adds ``weight_decay * param`` to the gradient; True
            to multiply the row by ``1 - lr * weight_decay`` instead. Default: False.
        maximize: ascend instead. Default: False.
        differentiable: let autograd see the step. Default: False.
    Raises:
        ValueError: if an option is out of range.
        RuntimeError: by ``step()``, for a gradient that is sparse in other dimensions than the first alone.
    Example:
        >>> table = torch.nn.Embedding(1000, 2, sparse=True)
        >>> optimizer = RowwiseAdagrad(table.parameters(), lr=0.1)
        >>> before = table.weight.detach().clone()
        >>> (table(torch.tensor([3, 5])) * torch.tensor([3.0, 4.0])).sum().backward()
        >>> optimizer.step()
        >>> optimizer.state[table.weight]["sum"][[3, 4]]  # the mean of 9 and 16; an untouched row
        tensor([[12.5000],
                [ 0.0000]])
        >>> (before - table.weight.detach())[3]  # 0.1 * 3 / sqrt(12.5), 0.1 * 4 / sqrt(12.5)
        tensor([0.0849, 0.1131])

    Source:
        FBGEMM, https://github.com/pytorch/FBGEMM: rowwise_adagrad; Adagrad: Duchi, Hazan & Singer 2011,
        https://jmlr.org/papers/v12/duchi11a.html
    """

    nonnegative_state = ("sum",)
    counts_steps = False

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-2,
        eps: float = 1e-8,
        weight_decay: float = 0,
        decoupled_weight_decay: bool = False,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "eps": eps,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "maximize": maximize,
            "differentiable": differentiable,
        }
        super().__init__(params, defaults, **options)

    def rule_for(self, group: Mapping[str, Any]) -> Callable[..., Any]:
        return rules.rowwise_adagradw if group["decoupled_weight_decay"] else rules.rowwise_adagrad

    def dtype_of_state(self, name: str, param: torch.Tensor) -> torch.dtype:
        # Sums of half precision would soon stop to grow, and they are few numbers.
        asked = self.options.state_dtype_of(name)
        if isinstance(asked, torch.dtype):
            return asked
        return torch.promote_types(param.dtype.to_real(), torch.float32)

    def meaning_of_sparse(self, param: torch.Tensor, group: Mapping[str, Any]) -> str:
        self.check_takes_rows(param, group)
        return "touched"  # whatever the option says, which in a group of another optimizer is meant for others

    def check_options(self, options: Mapping[str, Any]) -> None:
        check_lr(self, options)
        check_eps(self, options)
        check_not_negative(self, options, "weight_decay")
