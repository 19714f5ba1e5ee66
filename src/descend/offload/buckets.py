"""Parameters on a device that travel together, and their copies in the host's memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from descend.core import memory
from descend.core.optimizer import MethodOptimizer
from descend.offload.fingerprints import fingerprint, has_fingerprint
from descend.offload.transfers import Transfers, transfers_to


class HostCopy:
    """The copy of one parameter in the host's memory.

    Args:
        param: the parameter.
        transfers: to its device.
    Attributes:
        tensor: the copy, which may have a gradient of its own.
        left: what the parameter was when the copy was uploaded; None while the copy differs from it, or may do so.
    """

    def __init__(self, param: Tensor, transfers: Transfers) -> None:
        with torch.inference_mode(False):
            self.tensor = transfers.empty_like(param.detach(), param.dtype)
        self.tensor.grad_dtype = None  # gradients may be of any dtype
        self.left: _Left | None = None
        self._grad: Tensor | None = None
        self._layout = _layout(param)

    def fits(self, param: Tensor) -> bool:
        """Whether it can still be the copy of ``param``."""
        return self._layout == _layout(param)

    def memory_for(self, grad: Tensor, transfers: Transfers) -> Tensor:
        """Where a dense gradient goes: the same memory in each step."""
        if self._grad is None or self._grad.dtype != grad.dtype:
            with torch.inference_mode(False):
                self._grad = transfers.empty_like(self.tensor, grad.dtype)
        return self._grad


class _Left(NamedTuple):
    """A parameter as an upload has left it: its version counter, where it has one, and its fingerprint."""

    version: int | None
    fingerprint: Tensor


class Bucket:
    """Parameters on one device, whose gradients come to the host together.

    In a step: ``start``; ``arrive``; for what is updated then ``touch``, the update, ``leave``; and ``release``.

    Args:
        optimizer: their optimizer.
        params: the parameters.
    Attributes:
        device: where they are.
        params: the parameters.
    Raises:
        RuntimeError: if one cannot have a copy in the host's memory.
    """

    def __init__(self, optimizer: MethodOptimizer, params: Sequence[Tensor]) -> None:
        self.device = params[0].device
        self._copies: dict[Tensor, HostCopy] = {}
        self.transfers: Transfers = optimizer.transfers.get(self.device) or transfers_to(self.device)
        optimizer.transfers[self.device] = self.transfers
        for param in params:
            check_param(optimizer, param)
            copy = optimizer.host_copies.get(param)  # type: ignore[no-untyped-call]
            if copy is None or not copy.fits(param):
                copy = optimizer.host_copies[param] = HostCopy(param, self.transfers)
            self._copies[param] = copy
        self.params = list(self._copies)
        self._params = {id(copy.tensor): param for param, copy in self._copies.items()}
        self._coming: list[Any] = []  # what to wait for
        self._asked: list[Tensor] = []
        self._answers: Tensor | None = None

    def fits(self) -> bool:
        """Whether all copies can still be those of their parameters."""
        return all(copy.fits(param) for param, copy in self._copies.items())

    def tensor_of(self, param: Tensor) -> Tensor:
        """The copy of one of its parameters."""
        return self._copies[param].tensor

    def start(self, optimizer: MethodOptimizer) -> None:
        """Let the gradients come, and those parameters that are not what the last upload has left.

        Sparse gradients are read at once; their parameters come when they are updated.

        Raises:
            RuntimeError: if a gradient cannot be copied.
        """
        self._asked, moves = [], []
        for param, copy in self._copies.items():
            grad = param.grad
            if grad is None:
                copy.tensor.grad = None
                continue
            _check_grad(optimizer, param, grad)
            if grad.layout is not torch.strided:
                copy.tensor.grad = _sparse_on_host(grad)
                continue
            copy.tensor.grad = copy.memory_for(grad, self.transfers)
            moves.append((copy.tensor.grad, grad.detach()))
            left = copy.left
            if left is None or left.version != _version(param):
                moves.append((copy.tensor, param.detach()))
            else:
                self._asked.append(param)
        self._coming = [self._download(moves, self._asked)] if moves else []

    def arrive(self) -> None:
        """Wait until the copies, and their gradients, have their values."""
        self._wait()
        if self._asked and self._answers is not None:
            answers = zip(self._asked, self._answers[: len(self._asked)].tolist(), strict=True)
            self._asked = []
            edited = [param for param, is_edited in answers if is_edited]
            if edited:
                moves = [(self._copies[param].tensor, param.detach()) for param in edited]
                self.transfers.wait(self._download(moves, ()))

    def touch(self, tensors: Sequence[Tensor]) -> None:
        """Note that some of the copies change now."""
        for tensor in tensors:
            self._copies[self._params[id(tensor)]].left = None

    def leave(self, tensors: Sequence[Tensor]) -> None:
        """Upload some of the copies."""
        params = [self._params[id(tensor)] for tensor in tensors]

        def work() -> None:
            for param, tensor in zip(params, tensors, strict=True):
                whole = param.detach()
                self.transfers.copy(whole, tensor)
                if has_fingerprint(whole):
                    self._copies[param].left = _Left(_version(param), fingerprint(whole))

        self.transfers.upload(work)

    def fetch(self, param: Tensor) -> None:
        """Bring one parameter, and its gradient if that is dense, as they are now, and wait for them."""
        tensor, grad = self._copies[param].tensor, param.grad
        moves = [(tensor, param.detach())]
        if grad is not None and tensor.grad is not None and grad.layout is torch.strided:
            moves.append((tensor.grad, grad.detach()))
        self.transfers.begin()
        self.transfers.wait(self._download(moves, ()))

    def release(self) -> None:
        """Drop the gradients; what is still on its way arrives first."""
        self._wait()
        for copy in self._copies.values():
            copy.tensor.grad = None

    def _wait(self) -> None:
        while self._coming:
            self.transfers.wait(self._coming.pop())

    def _download(self, moves: Sequence[tuple[Tensor, Tensor]], asked: Sequence[Tensor]) -> Any:
        """Let tensors come, and answers whether those asked about are other than the last upload has left them."""
        if asked and self._answers is None:
            like = torch.empty(len(self._copies), dtype=torch.bool, device="cpu")
            self._answers = self.transfers.empty_like(like, torch.bool)

        def work() -> None:
            for to, source in moves:
                self.transfers.copy(to, source)
            if asked and self._answers is not None:
                found = [
                    fingerprint(param) != left.fingerprint
                    for param in asked
                    if (left := self._copies[param].left) is not None
                ]
                self.transfers.copy(self._answers[: len(asked)], torch.stack(found))

        return self.transfers.download(work)


class Rows:
    """The rows of one parameter that its sparse gradient names: they come and go when they are updated.

    Args:
        bucket: holds the parameter.
        param: the parameter.
    """

    # From ``come`` on.
    _rows: Tensor
    _rows_there: Tensor
    _moved: Tensor

    def __init__(self, bucket: Bucket, param: Tensor) -> None:
        self._transfers, self._param, self._tensor = bucket.transfers, param, bucket.tensor_of(param)

    def come(self) -> None:
        """Bring the rows, and wait for them."""
        grad = self._tensor.grad
        assert grad is not None
        self._rows = torch.unique(grad._indices()[0])
        self._moved = self._transfers.empty_like(self._tensor[: len(self._rows)], self._tensor.dtype)

        def work() -> None:
            self._rows_there = self._rows.to(self._param.device)
            self._transfers.copy(self._moved, self._param.detach().index_select(0, self._rows_there))

        self._transfers.wait(self._transfers.download(work))
        self._tensor.index_copy_(0, self._rows, self._moved)

    def leave(self) -> None:
        """Upload the rows."""
        moved, rows = self._moved, self._rows_there
        torch.index_select(self._tensor, 0, self._rows, out=moved)

        def work() -> None:
            there = torch.empty_like(moved, device=rows.device)
            self._transfers.copy(there, moved)
            self._param.detach().index_copy_(0, rows, there)

        self._transfers.upload(work)


def _layout(param: Tensor) -> tuple[Any, ...]:
    return param.dtype, param.device, param.shape, param.stride()


def _version(param: Tensor) -> int | None:
    return None if param.is_inference() else param._version


def _sparse_on_host(grad: Tensor) -> Tensor:
    """A sparse gradient in the host's memory: indices and values, as they are."""
    if grad.layout is not torch.sparse_coo:
        grad = grad.to_sparse()
    indices, values = grad._indices().to("cpu"), grad._values().detach().to("cpu")
    return torch.sparse_coo_tensor(indices, values, grad.shape, device="cpu", check_invariants=False)


