"""Copies between the memory of the host and that of one device, while both go on with something else."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Work = Callable[[], None]


class Transfers(ABC):
    """Copies between the host and one device.

    Downloads follow each other, and so do uploads; downloads and uploads pass each other on the way. Work is a function
    that calls ``copy``, and may compute on the device what it copies.
    """

    @abstractmethod
    def empty_like(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """Memory of the host, dense in the memory order of ``tensor``, which copies can reach."""

    @abstractmethod
    def copy(self, to: Tensor, source: Tensor) -> None:
        """Copy inside work: all that the other methods order."""

    @abstractmethod
    def begin(self) -> None:
        """Let all that follows come after what the device has been given to do, earlier uploads included."""

    @abstractmethod
    def download(self, work: Work) -> Any:
        """Copy to the host; what is returned is for ``wait``."""

    @abstractmethod
    def wait(self, arrival: Any) -> None:
        """Let the host wait until a download has arrived."""

    @abstractmethod
    def upload(self, work: Work) -> None:
        """Copy to the device, before whatever the device is given to do from now on. The host does not wait."""


class BlockingTransfers(Transfers):
    """Each copy is complete when its call returns: for devices without streams."""

    def empty_like(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.empty_like(tensor, dtype=dtype, device="cpu")

    def copy(self, to: Tensor, source: Tensor) -> None:
        to.copy_(source)

    def begin(self) -> None:
        """The host has waited for everything."""

    def download(self, work: Work) -> Any:
        work()

    def wait(self, arrival: Any) -> None:
        """It has arrived."""

    def upload(self, work: Work) -> None:
        work()


class StreamTransfers(Transfers):
    """Copies on two streams of their own, from and to pinned memory.

    Args:
        device: one that has streams.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._module = device, torch.get_device_module(device)
        self._down, self._up = self._module.Stream(device), self._module.Stream(device)

    def empty_like(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.empty_like(tensor, dtype=dtype, device="cpu", pin_memory=True)

    def copy(self, to: Tensor, source: Tensor) -> None:
        to.copy_(source, non_blocking=True)

    def begin(self) -> None:
        if self._device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "state_device='cpu': a step that waits for the device cannot be captured. Nothing has moved."
            )
        now = self._current().record_event()
        self._down.wait_event(now)
        self._up.wait_event(now)
        # The host may write to what was uploaded once a later download has arrived.
        self._down.wait_stream(self._up)

    def download(self, work: Work) -> Any:
        with self._module.stream(self._down):
            work()
        return self._down.record_event()

    def wait(self, arrival: Any) -> None:
        arrival.synchronize()

    def upload(self, work: Work) -> None:
        with self._module.stream(self._up):
            work()
        self._current().wait_stream(self._up)

    def _current(self) -> Any:
        return self._module.current_stream(self._device)


def transfers_to(device: torch.device) -> Transfers:
    """The fastest way to and from a device."""
    return StreamTransfers(device) if device.type in ("cuda", "xpu") else BlockingTransfers()
