"""The cases of the step benchmark, and how one of them is timed.

``descend.bench`` has the shapes, the optimizers and the interleaved clock, and says how the times are made comparable.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

import descend
from descend.bench.clock import Contender, Pace, Timing, interleave
from descend.bench.contenders import clip_and_step, enter
from descend.bench.methods import DEFAULT, FUSED, METHODS, OURS, PEERS, bytes_moved
from descend.bench.shapes import Shape

UNPLANNED = "unplanned"
"""Ours, with a parameter that moves before every step: no step can use the plan of the one before."""

MAX_NORM = 1.0
MODEL_SHAPES = ("64M", "gpt2", "resnet50", "1000x1000", "mlp")
ROW_SHAPES = ("gpt2", "1000x1000")
COLD_SHAPES = ("1000x1000cold", "300odd")
PYTHON_SHAPES = ("1000x1", "6x1")
# Timed on every shape and dtype, with and without clipping; the others on float32 in the two shapes that differ most.
THOROUGH = ("adamw", "adam", "sgd")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Case(NamedTuple):
    """One line of the table. The dtype is that of parameters, gradients and state."""

    shape: str
    dtype: str
    method: str
    clip: bool
    fresh: bool

    @property
    def name(self) -> str:
        clip = "clip" if self.clip else "plain"
        grads = "fresh" if self.fresh else "fixed"
        return f"{self.method}-{self.dtype}-{self.shape}-{clip}-{grads}"

    def bytes_moved(self, shape: Shape) -> int:
        """Bytes that a step has to move, whoever takes it."""
        size = shape.numel * DTYPES[self.dtype].itemsize
        return bytes_moved(size, METHODS[self.method].state * size, self.clip)


def prepare_and_move(prepare: Callable[[], None], param: Tensor) -> None:
    prepare()
    param.data = param.data.clone()


def contender(name: str, case: Case, values: list[Tensor]) -> Contender:
    """One optimizer with parameters, gradients and state of its own.

    Args:
        name: ``OURS``, ``UNPLANNED`` or one of ``PEERS``.
        values: what the parameters start from, and the value of the gradients; read only.
    """
    max_norm = MAX_NORM if case.clip else None
    entry = enter(OURS if name == UNPLANNED else name, METHODS[case.method], values, max_norm, case.fresh)
    if name != UNPLANNED:
        return entry.contender
    return entry.contender._replace(prepare=partial(prepare_and_move, entry.contender.prepare, entry.params[0]))


def draw_values(shape: Shape, dtype: str) -> list[Tensor]:
    """Normal numbers, the same for every contender and run: a norm far above ``MAX_NORM``."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=generator).to(DTYPES[dtype]) for size in shape.sizes]


def time_case(
    case: Case, shape: Shape, values: list[Tensor], pace: Pace, names: Sequence[str] = ()
) -> dict[str, Timing]:
    """Time the contenders of these names (default: ours and every peer) on one case, and give the memory back."""
    gc.freeze()  # else each collection, in a timed step too, walks through all of torch's objects
    contenders = {name: contender(name, case, values) for name in names or (OURS, *METHODS[case.method].peers)}
    timings = interleave(contenders, shape, pace)
    contenders.clear()
    gc.collect()  # gigabytes must not wait for it, should an optimizer be in a reference cycle
    return timings


def time_training(pace: Pace) -> dict[str, Timing]:
    """Time whole training steps of a small transformer: forward, backward, clip, step."""
    batch, length, vocabulary = 4, 64, 128
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary, (batch, length + 1), generator=generator)

    def trainer(name: str) -> Contender:
        torch.manual_seed(0)
        model = small_transformer(vocabulary, width=128, layers=6)
        params = list(model.parameters())
        if name == OURS:
            ours = descend.AdamW(params, max_norm=MAX_NORM)
            zero_grad, update = ours.zero_grad, ours.step
        else:
            peer = torch.optim.AdamW(params, **PEERS[name])
            zero_grad, update = peer.zero_grad, partial(clip_and_step, params, peer, MAX_NORM)

        def train() -> None:
            zero_grad()
            scores = model(tokens[:, :-1]).flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(scores, tokens[:, 1:].flatten())
            loss.backward()  # type: ignore[no-untyped-call]
            update()

        return Contender(train)

    contenders = {name: trainer(name) for name in (OURS, DEFAULT, FUSED)}
    return interleave(contenders, Shape((), burst=4, uncounted=1), pace)


def small_transformer(vocabulary: int, width: int, layers: int) -> torch.nn.Module:
    layer = torch.nn.TransformerEncoderLayer(
        width, nhead=4, dim_feedforward=4 * width, dropout=0.0, batch_first=True, norm_first=True
    )
    encoder = torch.nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
    return torch.nn.Sequential(torch.nn.Embedding(vocabulary, width), encoder, torch.nn.Linear(width, vocabulary))
