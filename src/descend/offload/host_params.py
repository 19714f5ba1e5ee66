"""``state_device="cpu"``: parameters on a device, in whose place copies in the host's memory are stepped.

Copies are kept between steps. Of a parameter that nobody else has written to since, only the gradient comes to the
host, and the new values go back.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from descend.core.optimizer import MethodOptimizer
from descend.offload.buckets import Bucket, check_param

# Large enough that copies reach the bandwidth of the bus, small enough that the first update begins early.
BUCKET_BYTES = 32 * 2**20


def is_offloaded(optimizer: MethodOptimizer, param: Tensor) -> bool:
    """Whether a parameter is on a device, and its state is not."""
    return optimizer.options.state_device is not None and _is_on_device(param)


def _is_on_device(param: Tensor) -> bool:
    return not param.is_cpu and not param.is_meta


def where_state_is(optimizer: MethodOptimizer, param: Tensor) -> Tensor:
    """A tensor like ``param`` that is where its state is: if it is offloaded, memory of the host without values.

    Raises:
        RuntimeError: if it cannot be offloaded.
    """
    if not is_offloaded(optimizer, param):
        return param
    check_param(optimizer, param)
    with torch.inference_mode(False):
        return torch.empty_like(param.detach(), device="cpu")


class HostParams:
    """For each parameter that is offloaded, a plain tensor in the host's memory.

    It has a gradient after ``read``, until ``release``; both have their values once their bucket has arrived.

    Args:
        optimizer: the optimizer.
        params: parameters, offloaded and others.
    Raises:
        RuntimeError: if one cannot have a copy in the host's memory.
    """

    def __init__(self, optimizer: MethodOptimizer, params: Iterable[Tensor]) -> None:
        self._is_read = False
        offloaded: list[Tensor] = []
        if optimizer.options.state_device is not None:
            offloaded = [param for param in dict.fromkeys(params) if _is_on_device(param)]
        elif optimizer.host_copies:
            optimizer.host_copies.clear()  # the option was turned off
        self._buckets = [Bucket(optimizer, members) for members in _bucketed(offloaded)]
        self._places = {param: bucket for bucket in self._buckets for param in bucket.params}

    def __bool__(self) -> bool:
        return bool(self._places)

    def of(self, param: Tensor) -> Tensor:
        """What is stepped in its place; a parameter that is not offloaded as it is."""
        bucket = self._places.get(param) if self._places else None
        return param if bucket is None else bucket.tensor_of(param)

    def bucket_of(self, param: Tensor) -> Bucket | None:
        """What it travels with; None for a parameter that is not offloaded."""
        return self._places.get(param)

    def originals(self) -> list[Tensor]:
        """The parameters that are offloaded."""
        return list(self._places)

    def read(self, optimizer: MethodOptimizer) -> bool:
        """Let the present gradients come, once a step; False if a parameter has become another one than was copied.

        Raises:
            RuntimeError: if a gradient cannot be copied.
        """
        if self._is_read:
            return True
        if not all(bucket.fits() for bucket in self._buckets):
            return False
        self._is_read = True
        for transfers in {id(bucket.transfers): bucket.transfers for bucket in self._buckets}.values():
            transfers.begin()
        for bucket in self._buckets:
            bucket.start(optimizer)
        return True

    def release(self) -> None:
        """Drop the gradients."""
        self._is_read = False
        for bucket in self._buckets:
            bucket.release()


def _bucketed(params: Iterable[Tensor]) -> list[list[Tensor]]:
    """Parameters in buckets of one device each, in their order."""
    buckets: list[list[Tensor]] = []
    filling: dict[torch.device, tuple[list[Tensor], int]] = {}
    for param in params:
        bucket, filled = filling.get(param.device, ([], 0))
        if not bucket or filled + param.nbytes > BUCKET_BYTES:
            bucket, filled = [], 0
            buckets.append(bucket)
        bucket.append(param)
        filling[param.device] = bucket, filled + param.nbytes
    return buckets
