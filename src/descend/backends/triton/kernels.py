"""What Triton compiles. ``library`` binds the functions that a kernel calls; addresses come from tables on the device.

A chunk is a row of four int64: which tensor, its row of scalars, offset, length. A program takes one chunk.
"""

from __future__ import annotations

from typing import Any

import triton.language as tl


def update(
    chunks: Any,
    addresses: Any,
    scalars: Any,
    decision: Any,
    RULE: tl.constexpr,
    DTYPES: tl.constexpr,
    COMPUTE: tl.constexpr,
    SCALARS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Apply a rule to a chunk.

    Args:
        chunks: the table of chunks.
        addresses: a row a tensor: parameter, gradient, state.
        scalars: a row of what gradients are multiplied by and the scalars of the rule.
        decision: ``Decision.values``; if it leaves the step out, nothing is written.
        RULE: the function to apply.
        DTYPES: of parameter, gradient and state.
        COMPUTE: dtype of the arithmetic.
        SCALARS: how many scalars the rule takes.
        BLOCK: elements at a time.
    """
    chunk = chunks + 4 * tl.program_id(0).to(tl.int64)
    tensor, row = tl.load(chunk), tl.load(chunk + 1)
    offset, length = tl.multiple_of(tl.load(chunk + 2), BLOCK), tl.load(chunk + 3).to(tl.int32)
    factor, take = tl.load(decision), tl.load(decision + 1)
    length = tl.where(take != 0, length, 0)
    scalars += row * (SCALARS + 1)
    scale = (tl.load(scalars).to(tl.float64) * factor).to(COMPUTE)
    numbers = ()
    for i in tl.static_range(SCALARS):
        numbers += (tl.load(scalars + (i + 1)),)
    addresses += tensor * len(DTYPES)
    pointers, aligned, bits = (), (), offset * 0
    for i in tl.static_range(len(DTYPES)):
        address = tl.load(addresses + i)
        bits |= address
        pointers += (address.to(tl.pointer_type(DTYPES[i])) + offset,)
        # A hint belongs to the operation that makes a value: it needs one of its own, or it would hold for both.
        aligned += (tl.multiple_of((address // 16 * 16).to(tl.pointer_type(DTYPES[i])), 16) + offset,)
    lanes = tl.arange(0, BLOCK)
    whole = tl.where(bits % 16 == 0, length // BLOCK * BLOCK, 0)
    for start in range(0, whole, BLOCK):
        apply(aligned, tl.multiple_of(start, BLOCK) + lanes, None, scale, numbers, RULE, DTYPES, COMPUTE)
    for start in range(whole, length, BLOCK):
        at = start + lanes
        apply(pointers, at, at < length, scale, numbers, RULE, DTYPES, COMPUTE)


def apply(
    pointers: Any,
    at: Any,
    mask: Any,
    scale: Any,
    numbers: Any,
    RULE: tl.constexpr,
    DTYPES: tl.constexpr,
    COMPUTE: tl.constexpr,
) -> None:
    """Apply a rule to the elements ``at`` some places where ``mask`` holds."""
    param = tl.load(pointers[0] + at, mask).to(COMPUTE)
    grad = tl.load(pointers[1] + at, mask).to(COMPUTE) * scale
    state = ()
    for i in tl.static_range(2, len(DTYPES)):
        state += (tl.load(pointers[i] + at, mask).to(COMPUTE),)
    if len(DTYPES) == 2:
        tl.store(pointers[0] + at, RULE(param, grad, *numbers).to(DTYPES[0]), mask)
    else:
        results = RULE(param, grad, *state, *numbers)
        tl.store(pointers[0] + at, results[0].to(DTYPES[0]), mask)
        for i in tl.static_range(2, len(DTYPES)):
            tl.store(pointers[i] + at, results[i - 1].to(DTYPES[i]), mask)
