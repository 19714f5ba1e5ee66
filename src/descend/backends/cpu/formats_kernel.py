"""Compiles a rule for tensors in any format: codes are decoded, and what the rule returns is encoded, block by block."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from descend.backends.cpu import stored
from descend.backends.cpu.columns import columns_of
from descend.backends.cpu.intrinsics import fetch_add, load_int, scalars_loader
from descend.backends.cpu.kernels import AHEAD, OPTIONS, PREFETCHED, ROW, assembly, compiler_of, operations
from descend.backends.retarget import retarget
from descend.core.codecs import BLOCK, Formats


def update_kernel(rule: Any, scalars: int, formats: Formats, compute: torch.dtype) -> str:
    """LLVM assembly of the loop that applies ``rule`` to every element of every chunk.

    Its arguments are those of ``kernels.update_kernel``, then: 13 the key of each row of scalars.

    Args:
        rule: the function to compile.
        scalars: how many scalars the rule takes.
        formats: of the parameter, the gradient and the state tensors.
        compute: float32 or float64, the dtype of the arithmetic.
    """
    compiled, columns = compiler_of(compute), columns_of(formats)
    apply = retarget(rule, operations(compiled), compiled)
    addresses_of, load, store = stored.elements_at(columns), stored.loader(columns, compute), stored.storer(columns, compute)
    load_scalars, size = scalars_loader(1 + scalars, compute), 8 * columns.count
    words_of, place_of = stored.words_loader(columns), stored.place_loader(columns)
    load_scales, store_scales, encode = stored.scales_loader(columns), stored.scales_storer(columns), stored.encoder(columns)
    buffer_of, width_at = stored.buffer_of(columns), columns.width
    prefetch, line = stored.prefetcher(columns), 64 // max(dtype.itemsize for dtype in columns.elements)
    zeros = (np.int32(0),) * len(columns.coded)

    def kernel(call: int) -> None:
        chunks, count = load_int(call, 0), load_int(call, 1)
        addresses, scalars_table, claimed = load_int(call, 2), load_int(call, 3), load_int(call, 4)
        buffer = buffer_of()
        while True:
            first = fetch_add(call + 40, claimed)
            if first >= count:
                break
            for chunk in range(first, min(first + claimed, count)):
                if chunk + AHEAD < count:
                    row = chunks + ROW * (chunk + AHEAD)
                    pointers = addresses_of(addresses + size * load_int(row, 0), load_int(row, 1), load_int(row, 2))
                    for i in range(0, min(load_int(row, 3), PREFETCHED), line):
                        prefetch(pointers, i)
                row = chunks + ROW * chunk
                tensor, offset, length = addresses + size * load_int(row, 0), load_int(row, 1), load_int(row, 3)
                pointers = addresses_of(tensor, offset, load_int(row, 2))
                scale_and_scalars = load_scalars(scalars_table, load_int(row, 4))
                scale, rule_scalars = scale_and_scalars[0], scale_and_scalars[1:]
                words, place = words_of(tensor, load_int(call, 13), load_int(row, 4)), place_of(tensor, offset)
                width = load_int(tensor, width_at)
                column = offset % width
                block = (offset // width) * ((width + BLOCK - 1) // BLOCK) + column // BLOCK
                begin = 0
                while begin < length:
                    some = min(BLOCK, width - column)
                    scales, largest = load_scales(tensor, block), zeros
                    for i in range(some):
                        values = load(pointers, begin + i, scales)
                        arguments = (values[0], scale * values[1]) + values[2:] + rule_scalars
                        largest = store(pointers, begin + i, apply(*arguments), buffer, i, largest, words, place)
                    factors = store_scales(tensor, block, largest)
                    for i in range(some):
                        encode(pointers, begin + i, buffer, i, factors, words, place)
                    begin, block, column = begin + some, block + 1, column + some
                    if column == width:
                        column = 0

    return assembly(kernel, OPTIONS)
