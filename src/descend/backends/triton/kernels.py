"""What Triton compiles. ``library`` binds the functions that a kernel calls; addresses come from tables on the device.

A chunk is a row of four int64: which tensor, its row of scalars, offset, length. A program takes one chunk.
"""

from __future__ import annotations

from typing import Any

import triton.language as tl

from descend.core.decision import judge as decide


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
    RAGGED: tl.constexpr,
) -> None:
    """Apply a rule to a chunk.

    Args:
        chunks: the table of chunks; offsets are multiples of 16.
        addresses: a row a tensor: parameter, gradient, state.
        scalars: a row of what gradients are multiplied by and the scalars of the rule.
        decision: ``Decision.values``; if it leaves the step out, nothing is written.
        RULE: the function to apply.
        DTYPES: of parameter, gradient and state.
        COMPUTE: dtype of the arithmetic.
        SCALARS: how many scalars the rule takes.
        BLOCK: elements at a time, where sixteen bytes can be read at once.
        RAGGED: elements at a time elsewhere.
    """
    chunk = chunks + 4 * tl.program_id(0).to(tl.int64)
    tensor, row = tl.load(chunk), tl.load(chunk + 1)
    offset, length = tl.multiple_of(tl.load(chunk + 2), 16), tl.load(chunk + 3).to(tl.int32)
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
    lanes, few = tl.arange(0, BLOCK), tl.arange(0, RAGGED)
    wide = tl.where(bits % 16 == 0, length, 0)
    whole, even = wide // BLOCK * BLOCK, wide // 16 * 16
    for start in range(0, whole, BLOCK):
        apply(aligned, start + lanes, None, scale, numbers, RULE, DTYPES, COMPUTE)
    if whole < even:
        at = whole + lanes
        apply(aligned, at, at < even, scale, numbers, RULE, DTYPES, COMPUTE)
    for start in range(even, length, RAGGED):
        at = start + few
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
    """Apply a rule to elements.

    Args:
        pointers: to the first elements of the parameter, its gradient and state.
        at: which elements.
        mask: those that exist; None for all.
        scale: what gradients are multiplied by.
        numbers: the scalars of the rule.
        RULE, DTYPES, COMPUTE: see ``update``.
    """
    param = load(pointers[0] + at, mask, COMPUTE)
    grad = load(pointers[1] + at, mask, COMPUTE) * scale
    state = ()
    for i in tl.static_range(2, len(DTYPES)):
        state += (load(pointers[i] + at, mask, COMPUTE),)
    if len(DTYPES) == 2:
        store(pointers[0] + at, RULE(param, grad, *numbers), mask, DTYPES[0])
    else:
        results = RULE(param, grad, *state, *numbers)
        store(pointers[0] + at, results[0], mask, DTYPES[0])
        for i in tl.static_range(2, len(DTYPES)):
            store(pointers[i] + at, results[i - 1], mask, DTYPES[i])


def load(pointer: Any, mask: Any, COMPUTE: tl.constexpr) -> Any:
    """Elements in the dtype of the arithmetic; 0 where there are none."""
    value = tl.load(pointer, mask) if mask is None else tl.load(pointer, mask, 0.0)
    if value.dtype.primitive_bitwidth == 16:
        value = value.to(tl.float32)  # not every version of Triton converts between bfloat16 and float64
    return value.to(COMPUTE)


def store(pointer: Any, value: Any, mask: Any, DTYPE: tl.constexpr) -> None:
    """Write elements, rounded to nearest; as torch does, from float64 to sixteen bits by way of float32."""
    if DTYPE.primitive_bitwidth == 16:
        value = value.to(tl.float32)
    tl.store(pointer, value.to(DTYPE), mask)


