"""How work is cut for GPUs. Unmeasured: chosen by Little's law for an H100 or H200, to be tuned by benchmarks/gpu.py.

Memory that answers after about 0.7 us and delivers 4.8 TB/s is busy while 3.4 MB are under way, 25 KB on each of 132
multiprocessors. A thread of AdamW in float32 has 2 loads of 16 bytes of each of 4 tensors under way, 128 bytes; the
4 warps of a program 16 KB. At no more than 64 registers a thread, 8 programs share a multiprocessor: 128 KB, so that
programs may wait for tables, or for nothing, most of the time.
"""

from __future__ import annotations

WARPS = 4  # of a program
BLOCK = 1024  # elements that a program has under way: 8 a thread, 16 bytes of the narrowest dtype
