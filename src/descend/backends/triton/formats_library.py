"""Kernels of ``formats_kernel``, made once for each rule and formats."""

from __future__ import annotations

from functools import cache
from types import FunctionType
from typing import Any, NamedTuple

import torch

from descend.backends.triton import formats_kernel, library, tuning
from descend.backends.triton.formats import CODES, HALF, KEPT, PLAIN, RANDOM, SIGNED
from descend.backends.triton.library import Kernel, inlined, made, triton_type
from descend.core.codecs import Codec, Format, Formats, Rounded, compute_dtype, is_plain, stored_dtypes
from descend.core.signature import signature


class Stored(NamedTuple):
    """Formats, as kernels are told of them.

    Attributes:
        hows: of the parameter, the gradient and the state of the rule, see ``formats``.
        beside: for each of these, the place of its scales or its compensation among ``dtypes``; its own if it has none.
        dtypes: of the parameter, the gradient, and all tensors of the state; halves of float32 are int16.
    """

    hows: tuple[int, ...]
    beside: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]

    @classmethod
    @cache
    def of(cls, formats: Formats) -> Stored:
        """What kernels need to know of formats."""
        hows = tuple(map(_how, formats))
        beside, dtypes = list(range(len(hows))), list(stored_dtypes(formats))
        added = [i for i, how in enumerate(hows) if how & (KEPT | CODES)]
        for place, i in enumerate(added, len(hows)):
            beside[i] = place
        for i, how in enumerate(hows):
            if how & HALF:
                dtypes[i] = torch.int16
        return cls(hows, tuple(beside), tuple(dtypes))

    def without_gradient(self) -> Stored:
        """The same of the parameter and its state alone."""
        beside = tuple(place - (place > 0) for place in self._but_one(self.beside))
        return Stored(self._but_one(self.hows), beside, self._but_one(self.dtypes))

    @staticmethod
    def _but_one(of_each: tuple[Any, ...]) -> tuple[Any, ...]:
        return of_each[:1] + of_each[2:]


def _how(format: Format) -> int:
    if isinstance(format, Codec):
        return CODES + SIGNED * format.signed + RANDOM * format.stochastic
    if isinstance(format, Rounded):
        return HALF + (KEPT if format.how == "compensated" else RANDOM)
    return PLAIN


def update(rule: Any, scalars: int, formats: Formats) -> Kernel:
    """The kernel that applies a rule to chunks of blocks, see ``formats_kernel.update``.

    Raises:
        Declined: if the rule cannot be made a kernel.
    """
    return library.declining(_update, rule, scalars, formats)


@cache
def _update(rule: FunctionType, scalars: int, formats: Formats, interpreted: bool) -> Kernel:
    constants = {
        "RULE": inlined(rule, compute_dtype(formats)),
        **_described(formats),
        "SCALARS": scalars,
        "BLOCKS": tuning.blocks(formats),
    }
    pointers = {**_tables(formats), "decision": "*fp64", "keys": "*i64"}
    return Kernel(made(formats_kernel.update, interpreted), pointers, constants)


def sums(rule: Any, formats: Formats) -> Kernel:
    """The kernel that sums what the part of a rule returns, see ``formats_kernel.sums``.

    Raises:
        Declined: if the part cannot be made a kernel.
    """
    return library.declining(_sums, rule, formats)


@cache
def _sums(rule: FunctionType, formats: Formats, interpreted: bool) -> Kernel:
    takes = signature(rule)
    constants = {
        "PART": inlined(library.part_of(rule), compute_dtype(formats)),
        **_described(formats),
        "SCALARS": len(takes.scalars),
        "GIVEN": len(takes.given),
        "SUMS": takes.sums,
        "BLOCKS": tuning.blocks(formats),
    }
    return Kernel(made(formats_kernel.sums, interpreted), {**_tables(formats), "sums": "*fp64"}, constants)


def _described(formats: Formats) -> dict[str, Any]:
    stored = Stored.of(formats)
    return {
        "HOWS": stored.hows,
        "BESIDE": stored.beside,
        "DTYPES": tuple(map(triton_type, stored.dtypes)),
        "COMPUTE": triton_type(compute_dtype(formats)),
    }


def _tables(formats: Formats) -> dict[str, str]:
    return {"chunks": "*i64", "addresses": "*i64", "scalars": library.pointer_to(compute_dtype(formats))}


def as_dtypes(formats: Formats) -> tuple[torch.dtype, ...]:
    """Dtypes in whose kernels it is checked what a rule computes: the formats, or what the rule sees of them."""
    return stored_dtypes(formats) if is_plain(formats) else (compute_dtype(formats),) * len(formats)
