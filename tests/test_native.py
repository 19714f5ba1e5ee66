"""Object code outlives what made it, and failures leave the compiler usable."""

from __future__ import annotations

import subprocess
import sys

FAIL_THEN_GO_ON = """
import gc, torch, descend
from descend import rules
from descend.kernels import cpu, native

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
    native.assembly(cpu.update_kernel(rules.sgd, 2, (float32, float32), float32))
    descend.AdamW([weight], max_norm=1.0).step()
print("survived")
"""


def test_failed_compilation_leaves_the_compiler_usable() -> None:
    # In a process of its own: what this guards against is a use after free.
    ran = subprocess.run([sys.executable, "-W", "error", "-c", FAIL_THEN_GO_ON], capture_output=True, text=True)
    assert ran.stdout.strip() == "survived", ran.stderr
