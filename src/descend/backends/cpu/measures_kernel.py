"""The loop that runs another one chunk by chunk, and sums up what ``core.measures.COLUMNS`` lists.

The rule runs in the very loop that steps without a sample run, so a sampled step changes no bit. What is read before
and after it is in the caches then: a chunk is read from memory once.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from descend.backends.cpu import stored
from descend.backends.cpu.columns import columns_of
from descend.backends.cpu.formats_kernel import block_length, first_block
from descend.backends.cpu.intrinsics import call_address, fetch_add, load_int, loader, store_double, store_int, storer
from descend.backends.cpu.kernels import AHEAD, PREFETCHED, ROW, assembly
from descend.core.codecs import Formats
from descend.core.measures import COLUMNS

# The order of these sums is free, so that they are vectorised; NaN and Inf stay exact.
_OPTIONS: dict[str, Any] = {"error_model": "numpy", "fastmath": {"contract", "nsz", "reassoc"}}

_NUMBER: dict[torch.dtype, Any] = {torch.float32: np.float32, torch.float64: np.float64}

CALL = 128  # as in ``launch``: bytes in front of a thread's scratch memory, for the arguments of the other loop


def measures_kernel(formats: Formats, compute: torch.dtype, moments: tuple[int, int] | None) -> str:
    """LLVM assembly of the loop.

    Its arguments are those of ``kernels.update_kernel``, then: 7 a row of sums per chunk, float64; 8 the address of
    the update's loop; 9 scratch memory; 10 bytes of it for a thread; 11 for how many threads; 12 how many have come.

    Args:
        formats: of the parameter, the gradient and the state tensors.
        compute: float32 or float64, the dtype of the rule's arithmetic.
        moments: positions of Adam's two averages among the state tensors, if the rule has both.
    """
    columns = columns_of(formats)
    # State of rows is not read: it has no element for each of the parameter's.
    addresses_of, load = stored.elements_at(columns), stored.loader(columns, compute, None if moments else 2)
    load_param_and_grad, load_scales = stored.loader(columns, compute, 2), stored.scales_loader(columns)
    prefetch, line = stored.prefetcher(columns), 64 // max(dtype.itemsize for dtype in columns.elements)
    begin_at, length_of, size = first_block(columns), block_length(columns), 8 * columns.size
    keep, kept = storer((compute, compute), compute), loader((compute,), compute)
    width_of_sums, has_moments = len(COLUMNS), moments is not None
    first, second = (2 + position for position in moments or (-2, -2))
    number = _NUMBER[compute]
    # Counts are exact in float32, too: a chunk has fewer than 2**24 elements. Ratios are summed in it, all positive and
    # of one magnitude; squares are not, they would overflow.
    zero, one, infinity = number(0), number(1), number(math.inf)

    def kernel(call: int) -> None:
        chunks, count = load_int(call, 0), load_int(call, 1)
        addresses, claimed, sums = load_int(call, 2), load_int(call, 4), load_int(call, 7)
        thread = fetch_add(call + 96, 1)
        if thread >= load_int(call, 11):
            return
        update = load_int(call, 9) + thread * load_int(call, 10)
        scratch = update + CALL
        store_int(update, 1, 1)
        store_int(update, 2, addresses)
        store_int(update, 3, load_int(call, 3))
        store_int(update, 4, 1)
        store_int(update, 13, load_int(call, 13))
        while True:
            begin = fetch_add(call + 40, claimed)
            if begin >= count:
                break
            for chunk in range(begin, min(begin + claimed, count)):
                if chunk + AHEAD < count:  # the other loop sees one chunk at a time, and asks for nothing ahead
                    row = chunks + ROW * (chunk + AHEAD)
                    pointers = addresses_of(addresses + size * load_int(row, 0), load_int(row, 1), load_int(row, 2))
                    for i in range(0, min(load_int(row, 3), PREFETCHED), line):
                        prefetch(pointers, i)
                row = chunks + ROW * chunk
                tensor, offset, length = addresses + size * load_int(row, 0), load_int(row, 1), load_int(row, 3)
                pointers = addresses_of(tensor, offset, load_int(row, 2))
                for i in range(length):
                    keep((scratch, scratch), i, load_param_and_grad(pointers, i, ())[0])
                store_int(update, 0, row)
                store_int(update, 5, 0)
                call_address(load_int(call, 8), update, 0)
                grad_sq, update_sq, weight_sq = 0.0, 0.0, 0.0
                ratio, ratios, moving, lost, bad_grads, bad_weights = zero, zero, zero, zero, zero, zero
                block, in_row, width = begin_at(tensor, offset, length)
                start = 0
                while start < length:
                    some, scales = length_of(in_row, width), load_scales(tensor, block)
                    for i in range(start, start + some):
                        values, before = load(pointers, i, scales), kept((scratch,), i)[0]
                        after, grad = values[0], values[1]
                        change = after - before
                        grad_sq += np.float64(grad) * np.float64(grad)
                        update_sq += np.float64(change) * np.float64(change)
                        weight_sq += np.float64(before) * np.float64(before)
                        if has_moments:
                            is_used = values[second] > zero
                            noise = math.sqrt(values[second] if is_used else one)
                            ratio += math.fabs(values[first]) / noise if is_used else zero
                            ratios += one if is_used else zero
                        moving += one if grad != zero else zero
                        lost += one if grad != zero and after == before else zero
                    start, block, in_row = start + some, block + 1, in_row + some
                    if in_row == width:
                        in_row = 0
                if not grad_sq + update_sq + weight_sq < math.inf:  # else there is none
                    for i in range(length):
                        values = load_param_and_grad(pointers, i, ())
                        bad_grads += zero if math.fabs(values[1]) < infinity else one
                        bad_weights += zero if math.fabs(values[0]) < infinity else one
                place = width_of_sums * chunk
                store_double(sums, place, grad_sq)
                store_double(sums, place + 1, update_sq)
                store_double(sums, place + 2, weight_sq)
                store_double(sums, place + 3, np.float64(ratio))
                store_double(sums, place + 4, np.float64(ratios))
                store_double(sums, place + 5, np.float64(moving))
                store_double(sums, place + 6, np.float64(lost))
                store_double(sums, place + 7, np.float64(bad_grads))
                store_double(sums, place + 8, np.float64(bad_weights))

    return assembly(kernel, _OPTIONS)