def sums_of_squares(
    chunks: Any,
    addresses: Any,
    sums: Any,
    COLUMN: tl.constexpr,
    COLUMNS: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """The sum of the squares of each chunk, in float64.

    Lane i of a program adds elements i, i + BLOCK, ..., wherever they lie: the bits do not depend on alignment.

    Args:
        chunks: the table of chunks.
        addresses: a row a tensor.
        sums: one a chunk, to be written.
        COLUMN: of the table of addresses.
        COLUMNS: how many it has.
        DTYPE: of the tensors.
        BLOCK: elements at a time.
    """
    program = tl.program_id(0).to(tl.int64)
    chunk = chunks + 4 * program
    offset, length = tl.multiple_of(tl.load(chunk + 2), 16), tl.load(chunk + 3).to(tl.int32)
    address = tl.load(addresses + (tl.load(chunk) * COLUMNS + COLUMN))
    pointer = address.to(tl.pointer_type(DTYPE)) + offset
    aligned = tl.multiple_of((address // 16 * 16).to(tl.pointer_type(DTYPE)), 16) + offset
    whole = tl.where(address % 16 == 0, length // BLOCK * BLOCK, 0)
    lanes, total = tl.arange(0, BLOCK), tl.full((BLOCK,), 0, tl.float64)
    for start in range(0, whole, BLOCK):
        value = load(aligned + (start + lanes), None, tl.float64)
        total += value * value
    for start in range(whole, length, BLOCK):
        at = start + lanes
        value = load(pointer + at, at < length, tl.float64)
        total += value * value
    tl.store(sums + program, added(total))


def sums(
    chunks: Any,
    addresses: Any,
    scalars: Any,
    sums: Any,
    PART: tl.constexpr,
    DTYPES: tl.constexpr,
    COMPUTE: tl.constexpr,
    SCALARS: tl.constexpr,
    GIVEN: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """What the part of a rule returns, summed over each chunk in float64, in the order of ``sums_of_squares``.

    Args:
        chunks, addresses, scalars: see ``update``.
        sums: a row a chunk, to be written.
        PART: the function.
        DTYPES, COMPUTE, SCALARS: see ``update``.
        GIVEN: how many of the scalars the part takes.
        SUMS: how many numbers it returns.
        BLOCK: elements at a time.
    """
    program = tl.program_id(0).to(tl.int64)
    chunk = chunks + 4 * program
    tensor, row = tl.load(chunk), tl.load(chunk + 1)
    offset, length = tl.multiple_of(tl.load(chunk + 2), 16), tl.load(chunk + 3).to(tl.int32)
    scalars += row * (SCALARS + 1)
    scale = tl.load(scalars)
    numbers = ()
    for i in tl.static_range(GIVEN):
        numbers += (tl.load(scalars + (i + 1)),)
    addresses += tensor * len(DTYPES)
    pointers, aligned, bits = (), (), offset * 0
    for i in tl.static_range(len(DTYPES)):
        address = tl.load(addresses + i)
        bits |= address
        pointers += (address.to(tl.pointer_type(DTYPES[i])) + offset,)
        aligned += (tl.multiple_of((address // 16 * 16).to(tl.pointer_type(DTYPES[i])), 16) + offset,)
    lanes, totals = tl.arange(0, BLOCK), ()
    for _ in tl.static_range(SUMS):
        totals += (tl.full((BLOCK,), 0, tl.float64),)
    whole = tl.where(bits % 16 == 0, length // BLOCK * BLOCK, 0)
    for start in range(0, whole, BLOCK):
        totals = summed(totals, aligned, start + lanes, None, scale, numbers, PART, DTYPES, COMPUTE, SUMS)
    for start in range(whole, length, BLOCK):
        at = start + lanes
        totals = summed(totals, pointers, at, at < length, scale, numbers, PART, DTYPES, COMPUTE, SUMS)
    for i in tl.static_range(SUMS):
        tl.store(sums + (program * SUMS + i), added(totals[i]))


def summed(
    totals: Any,
    pointers: Any,
    at: Any,
    mask: Any,
    scale: Any,
    numbers: Any,
    PART: tl.constexpr,
    DTYPES: tl.constexpr,
    COMPUTE: tl.constexpr,
    SUMS: tl.constexpr,
) -> Any:
    """The totals, with what the part returns for some elements. See ``apply`` and ``sums``."""
    param = load(pointers[0] + at, mask, COMPUTE)
    grad = load(pointers[1] + at, mask, COMPUTE) * scale
    state = ()
    for i in tl.static_range(2, len(DTYPES)):
        state += (load(pointers[i] + at, mask, COMPUTE),)
    results = PART(param, grad, *state, *numbers)
    new = ()
    for i in tl.static_range(SUMS):
        value = (results if SUMS == 1 else results[i]).to(tl.float64)
        new += (totals[i] + (value if mask is None else tl.where(mask, value, 0.0)),)
    return new


def total(sums: Any, count: Any, result: Any, BLOCK: tl.constexpr) -> None:
    """The sum of many float64 numbers in one program, always in the same order."""
    lanes, parts = tl.arange(0, BLOCK), tl.full((BLOCK,), 0, tl.float64)
    for start in range(0, count, BLOCK):
        at = start + lanes
        parts += tl.load(sums + at, at < count, 0.0)
    tl.store(result, added(parts))


def totals(sums: Any, spans: Any, results: Any, SUMS: tl.constexpr, BLOCK: tl.constexpr) -> None:
    """The sums of the rows of each tensor, a program a tensor, always in the same order.

    Args:
        sums: a row a chunk.
        spans: for each tensor, its first chunk and how many it has.
        results: a row a tensor, to be written.
        SUMS: numbers in a row.
        BLOCK: rows at a time.
    """
    tensor = tl.program_id(0).to(tl.int64)
    first, count = tl.load(spans + 2 * tensor), tl.load(spans + 2 * tensor + 1)
    lanes = tl.arange(0, BLOCK)
    for i in tl.static_range(SUMS):
        parts = tl.full((BLOCK,), 0, tl.float64)
        for start in range(0, count, BLOCK):
            at = start + lanes
            parts += tl.load(sums + (first + at) * SUMS + i, at < count, 0.0)
        tl.store(results + (tensor * SUMS + i), added(parts))


def added(x: Any) -> Any:
    """The sum of the elements of ``x``."""
    return tl.sum(x, 0)


def added_by_interpreter(x: Any) -> Any:
    """The same where ``tl.sum`` was made for GPUs, because the interpreter was turned on after Triton's import."""
    return tl.reduce(x, 0, tl.standard._sum_combine)


def judge(
    values: Any,
    total: Any,
    grad_scale: Any,
    found_inf: Any,
    scale: Any,
    max_norm: Any,
    skips_nonfinite: Any,
) -> None:
    """Write ``core.decision.judge`` into ``values``. The last three are the bits of float64 numbers."""
    factor, take, norm, skipped = decide(
        tl.load(total).to(tl.float64),
        tl.load(grad_scale).to(tl.float64),
        tl.load(found_inf).to(tl.float64),
        tl.load(values + 3),
        scale.to(tl.int64).to(tl.float64, bitcast=True),
        max_norm.to(tl.int64).to(tl.float64, bitcast=True),
        skips_nonfinite.to(tl.int64).to(tl.float64, bitcast=True),
    )
    tl.store(values, factor)
    tl.store(values + 1, take)
    tl.store(values + 2, norm)
    tl.store(values + 3, skipped)


def scalar_state(
    addresses: Any,
    places: Any,
    values: Any,
    decision: Any,
    count: Any,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Write float64 numbers into 0-dim tensors.

    Args:
        addresses: of the tensors.
        places: which value each is given.
        values: to choose from.
        decision: ``Decision.values``; if it leaves the step out, nothing is written.
        count: how many tensors there are.
        DTYPE: of the tensors.
        BLOCK: tensors a program.
    """
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < tl.where(tl.load(decision + 1) != 0, count, 0)
    pointers = tl.load(addresses + at, mask, 0).to(tl.pointer_type(DTYPE))
    value = tl.load(values + tl.load(places + at, mask, 0), mask, 0.0)
    tl.store(pointers, value.to(DTYPE), mask)
