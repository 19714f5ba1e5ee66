"""Object code outlives what made it, and failures leave the compiler usable."""

from __future__ import annotations

import subprocess
import sys

import pytest

FAIL_THEN_GO_ON = """
import gc, torch, descend
from descend import rules
from descend.backends.cpu import kernels
from descend.backends.cpu import object_files

def impossible(param, grad, lr):
    return param - lr * torch.tanh(grad)

weight = torch.ones(3, requires_grad=True)
weight.grad = torch.ones(3)
Impossible = descend.from_rule(impossible, "Impossible")
for _ in range(3):
    try:
        Impossible([weight]).step()
    except descend.RuleError:
        gc.collect()
    float32 = torch.float32
    object_files.assembly(kernels.update_kernel(rules.sgd, 2, (float32, float32), float32))
    descend.AdamW([weight], max_norm=1.0).step()
print("survived")
"""


def test_failed_compilation_leaves_the_compiler_usable() -> None:
    # In a process of its own: what this guards against is a use after free.
    ran = subprocess.run([sys.executable, "-W", "error", "-c", FAIL_THEN_GO_ON], capture_output=True, text=True)
    assert ran.stdout.strip() == "survived", ran.stderr


FREED = """
import torch, descend
weight = torch.ones(50, requires_grad=True)
weight.grad = torch.ones(50)
optimizer = descend.AdamW([("weight", weight)], backend="{backend}")
optimizer.step()
{freed}.untyped_storage().resize_(0)
try:
    optimizer.step()
except RuntimeError as error:
    print(optimizer.state_dict()["state"][0]["step"].item(), error)
"""


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("freed", ["weight", "weight.grad"])
def test_freed_memory_is_an_error(freed: str, backend: str) -> None:
    # In a process of its own: torch's optimizers end it.
    code = FREED.format(freed=freed, backend=backend)
    ran = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert ran.stdout.startswith("1.0 AdamW: weight: the memory of it"), ran.stderr
