"""The loops behind ``rows``: they sort the rows that a step touches, sum duplicates, and find stale rows.

A kernel receives the address of its int64 arguments, which its docstring lists. All but ``sums`` run on one thread: for
16,384 rows they take a tenth of the time of the update that follows.
"""

from __future__ import annotations

from typing import Any

import torch

from descend.backends.cpu.intrinsics import (
    fetch_add,
    load_int,
    load_word,
    loader,
    prefetch_word,
    prefetcher,
    store_int,
    store_word,
    storer,
)
from descend.backends.cpu.kernels import OPTIONS, PREFETCHED, ROW, assembly, njit

AHEAD = 32  # rows between a prefetch and its use
TASK = 32  # bytes of a row of the table of sums
TASKS = 8  # sums that a thread claims at a time: neighbours, so that it uses what it has prefetched


def _entry_out_of_range(indices: int, nnz: int, dims: int, sizes: int) -> int:
    """The first entry whose index is out of range; the last if none is."""
    for entry in range(nnz):
        for dim in range(dims):
            if not 0 <= load_int(indices, dim * nnz + entry) < load_int(sizes, dim):
                return entry
    return nnz - 1


_first_wrong: Any = njit(_entry_out_of_range)


def _sorted(call: int) -> int:
    """Sort entries by their row: a radix sort of the keys ``row << bits | entry``, least significant digit first.

    Arguments: 0 indices, one list for each sparse dimension; 1 nnz; 2 sparse dimensions; 3 their sizes; 4 keys; 5 spare
    keys; 6 counts of a digit's values; 7 bits of an entry; 8 passes; 9 bits of a digit; 10 set to the first entry
    whose index is out of range, else -1. The result is the address of the sorted keys.
    """
    indices, nnz, dims, sizes = load_int(call, 0), load_int(call, 1), load_int(call, 2), load_int(call, 3)
    keys, spare, counts, bits = load_int(call, 4), load_int(call, 5), load_int(call, 6), load_int(call, 7)
    passes, digit = load_int(call, 8), load_int(call, 9)
    mask = (1 << digit) - 1
    store_int(call, 10, -1)
    for entry in range(nnz):
        store_int(keys, entry, 0)
    wrong = 0  # negative if any index is; loops without branches are vectorised
    for dim in range(dims):
        size = load_int(sizes, dim)
        for entry in range(nnz):
            index = load_int(indices, dim * nnz + entry)
            wrong |= index | size - 1 - index
            store_int(keys, entry, load_int(keys, entry) * size + index)
    if wrong < 0:
        store_int(call, 10, _first_wrong(indices, nnz, dims, sizes))
        return int(keys)
    falls, previous = 0, 0  # negative if a row is smaller than the one before
    for entry in range(nnz):
        row = load_int(keys, entry)
        falls |= row - previous
        previous = row
        store_int(keys, entry, row << bits | entry)
    for turn in range(passes if falls < 0 else 0):
        shift = bits + turn * digit
        for value in range(mask + 1):
            store_int(counts, value, 0)
        for i in range(nnz):
            value = (load_int(keys, i) >> shift) & mask
            store_int(counts, value, load_int(counts, value) + 1)
        total = 0
        for value in range(mask + 1):
            count = load_int(counts, value)
            store_int(counts, value, total)
            total += count
        for i in range(nnz):
            key = load_int(keys, i)
            value = (key >> shift) & mask
            target = load_int(counts, value)
            store_int(counts, value, target + 1)
            store_int(spare, target, key)
        keys, spare = spare, keys
    return int(keys)


_sort: Any = njit(_sorted)


