"""A table of 20 million rows costs the pages that steps have touched."""

from __future__ import annotations

import ctypes
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
    trim = getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: None)

    def resident() -> float:
        trim(0)  # malloc keeps what was freed
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


FAULTS = """
import resource, sys, torch, descend
from descend.backends.cpu import threads

faults = []
run = threads.CallSequence.run

def counting(sequence):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    run(sequence)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

threads.CallSequence.run = counting
torch.set_num_threads(2)

def measure(sparse, rows):
    for size in (2_000, 400_000):  # what is compiled and started for the first time is not counted
        table = torch.nn.Embedding(size, 64, sparse=True, _weight=torch.ones(size, 64))
        optimizer = descend.AdamW(table.parameters(), sparse=sparse)
        if sparse == "exact":
            optimizer.attach(table)
        if rows == "dense":
            optimizer.init_state()
        faults.clear()
        for step in range(3):
            indices = torch.randperm(size if rows == "scattered" else min(size, 40_000))[: size // 20]
            if rows == "dense":
                table.weight.grad = torch.ones_like(table.weight)
            else:
                table(indices).sum().backward()
            optimizer.step()
            optimizer.zero_grad()

for argument in sys.argv[1:]:
    measure(*argument.split())
    print(sum(faults), len(faults))
"""


WAYS = ["touched scattered", "touched neighbours", "touched dense", "exact scattered", "exact neighbours"]


@needs_proc
def test_kernels_that_run_on_several_threads_do_not_fault() -> None:
    """Faults of two threads wait for each other. The state of each step is written for the first time."""
    done = subprocess.run([sys.executable, "-c", FAULTS, *WAYS], capture_output=True, text=True, check=True)
    for way, line in zip(WAYS, done.stdout.splitlines(), strict=True):
        faults, calls = map(int, line.split())
        assert calls >= 3, way
        assert faults < 50, way  # thousands without commit_rows
