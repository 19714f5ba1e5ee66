"""Source code, character by character."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from descend.compare.models import transformer
from descend.compare.tasks.catalog import SUMMARIES
from descend.compare.tasks.library import library
from descend.compare.tasks.rates import rates
from descend.compare.tasks.task import Batch, Data, Task

CONTEXT = 64
VOCABULARY = 128
TEST_WINDOWS = 256


def load(seed: int) -> Data:
    """Return windows of Python's own source code; each character is predicted from those before it.

    The text is that of the standard library's single-file modules, about 4.7 million characters; a tenth of the files
    is held out.
    """
    files = [_characters(path) for path in library("text")]
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(seed)).tolist()
    test, train = (
        torch.cat([files[i] for i in part]).unfold(0, CONTEXT + 1, 1)
        for part in (order[: len(order) // 10], order[len(order) // 10 :])
    )

    def sample(batch_size: int, generator: torch.Generator) -> Batch:
        return _shifted(train[torch.randint(len(train), (batch_size,), generator=generator)])

    return Data(sample, _shifted(test[:: len(test) // TEST_WINDOWS]))


def _characters(path: Path) -> Tensor:
    ascii_only = path.read_text("utf-8", errors="replace").encode("ascii", errors="replace")
    return torch.frombuffer(bytearray(ascii_only), dtype=torch.uint8)


def _shifted(windows: Tensor) -> Batch:
    windows = windows.long()
    return windows[:, :-1], windows[:, 1:]


def model() -> nn.Module:
    """Return a transformer of 430,000 parameters in 29 tensors."""
    return transformer(VOCABULARY, CONTEXT, width=128, heads=4, depth=2)


TASK = Task(
    name="text",
    summary=SUMMARIES["text"],
    load=load,
    model=model,
    steps=300,
    batch_size=32,
    lr=rates(sgd=0.1, adam=2e-3),
    optimizers=("sgd", "adam:weight_decay=1e-3", "adamw", "torch.adamw"),
)