def touched_kernel() -> str:
    """Turn indices into chunks, one for each row (more for long rows), and into a table of the sums that are needed.

    A row without duplicates is read from the gradient (tensor 0), a sum from the buffer of sums (tensor 1). More
    duplicates than a block has make a sum of sums. Columns of the table of sums: first key (or first slot), how many,
    target slot, whether these are slots.

    Arguments: 0 to 10 see ``_sorted``; 11 set to the sorted keys; 12 elements in a row; 13 most elements in a chunk;
    14 entries in a block; 15 chunks; 16 rows touched; 17 sums of entries; 18 sums of sums; 19 the step each row is
    current at, or 0; 20 the step it must be; 21 set to a row that is at another, else -1; 22 set to the number of
    chunks; 23 of rows; 24 of sums; 25 of sums of sums; 26 of slots.
    """

    def kernel(call: int) -> None:
        keys = _sort(call)
        store_int(call, 11, keys)
        store_int(call, 21, -1)
        if load_int(call, 10) >= 0:
            return
        nnz, bits = load_int(call, 1), load_int(call, 7)
        length, most, in_block = load_int(call, 12), load_int(call, 13), load_int(call, 14)
        chunks, rows, sums = load_int(call, 15), load_int(call, 16), load_int(call, 17)
        sums_of_sums, steps, step = load_int(call, 18), load_int(call, 19), load_int(call, 20)
        n_chunks, n_rows, n_sums, n_sums_of_sums, slots = 0, 0, 0, 0, 0
        i = 0
        while i < nnz:
            row, first = load_int(keys, i) >> bits, i
            if steps != 0 and i + AHEAD < nnz:
                prefetch_word(steps, load_int(keys, i + AHEAD) >> bits)
            i += 1
            while i < nnz and load_int(keys, i) >> bits == row:
                i += 1
            if steps != 0:
                last = load_word(steps, row)
                if last != step and -last != step:
                    store_int(call, 21, row)
                    return
            tensor, offset = 0, (load_int(keys, first) & ((1 << bits) - 1)) * length
            if i - first > 1:
                blocks = (i - first + in_block - 1) // in_block
                for block in range(blocks):
                    task, start = sums + TASK * n_sums, first + block * in_block
                    store_int(task, 0, start)
                    store_int(task, 1, min(in_block, i - start))
                    store_int(task, 2, slots + block)
                    store_int(task, 3, 0)
                    n_sums += 1
                if blocks > 1:
                    task = sums_of_sums + TASK * n_sums_of_sums
                    store_int(task, 0, slots)
                    store_int(task, 1, blocks)
                    store_int(task, 2, slots + blocks)
                    store_int(task, 3, 1)
                    n_sums_of_sums += 1
                    slots += blocks
                tensor, offset = 1, slots * length
                slots += 1
            store_int(rows, n_rows, row)
            n_rows += 1
            begin = 0
            while begin < length:  # range would divide
                chunk = chunks + ROW * n_chunks
                store_int(chunk, 0, tensor)
                store_int(chunk, 1, row * length + begin)
                store_int(chunk, 2, offset + begin)
                store_int(chunk, 3, min(most, length - begin))
                store_int(chunk, 4, 0)
                store_int(chunk, 5, 1)
                n_chunks += 1
                begin += most
        store_int(call, 22, n_chunks)
        store_int(call, 23, n_rows)
        store_int(call, 24, n_sums)
        store_int(call, 25, n_sums_of_sums)
        store_int(call, 26, slots)

    return assembly(kernel, OPTIONS)


