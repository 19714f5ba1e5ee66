"""The loop behind ``probe.NativeProbe``: it looks at every tensor of a plan, see there for what and why.

A call receives the address of ten int64 numbers: 0 addresses of torch's functions, 1 eight bytes of scratch, 2 whether
to record, 3 handles, 4 rows of facts, 5 number of handles, 6 starts and 7 ends of the intervals that the step writes,
8 their number, 9 set to 1 if all is as recorded. A row of facts: address, layout, the gradient's layout and address,
where a table keeps the gradient's address (0 nowhere, -1 for state tensors), bytes of the gradient.
"""

from __future__ import annotations

from descend.backends.cpu.intrinsics import call_address, load_int, store_int
from descend.backends.cpu.kernels import OPTIONS, assembly, njit


def probe_kernel() -> str:
    """LLVM assembly of the probe."""

    @njit
    def fact(functions: int, which: int, tensor: int, scratch: int) -> int:
        store_int(scratch, 0, 0)
        call_address(load_int(functions, which), tensor, scratch)
        return load_int(scratch, 0)

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

    def kernel(call: int) -> None:
        functions, scratch, record = load_int(call, 0), load_int(call, 1), load_int(call, 2)
        tensors, expected, count = load_int(call, 3), load_int(call, 4), load_int(call, 5)
        starts, ends, written = load_int(call, 6), load_int(call, 7), load_int(call, 8)
        for i in range(count):
            tensor, row = load_int(tensors, i), expected + 48 * i
            found_layout = layout(functions, tensor, scratch)
            found_address = fact(functions, 7, tensor, scratch)
            grad_layout, grad_address, cell = 0, 0, load_int(row, 4)
            if cell >= 0:  # a parameter; state tensors have no gradient
                grad = call_address(load_int(functions, 9), load_int(tensor, 0), 0)
                grad_layout = layout(functions, grad, scratch)
                if grad_layout & 1 and (record == 1 or grad_layout == load_int(row, 2)):
                    grad_address = fact(functions, 7, grad, scratch)
            if record == 1:
                store_int(row, 0, found_address)
                store_int(row, 1, found_layout)
                store_int(row, 2, grad_layout)
                store_int(row, 3, grad_address)
            elif (
                found_address != load_int(row, 0) or found_layout != load_int(row, 1) or grad_layout != load_int(row, 2)
            ):
                return
            elif grad_address != load_int(row, 3):
                if grad_address == 0 or meets(grad_address, grad_address + load_int(row, 5), starts, ends, written):
                    return
                store_int(row, 3, grad_address)
                if cell > 0:
                    store_int(cell, 0, grad_address)
        store_int(call, 9, 1)

    return assembly(kernel, OPTIONS)
