"""``differentiable=True``: autograd sees through the step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import CASES, Case
from torch import Tensor

DIFFERENTIABLE = [case for case in CASES if case.takes("differentiable")]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("case", DIFFERENTIABLE, ids=str)
def test_differentiable_step_passes_gradcheck(case: Case) -> None:
    def walk(start: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        param = start.clone()
        optimizer = case.ours([param], **case.options, differentiable=True)
        for scale in (1.0, 0.5):
            param.grad = grad * scale
            optimizer.step()
        state = optimizer.state[param].items() if optimizer.state else ()
        return (param, *(value for name, value in state if name != "step"))

    torch.manual_seed(3)
    start, grad = (torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(walk, (start, grad))


def unrolled(optimizer_class: Any, options: dict[str, Any]) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss after three steps, as a function of lr and of where they start."""

    def loss(lr: Tensor, start: Tensor) -> Tensor:
        param = start.clone()
        optimizer = optimizer_class([param], **{**options, "lr": lr}, differentiable=True)
        for _ in range(3):
            seen = param.clone()  # the step writes the parameter, in torch too
            (param.grad,) = torch.autograd.grad((seen**3).sum(), seen, create_graph=True)
            optimizer.step()
        return param.square().sum()

    return loss


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("case", DIFFERENTIABLE, ids=str)
def test_meta_gradient_is_the_slope(case: Case) -> None:
    torch.set_default_dtype(torch.float64)  # else the step sizes in the state of ASGD are float32
    lr = torch.tensor(0.05, dtype=torch.float64, requires_grad=True)
    start = torch.linspace(-1, 2, 5, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(unrolled(case.ours, case.options), (lr, start))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("case", [CASES[0], CASES[5]], ids=str)  # with the others torch's own graph breaks
def test_meta_gradient_is_torchs(case: Case) -> None:
    lr = torch.tensor(0.05, dtype=torch.float64, requires_grad=True)
    start = torch.linspace(-1, 2, 5, dtype=torch.float64).requires_grad_()
    ours, theirs = (
        torch.autograd.grad(unrolled(kind, case.options)(lr, start), (lr, start)) for kind in (case.ours, case.theirs)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)  # torch's bias corrections are in float32