def check_param(optimizer: MethodOptimizer, param: Tensor) -> None:
    """Raise ``RuntimeError`` for a parameter that cannot have a copy in the host's memory, or get it back."""
    name, who = optimizer.name_of(param), type(optimizer).__name__
    if type(param) not in memory.PLAIN or param.layout is not torch.strided:
        kind = type(param).__name__ if type(param) not in memory.PLAIN else f"of layout {param.layout}"
        raise RuntimeError(
            f"{who}: state_device='cpu' takes plain dense parameters on a device, but {name} is a {kind}. With FSDP2, "
            "CPUOffloadPolicy keeps parameters and state on the CPU. Nothing has moved."
        )
    if any(size > 1 and stride == 0 for size, stride in zip(param.shape, param.stride(), strict=True)):
        raise RuntimeError(
            f"{who}: {name}: the parameter is expanded: several of its elements share memory, so torch allows no "
            "update in place. Use a clone. Nothing has moved."
        )
    if memory.is_freed(param):
        raise _freed(optimizer, param, "it")


def _check_grad(optimizer: MethodOptimizer, param: Tensor, grad: Tensor) -> None:
    """Raise ``RuntimeError`` for a gradient that cannot be copied to the host."""
    if type(grad) not in memory.PLAIN or grad.shape != param.shape:
        raise RuntimeError(
            f"{type(optimizer).__name__}: {optimizer.name_of(param)} has a gradient that is a {type(grad).__name__} of "
            f"shape {tuple(grad.shape)}; with state_device='cpu' it must be a plain tensor of shape "
            f"{tuple(param.shape)}. Nothing has moved."
        )
    for what, tensor in (("it", param), ("its gradient", grad)):
        if tensor.layout is torch.strided and tensor.numel() and not tensor.data_ptr():
            raise _freed(optimizer, param, what)


def _freed(optimizer: MethodOptimizer, param: Tensor, what: str) -> RuntimeError:
    return RuntimeError(
        f"{type(optimizer).__name__}: {optimizer.name_of(param)}: the memory of {what} has been freed "
        "(untyped_storage().resize_). Restore it before the step, or set the gradient to None. Nothing has moved."
    )
