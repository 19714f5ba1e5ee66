"""The tasks: real data that every machine has, a small model, and suitable defaults."""

from __future__ import annotations

import re
import sysconfig
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from descend.compare.errors import UsageError, require, unknown
from descend.compare.models import bag_of_words, conv_net, transformer

Batch = tuple[Tensor, Tensor]

CONTEXT = 64
VOCABULARY = 128
TEST_WINDOWS = 256
BUCKETS = 1_000_000
BAG = 32
MODULES = 64
ADAMS = ("adam", "adamw", "adamax", "nadam", "radam")


@dataclass(frozen=True)
class Data:
    """A source of training batches, and one test batch.

    Args:
        sample: draws a batch (inputs, class indices) of the given size with the given generator.
        test: held-out inputs and class indices, which no training batch contains.
    """

    sample: Callable[[int, torch.Generator], Batch]
    test: Batch


@dataclass(frozen=True)
class Task:
    """A classification task with cross-entropy loss, in nats.

    Args:
        name: its name on the command line.
        summary: one line for ``--help``.
        load: reads the data; the seed selects the held-out part.
        model: builds the model from torch's global random state; the last dimension of its logits is the class.
        steps: default number of steps.
        batch_size: default number of samples in a batch.
        lr: learning rate by optimizer name, for specs that give none; other optimizers use their own default.
        optimizers: default specs.
        threads: default number of threads; None for torch's.
    """

    name: str
    summary: str
    load: Callable[[int], Data]
    model: Callable[[], nn.Module]
    steps: int
    batch_size: int
    lr: Mapping[str, float]
    optimizers: tuple[str, ...]
    threads: int | None = None


def load_digits(seed: int) -> Data:
    """Return scikit-learn's 1,797 handwritten digits, images of shape (1, 8, 8) in [0, 1]; a quarter is held out."""
    require("sklearn")
    from sklearn import datasets

    images, labels = datasets.load_digits(return_X_y=True)
    inputs = torch.from_numpy(images).float().view(-1, 1, 8, 8) / 16
    targets = torch.from_numpy(labels).long()
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed))
    test, train = order[: len(order) // 4], order[len(order) // 4 :]

    def sample(batch_size: int, generator: torch.Generator) -> Batch:
        rows = train[torch.randint(len(train), (batch_size,), generator=generator)]
        return inputs[rows], targets[rows]

    return Data(sample, (inputs[test], targets[test]))


def load_text(seed: int) -> Data:
    """Return windows of Python's own source code; each character is predicted from those before it.

    The text is that of the standard library's single-file modules, about 4.7 million characters; a tenth of the files
    is held out.
    """
    files = [_characters(path) for path in _library("text")]
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(seed)).tolist()
    test, train = (
        torch.cat([files[i] for i in part]).unfold(0, CONTEXT + 1, 1)
        for part in (order[: len(order) // 10], order[len(order) // 10 :])
    )

    def sample(batch_size: int, generator: torch.Generator) -> Batch:
        return _shifted(train[torch.randint(len(train), (batch_size,), generator=generator)])

    return Data(sample, _shifted(test[:: len(test) // TEST_WINDOWS]))


def _library(task: str) -> list[Path]:
    """Return the files of the standard library's single-file modules."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(folder.glob("*.py"))
    if len(files) < 100:
        raise UsageError(f"compare: {task} is read from Python's library, but {folder} holds no sources.")
    return files


def _characters(path: Path) -> Tensor:
    ascii_only = path.read_text("utf-8", errors="replace").encode("ascii", errors="replace")
    return torch.frombuffer(bytearray(ascii_only), dtype=torch.uint8)


def _shifted(windows: Tensor) -> Batch:
    windows = windows.long()
    return windows[:, :-1], windows[:, 1:]


def load_embeddings(seed: int) -> Data:
    """Return lines of Python's own source code; the class of a line is the module that it comes from.

    A line is a bag of hashed words and pairs of adjacent words, eleven on average. The data are the lines of at least
    three words in the 64 modules with the most of them, about 60,000 lines; a tenth of the lines is held out.
    """
    bags = sorted((_bags(path) for path in _library("embeddings")), key=len, reverse=True)[:MODULES]
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


def digits_model() -> nn.Module:
    """Return a convolutional net of 34,000 parameters in 8 tensors."""
    return conv_net(classes=10)


def text_model() -> nn.Module:
    """Return a transformer of 430,000 parameters in 29 tensors."""
    return transformer(VOCABULARY, CONTEXT, width=128, heads=4, depth=2)


def embeddings_model() -> nn.Module:
    """Return a classifier of 32 million parameters, all but 2,112 of them in one table."""
    return bag_of_words(BUCKETS, width=32, classes=MODULES)


TASKS = {
    task.name: task
    for task in (
        Task(
            name="digits",
            summary="handwritten digits and a small convolutional net",
            load=load_digits,
            model=digits_model,
            steps=500,
            batch_size=64,
            lr={"sgd": 0.2, **dict.fromkeys(ADAMS, 2e-3), "rmsprop": 1e-3},
            optimizers=("sgd", "adam:weight_decay=1e-3", "adamw", "torch.adamw"),
            # For so small a net, a second thread saves a quarter of the time, but makes it ten times as long once
            # another process needs that core, because the threads wait for each other at every layer.
            threads=1,
        ),
        Task(
            name="text",
            summary="Python's standard library and a character-level transformer",
            load=load_text,
            model=text_model,
            steps=300,
            batch_size=32,
            lr={"sgd": 0.1, **dict.fromkeys(ADAMS, 2e-3), "rmsprop": 1e-3},
            optimizers=("sgd", "adam:weight_decay=1e-3", "adamw", "torch.adamw"),
        ),
        Task(
            name="embeddings",
            summary="lines of Python's standard library and a classifier over a million embeddings of hashed words",
            load=load_embeddings,
            model=embeddings_model,
            steps=200,
            batch_size=256,
            lr={"sgd": 20.0, **dict.fromkeys((*ADAMS, "sparseadam"), 3e-2), "rmsprop": 3e-3},
            optimizers=("torch.adamw", "adamw:sparse=exact", "adamw:sparse=touched", "torch.sparseadam"),
        ),
    )
}


def find_task(name: str) -> Task:
    """Return the task called ``name``; raise a ``UsageError`` that lists all tasks if it does not exist."""
    if name not in TASKS:
        raise unknown("there is no task", name, TASKS)
    return TASKS[name]
