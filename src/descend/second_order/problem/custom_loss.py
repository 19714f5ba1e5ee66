"""A caller's own robust loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from descend.second_order.mathematics.robust_losses import Rho


def custom_loss(function: Callable[[Tensor], Any], who: str) -> Rho:
    """rho, rho' and rho'' by a function of z >= 0, elementwise.

    Args:
        function: returns rho(z), which is differentiated by autograd, or, as for SciPy, the three: as a tensor of
            shape (3, M) or a tuple.
        who: the name of the function in errors.
    """

    def rho(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.enable_grad():
            leaf = z.detach().requires_grad_()
            given = function(leaf)
            if isinstance(given, Tensor) and given.shape == z.shape:
                first = _derivative(given, leaf)
                parts = [given, first, _derivative(first, leaf)]
            else:
                is_several = isinstance(given, tuple | list) or (isinstance(given, Tensor) and given.dim() == 2)
                parts = list(given) if is_several else []
        if len(parts) != 3 or any(not isinstance(part, Tensor) or part.shape != z.shape for part in parts):
            got = tuple(given.shape) if isinstance(given, Tensor) else repr(given)
            raise ValueError(
                f"{who} must map z of shape (M,) to rho(z) of that shape, or to rho, rho' and rho'' of shape (3, M); "
                f"got {got} for M = {len(z)}."
            )
        value, first, second = (part.detach() for part in parts)
        if z.requires_grad:
            # The Taylor polynomial has the derivatives by z; parts[1] has the graph of rho's other inputs.
            step = z - z.detach()
            value = value + parts[1] * step + second / 2 * step.square()
        return value, first, second

    return rho


def _derivative(value: Tensor, leaf: Tensor) -> Tensor:
    """Of an elementwise function; zero if it is constant."""
    if not value.requires_grad:
        return torch.zeros_like(leaf)
    (grad,) = torch.autograd.grad(value.sum(), leaf, create_graph=True, allow_unused=True)
    return torch.zeros_like(leaf) if grad is None else grad
