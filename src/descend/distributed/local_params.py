"""Sharded parameters as plain tensors, and their gradients of one step."""

from __future__ import annotations

from collections.abc import Sequence
from operator import eq
from typing import Any

import torch
from torch import Tensor

from descend.core.optimizer import MethodOptimizer
from descend.core.update import Wrapper
from descend.distributed.cut_params import CutParams, grad_error
from descend.distributed.dtensors import is_dtensor, is_here, layout_in, layout_of, local_of, same_layout
from descend.distributed.gather import Cut
from descend.distributed.partial_sums import is_partial, reduced
from descend.distributed.ranks import Share, share_of
from descend.offload.host_params import HostParams


class LocalParams:
    """For each sharded parameter among some, a plain tensor on the memory of this rank's part of it.

    It has the local gradient after ``read``, until ``release``. Sharded are DTensors, and with ``shard_state`` the
    parameters that every rank has whole. With ``state_device``, a copy in the host's memory stands for a parameter on a
    device. Any other stands for itself.

    Args:
        optimizer: the optimizer.
        params: the parameters.
        previous: of the last step; what it has reduced for this one is not reduced again. Default: None.
        reads: whether to read the gradients, which may need other ranks. Default: True.
    Attributes:
        hosts: the copies in the host's memory.
    Raises:
        RuntimeError: if a parameter is a partial sum, or cannot have a copy in the host's memory.
    """

    def __init__(
        self,
        optimizer: MethodOptimizer,
        params: Sequence[Tensor],
        previous: LocalParams | None = None,
        reads: bool = True,
    ) -> None:
        self._is_read = False
        self._reduced: dict[int, tuple[Tensor, Tensor]] = previous._reduced if previous else {}
        self._locals: dict[Tensor, _Local] = {param: _local(optimizer, param) for param in params if is_dtensor(param)}
        self._cuts, self.hosts = CutParams(optimizer, params), HostParams(optimizer, params)
        self._has_any = bool(self._locals) or bool(self._cuts) or bool(self.hosts)
        self._types = {*map(type, self._locals)}
        self._specs = [local.spec for local in self._locals.values()]
        self._layouts = [*map(layout_in, self._specs)]
        if reads:
            self.read(optimizer)

    def __bool__(self) -> bool:
        return self._has_any  # asked in every step

    def of(self, param: Tensor) -> Tensor:
        """The plain tensor of a parameter, which has its gradient."""
        local = self._locals.get(param) if self._locals else None
        if local is not None:
            return local.tensor
        return self.hosts.of(param) if self.hosts else self._cuts.of(param)

    def share_of(self, param: Tensor) -> Share | None:
        """Which ranks hold its elements."""
        local = self._locals.get(param) if self._locals else None
        return self._cuts.share_of(param) if local is None else local.share

    def is_here(self, param: Tensor) -> bool:
        """Whether this rank is one of those that a parameter lies on. The others have nothing to step."""
        local = self._locals.get(param) if self._locals else None
        return local is None or local.is_here

    def shares(self) -> list[Share]:
        """The share of each sharded parameter."""
        return [*(local.share for local in self._locals.values()), *self._cuts.shares()]

    def cut_of(self, param: Tensor) -> Cut | None:
        """How a parameter is cut that this rank has whole; None for all others."""
        return self._cuts.cut_of(param)

    def wholes(self) -> list[Tensor]:
        """The parameters that are cut, and that this rank has whole."""
        return self._cuts.wholes()

    def read(self, optimizer: MethodOptimizer) -> bool:
        """Take the present gradients; whether the parameters still lie where they did.

        Raises:
            RuntimeError: if a gradient lies on other ranks than its parameter.
        """
        self._is_read = is_same = True
        self._reduce_partial_sums()
        param: Any
        for param, local in self._locals.items():
            is_same &= param._local_tensor is local.inner and local.is_on_inner()
            grad: Any = param.grad
            if grad is None or not local.is_here:
                local.tensor.grad = None
            else:
                local.tensor.grad = self._local_grad(optimizer, param, grad)
        self._cuts.read(optimizer)
        return self.hosts.read(optimizer) and is_same

    def release(self) -> None:
        """Drop the gradients."""
        if self._is_read:
            self._is_read = False
            self._reduced.clear()
            for local in self._locals.values():
                local.tensor.grad = None
            self._cuts.release()
            self.hosts.release()

    def wrapper_of(self, param: Tensor) -> Wrapper | None:
        """What a probe must know to find the local gradient by itself."""
        local = self._locals.get(param)
        if local is None or not local.is_here:
            return None
        return Wrapper(param, local.inner, local.spec if param.grad is None else getattr(param.grad, "_spec", None))

    def are_direct(self) -> bool:
        """Whether the inner tensors of all present gradients are the local ones: none must be reduced or refused."""
        grads: list[Any] = [param.grad for param in self._locals]
        if not set(map(type, grads)) - {type(None)} <= self._types:
            return False
        specs = [own if grad is None else grad._spec for grad, own in zip(grads, self._specs, strict=True)]
        return all(map(eq, map(layout_in, specs), self._layouts))

    def _reduce_partial_sums(self) -> None:
        """Reduce the gradients that are partial sums, and otherwise lie where their parameters do."""
        pairs: list[tuple[Any, Any]] = [(param, param.grad) for param, local in self._locals.items() if local.is_here]
        partial = [
            (param, grad)
            for param, grad in pairs
            if is_partial(grad) and id(grad) not in self._reduced and _lies_there_once_reduced(grad, param)
        ]
        wholes: list[Any] = reduced([grad for _, grad in partial])
        for (param, grad), whole in zip(partial, wholes, strict=True):
            self._reduced[id(grad)] = grad, local_of(whole.redistribute(param.device_mesh, param.placements))

    def _local_grad(self, optimizer: MethodOptimizer, param: Any, grad: Any) -> Tensor:
        if same_layout(param, grad):
            return local_of(grad)
        if id(grad) in self._reduced:
            return self._reduced[id(grad)][1]
        if is_partial(grad) and local_of(grad).layout is not torch.strided:
            raise RuntimeError(
                f"{type(optimizer).__name__}: {optimizer.name_of(param)} has a sparse gradient with {layout_of(grad)}. "
                "Sum it over the ranks first; with gloo, torch.distributed.all_reduce can. Nothing has moved."
            )
        raise grad_error(optimizer, param, grad)


