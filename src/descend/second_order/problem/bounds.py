"""Bounds of a structure of tensors."""

from __future__ import annotations

import math
import reprlib
from typing import Any

from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from descend.second_order.problem.shared_space import full_of
from descend.second_order.problem.structure import Structure


def bounds_of(bounds: Any, structure: Structure, who: str) -> tuple[Tensor, Tensor]:
    """Lower and upper bounds as flat vectors.

    Args:
        bounds: (lower, upper), each a number, a tensor, a structure or None.
        structure: of the point.
        who: the caller's name, for errors.
    """
    if not (isinstance(bounds, tuple | list) and len(bounds) == 2):
        raise ValueError(
            f"{who}: bounds must be (lower, upper), each a number, a tensor, a structure like x0 or None, got "
            f"{reprlib.repr(bounds)}. Write SciPy's pairs, one for each variable, as torch.tensor(pairs).T.unbind()."
        )
    if any(dtype.is_complex for dtype in structure.dtypes):
        raise ValueError(f"{who}: complex numbers have no order, so x0 cannot have bounds if it is complex.")
    lower, upper = pytree.tree_map(lambda end: full_of(end) if isinstance(end, Tensor) else end, tuple(bounds))
    lower = structure.bound(lower, -math.inf, f"{who}: the lower bound")
    upper = structure.bound(upper, math.inf, f"{who}: the upper bound")
    is_wrong = ~(lower <= upper) | (lower == math.inf) | (upper == -math.inf)
    if bool(is_wrong.any()):
        worst = int(is_wrong.long().argmax())
        raise ValueError(
            f"{who}: bounds must have lower <= upper, lower < inf and upper > -inf, without NaN, got {lower[worst]:g} "
            f"and {upper[worst]:g} at position {worst} of the flattened x0."
        )
    return lower, upper


def differentiable_bounds(bounds: Any, structure: Structure, who: str) -> list[Tensor | None]:
    """Lower and upper bounds, which have been checked, as flat vectors with their graphs; None for one without."""
    flat: list[Tensor | None] = []
    for end, default in zip(bounds or (), (-math.inf, math.inf), strict=False):
        vector = structure.broadcast(end, default, who, keeps_graph=True)
        has_graph = vector.requires_grad or has_tangent(vector)
        flat.append(vector if has_graph else None)
    return flat


def has_tangent(tensor: Tensor) -> bool:
    """Whether forward-mode differentiation goes through a tensor."""
    return forward_ad.unpack_dual(tensor).tangent is not None  # type: ignore[no-untyped-call]
