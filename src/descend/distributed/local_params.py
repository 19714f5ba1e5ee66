"""Sharded parameters as plain tensors, and their gradients of one step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from descend.core.method import Method
from descend.distributed.dtensors import is_dtensor, layout_of, local_of, same_layout
from descend.distributed.gather import Cut
from descend.distributed.ranks import Share, share_of
from descend.distributed.shard_state import as_sharded, part


class LocalParams:
    """For each sharded parameter among some, a plain tensor on the memory of this rank's part of it.

    It carries the local gradient while a step is prepared and taken: after ``read``, until ``release``. Sharded are
    DTensors, and with ``shard_state`` the parameters that every rank has whole. Any other stands for itself.

    Args:
        method: the optimizer.
        params: the parameters.
        previous: of the last step; what it has reduced for this one is not reduced again. Default: None.
    Raises:
        RuntimeError: if a parameter is a partial sum.
    """

    def __init__(self, method: Method, params: Iterable[Tensor], previous: LocalParams | None = None) -> None:
        self._reduced: dict[int, tuple[Tensor, Tensor]] = previous._reduced if previous else {}
        self._dtensors: dict[Tensor, _Local] = {}
        self._slices: dict[Tensor, _Slice] = {}
        for param in params:
            if is_dtensor(param):
                self._dtensors[param] = _local(method, param)
            elif is_dtensor(sharded := as_sharded(method, param)):
                self._slices[param] = _Slice(param, sharded)
        self._locals: dict[Tensor, _Local | _Slice] = {**self._dtensors, **self._slices}
        self.read(method)

    def __bool__(self) -> bool:
        return bool(self._locals)

    def of(self, param: Tensor) -> Tensor:
        """The plain tensor of a parameter, which has its gradient."""
        local = self._locals.get(param) if self._locals else None
        return param if local is None else local.tensor

    def share_of(self, param: Tensor) -> Share | None:
        """Which ranks hold its elements."""
        local = self._locals.get(param) if self._locals else None
        return None if local is None else local.share

    def cut_of(self, param: Tensor) -> Cut | None:
        """How a parameter is cut that this rank has whole; None for all others."""
        piece = self._slices.get(param) if self._slices else None
        return None if piece is None else piece.cut

    def wholes(self) -> list[Tensor]:
        """The parameters that are cut, but that this rank has whole."""
        return list(self._slices)

    def shares(self) -> list[Share]:
        """The share of each sharded parameter."""
        return [local.share for local in self._locals.values()]

    def read(self, method: Method) -> bool:
        """Take the present gradients; whether the parameters still lie where they did.

        Raises:
            RuntimeError: if a gradient lies on other ranks than its parameter.
        """
        is_same = True
        for param, local in self._dtensors.items():
            is_same &= param._local_tensor is local.inner  # type: ignore[attr-defined]
            grad: Any = param.grad
            if grad is None:
                local.tensor.grad = None
            elif type(grad) is type(param) and local.has_direct(grad):
                local.tensor.grad = grad._local_tensor  # type: ignore[attr-defined]  # the same as below, in a tenth of its time
            else:
                local.tensor.grad = self._local_grad(method, param, grad)
        for param, piece in self._slices.items():
            grad = param.grad
            if is_dtensor(grad):
                raise _grad_error(method, param, grad)
            piece.tensor.grad = None if grad is None else piece.part_of(grad)
        return is_same

    def release(self) -> None:
        """Drop the gradients."""
        self._reduced.clear()
        for local in self._locals.values():
            local.tensor.grad = None

    def increment_versions(self) -> None:
        """Tell autograd that DTensors have been written to; plain tensors on their memory know."""
        if self._dtensors:
            torch.autograd.graph.increment_version(list(self._dtensors))

    def _local_grad(self, method: Method, param: Any, grad: Any) -> Tensor:
        if same_layout(param, grad):
            return local_of(grad)
        partial = is_dtensor(grad) and any(placement.is_partial() for placement in grad.placements)
        if partial and grad.device_mesh == param.device_mesh:
            expected = [p if g.is_partial() else g for p, g in zip(param.placements, grad.placements, strict=True)]
            if tuple(expected) == tuple(param.placements):
                if id(grad) not in self._reduced:
                    with torch.no_grad():
                        reduced = grad.redistribute(param.device_mesh, param.placements)
                    self._reduced[id(grad)] = grad, local_of(reduced)
                return self._reduced[id(grad)][1]
        raise _grad_error(method, param, grad)


def _grad_error(method: Method, param: Tensor, grad: Tensor) -> RuntimeError:
    return RuntimeError(
        f"{type(method).__name__}: {method.name_of(param)} has {layout_of(param)}, but its gradient has "
        f"{layout_of(grad)}. They must be equal: call redistribute on the gradient. Nothing has moved."
    )


def _local(method: Method, param: Tensor) -> _Local:
    try:
        return _Local(param, share_of(param))
    except ValueError as error:
        raise RuntimeError(f"{type(method).__name__}: {method.name_of(param)}: {error} Nothing has moved.") from None


class _Local:
    """One sharded parameter.

    Attributes:
        inner: the tensor inside the DTensor.
        tensor: another tensor on the same memory, which may have a gradient of its own.
    """

    def __init__(self, param: Any, share: Share | None) -> None:
        assert share is not None
        self.share, self.spec, self.inner = share, param._spec, param._local_tensor
        self.tensor = local_of(param).detach()
        self.tensor.grad_dtype = None  # gradients may be of any dtype

    def has_direct(self, grad: Any) -> bool:
        """Whether the tensor inside a gradient is the local one, as far as a few comparisons can tell."""
        spec, own = grad._spec, self.spec
        is_same = spec is own or (
            spec.mesh is own.mesh and spec.placements == own.placements and spec.shard_order == own.shard_order
        )
        return is_same and type(grad._local_tensor) is Tensor


class _Slice:
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
        return torch.sparse_coo_tensor(indices, values, self.tensor.shape, check_invariants=False)
