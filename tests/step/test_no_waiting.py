"""A step of device tensors makes no host wait, as far as meta tensors can tell: they have no values to read.

Nor can they be copied to the CPU; what copies numbers to a device, for which CUDA makes the host wait, is seen here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import CASES, Case, one_in
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from descend import ASGD, NAdam, ops

META = torch.device("meta")
OPTIONS = [
    dict(),
    dict(max_norm=1.0),
    dict(nonfinite="skip"),
    dict(amp="fused", max_norm=1.0),
    dict(capturable=True),
]
COPIES = ("_to_copy", "copy_.default", "where", "lift")  # of CPU tensors, even of no dimension


class _NoWaiting(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result, name = function(*args, **kwargs), str(function)
        devices = {leaf.device for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)}
        if any(copy in name for copy in COPIES):
            assert len(devices) == 1, f"{name} copies from {devices}"
        assert not ("_local_scalar_dense" in name and META in devices)
        return result


def steps(optimizer: Any, params: list[Tensor]) -> Iterator[Any]:
    """Give new gradients, and what a ``GradScaler`` tells; yield what watches the step: the first one may wait."""
    for seed in range(3):
        for param in params:
            param.grad = torch.empty_like(param)
        if optimizer.amp:
            optimizer.grad_scale, optimizer.found_inf = torch.empty((), device=META), torch.empty(1, device=META)
        yield _NoWaiting() if seed else torch.no_grad()


def new_params() -> list[Tensor]:
    return [torch.empty(shape, device=META, requires_grad=True) for shape in ((5, 3), (7,), ())]


@pytest.mark.parametrize(("case", "backend", "options"), one_in(2, CASES, ("eager", "foreach"), OPTIONS))
def test_a_steady_step_does_not_wait(case: Case, backend: str, options: dict[str, Any]) -> None:
    if "capturable" in options and not case.takes("capturable"):
        pytest.skip("it has no such option")
    counts_itself = case.ours.__name__ == "AdamWScheduleFree" or case.options.get("dampening")
    if counts_itself and ("nonfinite" in options or "amp" in options):
        pytest.skip("the host waits to know whether a step was taken")
    if case.needs_sums():
        pytest.skip("the host forms scalars of sums")
    params = new_params()
    optimizer = case.ours(params, backend=backend, **case.options, **options)
    for watched in steps(optimizer, params):
        with watched:
            optimizer.step()


@pytest.mark.parametrize("kind", [ASGD, NAdam])  # they have scalar state
@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_nor_does_one_of_parameters_that_share_memory(kind: Any) -> None:
    params = new_params()
    optimizer = kind([*params, params[0]], nonfinite="skip", max_norm=1.0)
    for watched in steps(optimizer, params):
        with watched:
            optimizer.step()


def test_a_learning_rate_on_the_device_is_not_read_for_each_parameter() -> None:
    params = new_params()
    optimizer = NAdam(params, backend="foreach")
    optimizer.param_groups[0]["lr"] = torch.empty((), device=META)
    for watched in steps(optimizer, params):  # the plan is made in the first step
        with watched:
            optimizer.step()


def test_where_makes_numbers_on_the_device_of_its_condition() -> None:
    with _NoWaiting():
        chosen = ops.where(torch.empty(3, device=META) > 0, 1.0, -1.0)
    assert (chosen.device, chosen.dtype) == (META, torch.float64)
