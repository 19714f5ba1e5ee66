"""The loop that sums what the part of a rule returns, see ``ops.summing``."""

from __future__ import annotations

from typing import Any

import torch

from descend.backends.cpu.intrinsics import (
    adder,
    chunk_addresses,
    fetch_add,
    load_int,
    loader,
    prefetcher,
    scalars_loader,
    store_doubles,
)
from descend.backends.cpu.kernels import AHEAD, OPTIONS, PREFETCHED, ROW, assembly, compiler_of, operations
from descend.backends.retarget import retarget


def sums_kernel(
    part: Any, given: int, scalars: int, sums: int, dtypes: tuple[torch.dtype, ...], compute: torch.dtype
) -> str:
    """LLVM assembly of the loop. Its arguments are those of ``kernels.update_kernel``; 6 is a row of sums per chunk.

    The part computes in the compute dtype; its results are added in float64, many at a time, in an order that depends
    on the machine and the chunk's length alone.

    Args:
        part: the function to compile.
        given: how many scalars the part takes.
        scalars: how many the rule takes: a row of the scalars table has one more.
        sums: how many numbers the part returns.
        dtypes: of the parameter, the gradient and the state tensors.
        compute: float32 or float64, the dtype of the arithmetic.
    """
    compiled = compiler_of(compute)
    apply = retarget(part, operations(compiled), compiled)
    addresses_of, load = chunk_addresses(dtypes), loader(dtypes, compute)
    load_scalars = scalars_loader(1 + scalars, compute)
    prefetch, line = prefetcher(dtypes), 64 // max(dtype.itemsize for dtype in dtypes)
    add, tensors, end, zeros = adder(sums), len(dtypes), 1 + given, (0.0,) * sums

    def kernel(call: int) -> None:
        chunks, count = load_int(call, 0), load_int(call, 1)
        addresses, scalars_table, block = load_int(call, 2), load_int(call, 3), load_int(call, 4)
        while True:
            first = fetch_add(call + 40, block)
            if first >= count:
                break
            for chunk in range(first, min(first + block, count)):
                if chunk + AHEAD < count:
                    row = chunks + ROW * (chunk + AHEAD)
                    pointers = addresses_of(
                        addresses + 8 * tensors * load_int(row, 0), load_int(row, 1), load_int(row, 2)
                    )
                    for i in range(0, min(load_int(row, 3), PREFETCHED), line):
                        prefetch(pointers, i)
                row = chunks + ROW * chunk
                pointers = addresses_of(addresses + 8 * tensors * load_int(row, 0), load_int(row, 1), load_int(row, 2))
                scale_and_scalars = load_scalars(scalars_table, load_int(row, 4))
                scale, part_scalars = scale_and_scalars[0], scale_and_scalars[1:end]
                totals = zeros
                for i in range(load_int(row, 3)):
                    values = load(pointers, i)
                    arguments = (values[0], scale * values[1]) + values[2:] + part_scalars
                    totals = add(totals, apply(*arguments))
                store_doubles(load_int(call, 6), sums * chunk, totals)

    return assembly(kernel, OPTIONS)
