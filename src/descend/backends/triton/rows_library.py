"""Kernels of ``rows_kernel``, made once for each rule, dtypes and length of a row."""

from __future__ import annotations

from functools import cache
from types import FunctionType
from typing import Any, NamedTuple

import torch
import triton

from descend.backends.triton import formats_library, library, rows_kernel, tuning
from descend.backends.triton.library import Kernel, Signature, inlined, made, pointer_to, triton_type
from descend.core.codecs import Formats, compute_dtype, is_plain

_FOUND = ("which", "found", "seen", "places", "scalars")  # allocations of ``StaleRows``
_KEYS = {torch.int32: "*i32", torch.int64: "*i64"}


class Blocks(NamedTuple):
    """How programs share rows of ``length`` numbers: tiles of ``tile`` rows, ``across`` blocks of columns."""

    length: int
    tile: int
    columns: int

    @classmethod
    @cache
    def of(cls, length: int, compute: torch.dtype, most: int | None = None) -> Blocks:
        """How to share rows of ``length`` numbers that are summed in ``compute``.

        Args:
            length: of a row.
            compute: dtype of the sums.
            most: columns that a program takes. Default: ``tuning.COLUMNS``.
        """
        columns = min(triton.next_power_of_2(max(length, 1)), most or tuning.COLUMNS)
        shortest, longest = tuning.TILE
        return cls(length, min(max(tuning.SUMMED // (columns * compute.itemsize), shortest), longest), columns)

    @property
    def across(self) -> int:
        """Blocks of columns."""
        return -(-self.length // self.columns)

    def programs(self, rows: int) -> int:
        """How many programs take so many rows."""
        return -(-rows // self.tile) * self.across

    def numbers(self, rows: int) -> int:
        """At least as many as the tiles of so many rows have columns."""
        return self.programs(rows) * self.columns

    def constants(self) -> dict[str, Any]:
        """What kernels need to know of it."""
        return {"LENGTH": self.length, "BLOCKS": self.across, "TILE": self.tile, "COLUMNS": self.columns}


class Gradient(NamedTuple):
    """What decides how the entries of a gradient are read.

    Attributes:
        keys: dtype of the sorted keys.
        values: dtype of the values.
        compute: dtype of their sums.
        is_aligned: whether the values begin at a multiple of sixteen bytes.
        blocks: see ``Blocks``.
    """

    keys: torch.dtype
    values: torch.dtype
    compute: torch.dtype
    is_aligned: bool
    blocks: Blocks

    def arguments(self) -> dict[str, str]:
        """What kernels take last."""
        return {
            "keys": _KEYS[self.keys],
            "order": "*i64",
            "values": pointer_to(self.values),
            "carries": pointer_to(self.compute),
            "count": "i64",
        }

    def aligned(self) -> tuple[str, ...]:
        """Which of the pointers begin at multiples of sixteen bytes."""
        return ("keys", "order", "carries", "values") if self.is_aligned else ("keys", "order", "carries")


@cache
def keys(dimensions: int, dtype: torch.dtype, interpreted: bool) -> Kernel:
    """The kernel that makes keys, see ``rows_kernel.keys``."""
    pointers: Signature = {
        "indices": "*i64",
        "keys": _KEYS[dtype],
        "in_range": "*i8",
        "sizes": ("i64",) * dimensions,
        "count": "i64",
    }
    constants = {"DIMENSIONS": dimensions, "BLOCK": tuning.ENTRIES}
    return Kernel(made(rows_kernel.keys, interpreted), pointers, constants, aligned=("keys",))


@cache
def carry(gradient: Gradient, interpreted: bool) -> Kernel:
    """The kernel that sums what runs have in later tiles, see ``rows_kernel.carry``."""
    arguments, constants = gradient.arguments(), gradient.blocks.constants()
    return Kernel(made(rows_kernel.carry, interpreted), arguments, constants, gradient.aligned())


@cache
def sums(gradient: Gradient, by_key: bool, interpreted: bool) -> Kernel:
    """The kernel that stores summed gradients, see ``rows_kernel.sums``."""
    pointers = {"sums": pointer_to(gradient.values), **gradient.arguments()}
    constants = {**gradient.blocks.constants(), "GROUP": tuning.CARRIES, "BY_KEY": by_key}
    return Kernel(made(rows_kernel.sums, interpreted), pointers, constants, (*gradient.aligned(), "sums"))


@cache
def squares(gradient: Gradient, interpreted: bool) -> Kernel:
    """The kernel that sums squares of summed gradients, see ``rows_kernel.squares``."""
    pointers = {"squares": "*fp64", **gradient.arguments()}
    constants = {**gradient.blocks.constants(), "GROUP": tuning.CARRIES}
    return Kernel(made(rows_kernel.squares, interpreted), pointers, constants, gradient.aligned())


def update(rule: FunctionType, scalars: int, formats: Formats, gradient: Gradient, are_aligned: bool) -> Kernel:
    """The kernel that applies a rule to rows, see ``rows_kernel.update`` and ``rows_kernel.update_in_formats``.

    Args:
        rule: the function to apply.
        scalars: how many scalars it takes.
        formats: of the parameter, the gradient and the state.
        gradient: how it is read.
        are_aligned: whether parameter and state begin at multiples of sixteen bytes.
    Raises:
        Declined: if the rule cannot be made a kernel.
    """
    return library.declining(_update, rule, scalars, formats, gradient, are_aligned)


@cache
def _update(
    rule: FunctionType, scalars: int, formats: Formats, gradient: Gradient, are_aligned: bool, interpreted: bool
) -> Kernel:
    stored = formats_library.Stored.of(formats).without_gradient()
    pointers: Signature = {
        "tensors": tuple(map(pointer_to, stored.dtypes)),
        "scalars": pointer_to(gradient.compute),
        "decision": "*fp64",
        "mark": "*i32",
        "step": "i32",
    }
    constants = {
        "RULE": inlined(rule, gradient.compute),
        "SCALARS": scalars,
        **gradient.blocks.constants(),
        "GROUP": tuning.CARRIES,
    }
    aligned = (*gradient.aligned(), "tensors") if are_aligned else gradient.aligned()
    if is_plain(formats):
        return Kernel(made(rows_kernel.update, interpreted), {**pointers, **gradient.arguments()}, constants, aligned)
    noise = dict.fromkeys(("place", "first_word", "second_word"), "i64")
    constants = {"RULE": constants.pop("RULE"), "HOWS": stored.hows, "BESIDE": stored.beside, **constants}
    kernel = made(rows_kernel.update_in_formats, interpreted)
    return Kernel(kernel, {**pointers, **noise, **gradient.arguments()}, constants, aligned)


@cache
def find(named: bool, interpreted: bool) -> Kernel:
    """The kernel that finds stale rows, see ``rows_kernel.find``."""
    pointers = {"which": "*i64", "steps": "*i32", "found": "*i32", "seen": "*i8"}
    numbers = {"count": "i64", "first": "i64", "total": "i64", "now": "i32", "start": "i32"}
    constants = {"NAMED": named, "BLOCK": tuning.ENTRIES}
    return Kernel(made(rows_kernel.find, interpreted), {**pointers, **numbers}, constants, _FOUND)


@cache
def mark(named: bool, interpreted: bool) -> Kernel:
    """The kernel that marks rows as current, see ``rows_kernel.mark``."""
    pointers = {"which": "*i64", "found": "*i32", "steps": "*i32", "count": "i64", "first": "i64", "now": "i32"}
    constants = {"NAMED": named, "BLOCK": tuning.ENTRIES}
    return Kernel(made(rows_kernel.mark, interpreted), pointers, constants, _FOUND)


def catch_up(
    rule: FunctionType,
    scalars: int,
    dtypes: tuple[torch.dtype, ...],
    blocks: Blocks,
    are_aligned: bool,
    named: bool,
    have_state: bool,
    rounds: int,
) -> Kernel:
    """The kernel that brings rows up to date, see ``rows_kernel.catch_up``.

    Raises:
        Declined: if the rule cannot be made a kernel.
    """
    return library.declining(_catch_up, rule, scalars, dtypes, blocks, are_aligned, named, have_state, rounds)


@cache
def _catch_up(
    rule: FunctionType,
    scalars: int,
    dtypes: tuple[torch.dtype, ...],
    blocks: Blocks,
    are_aligned: bool,
    named: bool,
    have_state: bool,
    rounds: int,
    interpreted: bool,
) -> Kernel:
    compute = compute_dtype(dtypes)
    pointers: Signature = {
        "which": "*i64",
        "found": "*i32",
        "places": "*i64",
        "tensors": tuple(map(pointer_to, dtypes if have_state else dtypes[:1])),
        "scalars": pointer_to(compute),
        "count": "i64",
        "first": "i64",
        "steps": "i64",
    }
    constants = {
        "RULE": inlined(rule, compute),
        "SCALARS": scalars,
        "ROUNDS": rounds,
        "COMPUTE": triton_type(compute),
        "NAMED": named,
        "HAVE_STATE": have_state,
        **blocks.constants(),
    }
    return Kernel(
        made(rows_kernel.catch_up, interpreted), pointers, constants, ("tensors", *_FOUND) if are_aligned else _FOUND
    )


def check(rule: FunctionType, kernel: Kernel, scalars: int, formats: Formats, device: torch.device) -> None:
    """Compile the kernel of a rule. Raise ``Declined`` if it cannot be compiled for the device.

    Args:
        rule: the rule.
        kernel: its kernel.
        scalars: how many scalars it takes.
        formats: of a parameter, its gradient and state.
        device: the device.
    """
    dtypes = formats_library.as_dtypes(formats)
    library.check(rule, library.update(rule, scalars, dtypes), device)  # what a rule computes is checked there
    if device.type != "cpu":  # the interpreter compiles nothing
        library.check(rule, kernel, device)
