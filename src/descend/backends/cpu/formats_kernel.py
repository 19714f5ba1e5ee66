"""Compiles a rule for tensors in any format: codes are decoded, and results are encoded, block by block."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from descend.backends.cpu import stored
from descend.backends.cpu.columns import Columns, columns_of
from descend.backends.cpu.intrinsics import fetch_add, load_int, scalars_loader
from descend.backends.cpu.kernels import AHEAD, OPTIONS, PREFETCHED, ROW, assembly, compiler_of, njit, operations
from descend.backends.retarget import retarget
from descend.core.codecs import BLOCK, Formats

compiled_plainly: Any = njit(error_model="numpy")


def first_block(columns: Columns) -> Any:
    """Where a chunk begins: the number of its first block, its place in the row, and the row's width.

    Without codes there are no blocks, and a chunk is a row of its own.
    """
    is_coded, width_at = bool(columns.coded), columns.width

    @compiled_plainly
    def find(tensor: int, offset: int, length: int) -> tuple[int, int, int]:
        if not is_coded:
            return 0, 0, length
        width = load_int(tensor, width_at)
        row = offset // width
        place = offset - row * width
        return row * ((width + BLOCK - 1) // BLOCK) + place // BLOCK, place, width

    return find


def block_length(columns: Columns) -> Any:
    """How many elements are in the block at ``place`` in a row: all that are left, if there are no blocks."""
    is_coded = bool(columns.coded)

    @compiled_plainly
    def find(place: int, width: int) -> int:
        return min(BLOCK, width - place) if is_coded else width - place

    return find


def update_kernel(rule: Any, scalars: int, formats: Formats, compute: torch.dtype) -> str:
    """LLVM assembly of the loop that applies ``rule`` to every element of every chunk.

    Its arguments are those of ``kernels.update_kernel``, then: 13 the key of each row of scalars. A chunk begins and
    ends where blocks do, and the rule is applied once.

    The scale of a block is known when the rule has been applied to all of it. Until then results that will be encoded
    lie in a buffer: two passes over one block are in the first-level cache, and each is vectorised.

    Args:
        rule: the function to compile.
        scalars: how many scalars the rule takes.
        formats: of the parameter, the gradient and the state tensors.
        compute: float32 or float64, the dtype of the arithmetic.
    """
    compiled, columns = compiler_of(compute), columns_of(formats)
    apply = retarget(rule, operations(compiled), compiled)
    addresses_of, load, store, encode = (
        stored.elements_at(columns), stored.loader(columns, compute), stored.storer(columns, compute),
        stored.encoder(columns),
    )  # fmt: skip
    load_scales, store_scales, buffer_of = (
        stored.scales_loader(columns), stored.scales_storer(columns), stored.buffer_of(columns),
    )  # fmt: skip
    words_of, place_of, load_scalars = (
        stored.words_loader(columns), stored.place_loader(columns), scalars_loader(1 + scalars, compute),
    )  # fmt: skip
    prefetch, prefetch_scales = stored.prefetcher(columns), stored.scales_prefetcher(columns)
    begin_at, length_of, size = first_block(columns), block_length(columns), 8 * columns.size
    line, zeros = 64 // max(dtype.itemsize for dtype in columns.elements), (np.int32(0),) * len(columns.coded)

    def kernel(call: int) -> None:
        chunks, count = load_int(call, 0), load_int(call, 1)
        addresses, scalars_table, claimed = load_int(call, 2), load_int(call, 3), load_int(call, 4)
        buffer = buffer_of()
        while True:
            first = fetch_add(call + 40, claimed)
            if first >= count:
                break
            for chunk in range(first, min(first + claimed, count)):
                if chunk + AHEAD < count:  # else scattered rows of a large table would wait for memory one by one
                    row = chunks + ROW * (chunk + AHEAD)
                    tensor, offset, length = addresses + size * load_int(row, 0), load_int(row, 1), load_int(row, 3)
                    pointers = addresses_of(tensor, offset, load_int(row, 2))
                    for i in range(0, min(length, PREFETCHED), line):
                        prefetch(pointers, i)
                    prefetch_scales(tensor, begin_at(tensor, offset, length)[0])
                row = chunks + ROW * chunk
                tensor, offset, length = addresses + size * load_int(row, 0), load_int(row, 1), load_int(row, 3)
                pointers = addresses_of(tensor, offset, load_int(row, 2))
                scale_and_scalars = load_scalars(scalars_table, load_int(row, 4))
                scale, rule_scalars = scale_and_scalars[0], scale_and_scalars[1:]
                words, place = words_of(tensor, load_int(call, 13), load_int(row, 4)), place_of(tensor, offset)
                block, in_row, width = begin_at(tensor, offset, length)
                begin = 0
                while begin < length:
                    some = length_of(in_row, width)
                    scales, largest = load_scales(tensor, block), zeros
                    for i in range(some):
                        values = load(pointers, begin + i, scales)
                        arguments = (values[0], scale * values[1]) + values[2:] + rule_scalars
                        largest = store(pointers, begin + i, apply(*arguments), buffer, i, largest, words, place)
                    factors = store_scales(tensor, block, largest)
                    for i in range(some):
                        encode(pointers, begin + i, buffer, i, factors, words, place)
                    begin, block, in_row = begin + some, block + 1, in_row + some
                    if in_row == width:
                        in_row = 0

    return assembly(kernel, OPTIONS)
