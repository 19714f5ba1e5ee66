"""Which module a line of source code comes from: a table with a million rows."""

from __future__ import annotations

import re
import zlib
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn

from descend.compare.models import bag_of_words
from descend.compare.tasks.catalog import SUMMARIES
from descend.compare.tasks.library import library
from descend.compare.tasks.rates import rates
from descend.compare.tasks.task import Batch, Data, Task

BUCKETS = 1_000_000
BAG = 32
MODULES = 64


def load(seed: int) -> Data:
    """Return lines of Python's own source code; the class of a line is the module that it comes from.

    A line is a bag of hashed words and pairs of adjacent words, eleven on average. The data are the lines of at least
    three words in the 64 modules with the most of them, about 60,000 lines; a tenth of the lines is held out.
    """
    bags = sorted((_bags(path) for path in library("embeddings")), key=len, reverse=True)[:MODULES]
    inputs = torch.tensor([bag for module in bags for bag in module])
    targets = torch.arange(MODULES).repeat_interleave(torch.tensor([len(module) for module in bags]))
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed))
    test, train = order[: len(order) // 10], order[len(order) // 10 :]

    def sample(batch_size: int, generator: torch.Generator) -> Batch:
        rows = train[torch.randint(len(train), (batch_size,), generator=generator)]
        return inputs[rows], targets[rows]

    return Data(sample, (inputs[test], targets[test]))


def _bags(path: Path) -> list[list[int]]:
    """Return the lines of a file with at least three words, each as ``BAG`` bucket numbers padded with 0."""
    bags = []
    for line in path.read_text("utf-8", errors="replace").splitlines():
        words = re.findall(r"\w+", line)
        if len(words) >= 3:
            pairs = [f"{left} {right}" for left, right in pairwise(words)]
            # Python's own string hash differs between processes.
            buckets = [1 + zlib.crc32(gram.encode()) % (BUCKETS - 1) for gram in (words + pairs)[:BAG]]
            bags.append(buckets + [0] * (BAG - len(buckets)))
    return bags


def model() -> nn.Module:
    """Return a classifier of 32 million parameters, all but 2,112 of them in one table."""
    return bag_of_words(BUCKETS, width=32, classes=MODULES)


TASK = Task(
    name="embeddings",
    summary=SUMMARIES["embeddings"],
    load=load,
    model=model,
    steps=200,
    batch_size=256,
    lr=rates(sgd=20.0, adam=3e-2, rmsprop=3e-3),
    optimizers=("torch.adamw", "adamw:sparse=exact", "adamw:sparse=touched", "torch.sparseadam"),
    # Settling takes a few milliseconds in many calls. Once another process needs a core, two threads wait for each
    # other in each of them: exact then took 530 ms a step in its optimizer instead of 47.
    threads=1,
)
