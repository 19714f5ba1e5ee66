"""What is stepped: parameters by size, dtype and layout, from a name, a list of sizes or a user's model."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from descend.bench.settings import DEFAULT_SHAPES, Settings
from descend.bench.shapes import SHAPES, Shape, Size
from descend.bench.user_model import build_model, trained
from descend.reporting.errors import UsageError

_SIZE = re.compile(r"(?:(?P<count>[1-9]\d*)\*)?(?P<size>[1-9]\d*(?:x[1-9]\d*)*)")
_MOST = 2**40
_MOST_TENSORS = 10**6


@dataclass(frozen=True)
class Workload:
    """Parameters that an optimizer steps.

    Args:
        name: of the shapes, or what the user wrote.
        dtype: name of the parameters' dtype, or of all of them.
        templates: tensors without memory that have the size, dtype and layout of each parameter.
        shape: their sizes, and how long a turn is.
    """

    name: str
    dtype: str
    templates: tuple[Tensor, ...]
    shape: Shape

    @property
    def param_bytes(self) -> int:
        """Size of all parameters."""
        return sum(template.nbytes for template in self.templates)

    def state_bytes(self, tensors: int, is_ours: bool) -> int:
        """Return the size of a state of so many tensors for each parameter.

        Ours is float32 for float16, where squares of gradients underflow; torch's has the parameter's dtype.
        """
        factors = [2 if is_ours and template.dtype is torch.float16 else 1 for template in self.templates]
        return tensors * sum(factor * template.nbytes for factor, template in zip(factors, self.templates, strict=True))

    def values(self, device: str) -> list[Tensor]:
        """Return normal numbers, the same in each run: start of the parameters, and value of the gradients."""
        generator = torch.Generator(device).manual_seed(0)
        return [torch.empty_like(template, device=device).normal_(generator=generator) for template in self.templates]


def workloads(settings: Settings) -> Iterator[Workload]:
    """Yield what ``settings`` ask for.

    Raises:
        UsageError: the sizes or the model are not valid.
    """
    dtypes = settings.dtypes or ("float32",)
    named = {name: SHAPES[name] for name in settings.shapes}
    if settings.sizes:
        named[settings.sizes] = Shape.of(parse_sizes(settings.sizes))
    if not named and not settings.model:
        named = {name: SHAPES[name] for name in DEFAULT_SHAPES}
    for name, shape in named.items():
        for dtype in dict.fromkeys(dtypes):
            sizes = [torch.empty(size, dtype=getattr(torch, dtype), device="meta") for size in shape.sizes]
            yield Workload(name, dtype, tuple(sizes), shape)
    if settings.model:
        params = [param.detach().to("meta") for param in trained(build_model(settings.model), settings.model)]
        shape = Shape.of([tuple(param.shape) for param in params])
        for dtype in dict.fromkeys(settings.dtypes or ("",)):
            chosen = [param.to(getattr(torch, dtype)) if dtype else param for param in params]
            names = dict.fromkeys(str(param.dtype).removeprefix("torch.") for param in chosen)
            yield Workload(settings.model, " and ".join(names), tuple(chosen), shape)


def parse_sizes(text: str) -> Sequence[Size]:
    """Return the sizes written as ``text``.

    Example:
        >>> parse_sizes("3x4,2*5")
        [(3, 4), (5,), (5,)]
    """
    sizes: list[Size] = []
    for part in text.replace(" ", "").split(","):
        match = _SIZE.fullmatch(part)
        if not match:
            raise UsageError(
                f"--sizes must be sizes of tensors, as in 768x768,768 or 1000*64x64 for a thousand, got {part!r}."
            )
        size = tuple(map(int, match["size"].split("x")))
        count = int(match["count"] or 1)
        if count * math.prod(size) > _MOST or len(sizes) + count > _MOST_TENSORS:
            raise UsageError(f"--sizes: {part} is more than a trillion numbers or a million tensors.")
        sizes += count * [size]
    return sizes