def _lies_there_once_reduced(grad: Any, param: Any) -> bool:
    """Whether a dense partial gradient lies where its parameter does, but for the sums that are still to be taken."""
    if local_of(grad).layout is not torch.strided:
        return False
    return grad.device_mesh == param.device_mesh and all(
        here.is_partial() or here == there for here, there in zip(grad.placements, param.placements, strict=True)
    )


def _local(optimizer: MethodOptimizer, param: Tensor) -> _Local:
    try:
        return _Local(param, share_of(param))
    except ValueError as error:
        raise RuntimeError(
            f"{type(optimizer).__name__}: {optimizer.name_of(param)}: {error} Nothing has moved."
        ) from None


class _Local:
    """One sharded parameter.

    Attributes:
        inner: the tensor inside the DTensor.
        tensor: another tensor on the same memory, which may have a gradient of its own.
        is_here: whether this rank is one of those of its mesh.
    """

    def __init__(self, param: Any, share: Share | None) -> None:
        assert share is not None
        self.share, self.spec, self.inner = share, param._spec, param._local_tensor
        self.tensor, self.is_here = local_of(param).detach(), is_here(param)
        self.tensor.grad_dtype = None  # gradients may be of any dtype

    def is_on_inner(self) -> bool:
        """Whether the tensor still has the memory of the inner one."""
        tensor, inner = self.tensor, self.inner
        return tensor.is_meta or (tensor.data_ptr() == inner.data_ptr() and tensor.shape == inner.shape)
