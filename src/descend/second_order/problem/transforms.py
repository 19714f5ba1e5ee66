"""Transforms of ``torch.func``, within which no solver can run."""

from __future__ import annotations

import torch


def check_not_transformed(who: str) -> None:
    """Raise ``RuntimeError`` inside ``vmap``, ``grad`` and the others: they cannot trace the decisions of a solver."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise RuntimeError(
            f"{who}: torch.func cannot transform a solver. For many problems take batched=True in place of vmap; for "
            "derivatives, differentiable=True and torch.autograd."
        )