def sums_kernel(dtype: torch.dtype) -> str:
    """Sum rows, each sum by one thread in a fixed order: the bits do not depend on the number of threads.

    Arguments: 0 table of sums; 1 how many; 2 sorted keys; 3 bits of an entry; 4 values of the gradient; 5 next sum;
    6 buffer of sums; 7 elements in a row; 8 nnz.
    """
    size = dtype.itemsize
    load: Any = loader((dtype, dtype), dtype)
    store: Any = storer((dtype, dtype), dtype)
    prefetch = prefetcher((dtype,))

    def kernel(call: int) -> None:
        tasks, count, keys = load_int(call, 0), load_int(call, 1), load_int(call, 2)
        mask, values = (1 << load_int(call, 3)) - 1, load_int(call, 4)
        buffer, length, nnz = load_int(call, 6), load_int(call, 7), load_int(call, 8)
        while True:
            begin = fetch_add(call + 40, TASKS)
            if begin >= count:
                break
            for index in range(begin, min(begin + TASKS, count)):
                task = tasks + TASK * index
                first, end, target = load_int(task, 0), load_int(task, 0) + load_int(task, 1), load_int(task, 2)
                is_slots = load_int(task, 3)
                total = buffer + size * length * target
                for i in range(first, end):
                    if is_slots == 1:
                        source = buffer + size * length * i
                    else:
                        source = values + size * length * (load_int(keys, i) & mask)
                        if i + AHEAD < nnz:  # most likely an entry of the next sum
                            coming = (values + size * length * (load_int(keys, i + AHEAD) & mask),)
                            for j in range(0, min(length, PREFETCHED), 64 // size):
                                prefetch(coming, j)
                    pointers = (total, source)
                    if i == first:
                        for j in range(length):
                            store(pointers, j, load(pointers, j)[1])
                    else:
                        for j in range(length):
                            value = load(pointers, j)
                            store(pointers, j, value[0] + value[1])

    return assembly(kernel, OPTIONS)


def stale_kernel() -> str:
    """Find the rows that have missed steps, as chunks, and the distinct last steps among them.

    A row's last step is negative while its state is zero, which means that only decay has happened to it. Such rows
    have a table of chunks of their own. A chunk's row of scalars is the position of its last step in the list of
    distinct ones.

    Arguments: 0 to 10 see ``_sorted``, but indices are 0 for a range of rows, and 1 is its length; 11 first row of the
    range; 12 elements in a row; 13 most elements in a chunk; 14 the step each row is current at; 15 the present step;
    16 the first step of the schedule; 17 positions by step, -1 where not yet seen; 18 distinct last steps; 19 chunks of
    rows with state; 20 chunks of rows without; 21 rows found; 22, 23 set to the numbers of chunks; 24 of rows; 25 of
    steps.
    """

    def kernel(call: int) -> None:
        keys, count, bits = 0, load_int(call, 1), load_int(call, 7)
        if load_int(call, 0) != 0:
            keys = _sort(call)
            if load_int(call, 10) >= 0:
                return
        low, length, most, steps = load_int(call, 11), load_int(call, 12), load_int(call, 13), load_int(call, 14)
        now, start, positions, distinct = load_int(call, 15), load_int(call, 16), load_int(call, 17), load_int(call, 18)
        used, unused, rows = load_int(call, 19), load_int(call, 20), load_int(call, 21)
        n_used, n_unused, n_rows, n_steps, previous = 0, 0, 0, 0, -1
        for i in range(count):
            row = low + i
            if keys != 0:
                row = load_int(keys, i) >> bits
                if i + AHEAD < count:
                    prefetch_word(steps, load_int(keys, i + AHEAD) >> bits)
                if row == previous:
                    continue
                previous = row
            last = load_word(steps, row)
            since = max(last if last > 0 else -last, start)
            if since >= now:
                continue
            position = load_int(positions, since - start)
            if position < 0:
                position = n_steps
                store_int(positions, since - start, position)
                store_int(distinct, position, since)
                n_steps += 1
            store_int(rows, n_rows, row)
            n_rows += 1
            begin = 0
            while begin < length:
                if last > 0:
                    chunk = used + ROW * n_used
                    n_used += 1
                else:
                    chunk = unused + ROW * n_unused
                    n_unused += 1
                store_int(chunk, 0, 0)
                store_int(chunk, 1, row * length + begin)
                store_int(chunk, 2, 0)
                store_int(chunk, 3, min(most, length - begin))
                store_int(chunk, 4, position)
                store_int(chunk, 5, 1)
                begin += most
        for i in range(n_steps):
            store_int(positions, load_int(distinct, i) - start, -1)
        store_int(call, 22, n_used)
        store_int(call, 23, n_unused)
        store_int(call, 24, n_rows)
        store_int(call, 25, n_steps)

    return assembly(kernel, OPTIONS)


def mark_kernel() -> str:
    """Record the step that rows are current at. Rows without state keep their negative sign.

    Arguments: 0 rows; 1 how many; 2 the step each row is current at; 3 the step to record; 4 whether they
    have state now.
    """

    def kernel(call: int) -> None:
        rows, count, steps, step = load_int(call, 0), load_int(call, 1), load_int(call, 2), load_int(call, 3)
        for i in range(count):
            row = load_int(rows, i)
            if i + AHEAD < count:
                prefetch_word(steps, load_int(rows, i + AHEAD))
            has_state = load_int(call, 4) == 1 or load_word(steps, row) > 0
            store_word(steps, row, step if has_state else -step)

    return assembly(kernel, OPTIONS)
