"""Parameters on the CPU as if they were on another device, and copies that arrive as late as they may."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from descend import FirstOrder
from descend.offload import buckets, host_params
from descend.offload.transfers import Transfers, Work


class LateTransfers(Transfers):
    """Copies of a device that is always behind: nothing arrives before somebody waits for it.

    Until then memory that a download will write has NaN, and an upload may send what the host has written meanwhile.

    Attributes:
        downloaded, uploaded: numbers that have gone either way.
        downloads: how often the host has asked for some.
    """

    def __init__(self) -> None:
        self.downloaded = self.uploaded = self.downloads = 0
        self._coming: list[list[tuple[Tensor, Tensor]]] = []
        self._going: list[Work] = []
        self._copies: list[tuple[Tensor, Tensor]] | None = None

    def empty_like(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.empty_like(tensor, dtype=dtype)

    def copy(self, to: Tensor, source: Tensor) -> None:
        assert not to.requires_grad
        assert not source.requires_grad
        if self._copies is None:
            to.copy_(source)
            self.uploaded += to.numel()
            return
        to.fill_(torch.nan if to.is_floating_point() or to.is_complex() else 0)
        self._copies.append((to, source))
        self.downloaded += to.numel()

    @property
    def is_idle(self) -> bool:
        """Whether all downloads have arrived."""
        return not self._coming

    def begin(self) -> None:
        for work in self._going:
            work()
        self._going.clear()

    def download(self, work: Work) -> Any:
        self._copies, self.downloads = [], self.downloads + 1
        work()
        self._coming.append(self._copies)
        self._copies = None
        return self._coming[-1]

    def wait(self, arrival: Any) -> None:
        while any(each is arrival for each in self._coming):  # downloads follow each other
            for to, source in self._coming.pop(0):
                to.copy_(source)

    def upload(self, work: Work) -> None:
        self._going.append(work)


def pretend(
    monkeypatch: pytest.MonkeyPatch,
    is_on_device: Callable[[Tensor], bool] = lambda param: True,
    bucket_bytes: int = host_params.BUCKET_BYTES,
) -> None:
    """Let ``state_device="cpu"`` take parameters for those of another device."""
    monkeypatch.setattr(host_params, "_is_on_device", is_on_device)
    monkeypatch.setattr(host_params, "BUCKET_BYTES", bucket_bytes)
    monkeypatch.setattr(buckets, "transfers_to", lambda device: LateTransfers())


def transfers_of(optimizer: FirstOrder) -> LateTransfers:
    (transfers,) = optimizer.transfers.values()
    assert isinstance(transfers, LateTransfers)
    return transfers


def flush(optimizers: Iterable[FirstOrder]) -> None:
    """What a program does before it looks: let the device finish."""
    for optimizer in optimizers:
        for transfers in optimizer.transfers.values():
            transfers.begin()


def step(optimizer: FirstOrder) -> None:
    """Take a step, and let the device finish."""
    optimizer.step()
    flush([optimizer])
