"""A step raises the version counters of what it writes, natively or through torch."""

from __future__ import annotations

import pytest
import torch
from cases import BACKENDS, CASES, Case, give_grads, leaves, params_of

from descend import SGD
from descend.backends.cpu import versions


@pytest.mark.parametrize("way", ["native", "torch"])
def test_versions_are_raised_by_one(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if way == "torch":
        monkeypatch.setattr(versions, "_bump_version", lambda: None)
    params = leaves()
    optimizer = SGD(params, lr=0.1)
    for count in (1, 2, 3):
        give_grads(params, count)
        optimizer.step()
        assert [param._version for param in params] == [count] * len(params)


def test_function_that_does_something_else_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "_BUMP", "_ZN2at6native6is_negERKNS_6TensorE")
    assert versions._bump_version.__wrapped__() is None
    monkeypatch.setattr(versions, "_BUMP", "there_is_no_such_function")
    assert versions._bump_version.__wrapped__() is None


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_backward_through_what_a_step_has_written_is_refused(case: Case, backend: str) -> None:
    optimizer = case.ours(leaves([(3,)]), **case.options, backend=backend)
    (param,) = params_of(optimizer)
    loss = (param * param).sum()
    param.grad = torch.ones(3, dtype=torch.float64)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
