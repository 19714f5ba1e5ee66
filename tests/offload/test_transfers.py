"""What waits for what on streams; and, on a GPU, that it does."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest.mock import create_autospec

import pytest
import torch
from cases import device, give_grads, leaves, params_of
from torch import Tensor

from descend import SGD, AdamW
from descend.offload.fingerprints import SMALLEST
from descend.offload.transfers import BlockingTransfers, StreamTransfers, transfers_to


class Streams:
    """Stands for ``torch.cuda``: writes down what is called, and refuses what ``torch.cuda`` does not have."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self._made = 0

    def Stream(self, place: torch.device) -> Any:  # noqa: N802
        self._made += 1
        return self._named(("down", "up")[self._made - 1])

    def current_stream(self, place: torch.device) -> Any:
        return self._named("current")

    def stream(self, stream: Any) -> AbstractContextManager[None]:
        self.log.append(f"in {stream.name}")
        return nullcontext()

    def _named(self, name: str) -> Any:
        stream = create_autospec(torch.cuda.Stream, instance=True)
        stream.name = name
        event = create_autospec(torch.cuda.Event, instance=True)
        event.synchronize.side_effect = lambda: self.log.append(f"host waits for {name}")
        stream.record_event.side_effect = lambda: event
        stream.wait_event.side_effect = lambda other: self.log.append(f"{name} waits for an event")
        stream.wait_stream.side_effect = lambda other: self.log.append(f"{name} waits for {other.name}")
        return stream


def test_streams_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = Streams()
    monkeypatch.setattr(torch, "get_device_module", lambda place: streams)
    transfers = StreamTransfers(torch.device("xpu"))
    transfers.begin()
    assert streams.log == ["down waits for an event", "up waits for an event", "down waits for up"]
    arrival = transfers.download(lambda: streams.log.append("comes"))
    transfers.wait(arrival)
    transfers.upload(lambda: streams.log.append("goes"))
    assert streams.log[3:] == ["in down", "comes", "host waits for down", "in up", "goes", "current waits for up"]


@pytest.mark.parametrize("name", ["Stream", "current_stream", "stream", "is_current_stream_capturing"])
def test_streams_are_called_what_torch_calls_them(name: str) -> None:
    assert callable(getattr(torch.cuda, name))


def test_devices_without_streams_are_copied_from_and_to_at_once() -> None:
    transfers = transfers_to(torch.device("mps"))
    assert isinstance(transfers, BlockingTransfers)


def state_places(optimizer: Any) -> set[str]:
    return {value.device.type for state in optimizer.state.values() for value in state.values()}


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("kind", "options"),
    [(AdamW, dict(lr=0.01)), (AdamW, dict(lr=0.01, max_norm=0.5)), (SGD, dict(lr=0.1, momentum=0.9))],
)
def test_steps_on_a_gpu_are_those_of_the_cpu(kind: Any, options: dict[str, Any]) -> None:
    params = leaves([(300, 300), (7,), (), (5_000_000,)], torch.float32)
    twins = [param.detach().cpu().requires_grad_() for param in params]
    ours, plain = kind(params, state_device="cpu", **options), kind(twins, **options)
    for seed in range(6):
        for each in (params, twins):
            give_grads(each, seed)
            if seed == 3:
                each[0].data.copy_(each[0].detach().flip(0))
                each[3].data.mul_(0.5)
        ours.step()
        plain.step()
        for param in params:
            param.grad = None  # the step has copied it
        assert all(torch.equal(param.cpu(), twin) for param, twin in zip(params, twins, strict=True))
    assert state_places(ours) == {"cpu"}
    assert all(ours.host_copies[param].tensor.is_pinned() for param in params)


@pytest.mark.gpu
def test_steps_on_a_gpu_come_after_what_its_stream_was_given() -> None:
    param = torch.zeros(4_000_000, device=device(), requires_grad=True)
    optimizer = SGD([param], lr=1.0, state_device="cpu")
    param.grad = torch.zeros_like(param)
    optimizer.step()
    busy, side = torch.randn(2048, 2048, device=device()), torch.cuda.Stream(device())
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for round_ in range(5):
            for _ in range(50):
                busy = busy @ busy / 64
            param.grad.fill_(1.0)
            optimizer.step()
            read = param.detach().clone()  # at once: the upload comes first
            assert torch.equal(read, torch.full_like(read, -1.0 - round_))


@pytest.mark.gpu
def test_rows_of_a_table_on_a_gpu_come_and_go() -> None:
    params, rows = leaves([(100_000, 8)], torch.float32), torch.tensor([[3, 99_999, 3]], device=device())
    twins = [params[0].detach().cpu().requires_grad_()]
    optimizers = [AdamW(params, sparse="touched", state_device="cpu"), AdamW(twins, sparse="touched")]
    for _ in range(3):
        values = torch.randn(3, 8, device=device())
        params[0].grad = torch.sparse_coo_tensor(rows, values, params[0].shape)
        twins[0].grad = params[0].grad.cpu()
        for optimizer in optimizers:
            optimizer.step()
        assert torch.equal(params[0].cpu(), twins[0])
    assert params[0].numel() > SMALLEST


@pytest.mark.gpu
def test_state_of_a_gpu_goes_to_the_host_and_back() -> None:
    params = leaves([(300, 300)], torch.float32)
    there, here = AdamW(params), AdamW(params, state_device="cpu")
    give_grads(params, 0)
    there.step()
    here.load_state_dict(there.state_dict())
    here.step()
    assert state_places(here) == {"cpu"}
    there.load_state_dict(here.state_dict())
    there.step()
    assert "cuda" in state_places(there)


@pytest.mark.gpu
def test_capturing_an_offloaded_step_is_refused() -> None:
    optimizer = SGD(leaves([(5,)], torch.float32), lr=0.1, state_device="cpu")
    give_grads(params_of(optimizer), 0)
    optimizer.step()
    before: Tensor = params_of(optimizer)[0].detach().clone()
    with pytest.raises(RuntimeError, match="cannot be captured"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()
    assert torch.equal(params_of(optimizer)[0], before)
