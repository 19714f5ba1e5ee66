"""What Triton compiles for launches in formats: ``kernels`` once more, block by block.

A tensor is cut into rows of ``width`` numbers, and these into blocks of 256, of which the last of a row may be shorter.
Where nothing has scales, a tensor is one row. A chunk is a row of four int64: which tensor, its row of scalars, its first
block, how many. A row of addresses ends with the width, the number and the place of the parameter's stream of noise.
"""

from __future__ import annotations

from typing import Any

import triton.language as tl

from descend.backends.triton.formats import hashed, read, sixteen_bits, write
from descend.backends.triton.kernels import load
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
    RAGGED: tl.constexpr,
) -> None:
    """Apply a rule to a chunk.

    Args:
        chunks, addresses: see above.
        scalars, decision: see ``kernels.update``.
        keys: of the noise, one a row of scalars.
        RULE: the function to apply.
        HOWS: formats of parameter, gradient and the state of the rule, see ``formats``.
        BESIDE: for each of these, the column of its scales or compensation; if it has none, its own.
        DTYPES: of parameter, gradient, and all tensors of the state.
        COMPUTE, SCALARS: see ``kernels.update``.
        BLOCKS: at a time, where sixteen bytes can be read at once.
        RAGGED: blocks at a time elsewhere.
    """
    chunk = chunks + 4 * tl.program_id(0).to(tl.int64)
    tensor, row = tl.load(chunk), tl.load(chunk + 1)
    first, count = tl.load(chunk + 2).to(tl.int32), tl.load(chunk + 3).to(tl.int32)
    factor, take = tl.load(decision), tl.load(decision + 1)
    count = tl.where(take != 0, count, 0)
    scalars += row * (SCALARS + 1)
    scale = (tl.load(scalars).to(tl.float64) * factor).to(COMPUTE)
    numbers = ()
    for i in tl.static_range(SCALARS):
        numbers += (tl.load(scalars + (i + 1)),)
    addresses += tensor * (len(DTYPES) + 3)
    pointers, bits = (), tensor * 0
    for i in tl.static_range(len(DTYPES)):
        address = tl.load(addresses + i)
        bits |= address
        pointers += (tl.multiple_of((address // 16 * 16).to(tl.pointer_type(DTYPES[i])), 16),)
    width, number, place = (
        tl.load(addresses + len(DTYPES)),
        tl.load(addresses + (len(DTYPES) + 1)),
        tl.load(addresses + (len(DTYPES) + 2)),
    )
    stream = (place,) + words(tl.load(keys + row).to(tl.uint64), number.to(tl.uint64))  # noqa: RUF005
    across = ((width + BLOCK - 1) // BLOCK).to(tl.int32)
    # Blocks that begin and end at multiples of 16: all of them, or those of the first row but for the last.
    even = tl.where(width % 16 == 0, count, tl.minimum(tl.maximum(across - 1 - first, 0), count))
    even = tl.where(bits % 16 == 0, even, 0)
    lanes, few = tl.arange(0, BLOCKS), tl.arange(0, RAGGED)
    for start in range(0, even, BLOCKS):
        block, begin, length = cut(first, start + lanes, even, width, across)
        apply(pointers, tl.multiple_of(begin, 16), block, length // 16 * 16, stream, scale, numbers, RULE, HOWS, BESIDE, COMPUTE)
    # Read anew: kept until here, these pointers would take registers from the loop above.
    pointers = ()
    for i in tl.static_range(len(DTYPES)):
        pointers += (tl.load(addresses + i).to(tl.pointer_type(DTYPES[i])),)
    for start in range(even, count, RAGGED):
        block, begin, length = cut(first, start + few, count, width, across)
        apply(pointers, begin, block, length, stream, scale, numbers, RULE, HOWS, BESIDE, COMPUTE)


def cut(first: Any, which: Any, end: Any, width: Any, across: Any) -> Any:
    """Blocks of a chunk: their numbers in the tensor, where they begin, their lengths, 0 of those that do not exist.

    Args:
        first: block of the chunk.
        which: counted from there.
        end: of those that exist.
        width: of a row.
        across: blocks in a row.
    """
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
        stream: the place of the tensor and two words of noise.
        scale: what gradients are multiplied by.
        numbers: the scalars of the rule.
        RULE, HOWS, BESIDE, COMPUTE: see ``update``.
    """
    lane = tl.arange(0, BLOCK)[None, :]
    at, mask, present = begin[:, None] + lane, lane < length[:, None], length > 0
    param = read(pointers[0], pointers[BESIDE[0]], at, block, mask, present, HOWS[0], COMPUTE)
    grad = load(pointers[1] + at, mask, COMPUTE) * scale
    state = ()
    for i in tl.static_range(2, len(HOWS)):
        state += (read(pointers[i], pointers[BESIDE[i]], at, block, mask, present, HOWS[i], COMPUTE),)
    results = RULE(param, grad, *state, *numbers)
    if len(HOWS) == 2:
        results = (results,)
    noise = hashed((begin + stream[0]).to(tl.uint32)[:, None] + lane.to(tl.uint32), stream[1].to(tl.uint32))
    second = stream[2].to(tl.uint32)
    write(pointers[0], pointers[BESIDE[0]], at, block, mask, present, results[0], sixteen_bits(noise, second, 0), HOWS[0])
    for i in tl.static_range(2, len(HOWS)):
        bits = sixteen_bits(noise, second, i - 1)
        write(pointers[i], pointers[BESIDE[i]], at, block, mask, present, results[i - 1], bits, HOWS[i])
