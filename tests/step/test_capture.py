"""What a CUDA graph may capture. There need not be one: here a flag says that one is being captured."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from descend import SGD, Adagrad, AdamW, AdamWScheduleFree, Lion
from descend.step import capture
from descend.step.capture import check_capture


@pytest.fixture
def weight() -> Tensor:
    weight = torch.ones(3, requires_grad=True)
    weight.grad = torch.ones(3)
    return weight


@pytest.fixture(autouse=True)
def captures(monkeypatch: pytest.MonkeyPatch, weight: Tensor) -> None:
    monkeypatch.setattr(capture, "is_capturing", lambda: True)


def test_the_first_step_cannot_be_captured(weight: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = SGD([weight], lr=0.1)
    with pytest.raises(RuntimeError, match="SGD: the first step, and the first after an edit"):
        optimizer.step()
    assert torch.equal(weight, torch.ones(3))
    monkeypatch.setattr(capture, "is_capturing", lambda: False)
    optimizer.step()
    monkeypatch.undo()
    weight.grad = torch.ones(3)  # elsewhere
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full((3,), 0.8))


@pytest.mark.parametrize("options", [dict(), dict(momentum=0.9), dict(momentum=0.9, dampening=0.5)], ids=str)
def test_a_step_that_counts_nothing_can_be_captured(weight: Tensor, options: dict[str, Any]) -> None:
    check_capture(Lion([weight]), waits=False)
    check_capture(SGD([weight], **options), waits=False)  # torch's example of a whole network in a graph does


@pytest.mark.parametrize("kind", [Adagrad, AdamWScheduleFree])
def test_a_step_that_is_counted_by_the_host_cannot(weight: Tensor, kind: Any) -> None:
    with pytest.raises(RuntimeError, match=f"{kind.__name__} has no such option"):
        check_capture(kind([weight]), waits=False)


def test_one_that_could_be_counted_on_the_device_says_how(weight: Tensor) -> None:
    optimizer = AdamW([weight])
    with pytest.raises(RuntimeError, match=r"capturable is False: .* Make it with capturable=True"):
        check_capture(optimizer, waits=False)
    optimizer.param_groups[0]["capturable"] = True
    check_capture(optimizer, waits=False)


def test_one_that_waits_cannot(weight: Tensor) -> None:
    with pytest.raises(RuntimeError, match="SGD: a step that waits for the device cannot be captured"):
        check_capture(SGD([weight]), waits=True)


def test_one_that_rounds_at_random_cannot(weight: Tensor) -> None:
    optimizer = AdamW([weight], rounding="stochastic")
    optimizer.param_groups[0]["capturable"] = True
    with pytest.raises(RuntimeError, match=r"AdamW: a step with rounding='stochastic' cannot be captured.* has moved"):
        check_capture(optimizer, waits=False)
    check_capture(SGD([weight], rounding="compensated"), waits=False)
