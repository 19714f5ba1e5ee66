"""The loop that runs another one chunk by chunk, and sums up what ``core.measures.COLUMNS`` lists.

The rule runs in the very loop that steps without a sample run, so a sampled step changes no bit. What is read before
and after it is in the caches then: a chunk is read from memory once.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from descend.backends.cpu.intrinsics import (
    call_address,
    chunk_addresses,
    fetch_add,
    load_int,
    loader,
    prefetcher,
    store_double,
    store_int,
    storer,
)
from descend.backends.cpu.kernels import AHEAD, PREFETCHED, ROW, assembly
from descend.core.measures import COLUMNS

# The order of these sums is free, so that they are vectorised; NaN and Inf stay exact.
_OPTIONS: dict[str, Any] = {"error_model": "numpy", "fastmath": {"contract", "nsz", "reassoc"}}

_NUMBER: dict[torch.dtype, Any] = {torch.float32: np.float32, torch.float64: np.float64}

CALL = 128  # as in ``launch``: bytes in front of a thread's scratch memory, for the arguments of the other loop


def measures_kernel(dtypes: tuple[torch.dtype, ...], compute: torch.dtype, moments: tuple[int, int] | None) -> str:
    """LLVM assembly of the loop.

    Its arguments are those of ``kernels.update_kernel``, then: 7 a row of sums per chunk, float64; 8 the address of
    the update's loop; 9 scratch memory; 10 bytes of it for a thread; 11 for how many threads; 12 how many have come.

    Args:
        dtypes: of the parameter, the gradient and the state tensors.
        compute: float32 or float64, the dtype of the rule's arithmetic.
        moments: positions of Adam's two averages among the state tensors, if the rule has both.
    """
    # State of rows is not read: it has no element for each of the parameter's.
    addresses_of, load = chunk_addresses(dtypes), loader(dtypes if moments else dtypes[:2], compute)
    prefetch, line = prefetcher(dtypes), 64 // max(dtype.itemsize for dtype in dtypes)
    keep, kept = storer((compute, compute), compute), loader((compute,), compute)
    tensors, columns, has_moments = len(dtypes), len(COLUMNS), moments is not None
    first, second = (2 + position for position in moments or (-2, -2))
    number = _NUMBER[compute]
    # Counts are exact in float32, too: a chunk has fewer than 2**24 elements. Ratios are summed in it, all positive and
    # of one magnitude; squares are not, they would overflow.
    zero, one, infinity = number(0), number(1), number(math.inf)

    def kernel(call: int) -> None:
        chunks, count = load_int(call, 0), load_int(call, 1)
        addresses, block, sums = load_int(call, 2), load_int(call, 4), load_int(call, 7)
        thread = fetch_add(call + 96, 1)
        if thread >= load_int(call, 11):
            return
        update = load_int(call, 9) + thread * load_int(call, 10)
        scratch = update + CALL
        store_int(update, 1, 1)
        store_int(update, 2, addresses)
        store_int(update, 3, load_int(call, 3))
        store_int(update, 4, 1)
        while True:
            begin = fetch_add(call + 40, block)
            if begin >= count:
                break
            for chunk in range(begin, min(begin + block, count)):
                if chunk + AHEAD < count:  # the other loop sees one chunk at a time, and asks for nothing ahead
                    row = chunks + ROW * (chunk + AHEAD)
                    pointers = addresses_of(
                        addresses + 8 * tensors * load_int(row, 0), load_int(row, 1), load_int(row, 2)
                    )
                    for i in range(0, min(load_int(row, 3), PREFETCHED), line):
                        prefetch(pointers, i)
                row = chunks + ROW * chunk
                length = load_int(row, 3)
                pointers = addresses_of(addresses + 8 * tensors * load_int(row, 0), load_int(row, 1), load_int(row, 2))
                for i in range(length):
                    keep((scratch, scratch), i, load(pointers, i)[0])
                store_int(update, 0, row)
                store_int(update, 5, 0)
                call_address(load_int(call, 8), update, 0)
                grad_sq, update_sq, weight_sq = 0.0, 0.0, 0.0
                ratio, ratios, moving, lost, bad_grads, bad_weights = zero, zero, zero, zero, zero, zero
                for i in range(length):
                    values, before = load(pointers, i), kept((scratch,), i)[0]
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
                if not grad_sq + update_sq + weight_sq < math.inf:  # else there is none
                    for i in range(length):
                        values = load(pointers, i)
                        bad_grads += zero if math.fabs(values[1]) < infinity else one
                        bad_weights += zero if math.fabs(values[0]) < infinity else one
                place = columns * chunk
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
