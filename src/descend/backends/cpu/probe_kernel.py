"""The loop behind ``probe.NativeProbe``: it looks at every tensor of a plan, see there for what and why.

A call receives the address of twelve int64 numbers: 0 addresses of torch's functions, 1 rows of facts, 2 starts and 3
ends of the intervals that the step writes, 4 their number, 5 where an object's class is, in words from its
``at::Tensor``, 6 whether to record, 7 number of rows, 8 next row to take (the threads share the work through this
counter), 9 set to 0 unless all is as recorded, 10 facts about wrappers (0 if no tensor has one), 11 whether to
compare what describes the placements of their gradients.

A row of facts: 0 where the ``at::Tensor`` is, 1 address of its data, 2 hash of its layout, 3 and 4 the same of its
gradient, 5 bytes of the gradient, 6 where a table keeps the gradient's address (0 nowhere, -1 for state tensors). If
the tensor stands for the inside of a wrapper (a DTensor), it has no gradient of its own: 7 where the ``at::Tensor`` of
the wrapper is (0 for other tensors), 8 the object that is inside, 9 the object that describes the placements of its
gradient, 10 where the ``at::Tensor`` inside its gradient was found, 11 the same of that gradient (0 if there is none).

Facts about wrappers: 0 their class, 1 the class of what is inside, 2 where a TensorImpl keeps its object, in words; and
in words from an object's ``at::Tensor``: 3 what is inside a wrapper, 4 what describes it; 5 the bytes from an object to
its ``at::Tensor``.

Torch's functions read scattered memory: the TensorImpl, the storage and the autograd data of each tensor and of its
gradient, one found through the other. With cold caches a step would wait for each of them in turn. So the loop
prefetches them in stages, a few rows ahead (measured for 1,000 tensors: 0.15 ms instead of 0.4 ms).
"""

from __future__ import annotations

from descend.backends.cpu.intrinsics import call_address, fetch_add, load_int, local_word, prefetch_word, store_int
from descend.backends.cpu.kernels import OPTIONS, assembly, njit

ROW = 96  # bytes of a row of facts
BLOCK = 64  # rows that a thread takes at a time
AHEAD = 8  # rows between two stages


