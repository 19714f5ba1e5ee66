"""What Triton compiles for ``rows``: keys of a gradient's entries, sums of duplicates, rules on rows.

A gradient has ``count`` entries. The key of an entry is the number of its row, -1 where an index is out of range. Keys
are sorted; ``order`` tells which entry a sorted position came from. The entries of a row are consecutive positions, its
*run*; the first of them is its *head*. Positions are cut into tiles, and runs with them. The part of a run in the tile
of its head is summed there, one entry after the other. The part in a later tile is summed by that tile and stored in
its row of ``carries``; the head's tile adds what later tiles have carried, ``GROUP`` tiles at a time. So the order of
summation depends on the keys alone, and the longest run is spread over many programs.

A program takes one tile and one of the ``BLOCKS`` blocks of columns of a row of ``LENGTH`` numbers.
"""

from __future__ import annotations

from typing import Any

import triton.language as tl

from descend.backends.triton.formats import hashed, read, write
from descend.backends.triton.kernels import added


def keys(
    indices: Any,
    keys: Any,
    in_range: Any,
    sizes: Any,
    count: Any,
    DIMENSIONS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """The key of each entry; ``indices`` has shape (DIMENSIONS, count). A wrong index sets ``in_range`` to 0."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_entry = i < count
    key = i * 0
    is_in_range = is_entry
    places = indices + i
    for dimension in tl.static_range(DIMENSIONS):
        index = tl.load(places, mask=is_entry, other=0)
        is_in_range = is_in_range & (index >= 0) & (index < sizes[dimension])
        key = key * sizes[dimension] + index
        places += count
    tl.store(keys + i, tl.where(is_in_range, key, -1).to(keys.dtype.element_ty), mask=is_entry)
    tl.store(in_range + i * 0, (i * 0).to(tl.int8), mask=is_entry & (is_in_range == 0))


def carry(
    keys: Any,
    order: Any,
    values: Any,
    carries: Any,
    count: Any,
    LENGTH: tl.constexpr,
    BLOCKS: tl.constexpr,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """The sums of what the runs of earlier tiles have in this one; other rows of ``carries`` are left alone."""
    tile = tl.program_id(0).to(tl.int64) // BLOCKS
    first = tile * TILE
    key = tl.load(keys + first)
    before = tl.load(keys + first - 1, mask=first > 0, other=-1)
    if key == before:
        column = columns(BLOCKS, COLUMNS)
        i = first + tl.arange(0, TILE)
        is_same = tl.load(keys + i, mask=i < count, other=-2) == key  # -2 is no key
        entry = tl.load(order + i, mask=is_same, other=0)
        mask = is_same[:, None] & (column < LENGTH)[None, :]
        value = tl.load(values + entry[:, None] * LENGTH + column[None, :], mask=mask, other=0.0)
        total = added(value.to(carries.dtype.element_ty))
        tl.store(carries + tile * LENGTH + column, total, mask=column < LENGTH)


def columns(BLOCKS: tl.constexpr, COLUMNS: tl.constexpr) -> Any:
    """The columns of this program."""
    return tl.program_id(0) % BLOCKS * COLUMNS + tl.arange(0, COLUMNS)


def heads(keys: Any, count: Any, BLOCKS: tl.constexpr, TILE: tl.constexpr) -> Any:
    """Of this program's tile: sorted positions, their keys, and which are heads.

    Keys of -1 come first and are no heads, because before the first one another is assumed.
    """
    i = tl.program_id(0).to(tl.int64) // BLOCKS * TILE + tl.arange(0, TILE)
    key = tl.load(keys + i, mask=i < count, other=-1).to(tl.int64)
    before = tl.load(keys + i - 1, mask=(i > 0) & (i < count), other=-1).to(tl.int64)
    return i, key, key != before


def summed(
    i: Any,
    key: Any,
    is_head: Any,
    keys: Any,
    order: Any,
    values: Any,
    carries: Any,
    count: Any,
    LENGTH: tl.constexpr,
    BLOCKS: tl.constexpr,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
) -> Any:
    """The summed gradients of the heads of this program's tile, of shape (TILE, COLUMNS); 0 elsewhere."""
    column = columns(BLOCKS, COLUMNS)
    inside = (column < LENGTH)[None, :]
    entry = tl.load(order + i, mask=is_head, other=0)
    places = values + column[None, :]
    total = tl.load(places + entry[:, None] * LENGTH, mask=is_head[:, None] & inside, other=0.0)
    total = total.to(carries.dtype.element_ty)
    # The rest of the runs in this tile. Of four entries at a time, no load waits for another; -2 and -3 are no keys.
    tile = tl.program_id(0).to(tl.int64) // BLOCKS
    end = tl.minimum((tile + 1) * TILE, count)
    later = i + 1
    is_same = is_head & (tl.load(keys + later, mask=later < end, other=-2) == key)
    while added(is_same.to(tl.int32)) > 0:
        for _ in tl.static_range(4):
            entry = tl.load(order + later, mask=is_same, other=0)
            more = tl.load(places + entry[:, None] * LENGTH, mask=is_same[:, None] & inside, other=0.0)
            total += more.to(carries.dtype.element_ty)
            later += 1
            is_same = is_head & (tl.load(keys + later, mask=later < end, other=-2) == key)
    # The run that goes on in the next tile, if its head is in this one.
    following = (tile + 1) * TILE
    open_key = tl.load(keys + following, mask=following < count, other=-2).to(tl.int64)
    is_open = is_head & (key == open_key)
    open_key = tl.where(added(is_open.to(tl.int32)) > 0, open_key, -2)
    tiles = tile + 1 + tl.arange(0, GROUP)
    has_carry = tl.load(keys + tiles * TILE, mask=tiles * TILE < count, other=-3) == open_key
    carried = tl.full((COLUMNS,), 0, carries.dtype.element_ty)
    while added(has_carry.to(tl.int32)) > 0:
        part = tl.load(carries + tiles[:, None] * LENGTH + column[None, :], mask=has_carry[:, None] & inside, other=0.0)
        carried += added(part)
        tiles += GROUP
        has_carry = tl.load(keys + tiles * TILE, mask=tiles * TILE < count, other=-3) == open_key
    return tl.where(is_open[:, None], total + carried[None, :], total)


def sums(
    sums: Any,
    keys: Any,
    order: Any,
    values: Any,
    carries: Any,
    count: Any,
    LENGTH: tl.constexpr,
    BLOCKS: tl.constexpr,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    BY_KEY: tl.constexpr,
) -> None:
    """Store the summed gradients: in the rows that the keys name, or in that of each head's position."""
    column = columns(BLOCKS, COLUMNS)
    i, key, is_head = heads(keys, count, BLOCKS, TILE)
    total = summed(
        i, key, is_head, keys, order, values, carries, count, LENGTH, BLOCKS, TILE, COLUMNS, GROUP
    )  # fmt: skip
    row = key if BY_KEY else i
    mask = is_head[:, None] & (column < LENGTH)[None, :]
    tl.store(sums + row[:, None] * LENGTH + column[None, :], total.to(sums.dtype.element_ty), mask=mask)


def squares(
    squares: Any,
    keys: Any,
    order: Any,
    values: Any,
    carries: Any,
    count: Any,
    LENGTH: tl.constexpr,
    BLOCKS: tl.constexpr,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
) -> None:
    """The sum of the squares of the summed gradients, in float64, one number a program."""
    i, key, is_head = heads(keys, count, BLOCKS, TILE)
    total = summed(
        i, key, is_head, keys, order, values, carries, count, LENGTH, BLOCKS, TILE, COLUMNS, GROUP
    ).to(tl.float64)  # fmt: skip
    tl.store(squares + tl.program_id(0), added(added(total * total)))


def update(
    tensors: Any,
    scalars: Any,
    decision: Any,
    mark: Any,
    step: Any,
    keys: Any,
    order: Any,
    values: Any,
    carries: Any,
    count: Any,
    RULE: tl.constexpr,
    SCALARS: tl.constexpr,
    LENGTH: tl.constexpr,
    BLOCKS: tl.constexpr,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
) -> None:
    """Apply a rule to the rows of the heads.

    Args:
        tensors: the parameter and its state.
        scalars: what gradients are multiplied by, and the scalars of the rule.
        decision: ``Decision.values``; if it leaves the step out, nothing is written.
        mark: the step each row is current at, int32.
        step: the step the rows are current at now; 0 to mark none.
        keys, order, values, carries, count: see above.
        RULE: the function to apply.
        SCALARS: how many scalars it takes.
        LENGTH, BLOCKS, TILE, COLUMNS, GROUP: see above.
    """
    column = columns(BLOCKS, COLUMNS)
    i, key, is_head = heads(keys, count, BLOCKS, TILE)
    grad = summed(i, key, is_head, keys, order, values, carries, count, LENGTH, BLOCKS, TILE, COLUMNS, GROUP)
    grad *= (tl.load(scalars).to(tl.float64) * tl.load(decision)).to(grad.dtype)
    is_head = tl.where(tl.load(decision + 1) != 0, is_head, False)
    at = key[:, None] * LENGTH + column[None, :]
    mask = is_head[:, None] & (column < LENGTH)[None, :]
    rows: Any = ()
    for n in tl.static_range(len(tensors)):
        rows += (tl.load(tensors[n] + at, mask=mask, other=0.0).to(grad.dtype),)
    numbers: Any = ()
    for n in tl.static_range(SCALARS):
        numbers += (tl.load(scalars + (n + 1)),)
    results = RULE(rows[0], grad, *rows[1:], *numbers)
    if len(tensors) == 1:
        results = (results,)
    store(tensors, at, results, mask)
    if (step > 0) & (tl.program_id(0) % BLOCKS == 0):
        tl.store(mark + key, (key * 0 + step).to(tl.int32), mask=is_head)


def update_in_formats(
    tensors: Any,
    scalars: Any,
    decision: Any,
    mark: Any,
    step: Any,
    place: Any,
    first_word: Any,
    second_word: Any,
    keys: Any,
    order: Any,
    values: Any,
    carries: Any,
    count: Any,
    RULE: tl.constexpr,
    HOWS: tl.constexpr,
    BESIDE: tl.constexpr,
    SCALARS: tl.constexpr,
    LENGTH: tl.constexpr,
    BLOCKS: tl.constexpr,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
) -> None:
    """The same in formats, where a block of columns has a scale.

    Args:
        tensors: the parameter and all tensors of its state; halves of float32 as int16.
        place: of the first element, in the noise.
        first_word, second_word: of the noise, see ``core.noise.words``.
        HOWS: formats of the parameter and the state of the rule, see ``formats``.
        BESIDE: for each of these, which of the tensors has its scales or its compensation; itself if it has none.
    """
    column = columns(BLOCKS, COLUMNS)
    i, key, is_head = heads(keys, count, BLOCKS, TILE)
    grad = summed(i, key, is_head, keys, order, values, carries, count, LENGTH, BLOCKS, TILE, COLUMNS, GROUP)
    grad *= (tl.load(scalars).to(tl.float64) * tl.load(decision)).to(grad.dtype)
    is_head = tl.where(tl.load(decision + 1) != 0, is_head, False)
    at, block = key[:, None] * LENGTH + column[None, :], key * BLOCKS + tl.program_id(0) % BLOCKS
    mask = is_head[:, None] & (column < LENGTH)[None, :]
    rows: Any = ()
    for n in tl.static_range(len(HOWS)):
        rows += (read(tensors[n], tensors[BESIDE[n]], at, block, mask, is_head, HOWS[n], grad.dtype),)
    numbers: Any = ()
    for n in tl.static_range(SCALARS):
        numbers += (tl.load(scalars + (n + 1)),)
    results = RULE(rows[0], grad, *rows[1:], *numbers)
    if len(HOWS) == 1:
        results = (results,)
    noise = hashed((place + at).to(tl.uint32), first_word), second_word.to(tl.uint32)
    for n in tl.static_range(len(HOWS)):
        write(tensors[n], tensors[BESIDE[n]], at, block, mask, is_head, results[n], noise, n, HOWS[n])
    if (step > 0) & (tl.program_id(0) % BLOCKS == 0):
        tl.store(mark + key, (key * 0 + step).to(tl.int32), mask=is_head)


def store(tensors: Any, at: Any, results: Any, mask: Any) -> None:
    """Store results, each in the dtype of its tensor."""
    for n in tl.static_range(len(tensors)):
        tl.store(tensors[n] + at, results[n].to(tensors[n].dtype.element_ty), mask=mask)


def find(
    which: Any,
    steps: Any,
    found: Any,
    seen: Any,
    count: Any,
    first: Any,
    total: Any,
    now: Any,
    start: Any,
    NAMED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """What each of ``count`` rows has missed.

    ``which`` are sorted numbers of rows, where only the first of equal ones counts; without NAMED they are those from
    ``first`` on. ``found`` is set to 0 for a row that is current; else to one more than how many steps after ``start``
    it is current, negative if its state is zero. ``seen`` has three flags, which are set if there is a stale row with
    state, one without, a number that is no row of ``total``; then one for each of these steps.
    """
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_row = i < count
    row = first + i
    if NAMED:
        row = tl.load(which + i, mask=is_row, other=-1)
        before = tl.load(which + i - 1, mask=is_row & (i > 0), other=-1)
        is_in_range = (row >= 0) & (row < total)
        tl.store(seen + 2 + i * 0, (i * 0 + 1).to(tl.int8), mask=is_row & (is_in_range == 0))
        is_row = is_row & is_in_range & (row != before)
    step = tl.load(steps + row, mask=is_row, other=0)
    since = tl.maximum(tl.abs(step), start)
    is_stale = is_row & (since < now)
    late = since - start
    one = (i * 0 + 1).to(tl.int8)
    tl.store(seen + tl.where(step > 0, 0, 1), one, mask=is_stale)
    tl.store(seen + 3 + late, one, mask=is_stale)
    tl.store(found + i, tl.where(is_stale, tl.where(step > 0, late + 1, -late - 1), 0), mask=i < count)


def catch_up(
    which: Any,
    found: Any,
    places: Any,
    tensors: Any,
    scalars: Any,
    count: Any,
    first: Any,
    steps: Any,
    RULE: tl.constexpr,
    SCALARS: tl.constexpr,
    ROUNDS: tl.constexpr,
    COMPUTE: tl.constexpr,
    NAMED: tl.constexpr,
    HAVE_STATE: tl.constexpr,
    LENGTH: tl.constexpr,
    BLOCKS: tl.constexpr,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Apply a rule to those of the rows found that have state, or to those that have none.

    Args:
        which, found, count, first, NAMED: see ``find``.
        places: which of the distinct steps each step after ``start`` is.
        tensors: the parameter and, if HAVE_STATE, its state.
        scalars: of shape (ROUNDS, steps, SCALARS): a row is updated once a round.
        steps: how many distinct steps there are.
        RULE: the function to apply; it uses no gradient.
        SCALARS: how many scalars it takes.
        ROUNDS: how often it is applied.
        COMPUTE: dtype of the arithmetic.
        HAVE_STATE: which of the rows are updated.
        LENGTH, BLOCKS, TILE, COLUMNS: see above.
    """
    i = tl.program_id(0).to(tl.int64) // BLOCKS * TILE + tl.arange(0, TILE)
    column = columns(BLOCKS, COLUMNS)
    late = tl.load(found + i, mask=i < count, other=0)
    if not HAVE_STATE:
        late = -late
    is_mine = late > 0
    row = first + i
    if NAMED:
        row = tl.load(which + i, mask=is_mine, other=0)
    place = tl.load(places + late - 1, mask=is_mine, other=0)
    mask = is_mine[:, None] & (column < LENGTH)[None, :]
    at = row[:, None] * LENGTH + column[None, :]
    rows: Any = ()
    for n in tl.static_range(len(tensors)):
        rows += (tl.load(tensors[n] + at, mask=mask, other=0.0).to(COMPUTE),)
    for turn in tl.static_range(ROUNDS):
        numbers: Any = ()
        for n in tl.static_range(SCALARS):
            number = tl.load(scalars + (turn * steps + place) * SCALARS + n, mask=is_mine, other=1.0)
            numbers += (number[:, None],)
        rows = RULE(rows[0], rows[0], *rows[1:], *numbers)
        if len(tensors) == 1:
            rows = (rows,)
    store(tensors, at, rows, mask)


def mark(
    which: Any,
    found: Any,
    steps: Any,
    count: Any,
    first: Any,
    now: Any,
    NAMED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Note that the rows found are current; those without state keep their negative sign."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    late = tl.load(found + i, mask=i < count, other=0)
    row = first + i
    if NAMED:
        row = tl.load(which + i, mask=late != 0, other=0)
    tl.store(steps + row, tl.where(late > 0, now, -now), mask=late != 0)
