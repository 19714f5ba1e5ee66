"""The loop that sums what the part of a rule returns, see ``ops.summing``."""

from __future__ import annotations

from typing import Any

import torch

from descend.backends.cpu import stored
from descend.backends.cpu.columns import columns_of
from descend.backends.cpu.formats_kernel import block_length, first_block
from descend.backends.cpu.intrinsics import adder, fetch_add, load_int, scalars_loader, store_doubles
from descend.backends.cpu.kernels import AHEAD, OPTIONS, PREFETCHED, ROW, assembly, compiler_of, operations
from descend.backends.retarget import retarget
from descend.core.codecs import Formats


def sums_kernel(part: Any, given: int, scalars: int, sums: int, formats: Formats, compute: torch.dtype) -> str:
    """LLVM assembly of the loop. Its arguments are those of ``kernels.update_kernel``; 6 is a row of sums per chunk.

    The part computes in the compute dtype; its results are added in float64, many at a time, in an order that depends
    on the machine and the chunk's length alone.

    Args:
        part: the function to compile.
        given: how many scalars the part takes.
        scalars: how many the rule takes: a row of the scalars table has one more.
        sums: how many numbers the part returns.
        formats: of the parameter, the gradient and the state tensors.
        compute: float32 or float64, the dtype of the arithmetic.
    """
    compiled = compiler_of(compute)
    apply = retarget(part, operations(compiled), compiled)
    columns, load_scalars = columns_of(formats), scalars_loader(1 + scalars, compute)
    addresses_of, load, load_scales = (
        stored.elements_at(columns), stored.loader(columns, compute), stored.scales_loader(columns),
    )  # fmt: skip
    prefetch, line = stored.prefetcher(columns), 64 // max(dtype.itemsize for dtype in columns.elements)
    begin_at, length_of, size = first_block(columns), block_length(columns), 8 * columns.size
    add, end, zeros = adder(sums), 1 + given, (0.0,) * sums

    def kernel(call: int) -> None:
        chunks, count = load_int(call, 0), load_int(call, 1)
        addresses, scalars_table, claimed = load_int(call, 2), load_int(call, 3), load_int(call, 4)
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
                scale, part_scalars = scale_and_scalars[0], scale_and_scalars[1:end]
                block, in_row, width = begin_at(tensor, offset, length)
                begin, totals = 0, zeros
                while begin < length:
                    some, scales = length_of(in_row, width), load_scales(tensor, block)
                    for i in range(begin, begin + some):
                        values = load(pointers, i, scales)
                        arguments = (values[0], scale * values[1]) + values[2:] + part_scalars
                        totals = add(totals, apply(*arguments))
                    begin, block, in_row = begin + some, block + 1, in_row + some
                    if in_row == width:
                        in_row = 0
                store_doubles(load_int(call, 6), sums * chunk, totals)

    return assembly(kernel, OPTIONS)