def probe_kernel() -> str:
    """LLVM assembly of the probe."""

    @njit
    def fact(functions: int, which: int, tensor: int, scratch: int) -> int:
        store_int(scratch, 0, 0)
        call_address(load_int(functions, which), tensor, scratch)
        return load_int(scratch, 0)

    @njit
    def grad_of(functions: int, tensor: int) -> int:
        return call_address(load_int(functions, 9), load_int(tensor, 0), 0)

    @njit
    def grad_in(functions: int, row: int) -> int:
        """Where the gradient of a row is: inside that of its wrapper if it has one."""
        return load_int(row, 10) if load_int(row, 7) != 0 else grad_of(functions, load_int(row, 0))

    @njit
    def mixed(seed: int, value: int) -> int:
        seed = (seed ^ value) * 0x100000001B3
        return seed ^ (seed >> 29)

    @njit
    def layout(functions: int, tensor: int, scratch: int) -> int:
        """A hash of dtype, device, layout, sign bit, sizes and strides; odd for strided tensors, 0 for no tensor."""
        if fact(functions, 0, tensor, scratch) & 1 == 0:
            return 0
        kind = fact(functions, 3, tensor, scratch)
        seed = mixed(mixed(fact(functions, 1, tensor, scratch), fact(functions, 2, tensor, scratch)), kind)
        seed = mixed(seed, call_address(load_int(functions, 8), tensor, 0) & 1)
        if kind != 0:  # sparse: what it holds is read at every step
            return (seed | 3) - 1
        sizes, strides = fact(functions, 5, tensor, scratch), fact(functions, 6, tensor, scratch)
        if sizes == 0 or strides == 0:  # a nested tensor has none
            return (seed | 3) - 1
        for dim in range(fact(functions, 4, tensor, scratch)):
            seed = mixed(mixed(seed, load_int(sizes, dim)), load_int(strides, dim))
        return seed | 1

    @njit
    def meets(start: int, end: int, starts: int, ends: int, count: int) -> bool:
        """Whether [start, end) meets one of the sorted, disjoint intervals."""
        low, high = 0, count
        while low < high:
            middle = (low + high) // 2
            if load_int(ends, middle) > start:
                high = middle
            else:
                low = middle + 1
        return low < count and load_int(starts, low) < end

    @njit
    def prefetch_impl(tensor: int) -> None:
        impl = load_int(tensor, 0)
        for line in range(4):
            prefetch_word(impl, 16 * line)

    @njit
    def prefetch_parts(tensor: int) -> None:
        """Prefetch the storage and the autograd data of a tensor.

        Their places in a TensorImpl are those of torch 2.13; elsewhere this would prefetch in vain, and harm nothing.
        """
        impl = load_int(tensor, 0)
        for part in (2, 3):
            where = load_int(impl, part)
            prefetch_word(where, 0)
            prefetch_word(where, 16)

    @njit
    def unwrap(call: int, row: int, stage: int, scratch: int) -> bool:
        """Take one of the stages that find the tensor inside a wrapper's gradient; False if something has changed.

        Each stage prefetches what the next one reads.
        """
        functions, facts, wrapper, grad = load_int(call, 0), load_int(call, 10), load_int(row, 7), load_int(row, 11)
        if stage == 0:
            prefetch_word(wrapper, 0)
        elif stage == 1:
            prefetch_impl(wrapper)
        elif stage == 2:
            prefetch_parts(wrapper)
        elif stage == 3:
            grad = grad_of(functions, wrapper)
            store_int(row, 10, grad)  # if it is none, this says so
            store_int(row, 11, grad if fact(functions, 0, grad, scratch) & 1 else 0)
            prefetch_word(load_int(grad, 0), 2 * load_int(facts, 2))
            return load_int(wrapper, load_int(facts, 3)) == load_int(row, 8)
        elif grad == 0:
            return True
        elif stage == 4:
            found = load_int(load_int(grad, 0), load_int(facts, 2)) + load_int(facts, 5)
            store_int(row, 11, found)
            prefetch_word(found, 2 * load_int(call, 5))
            prefetch_word(found, 2 * load_int(facts, 4))
        elif stage == 5:
            if grad == load_int(facts, 5):  # no object
                return False
            inside = load_int(grad, load_int(facts, 3)) + load_int(facts, 5)
            store_int(row, 10, inside)
            prefetch_word(inside, 0)
            is_wrapper = load_int(grad, load_int(call, 5)) == load_int(facts, 0)
            is_described = load_int(call, 11) == 0 or load_int(grad, load_int(facts, 4)) == load_int(row, 9)
            return is_wrapper and is_described
        else:
            return load_int(load_int(row, 10), load_int(call, 5)) == load_int(facts, 1)
        return True

    @njit
    def unwrap_all(call: int, first: int, last: int, scratch: int) -> bool:
        for stage in range(7):
            for i in range(first, last):
                row = load_int(call, 1) + ROW * i
                if load_int(row, 7) != 0 and not unwrap(call, row, stage, scratch):
                    return False
        return True

    @njit
    def prefetch(functions: int, rows: int, i: int, first: int, last: int) -> None:
        """Prefetch for four rows ahead of row ``i``, each at another stage; rows outside [first, last) are left out."""
        for stage in range(4):
            ahead = i + (4 - stage) * AHEAD
            if first <= ahead < last:
                row = rows + ROW * ahead
                tensor = load_int(row, 0)
                if stage >= 2:
                    if load_int(row, 6) < 0:
                        continue
                    tensor = grad_in(functions, row)
                if stage % 2 == 0:
                    prefetch_impl(tensor)
                else:
                    prefetch_parts(tensor)

    @njit
    def is_as_recorded(call: int, row: int, scratch: int) -> bool:
        """Whether the facts of a row hold; a gradient that moved is followed. When recording: write them."""
        functions, record, tensor, cell = load_int(call, 0), load_int(call, 6), load_int(row, 0), load_int(row, 6)
        found_layout = mixed(layout(functions, tensor, scratch), load_int(tensor, load_int(call, 5)))
        found_address = fact(functions, 7, tensor, scratch)
        grad_layout, grad_address = 0, 0
        if cell >= 0:  # a parameter; state tensors have no gradient
            grad = grad_in(functions, row)
            grad_layout = layout(functions, grad, scratch)
            if grad_layout & 1 and (record == 1 or grad_layout == load_int(row, 4)):
                grad_address = fact(functions, 7, grad, scratch)
        if record == 1:
            store_int(row, 1, found_address)
            store_int(row, 2, found_layout)
            store_int(row, 3, grad_address)
            store_int(row, 4, grad_layout)
        elif found_address != load_int(row, 1) or found_layout != load_int(row, 2) or grad_layout != load_int(row, 4):
            return False
        elif grad_address != load_int(row, 3):
            end = grad_address + load_int(row, 5)
            if grad_address == 0 or meets(grad_address, end, load_int(call, 2), load_int(call, 3), load_int(call, 4)):
                return False
            store_int(row, 3, grad_address)
            if cell > 0:
                store_int(cell, 0, grad_address)
        return True

    def kernel(call: int) -> None:
        functions, rows, count = load_int(call, 0), load_int(call, 1), load_int(call, 7)
        scratch = local_word()
        lead = 4 * AHEAD if count > 4 * AHEAD else 0  # a few tensors stay in the caches: looking ahead costs 15 ns each
        while True:
            first = fetch_add(call + 64, BLOCK)
            if first >= count:
                break
            last = min(first + BLOCK, count)
            if load_int(call, 10) != 0 and not unwrap_all(call, first, last, scratch):
                store_int(call, 9, 0)
                return
            for i in range(first - lead, last):
                if lead > 0:
                    prefetch(functions, rows, i, first, last)
                if i >= first and not is_as_recorded(call, rows + ROW * i, scratch):
                    store_int(call, 9, 0)
                    return

    return assembly(kernel, OPTIONS)
