"""Models as an optimizer sees them: the sizes of their parameters."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

Size = tuple[int, ...]

# Turns by how many numbers a shape has: the more, the fewer steps find anything in the caches.
_TURNS = ((300_000, 20, 5), (4_000_000, 10, 3), (48_000_000, 4, 1))


class Shape(NamedTuple):
    """A model seen by an optimizer: the sizes of its parameters, and how long a turn is.

    Attributes:
        sizes: one per parameter, in the model's order.
        burst: steps in a turn.
        uncounted: the first steps of a turn, which only restore caches and threads.
    """

    sizes: tuple[Size, ...]
    burst: int
    uncounted: int

    @classmethod
    def of(cls, sizes: Iterable[Size]) -> Shape:
        """Return parameters of these sizes, with turns as long as suits them.

        Example:
            >>> Shape.of([(2, 3), (3,)])
            Shape(sizes=((2, 3), (3,)), burst=20, uncounted=5)
        """
        shape = cls(tuple(sizes), burst=1, uncounted=0)
        for most, burst, uncounted in _TURNS:
            if shape.numel <= most:
                return shape._replace(burst=burst, uncounted=uncounted)
        return shape

    @property
    def numel(self) -> int:
        """Numbers in all parameters."""
        return sum(map(math.prod, self.sizes))

    def cut(self, tensors: int, rows: int) -> Shape:
        """Return the first tensors, with at most so many rows each: small enough for a smoke test."""
        sizes = tuple((min(size[0], rows), *size[1:]) for size in self.sizes[:tensors])
        return Shape(sizes, burst=1, uncounted=0)


def gpt2_sizes(width: int = 768, blocks: int = 12) -> tuple[Size, ...]:
    """GPT-2 small, 148 tensors, 124 M numbers; the output layer shares the token embedding.

    Source: Radford et al. 2019, https://github.com/openai/gpt-2.
    """
    norm = ((width,), (width,))
    attention = ((width, 3 * width), (3 * width,), (width, width), (width,))
    mlp = ((width, 4 * width), (4 * width,), (4 * width, width), (width,))
    return ((50257, width), (1024, width), *blocks * (*norm, *attention, *norm, *mlp), *norm)


def resnet50_sizes() -> tuple[Size, ...]:
    """ResNet-50, 161 tensors, 25.6 M numbers.

    Source: He et al. 2016, Table 1, https://arxiv.org/abs/1512.03385.
    """

    def convolution(outputs: int, inputs: int, kernel: int) -> list[Size]:
        return [(outputs, inputs, kernel, kernel), (outputs,), (outputs,)]  # and its batch norm

    sizes = convolution(64, 3, 7)
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            sizes += convolution(width, inputs, 1)
            sizes += convolution(width, width, 3)
            sizes += convolution(4 * width, width, 1)
            if block == 0:
                sizes += convolution(4 * width, inputs, 1)
            inputs = 4 * width
    return (*sizes, (1000, 2048), (1000,))


def odd_sizes() -> tuple[Size, ...]:
    """Three hundred small tensors of ten shapes, none a power of two, 0.25 M numbers."""
    shapes = ((7, 13), (129,), (33, 65), (1001,), (3, 5, 7), (255,), (63, 17), (1,), (31, 3, 3, 3), (2049,))
    return 30 * shapes


SHAPES = {
    "64M": Shape(((64 * 2**20,),), burst=1, uncounted=0),
    "gpt2": Shape(gpt2_sizes(), burst=1, uncounted=0),
    "resnet50": Shape(resnet50_sizes(), burst=4, uncounted=1),
    "1000x1000": Shape(1000 * ((1000,),), burst=10, uncounted=3),
    "mlp": Shape(((32, 16), (32,), (32, 32), (32,), (10, 32), (10,)), burst=20, uncounted=5),
    # A step a turn: the peers take theirs in between, and leave nothing of ours in the caches.
    "1000x1000cold": Shape(1000 * ((1000,),), burst=1, uncounted=0),
    "300odd": Shape(odd_sizes(), burst=1, uncounted=0),
    # One number per tensor: what is left is the time spent in Python, per step and per tensor.
    "1000x1": Shape(1000 * ((1,),), burst=10, uncounted=3),
    "6x1": Shape(6 * ((1,),), burst=20, uncounted=5),
}
