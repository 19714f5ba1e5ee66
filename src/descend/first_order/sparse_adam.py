"""Adam for embeddings: only the rows that a gradient names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from typing_extensions import Unpack

from descend import rules
from descend.core.checks import check_betas, check_eps, check_lr
from descend.core.groups import ParamsT
from descend.core.options import Options
from descend.first_order.optimizer import FirstOrder


class SparseAdam(FirstOrder):
    """Adam on the rows that a sparse gradient names; the other rows do not change.

    Drop-in for ``torch.optim.SparseAdam``. The results differ from those of ``Adam``, where the averages of the other
    rows decay and move them; ``AdamW(sparse="exact")`` gives the results of a dense ``AdamW`` at a similar cost.
    ``Adam(sparse="touched")`` also takes dense gradients, weight decay and AMSGrad.

    Args:
        params: a module, whose parameters then have names; or parameters, ``(name, parameter)`` pairs, or dicts that
            define groups, as in torch.
        lr: step size, > 0; a float or a tensor of one element. Default: 1e-3.
        betas: decay of the averages of gradient and squared gradient, each in [0, 1). Default: (0.9, 0.999).
        eps: added to the denominator before bias correction, > 0, in units of the gradient. Default: 1e-8.
        maximize: ascend instead. Default: False.
    Raises:
        ValueError: if an option is out of range, or a parameter is itself sparse.
        RuntimeError: from ``step``, for a dense gradient; nothing has moved then.
    Example:
        >>> table = torch.nn.Embedding(1000, 2, sparse=True)
        >>> optimizer = SparseAdam(table.parameters(), lr=0.1)
        >>> before = table.weight.detach().clone()
        >>> table(torch.tensor([3, 5, 3])).sum().backward()
        >>> optimizer.step()
        >>> (before - table.weight.detach())[[3, 4, 5]]
        tensor([[0.1000, 0.1000],
                [0.0000, 0.0000],
                [0.1000, 0.1000]])

    Source:
        Kingma & Ba 2015, Algorithm 1, https://arxiv.org/abs/1412.6980, with gradients of some rows
    """

    rule = staticmethod(rules.adam)
    decay = "none"
    nonnegative_state = ("exp_avg_sq",)
    is_for_groups = False  # "touched" of Adam's is the same
    step_is_int = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        maximize: bool = False,
        **options: Unpack[Options],
    ) -> None:
        if options.setdefault("sparse", "touched") != "touched":
            raise ValueError(f"SparseAdam: sparse is always 'touched', got {options['sparse']!r}; see AdamW.")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "maximize": maximize}
        super().__init__(params, defaults, **options)

    def scalars(self, group: Mapping[str, Any], step: float) -> tuple[Any, ...]:
        beta1, beta2 = group["betas"]
        bias1, bias2 = 1 - beta1**step, 1 - beta2**step
        # eps is added before bias correction here, after it in the rule.
        return group["lr"], 1 - beta1, 1 - beta2, group["eps"] / bias2**0.5, 0.0, bias1, bias2

    def check_options(self, options: Mapping[str, Any]) -> None:
        check_lr(self, options)
        check_eps(self, options)
        for what, key in (("learning rate", "lr"), ("epsilon value", "eps")):
            if not options[key] > 0:
                raise ValueError(f"Invalid {what}: {options[key]} ({type(self).__name__}: {key} must be > 0)")
        check_betas(self, options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        index, params = len(self.param_groups) - 1, self.param_groups[-1]["params"]
        sparse_params = [[index, position] for position, param in enumerate(params) if param.layout != torch.strided]
        complex_params = [[index, position] for position, param in enumerate(params) if param.is_complex()]
        if sparse_params or complex_params:
            del self.param_groups[-1]
            raise ValueError(
                f"Sparse params at indices {sparse_params}: SparseAdam requires dense parameter tensors"
                if sparse_params
                else f"Complex params at indices {complex_params}: SparseAdam does not support complex parameters"
            )

    def check_param(self, param: torch.Tensor, group: Mapping[str, Any]) -> None:
        super().check_param(param, group)
        if param.grad is not None and param.grad.layout == torch.strided:
            raise RuntimeError(
                "SparseAdam does not support dense gradients, please consider Adam instead "
                f"({self.name_of(param)} has one)"
            )
