"""Programs of one process load nothing of ``torch.distributed`` that torch itself does not load."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys
import torch
weight = torch.nn.Parameter(torch.ones(3))
def closure():
    weight.grad = None
    loss = weight.square().sum()
    loss.backward()
    return loss
closure()
"""
OURS = """
import descend
for optimizer in (descend.AdamW([weight], max_norm=1.0, nonfinite="skip"), descend.LBFGS([weight], max_iter=2)):
    for _ in range(2):
        optimizer.step(closure)
descend.clip_grad_norm_([weight], 1.0)
descend.clip_grad_value_([weight], 1.0)
descend.get_total_norm([weight.grad])
"""
SHOW = "\nprint(*(name for name in sys.modules if name.startswith('torch.distributed')))"


def test_one_process_loads_no_more_of_torch_distributed_than_import_torch() -> None:
    program = PROGRAM + SHOW + OURS + SHOW
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    alone, with_ours = (set(line.split()) for line in done.stdout.splitlines())
    assert alone  # the program shows something
    assert not any(name.startswith("torch.distributed.tensor") for name in alone)
    assert with_ours == alone
