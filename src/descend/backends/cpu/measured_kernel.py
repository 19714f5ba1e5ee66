"""The loop of ``kernels.update_kernel`` once more, which also sums up what ``core.measures.COLUMNS`` lists.

It runs in the few steps that are sampled. What it adds must not change the rule's results by a bit: the rule keeps its
own flags, and nothing that it computes on the way is used a second time, only what it takes and returns.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from descend.backends.cpu.intrinsics import (
    chunk_addresses,
    fetch_add,
    load_int,
    loader,
    rounder,
    scalars_loader,
    store_double,
    storer,
)
from descend.backends.cpu.kernels import OPTIONS, ROW, assembly, compiled_rule, njit
from descend.core.measures import COLUMNS


def _plus(total: Any, value: Any) -> Any:
    return total + value


# The only sums whose order does not matter: vectorised, each has as many partial sums as a register has places.
_add: Any = njit(error_model="numpy", fastmath={"reassoc", "nsz"})(_plus)

_NUMBER: dict[torch.dtype, Any] = {torch.float32: np.float32, torch.float64: np.float64}


def measured_kernel(
    rule: Any,
    scalars: int,
    dtypes: tuple[torch.dtype, ...],
    compute: torch.dtype,
    moments: tuple[int, int] | None,
) -> str:
    """LLVM assembly of the loop. Each chunk's sums go to its row of the table of sums, argument 7.

    Args:
        rule: the function to compile.
        scalars: how many scalars the rule takes.
        dtypes: of the parameter, the gradient and the state tensors.
        compute: float32 or float64, the dtype of the arithmetic.
        moments: positions of the two averages among the state tensors, if the rule has both.
    """
    apply = compiled_rule(rule, compute)
    addresses_of, load, store = chunk_addresses(dtypes), loader(dtypes, compute), storer(dtypes, compute)
    stored: Any = rounder(dtypes, compute)
    load_scalars = scalars_loader(1 + scalars, compute)
    tensors, columns, has_moments = len(dtypes), len(COLUMNS), moments is not None
    first, second = (1 + position for position in moments or (-1, -1))  # the parameter comes first
    number = _NUMBER[compute]
    # Counts are exact in float32, too: a chunk has fewer than 2**24 elements.
    zero, one, infinity = number(0), number(1), number(math.inf)

    def kernel(call: int) -> None:
        chunks, count = load_int(call, 0), load_int(call, 1)
        addresses, scalars_table, block = load_int(call, 2), load_int(call, 3), load_int(call, 4)
        sums = load_int(call, 7)
        while True:
            begin = fetch_add(call + 40, block)
            if begin >= count:
                break
            for chunk in range(begin, min(begin + block, count)):
                row = chunks + ROW * chunk
                tensor, length = load_int(row, 0), load_int(row, 3)
                pointers = addresses_of(addresses + 8 * tensors * tensor, load_int(row, 1), load_int(row, 2))
                scale_and_scalars = load_scalars(scalars_table, load_int(row, 4))
                scale, rule_scalars = scale_and_scalars[0], scale_and_scalars[1:]
                grad_sq, update_sq, weight_sq, ratio = 0.0, 0.0, 0.0, 0.0
                ratios, moved, lost, bad_grads, bad_weights = zero, zero, zero, zero, zero
                for i in range(length):
                    values = load(pointers, i)
                    arguments = (values[0], scale * values[1]) + values[2:] + rule_scalars
                    results = apply(*arguments)
                    store(pointers, i, results)
                    kept = stored(results)
                    before, grad, after = np.float64(values[0]), np.float64(values[1]), np.float64(kept[0][0])
                    grad_sq = _add(grad_sq, grad * grad)
                    update_sq = _add(update_sq, (after - before) * (after - before))
                    weight_sq = _add(weight_sq, before * before)
                    if has_moments:
                        exp_avg, exp_avg_sq = kept[0][first], kept[0][second]
                        is_used = exp_avg_sq > zero
                        ratio = _add(ratio, np.float64(math.fabs(exp_avg) / math.sqrt(exp_avg_sq) if is_used else zero))
                        ratios = _add(ratios, one if is_used else zero)
                    moves = kept[1] != values[0]
                    moved = _add(moved, one if moves else zero)
                    lost = _add(lost, one if moves and kept[0][0] == values[0] else zero)
                    bad_grads = _add(bad_grads, zero if math.fabs(values[1]) < infinity else one)
                    bad_weights = _add(bad_weights, zero if math.fabs(kept[0][0]) < infinity else one)
                place = columns * chunk
                store_double(sums, place, grad_sq)
                store_double(sums, place + 1, update_sq)
                store_double(sums, place + 2, weight_sq)
                store_double(sums, place + 3, ratio)
                store_double(sums, place + 4, np.float64(ratios))
                store_double(sums, place + 5, np.float64(moved))
                store_double(sums, place + 6, np.float64(lost))
                store_double(sums, place + 7, np.float64(bad_grads))
                store_double(sums, place + 8, np.float64(bad_weights))

    return assembly(kernel, OPTIONS)
