"""Rules with sums in Triton: in the interpreter, and compiled for GPUs that need not be there."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from cases import leaves
from rule_runs import BRAIN, DOUBLE, SINGLE, Padded
from sum_rules import Estimated, Trusted, estimated_naively, trusted, trusted_naively
from torch import Tensor

from descend.backends import eager
from descend.backends.triton.backend import TritonBackend
from descend.ops import summing

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402

from descend.backends.triton import library  # noqa: E402

NAIVELY = {Trusted: trusted_naively, Estimated: estimated_naively}


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("kind", NAIVELY, ids=lambda kind: kind.__name__)
def test_steps_match_float64(kind: Any) -> None:
    params = leaves([(), (0,), (7, 5), (1025,)])
    steps = [[torch.randn_like(param) for param in params] for _ in range(2)]
    norms = [torch.cat([grad.reshape(-1) for grad in grads]).norm() + 1e-6 for grads in steps]
    expected = NAIVELY[kind](params, [[g / n for g in grads] for grads, n in zip(steps, norms, strict=True)])
    optimizer = kind([dict(params=params[:2]), dict(params=params[2:])], backend="triton", max_norm=1.0)
    for grads in steps:
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.clone()
        optimizer.step()
    assert {placement.backend for placement in optimizer.backends()} == {"triton"}
    torch.testing.assert_close([param.detach() for param in params], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("dtypes", [(SINGLE,) * 3, (BRAIN, BRAIN, SINGLE), (DOUBLE,) * 3], ids=str)
def test_sums_match_eager_wherever_tensors_lie(dtypes: tuple[torch.dtype, ...]) -> None:
    sizes, found = (0, 1, 1023, 3000), []
    made = [[Padded(size, dtype).tensor for dtype in dtypes] for size in sizes]
    for offset in (0, 1):
        rows = [[Padded(size, dtype, offset).tensor for dtype in dtypes] for size in sizes]
        for row, values in zip(rows, made, strict=True):
            for tensor, value in zip(row, values, strict=True):
                tensor.copy_(value)
            row[0].grad_dtype = None  # type: ignore[attr-defined]
            row[0].grad = row[1]
        launch: Any = TritonBackend().launch(trusted, 2, dtypes, [row[0] for row in rows], [1, 0, 1, 1])
        launch.compile(False)
        launch.set_state([row[2:] for row in rows])
        launch.set_scalars(0, 0.5, (0.1, 0.2))
        launch.set_scalars(1, 0.25, (0.1, 0.3))
        sums: Tensor = launch.sums().clone()
        for row, total, second in zip(rows, sums, (True, False, True, True), strict=True):
            scale, gain = (0.25, 0.3) if second else (0.5, 0.2)
            expected = eager.sums(trusted, row[0], row[1], row[2:], (0.1, gain), scale)
            torch.testing.assert_close(total, expected, rtol=1e-6, atol=0)
        found.append(sums)
    assert torch.equal(*found)
    launch.set_formed(np.ones((4, 1)))
    before = rows[2][0].clone()
    launch.run(None, False)
    assert not torch.equal(rows[2][0], before)


@pytest.mark.parametrize("target", [GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64)], ids=str)
@pytest.mark.parametrize("dtypes", [(SINGLE,) * 3, (BRAIN, BRAIN, SINGLE), (DOUBLE,) * 3], ids=str)
def test_kernels_compile_for_gpus(dtypes: tuple[torch.dtype, ...], target: GPUTarget) -> None:
    code = library.sums(trusted, dtypes).compile_for(target).asm
    if target.backend == "cuda":
        assert "ld.local" not in code["ptx"]
        assert code["ptx"].count(".v4.b32") + code["ptx"].count(".v2.b64") >= 3  # sixteen bytes of each tensor
    else:
        assert code["amdgcn"].count("global_load_dwordx4") + code["amdgcn"].count("buffer_load_dwordx4") >= 3
    library.totals(2, False).compile_for(target)


def remainder(param, grad, lr):
    return grad % 2.0


def sum_of_its_own(param, grad, lr):
    return grad.sum() + grad


@pytest.mark.parametrize(
    ("part", "why"), [(remainder, "the result of % has the sign"), (sum_of_its_own, "look at one element at a time")]
)
def test_parts_that_triton_computes_otherwise_are_declined(part: Any, why: str) -> None:
    def rule(param, grad, lr, total):
        return param - lr * total * grad

    kernel = library._sums.__wrapped__(summing(part)(rule), (SINGLE, SINGLE), False)
    with pytest.raises(TypeError, match=why):
        kernel.compile_for(GPUTarget("cuda", 90, 32))
