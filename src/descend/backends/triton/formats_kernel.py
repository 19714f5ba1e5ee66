"""What Triton compiles for launches in formats: ``kernels`` once more, block by block.

A tensor is cut into rows of equal width, and these into blocks of 256 numbers, of which the last of a row may be
shorter. Where nothing has scales, a tensor is one row. A chunk is a row of four int64: which tensor, its row of
scalars, its first block, how many. A row of addresses ends with the width, and the number and the place of the stream
of noise.
"""

from __future__ import annotations

from typing import Any

import triton.language as tl

from descend.backends.triton.formats import hashed, read, write
from descend.backends.triton.kernels import added, load
from descend.core.codecs import BLOCK
from descend.core.noise import words


def update(
    chunks: Any,
    addresses: Any,
    scalars: Any,
    decision: Any,
    keys: Any,
    RULE: tl.constexpr,
    HOWS: tl.constexpr,
    BESIDE: tl.constexpr,
    DTYPES: tl.constexpr,
    COMPUTE: tl.constexpr,
    SCALARS: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> None:
    """Apply a rule to a chunk.

    Args:
        chunks, addresses: see above.
        scalars, decision: see ``kernels.update``.
        keys: of the noise, one for each row of scalars.
        RULE: the function to apply.
        HOWS: formats of parameter, gradient and the state of the rule, see ``formats``.
        BESIDE: for each of these, the column of its scales or its compensation; its own if it has none.
        DTYPES: of parameter, gradient and all tensors of the state.
        COMPUTE, SCALARS: see ``kernels.update``.
        BLOCKS: at a time, where sixteen bytes can be read at once; elsewhere one.
    """
    chunk = chunks + 4 * tl.program_id(0).to(tl.int64)
    tensor, row = tl.load(chunk), tl.load(chunk + 1)
    first, count = tl.load(chunk + 2).to(tl.int32), tl.load(chunk + 3).to(tl.int32)
    count = tl.where(tl.load(decision + 1) != 0, count, 0)
    scalars += row * (SCALARS + 1)
    scale = (tl.load(scalars).to(tl.float64) * tl.load(decision)).to(COMPUTE)
    numbers = ()
    for i in tl.static_range(SCALARS):
        numbers += (tl.load(scalars + (i + 1)),)
    addresses += tensor * (len(DTYPES) + 3)
    tail = addresses + len(DTYPES)
    width, place = tl.load(tail), tl.load(tail + 2)
    stream = (place,) + words(tl.load(keys + row).to(tl.uint64), tl.load(tail + 1).to(tl.uint64))  # noqa: RUF005
    even = even_blocks(addresses, width, first, count, DTYPES)
    pointers = aligned_pointers(addresses, DTYPES)
    for start in range(0, even, BLOCKS):
        block, begin, length = cut(first, start + tl.arange(0, BLOCKS), even, width)
        begin = tl.multiple_of(begin, 16)
        apply(pointers, begin, block, length // 16 * 16, stream, scale, numbers, RULE, HOWS, BESIDE, COMPUTE)
    # Made anew: kept until here, they would take registers from the loop above.
    pointers = pointers_to(addresses, DTYPES)
    for start in range(even, count):
        block, begin, length = cut(first, start + tl.arange(0, 1), count, width)
        apply(pointers, begin, block, length, stream, scale, numbers, RULE, HOWS, BESIDE, COMPUTE)


def even_blocks(addresses: Any, width: Any, first: Any, count: Any, DTYPES: tl.constexpr) -> Any:
    """How many blocks of a chunk, from the first on, begin and end at multiples of sixteen bytes in each tensor."""
    bits = width * 0
    for i in tl.static_range(len(DTYPES)):
        bits |= tl.load(addresses + i)
    # All of them, or those of the first row but for the last.
    whole = tl.where(width % 16 == 0, count, tl.minimum(tl.maximum((width // BLOCK).to(tl.int32) - first, 0), count))
    return tl.where(bits % 16 == 0, whole, 0)


def aligned_pointers(addresses: Any, DTYPES: tl.constexpr) -> Any:
    """Pointers to tensors that begin at multiples of sixteen bytes."""
    pointers = ()
    for i in tl.static_range(len(DTYPES)):
        address = tl.load(addresses + i) // 16 * 16
        pointers += (tl.multiple_of(address.to(tl.pointer_type(DTYPES[i])), 16),)
    return pointers


def pointers_to(addresses: Any, DTYPES: tl.constexpr) -> Any:
    """Pointers to tensors that begin anywhere."""
    pointers = ()
    for i in tl.static_range(len(DTYPES)):
        pointers += (tl.load(addresses + i).to(tl.pointer_type(DTYPES[i])),)
    return pointers


def cut(first: Any, which: Any, end: Any, width: Any) -> Any:
    """Blocks of a chunk: their numbers in the tensor, where they begin, their lengths; 0 for those that do not exist.

    Args:
        first: block of the chunk.
        which: counted from there.
        end: of those that exist.
        width: of a row.
    """
    across = ((width + BLOCK - 1) // BLOCK).to(tl.int32)
    block = first + which
    row = block // across
    before = (block - row * across).to(tl.int64) * BLOCK
    length = tl.where(which < end, tl.minimum(width - before, BLOCK), 0)
    return block, row.to(tl.int64) * width + before, length.to(tl.int32)


def apply(
    pointers: Any,
    begin: Any,
    block: Any,
    length: Any,
    stream: Any,
    scale: Any,
    numbers: Any,
    RULE: tl.constexpr,
    HOWS: tl.constexpr,
    BESIDE: tl.constexpr,
    COMPUTE: tl.constexpr,
) -> None:
    """Apply a rule to blocks.

    Args:
        pointers: to the first elements of the parameter, its gradient and state.
        begin, block, length: see ``cut``.
        stream: the place of the first element, and two words of noise.
        scale: what gradients are multiplied by.
        numbers: the scalars of the rule.
        RULE, HOWS, BESIDE, COMPUTE: see ``update``.
    """
    lane = tl.arange(0, BLOCK)[None, :]
    at, mask, present = begin[:, None] + lane, lane < length[:, None], length > 0
    param, grad, state = opened(pointers, at, block, mask, present, scale, HOWS, BESIDE, COMPUTE)
    results = RULE(param, grad, *state, *numbers)
    if len(HOWS) == 2:
        results = (results,)
    places = (begin + stream[0]).to(tl.uint32)[:, None] + lane.to(tl.uint32)
    noise = hashed(places, stream[1]), stream[2].to(tl.uint32)
    write(pointers[0], pointers[BESIDE[0]], at, block, mask, present, results[0], noise, 0, HOWS[0])
    for i in tl.static_range(2, len(HOWS)):
        write(pointers[i], pointers[BESIDE[i]], at, block, mask, present, results[i - 1], noise, i - 1, HOWS[i])


def opened(
    pointers: Any,
    at: Any,
    block: Any,
    mask: Any,
    present: Any,
    scale: Any,
    HOWS: tl.constexpr,
    BESIDE: tl.constexpr,
    COMPUTE: tl.constexpr,
) -> Any:
    """The parameter, its gradient times ``scale``, and its state, as a rule sees them. See ``formats.read``."""
    param = read(pointers[0], pointers[BESIDE[0]], at, block, mask, present, HOWS[0], COMPUTE)
    grad = load(pointers[1] + at, mask, COMPUTE) * scale
    state = ()
    for i in tl.static_range(2, len(HOWS)):
        state += (read(pointers[i], pointers[BESIDE[i]], at, block, mask, present, HOWS[i], COMPUTE),)
    return param, grad, state


def sums(
    chunks: Any,
    addresses: Any,
    scalars: Any,
    sums: Any,
    PART: tl.constexpr,
    HOWS: tl.constexpr,
    BESIDE: tl.constexpr,
    DTYPES: tl.constexpr,
    COMPUTE: tl.constexpr,
    SCALARS: tl.constexpr,
    GIVEN: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> None:
    """What the part of a rule returns, summed over each chunk in float64, in an order that depends on widths alone.

    Args:
        chunks, addresses, HOWS, BESIDE, DTYPES, COMPUTE, SCALARS: see ``update``.
        scalars, sums, PART, GIVEN, SUMS: see ``kernels.sums``.
        BLOCKS: at a time.
    """
    program = tl.program_id(0).to(tl.int64)
    chunk = chunks + 4 * program
    tensor, row = tl.load(chunk), tl.load(chunk + 1)
    first, count = tl.load(chunk + 2).to(tl.int32), tl.load(chunk + 3).to(tl.int32)
    scalars += row * (SCALARS + 1)
    scale = tl.load(scalars)
    numbers = ()
    for i in tl.static_range(GIVEN):
        numbers += (tl.load(scalars + (i + 1)),)
    addresses += tensor * (len(DTYPES) + 3)
    width = tl.load(addresses + len(DTYPES))
    blocks, totals = tl.arange(0, BLOCKS), ()
    for _ in tl.static_range(SUMS):
        totals += (tl.full((BLOCKS, BLOCK), 0, tl.float64),)
    whole = even_blocks(addresses, width, first, count, DTYPES) // BLOCKS * BLOCKS
    pointers = aligned_pointers(addresses, DTYPES)
    for start in range(0, whole, BLOCKS):
        block, begin, length = cut(first, start + blocks, whole, width)
        begin, length = tl.multiple_of(begin, 16), length // 16 * 16
        totals = summed(totals, pointers, begin, block, length, scale, numbers, PART, HOWS, BESIDE, COMPUTE, SUMS)
    pointers = pointers_to(addresses, DTYPES)
    for start in range(whole, count, BLOCKS):
        block, begin, length = cut(first, start + blocks, count, width)
        totals = summed(totals, pointers, begin, block, length, scale, numbers, PART, HOWS, BESIDE, COMPUTE, SUMS)
    for i in tl.static_range(SUMS):
        tl.store(sums + (program * SUMS + i), added(added(totals[i])))


def summed(
    totals: Any,
    pointers: Any,
    begin: Any,
    block: Any,
    length: Any,
    scale: Any,
    numbers: Any,
    PART: tl.constexpr,
    HOWS: tl.constexpr,
    BESIDE: tl.constexpr,
    COMPUTE: tl.constexpr,
    SUMS: tl.constexpr,
) -> Any:
    """The totals, with what the part returns for some blocks. See ``apply`` and ``sums``."""
    lane = tl.arange(0, BLOCK)[None, :]
    at, mask, present = begin[:, None] + lane, lane < length[:, None], length > 0
    param, grad, state = opened(pointers, at, block, mask, present, scale, HOWS, BESIDE, COMPUTE)
    results = PART(param, grad, *state, *numbers)
    new = ()
    for i in tl.static_range(SUMS):
        value = (results if SUMS == 1 else results[i]).to(tl.float64)
        new += (totals[i] + tl.where(mask, value, 0.0),)
    return new
