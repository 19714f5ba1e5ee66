"""Structures of tensors for many problems, and the matrix whose rows are the problems' flat vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from descend.distributed.dtensors import is_dtensor
from descend.second_order.problem.structure import Structure


class BatchedStructure:
    """The shapes of a structure of tensors whose first dimension counts problems, and its conversion to a matrix.

    Args:
        tree: a tensor of shape (B, ...), or dicts, lists and tuples of such in any nesting.
        who: the caller's name, for errors.
    Attributes:
        whole: the same structure, for which the first dimension is one like any other.
        count: B, the number of problems.
        numel: n, the real numbers of each.
    Raises:
        TypeError: if a leaf is no tensor, or not floating point or complex.
        ValueError: if there is no tensor, or their first dimensions differ; for modules, parameters and DTensors.
    """

    def __init__(self, tree: Any, who: str) -> None:
        if isinstance(tree, nn.Module) or any(isinstance(leaf, nn.Parameter) for leaf in pytree.tree_leaves(tree)):
            raise ValueError(
                f"{who}: with batched, x0 must be made of plain tensors of shape (B, ...), got parameters, which would "
                "be set in place. Stack them with torch.func.stack_module_state; functional_call takes them."
            )
        self.whole = whole = Structure(tree, who)
        if any(map(is_dtensor, whole.leaves)):
            raise ValueError(f"{who}: with batched, x0 must be made of plain tensors, got a DTensor. Take to_local().")
        counts = {leaf.shape[0] if leaf.dim() else None for leaf in whole.leaves}
        if len(counts) > 1 or None in counts:
            raise ValueError(
                f"{who}: with batched, the first dimension of every tensor in x0 counts the problems, got shapes "
                f"{whole}. Stack the starts of all problems along a new first dimension."
            )
        self.count: int = counts.pop() or 0
        self.shapes = [tuple(shape[1:]) for shape in whole.shapes]
        self.sizes = [
            torch.Size(shape).numel() * (1 + dtype.is_complex)
            for shape, dtype in zip(self.shapes, whole.dtypes, strict=True)
        ]
        self.numel = sum(self.sizes)

    def flatten(self, tensors: Sequence[Tensor]) -> Tensor:
        """The leaves as a matrix (K, n) in memory of its own."""
        parts = [
            (torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor)
            .reshape(tensor.shape[0], size)
            .to(self.whole.device, self.whole.dtype)
            for tensor, size in zip(tensors, self.sizes, strict=True)
        ]
        return torch.cat(parts, 1)

    def split(self, flat: Tensor) -> list[Tensor]:
        """The leaves (K, ...) from a matrix (K, n); differentiable."""
        count, whole = flat.shape[0], self.whole
        if len(self.shapes) == 1 and whole.dtype == whole.dtypes[0]:
            return [flat.view(count, *self.shapes[0])]
        return [
            (
                torch.complex(*part.reshape(count, *shape, 2).to(device, dtype.to_real()).unbind(-1))
                if dtype.is_complex
                else part.reshape(count, *shape).to(device, dtype)
            )
            for part, shape, dtype, device in zip(
                torch.split(flat, self.sizes, 1), self.shapes, whole.dtypes, whole.devices, strict=True
            )
        ]

    def unflatten(self, flat: Tensor) -> Any:
        """The structure with leaves (K, ...) from a matrix (K, n)."""
        return self.whole.tree_of(self.split(flat))

    def row(self, flat: Tensor) -> Any:
        """The structure of one problem, without the dimension of problems, from its flat vector."""
        return self.whole.tree_of([leaf[0] for leaf in self.split(flat[None])])

    def like(self, tree: Any, count: int, who: str) -> Tensor:
        """The matrix (K, n) of another tree.

        Raises:
            ValueError: if its structure or shapes differ from x0's, with K for the number of problems.
        """
        leaves = pytree.tree_leaves(tree)
        shapes = [tuple(leaf.shape) if isinstance(leaf, Tensor) else None for leaf in leaves]
        wanted = [(count, *shape) for shape in self.shapes]
        if shapes != wanted:
            raise ValueError(f"{who} must have the structure of x0 and shapes {wanted}, got {shapes}.")
        return self.flatten(leaves)
