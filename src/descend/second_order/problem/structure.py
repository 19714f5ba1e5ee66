"""Structures of tensors (a tensor, dicts, lists, tuples, a module) and the flat real vector that solvers work on."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


class Structure:
    """The shapes, dtypes and devices of a structure of tensors, and its conversion to and from a flat vector.

    The flat vector has the widest dtype among the tensors, at least float32, and is on the first one's device. A
    complex number takes two real ones.

    Args:
        tree: a tensor, or dicts, lists and tuples of tensors in any nesting, or an ``nn.Module``: a dict of those of
            its parameters that require gradients.
        who: the caller's name, for errors.
    Raises:
        TypeError: if a leaf is no tensor, or not floating point or complex.
        ValueError: if there is no tensor at all.
    """

    def __init__(self, tree: Any, who: str) -> None:
        leaves, self.spec = pytree.tree_flatten(_content(tree))
        if not leaves:
            what = "a parameter that requires gradients" if isinstance(tree, nn.Module) else "any"
            raise ValueError(f"{who}: x0 must hold at least one tensor, got {type(tree).__name__} without {what}.")
        for leaf in leaves:
            if not isinstance(leaf, Tensor) or not (leaf.is_floating_point() or leaf.is_complex()):
                got = str(leaf.dtype) if isinstance(leaf, Tensor) else type(leaf).__name__
                raise TypeError(
                    f"{who}: x0 must be made of real or complex floating point tensors, got {got}; "
                    "convert it, e.g. with torch.as_tensor(x0, dtype=torch.float64)."
                )
            if leaf.layout != torch.strided or leaf.is_meta:
                got = (
                    "a tensor on meta, which has no values" if leaf.is_meta else f"layout {leaf.layout}; use to_dense()"
                )
                raise TypeError(f"{who}: x0 must be made of dense tensors, got {got}.")
        self.leaves: list[Tensor] = leaves
        self.shapes = [leaf.shape for leaf in leaves]
        self.dtypes = [leaf.dtype for leaf in leaves]
        self.devices = [leaf.device for leaf in leaves]
        self.sizes = [leaf.numel() * (1 + leaf.is_complex()) for leaf in leaves]
        self.numel = sum(self.sizes)
        self.device = self.devices[0]
        reals = [dtype.to_real() for dtype in self.dtypes]
        self.dtype = torch.float32  # at least; half precision is for storage
        for dtype in reals:
            self.dtype = torch.promote_types(self.dtype, dtype)
        self.eps = max(torch.finfo(dtype).eps for dtype in reals)
        self._is_tensor = isinstance(tree, Tensor)
        self._is_one = len(leaves) == 1 and self.dtype == self.dtypes[0]
        self._shape = self.shapes[0]

    def __getstate__(self) -> dict[str, Any]:
        """For results, which hold a structure: without the tensors, and with a tree instead of its specification."""
        return {**vars(self), "leaves": [], "spec": pytree.tree_unflatten([0] * len(self.shapes), self.spec)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, spec=pytree.tree_flatten(state["spec"])[1])

    def flatten(self, tensors: Sequence[Tensor | None], keeps_graph: bool = False) -> Tensor:
        """The leaves as one flat vector; None becomes zeros. The vector may share memory with a single leaf."""
        dense = [None if tensor is None else tensor if keeps_graph else tensor.detach() for tensor in tensors]
        dense = [tensor if tensor is None or tensor.layout == torch.strided else tensor.to_dense() for tensor in dense]
        if self._is_one and dense[0] is not None and dense[0].dtype == self.dtype:
            return dense[0].reshape(-1).to(self.device)
        parts = [
            torch.zeros(size, dtype=self.dtype, device=self.device)
            if tensor is None
            else _real(tensor).reshape(-1).to(self.device, self.dtype)
            for size, tensor in zip(self.sizes, dense, strict=True)
        ]
        return torch.cat(parts)

    def split(self, flat: Tensor) -> list[Tensor]:
        """The leaves, from a flat vector; differentiable."""
        if self._is_one:
            return [flat.view(self._shape)]
        return [
            (
                torch.complex(*part.reshape(*shape, 2).to(device, dtype.to_real()).unbind(-1))
                if dtype.is_complex
                else part.view(shape).to(device, dtype)
            )
            for part, shape, dtype, device in zip(
                torch.split(flat, self.sizes), self.shapes, self.dtypes, self.devices, strict=True
            )
        ]

    def unflatten(self, flat: Tensor) -> Any:
        """The structure, from a flat vector; a dict for a module."""
        return self.tree_of(self.split(flat))

    def tree_of(self, leaves: Sequence[Tensor]) -> Any:
        """The structure, from its leaves; a dict for a module."""
        return leaves[0] if self._is_tensor else pytree.tree_unflatten(leaves, self.spec)

    def like(self, tree: Any, who: str) -> list[Tensor]:
        """The leaves of another tree.

        Raises:
            ValueError: if its structure or shapes differ, or if it is complex where this structure is real.
        """
        if self._is_tensor and isinstance(tree, Tensor) and tree.shape == self._shape:
            leaves = [tree]
        else:
            leaves = self._leaves_of(tree)
            shapes = [
                leaf.shape if isinstance(leaf, Tensor) else f"no tensor but {type(leaf).__name__}" for leaf in leaves
            ]
            if shapes != self.shapes:
                got = _described(shapes) if leaves else reprlib.repr(tree)
                raise ValueError(f"{who} must have the structure and shapes of x0, {self}; got {got}.")
        for leaf, dtype in zip(leaves, self.dtypes, strict=True):
            if leaf.is_complex() and not dtype.is_complex:
                raise ValueError(f"{who} must be real where x0 is, got {leaf.dtype}. Take its .real.")
        return leaves

    def bound(self, tree: Any, default: float, who: str) -> Tensor:
        """Bounds by ``broadcast``, rounded inwards to the dtype of each leaf.

        They are lower bounds if ``default`` is -inf, and upper bounds if it is inf.
        """
        exact = self.broadcast(tree, default, who, torch.float64)
        parts = []
        for part, dtype in zip(torch.split(exact, self.sizes), self.dtypes, strict=True):
            rounded = part.to(dtype.to_real())
            beyond = rounded.double() < part if default < 0 else rounded.double() > part
            inside = _next(rounded, upwards=default < 0)
            parts.append(torch.where(beyond, inside, rounded).to(self.dtype))
        return torch.cat(parts)

    def broadcast(
        self, tree: Any, default: float, who: str, dtype: torch.dtype | None = None, keeps_graph: bool = False
    ) -> Tensor:
        """A flat vector from one number or tensor for all leaves, or from a structure of them; None is ``default``.

        Raises:
            ValueError: if it does not fit.
        """
        is_one = not isinstance(tree, dict | list | tuple | nn.Module)
        leaves = [tree] * len(self.shapes) if is_one else self._leaves_of(tree)
        if not leaves:
            wanted = f"for all of x0, or have its structure, {self._outline()}"
            if self._is_tensor:
                wanted = f"that broadcasts to x0, {self}"
            raise ValueError(f"{who} must be one number or tensor {wanted}; got {reprlib.repr(tree)}.")
        parts = []
        for leaf, shape in zip(leaves, self.shapes, strict=True):
            try:
                if isinstance(leaf, Tensor) and leaf.is_complex():
                    raise TypeError("complex numbers have no order")
                part = torch.as_tensor(default if leaf is None else leaf, dtype=dtype or self.dtype, device=self.device)
                parts.append((part if keeps_graph else part.detach()).expand(shape).reshape(-1))
            except (RuntimeError, TypeError, ValueError) as error:
                raise ValueError(
                    f"{who} must be real numbers or tensors that broadcast to the shapes of x0, {self}; got {leaf!r}."
                ) from error
        return torch.cat(parts)

    def _leaves_of(self, tree: Any) -> list[Any]:
        """The entries of a tree at the structure's leaves; an empty list if the structures differ."""
        try:
            leaves = self.spec.flatten_up_to(_content(tree))
        except ValueError:
            return []
        return [] if any(isinstance(leaf, dict | list | tuple) for leaf in leaves) else leaves

    def _outline(self) -> str:
        """The structure with shapes in place of the tensors, cut short."""
        return reprlib.repr(pytree.tree_unflatten([tuple(shape) for shape in self.shapes], self.spec))

    def __str__(self) -> str:
        return _described(self.shapes)


def _content(tree: Any) -> Any:
    if isinstance(tree, nn.Module):
        return {name: parameter for name, parameter in tree.named_parameters() if parameter.requires_grad}
    # Generators such as module.parameters() can be read only once.
    return list(tree) if hasattr(tree, "__next__") else tree


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _described(shapes: Sequence[Any]) -> str:
    """Shapes, and what takes the place of one, in words."""
    return ", ".join(shape if isinstance(shape, str) else str(tuple(shape)) for shape in shapes) or "nothing"


def _next(numbers: Tensor, *, upwards: bool) -> Tensor:
    """The next floating point numbers: as integers, numbers of one sign are consecutive."""
    integers = numbers.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[numbers.element_size()])
    further = (integers + torch.where((numbers >= 0) == upwards, 1, -1).to(integers.dtype)).view(numbers.dtype)
    smallest = torch.full_like(numbers, torch.finfo(numbers.dtype).tiny)
    return torch.where(numbers == 0, smallest if upwards else -smallest, further)
