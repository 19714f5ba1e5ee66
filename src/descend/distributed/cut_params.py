"""Parameters that every rank has whole, of which it updates a part, and their gradients of one step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from descend.core.optimizer import MethodOptimizer
from descend.distributed.dtensors import is_dtensor, layout_of, local_of
from descend.distributed.gather import Cut
from descend.distributed.ranks import Share
from descend.distributed.shard_state import as_sharded, part


class CutParams:
    """With ``shard_state``, for each parameter that is cut, a plain tensor on the memory of this rank's part of it.

    It has that part of the gradient after ``read``, until ``release``.

    Args:
        optimizer: the optimizer.
        params: parameters, cut and others.
    """

    def __init__(self, optimizer: MethodOptimizer, params: Iterable[Tensor]) -> None:
        self._pieces: dict[Tensor, _Piece] = {}
        if optimizer.options.shard_state is not None:
            for param in params:
                if not is_dtensor(param) and is_dtensor(sharded := as_sharded(optimizer, param)):
                    self._pieces[param] = _Piece(param, sharded)

    def __bool__(self) -> bool:
        return bool(self._pieces)

    def of(self, param: Tensor) -> Tensor:
        """This rank's part; a parameter that is not cut as it is."""
        piece = self._pieces.get(param) if self._pieces else None
        return param if piece is None else piece.tensor

    def share_of(self, param: Tensor) -> Share | None:
        """Which ranks update its elements."""
        piece = self._pieces.get(param) if self._pieces else None
        return None if piece is None else piece.share

    def cut_of(self, param: Tensor) -> Cut | None:
        """How it is cut."""
        piece = self._pieces.get(param) if self._pieces else None
        return None if piece is None else piece.cut

    def shares(self) -> list[Share]:
        """The share of each parameter that is cut."""
        return [piece.share for piece in self._pieces.values()]

    def wholes(self) -> list[Tensor]:
        """The parameters that are cut."""
        return list(self._pieces)

    def read(self, optimizer: MethodOptimizer) -> None:
        """Take the present gradients.

        Raises:
            RuntimeError: if one is a DTensor.
        """
        for param, piece in self._pieces.items():
            grad = param.grad
            if is_dtensor(grad):
                raise grad_error(optimizer, param, grad)
            piece.tensor.grad = None if grad is None else piece.part_of(grad)

    def release(self) -> None:
        """Drop the gradients."""
        for piece in self._pieces.values():
            piece.tensor.grad = None


def grad_error(optimizer: MethodOptimizer, param: Tensor, grad: Any) -> RuntimeError:
    """A gradient that does not lie on the ranks as its parameter does."""
    return RuntimeError(
        f"{type(optimizer).__name__}: {optimizer.name_of(param)} has {layout_of(param)}, but its gradient has "
        f"{layout_of(grad)}. They must be equal: call redistribute on the gradient. Nothing has moved."
    )


class _Piece:
    """One parameter that this rank has whole, and of which it updates a part.

    Args:
        param: the parameter.
        sharded: its part as a DTensor, see ``as_sharded``.
    Attributes:
        cut: how the parameter is cut.
        tensor: the part, which may have a gradient of its own.
    """

    def __init__(self, param: Tensor, sharded: Any) -> None:
        mesh, dim = sharded.device_mesh, sharded.placements[0].dim
        self.share, self.cut = Share(mesh, 1), Cut(param.detach(), dim, mesh.size())
        self._start, self._stop = part(param.shape[dim], mesh.size(), mesh.get_local_rank())
        self.tensor = local_of(sharded)
        self.tensor.grad_dtype = None  # gradients may be of any dtype

    def part_of(self, grad: Tensor) -> Tensor:
        """The part of a gradient that belongs to the tensor; dense ones share memory."""
        dim, length = self.cut.dim, self._stop - self._start
        if grad.layout is torch.strided:
            grad = grad.detach() if grad.requires_grad else grad
            return grad.narrow(dim, self._start, length)
        if grad.layout is not torch.sparse_coo:
            grad = grad.to_sparse()
        indices, values = grad._indices(), grad._values()
        if dim < grad.sparse_dim():
            is_here = (indices[dim] >= self._start) & (indices[dim] < self._stop)
            indices, values = indices[:, is_here], values[is_here]
            indices[dim] -= self._start
        else:
            values = values.narrow(dim - grad.sparse_dim() + 1, self._start, length)
        return torch.sparse_coo_tensor(
            indices, values, self.tensor.shape, device=self.tensor.device, check_invariants=False
        )
