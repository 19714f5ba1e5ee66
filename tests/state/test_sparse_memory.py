"""A table of 20 million rows costs the pages that steps have touched."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from descend import AdamW
from descend.state.lazy_memory import zeros

needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

PROGRAM = """
import sys, torch, descend
from descend.state.lazy_memory import zeros

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 2**20

ROWS, USED, DIM = 20_000_000, 200_000, 16
table = torch.nn.EmbeddingBag(ROWS, DIM, sparse=True, _weight=zeros((ROWS, DIM), torch.float32))

def optimizer():
    made = descend.AdamW(table.parameters(), sparse=sys.argv[1])
    if sys.argv[1] == "exact":
        made.attach(table)
    return made

def train(optimizer, steps):
    for step in range(steps):
        optimizer.zero_grad()
        table(torch.randint(USED, (8, 128), generator=torch.Generator().manual_seed(step))).sum().backward()
        optimizer.step()

first = optimizer()
train(first, 1)  # what is compiled and imported is not counted
before = resident()
train(first, 100)
if sys.argv[1] == "touched":  # exact reads all weights for a checksum, of which here hardly any exist
    second = optimizer()
    second.load_state_dict(first.state_dict())
    train(second, 2)
print(resident() - before)
"""


@needs_proc
@pytest.mark.parametrize("sparse", ["touched", "exact"])
def test_a_hundred_steps_on_twenty_million_rows_cost_what_they_touch(sparse: str) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM, sparse], capture_output=True, text=True, check=True)
    # One in a hundred rows: 12.2 MiB of the weights, and four times as much for the state and its copy; the state of
    # all rows would be 2,441 MiB. The rest is what a step works in.
    assert float(done.stdout) < 5 * 12.2 + 60


@needs_proc
def test_state_made_ahead_or_loaded_costs_nothing_where_it_is_zero() -> None:
    def resident() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) / 2**8  # MiB

    costs = []
    for rows in (1, 2**18):  # what a first time imports is not counted
        table = zeros((rows, 16), torch.float32).requires_grad_()
        optimizers = [AdamW([table], sparse="touched") for _ in range(2)]
        before = resident()
        optimizers[0].init_state()
        optimizers[1].load_state_dict(optimizers[0].state_dict())
        costs.append(resident() - before)
    assert costs[1] < 16  # else 32 for each of the two, as both averages have the table's size
