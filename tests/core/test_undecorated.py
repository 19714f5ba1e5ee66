"""An ordinary training loop imports neither torch's compiler, which takes seconds, nor Triton."""

from __future__ import annotations

import functools
import subprocess
import sys
from typing import Any

import pytest
import torch
from cases import CASES, Case, Twins, give_grads, leaves, params_of

from descend import SGD, AdamW
from descend.core.undecorated import undecorated

LOOP = """
import copy, sys
import torch
import descend

model = torch.nn.Linear(3, 2)
for kind in (descend.SGD, descend.AdamW, descend.NAdam, descend.AdamWScheduleFree):
    optimizer = kind(model.parameters(), lr=0.1)
    optimizer.add_param_group({"params": [torch.ones(2, requires_grad=True)]})
    for set_to_none in (True, False):
        optimizer.zero_grad(set_to_none)
        model(torch.ones(3)).sum().backward()
        optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    copy.deepcopy(optimizer).step()
    optimizer.backends()
assert "torch._dynamo" not in sys.modules
assert "triton" not in sys.modules
"""


def test_a_loop_imports_neither_the_compiler_nor_triton() -> None:
    subprocess.run([sys.executable, "-W", "error", "-c", LOOP], check=True)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_zero_grad_does_what_torchs_does(case: Case, set_to_none: bool) -> None:
    twins = Twins(case)
    for optimizer in twins.both:
        give_grads(params_of(optimizer)[1:], 0)
        optimizer.zero_grad(set_to_none=set_to_none)
    ours, theirs = ([param.grad for param in params_of(optimizer)] for optimizer in twins.both)
    assert [grad is None for grad in ours] == [grad is None for grad in theirs]
    assert all(not grad.any() for grad in ours if grad is not None)


def test_only_torchs_own_decorator_is_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = torch.optim.Optimizer.zero_grad

    @functools.wraps(original)
    def counted(self: Any, set_to_none: bool = True) -> None:
        calls.append(self)
        original(self, set_to_none)

    monkeypatch.setattr(torch.optim.Optimizer, "zero_grad", counted)
    assert undecorated(counted) is counted
    optimizer = SGD(leaves())
    optimizer.zero_grad()
    assert calls == [optimizer]


def test_the_decorator_stays_while_a_program_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    method = torch.optim.Optimizer.zero_grad
    assert undecorated(method) is not method
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert undecorated(method) is method


def test_zero_grad_in_a_compiled_function() -> None:
    param = torch.ones(3, requires_grad=True)
    optimizer = AdamW([param])

    @torch.compile(backend="eager")
    def cleared(values: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        return values * 2

    param.grad = torch.ones(3)
    assert torch.equal(cleared(torch.ones(2)), torch.full((2,), 2.0))
    assert param.grad is None
