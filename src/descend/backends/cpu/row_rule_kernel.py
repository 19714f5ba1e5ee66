"""Compiles a rule of rows, see ``core.signature.of_rows``: each row is read for its mean, and again from the caches."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from descend.backends.cpu.intrinsics import (
    chunk_addresses,
    fetch_add,
    load_int,
    loader,
    prefetcher,
    scalars_loader,
    storer,
)
from descend.backends.cpu.kernels import AHEAD, OPTIONS, PREFETCHED, ROW, assembly, compiler_of, njit, operations
from descend.backends.retarget import retarget

# The numbers of a row are added many at a time, in an order that depends on the machine and the row's length alone.
_OPTIONS: dict[str, Any] = {**OPTIONS, "fastmath": {*OPTIONS["fastmath"], "reassoc"}}

_NUMBER: dict[torch.dtype, Any] = {torch.float32: np.float32, torch.float64: np.float64}


def _exact_quotient(whole: int, part: int) -> int:
    """``whole / part``, which is an integer; exact below 2**53, and faster than a division of integers."""
    return int(np.float64(whole) / np.float64(part))


quotient: Any = njit(_exact_quotient, error_model="numpy")  # no fastmath: a product with 1 / part would not be exact


def row_update_kernel(rule: Any, part: Any, scalars: int, dtypes: tuple[torch.dtype, ...], compute: torch.dtype) -> str:
    """LLVM assembly of the loop that applies ``rule`` to every row of every chunk.

    Its arguments are those of ``kernels.update_kernel``. A chunk holds whole rows, and has their number in place of
    ``times``.

    Args:
        rule: the function to compile.
        part: what is averaged over each row: in the compute dtype, added in float64.
        scalars: how many scalars the part takes; the rule takes one more.
        dtypes: of the parameter, the gradient and the state tensors.
        compute: float32 or float64, the dtype of the arithmetic.
    """
    compiled = compiler_of(compute)
    apply, share = (retarget(function, operations(compiled), compiled) for function in (rule, part))
    elements, of_rows, number = dtypes[:2], dtypes[2:], _NUMBER[compute]
    elements_at, load, store = chunk_addresses(elements), loader(elements, compute), storer(elements, compute)
    prefetch, line = prefetcher(elements), 64 // max(dtype.itemsize for dtype in elements)
    # A storer passes over the gradient in second place: with the state, the first tensor stands there too.
    state_at, load_state = chunk_addresses(of_rows), loader(of_rows, compute)
    store_state, prefetch_state = storer((of_rows[0], *of_rows), compute), prefetcher(of_rows)
    load_scalars, tensors = scalars_loader(1 + scalars, compute), len(dtypes)

    def kernel(call: int) -> None:
        chunks, count = load_int(call, 0), load_int(call, 1)
        addresses, scalars_table, block = load_int(call, 2), load_int(call, 3), load_int(call, 4)
        while True:
            first = fetch_add(call + 40, block)
            if first >= count:
                break
            for chunk in range(first, min(first + block, count)):
                if chunk + AHEAD < count:  # else scattered rows of a large table would wait for memory one by one
                    row = chunks + ROW * (chunk + AHEAD)
                    table, start, length = (
                        addresses + 8 * tensors * load_int(row, 0),
                        load_int(row, 1),
                        load_int(row, 3),
                    )
                    pointers = elements_at(table, start, load_int(row, 2))
                    for i in range(0, min(length, PREFETCHED), line):
                        prefetch(pointers, i)
                    rows = load_int(row, 5)
                    first_row = quotient(start, length if rows == 1 else quotient(length, rows))
                    prefetch_state(state_at(table + 16, first_row, first_row), 0)
                row = chunks + ROW * chunk
                table, start, rows = addresses + 8 * tensors * load_int(row, 0), load_int(row, 1), load_int(row, 5)
                width = load_int(row, 3) if rows == 1 else quotient(load_int(row, 3), rows)
                pointers, first_row = elements_at(table, start, load_int(row, 2)), quotient(start, width)
                state = state_at(table + 16, first_row, first_row)
                scale_and_scalars = load_scalars(scalars_table, load_int(row, 4))
                scale, rule_scalars = scale_and_scalars[0], scale_and_scalars[1:]
                for place in range(rows):
                    begin, end, before = place * width, (place + 1) * width, load_state(state, place)
                    total = 0.0
                    for i in range(begin, end):
                        values = load(pointers, i)
                        total += np.float64(share(values[0], scale * values[1], *before, *rule_scalars))
                    mean = number(total / width)
                    values = load(pointers, begin)
                    results = apply(values[0], scale * values[1], *before, *rule_scalars, mean)
                    store_state(state[:1] + state, place, results[1:])
                    for i in range(begin, end):
                        values = load(pointers, i)
                        results = apply(values[0], scale * values[1], *before, *rule_scalars, mean)
                        store(pointers, i, results[0])

    return assembly(kernel, _OPTIONS)
