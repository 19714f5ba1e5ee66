"""Lazily committed zeros: which pages exist, when they are committed, and what copies commit."""

from __future__ import annotations

import copy
import errno
import gc
import io
import json
import mmap
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from descend.state import lazy_memory

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.int32, torch.bool)
MIB = 2**20
has_pages = pytest.mark.skipif(
    not (sys.platform.startswith("linux") and hasattr(mmap, "MADV_NOHUGEPAGE") and mmap.PAGESIZE == 4096),
    reason="needs Linux with pages of 4 KiB",
)


PRELUDE = """
import contextlib, io, json, os, resource, sys, traceback
import numpy as np, torch
from descend.state import lazy_memory
torch.set_num_threads(1)
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE") / 1e6
torch.zeros(1000).add_(1).sum().item(); torch.randperm(1000); lazy_memory.copied(torch.ones(2**19))
last, faulted = resident(), 0
def grown():
    global last
    before, last = last, resident()
    return last - before
def faults():
    global faulted
    before, faulted = faulted, resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    return faulted - before
def answer(code):
    module, printed = dict(vars(lazy_memory)), io.StringIO()
    grown()
    try:
        with contextlib.redirect_stdout(printed):
            exec(code, {**globals()})
    except Exception:
        return traceback.format_exc()
    finally:
        vars(lazy_memory).update(module)
    return [float(line) for line in printed.getvalue().split()]
for line in sys.stdin:
    print(json.dumps(answer(json.loads(line))), flush=True)
"""
Measure = Callable[[str], list[float]]


def new_process() -> subprocess.Popen[str]:
    """A process that runs the code of each line, and answers with the numbers that it prints.

    There, ``grown()`` returns the MB that have become resident since its last call, and ``faults()`` the page faults.
    """
    # Arenas of malloc would count as well.
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", PRELUDE]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def measured_by(process: subprocess.Popen[str], code: str) -> list[float]:
    process.stdin.write(json.dumps(textwrap.dedent(code)) + "\n")
    process.stdin.flush()
    answer = json.loads(process.stdout.readline())
    assert isinstance(answer, list), answer
    return answer


@pytest.fixture(scope="module")
def measured() -> Iterator[Measure]:
    """Return the numbers that code prints in a process that does nothing else; nothing is left of earlier code."""
    with new_process() as process:
        yield lambda code: measured_by(process, code)


@has_pages
def test_only_written_pages_are_resident(measured: Measure) -> None:
    total = 10_000_000 * 64 * 4 / 1e6  # MB
    unused, neighbours, scattered = measured("""
        table = lazy_memory.zeros((10_000_000, 64), torch.float32)
        print(grown())
        table[5_000_000:5_100_000] = 1
        print(grown())
        rows = torch.arange(0, 10_000_000, 100)
        grown()
        table.index_fill_(0, rows, 2.0)
        print(grown())
        """)
    assert unused < 1
    assert 0.0099 * total < neighbours < 0.0105 * total
    assert 0.15 * total < scattered < 0.165 * total  # a page each


TABLE = "table = lazy_memory.zeros((400_000, 64), torch.float32)\n"  # 102.4 MB, 49 blocks of 2 MiB
SCATTERED_ROWS = "np.arange(0, 400_000, 400)"
NEIGHBOURS = "np.arange(20_000)"  # 5.12 MB


@has_pages
@pytest.mark.parametrize(
    ("rows", "pages", "expected"),
    [
        (SCATTERED_ROWS, "auto", 102.4),
        (SCATTERED_ROWS, "touched", 4.096),
        (SCATTERED_ROWS, "all", 102.4),
        (NEIGHBOURS, "auto", 5.12),
        ("np.arange(190_000)", "auto", 48.64),
        ("np.arange(210_000)", "auto", 102.4),
        (NEIGHBOURS, "touched", 5.12),
        (NEIGHBOURS, "all", 102.4),
        ("np.arange(0)", "all", 0),
        ("np.array([0, 200_000, 399_999])", "auto", 0.012288),
    ],
)
def test_rows_and_policy_decide_which_pages_are_committed(
    rows: str, pages: str, expected: float, measured: Measure
) -> None:
    committed, again = measured(f"""
        {TABLE}
        rows = {rows}
        lazy_memory.commit_rows([table], rows[:1], len(table), "touched")
        grown()
        lazy_memory.commit_rows([table], rows, len(table), {pages!r})
        print(grown())
        lazy_memory.commit_rows([table], rows, len(table), {pages!r})
        print(grown())
        """)
    assert abs(committed - expected) < 2.2
    assert again < 0.2


@has_pages
def test_rows_that_scatter_later_commit_the_table_then(measured: Measure) -> None:
    neighbours, scattered = measured(f"""
        {TABLE}
        for rows in ({NEIGHBOURS}, {SCATTERED_ROWS}):
            grown()
            lazy_memory.commit_rows([table], rows, len(table))
            print(grown())
        """)
    assert neighbours < 7
    assert scattered > 95


@has_pages
def test_stragglers_among_neighbours_do_not_commit_the_table(measured: Measure) -> None:
    """Each step reads most pages of the first fifth of the table; its new pages alone would look scattered."""
    (grown,) = measured(f"""
        {TABLE}
        generator = np.random.default_rng(0)
        grown()
        for _ in range(5):
            rows = np.unique(generator.integers(80_000, size=10_000))
            lazy_memory.commit_rows([table], rows, len(table))
        print(grown())
        """)
    assert 20 < grown < 24


@has_pages
@pytest.mark.parametrize(("available", "expected"), [(0, 4.096), (204, 4.096), (206, 102.4)])
def test_scarce_memory_keeps_pages_uncommitted(available: int, expected: float, measured: Measure) -> None:
    (committed,) = measured(f"""
        {TABLE}
        lazy_memory.available_memory = lambda: {available}e6
        grown()
        lazy_memory.commit_rows([table], {SCATTERED_ROWS}, len(table))
        print(grown())
        """)
    assert abs(committed - expected) < 2


@has_pages
def test_all_tables_share_the_memory_that_may_be_committed(measured: Measure) -> None:
    """Half of 650 MB are three tables; the memory of one that is freed counts again."""
    sizes = measured(f"""
        begin = resident()
        lazy_memory.available_memory = lambda: 650e6 - (resident() - begin) * 1e6
        tables = []
        for i in range(6):
            if i == 4:
                del tables[0]
            tables.append(lazy_memory.zeros((400_000, 64), torch.float32))
            grown()
            lazy_memory.commit_rows(tables[-1:], {SCATTERED_ROWS}, 400_000)
            print(round(grown(), -1))
        """)
    assert sizes == [100, 100, 100, 0, 100, 0]


@has_pages
@pytest.mark.parametrize("length", [1, 25, 1024, 1500, 5000])
def test_committed_rows_are_written_without_faults(length: int, measured: Measure) -> None:
    before, after = measured(f"""
        table = lazy_memory.zeros((2_000_000 // {length}, {length}), torch.float32)
        rows = np.arange(3, len(table), 5_000 // {length} + 2)
        view = table.numpy()
        faults()
        lazy_memory.commit_rows([table], rows, len(table), "touched")
        print(faults())
        for row in rows:
            view[row] = 1
        print(faults())
        """)
    assert before > 200
    assert after < 20


@has_pages
def test_a_committed_table_is_written_without_faults(measured: Measure) -> None:
    before, after = measured(f"""
        {TABLE}
        faults()
        lazy_memory.commit([table])
        print(faults())
        table.numpy().fill(1)
        print(faults())
        """)
    assert before < 26_000
    assert after < 20


@has_pages
@pytest.mark.parametrize("error", [None, errno.EINVAL, errno.ENOMEM])
def test_committing_keeps_what_is_written(error: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """On older kernels (EINVAL) too, and where memory runs out (ENOMEM)."""
    asked = []

    def madvise(mapping: mmap.mmap, option: int, *args: int) -> None:
        if option == lazy_memory.POPULATE_WRITE:
            asked.append(option)
            if error is not None:
                raise OSError(error, os.strerror(error))
        mmap.mmap.madvise(mapping, option, *args)

    monkeypatch.setattr(lazy_memory._Mapping, "madvise", madvise)
    table = lazy_memory.zeros((6000, 101), torch.bfloat16)
    expected = torch.zeros_like(table)
    rows = torch.arange(0, 6000, 7)
    for each in (table, expected):
        each[rows] = torch.arange(101).to(torch.bfloat16)
    for _ in range(2):
        lazy_memory.commit_rows([table], np.arange(6000), 6000, "all")
        lazy_memory.commit([table])
    assert torch.equal(table, expected)
    assert len(asked) == 1


@has_pages
def test_small_tensors_are_committed_at_once(measured: Measure) -> None:
    (after,) = measured("""
        tables = [lazy_memory.zeros((4_000, 64), torch.float32).numpy() for _ in range(20)]
        faults()
        for table in tables:
            table[:] = 1
        print(faults())
        """)
    assert after < 20  # of 5,000 pages


def test_other_tensors_are_left_alone() -> None:
    tensors = [torch.ones(MIB), torch.ones(3, 5), torch.empty(0, 4), torch.ones(4, device="meta"), torch.tensor(1.0)]
    lazy_memory.commit(tensors)
    lazy_memory.commit_rows(tensors, np.arange(3), 3, "all")
    assert all(bool((tensor == 1).all()) for tensor in tensors if not tensor.is_meta)


def test_the_mapping_of_a_freed_table_is_forgotten() -> None:
    table = lazy_memory.zeros(MIB, torch.float32)
    address = table.data_ptr()
    del table
    gc.collect()
    assert address not in lazy_memory._mappings


@has_pages
def test_copies_are_resident_where_the_source_is_not_zero(measured: Measure) -> None:
    same, wider, narrower, unused = measured("""
        table = lazy_memory.zeros((1_000_000, 64), torch.float32)
        table[500_000:600_000] = 1
        grown()
        kept = lazy_memory.copied(table)
        print(grown())
        kept = lazy_memory.copied(table, torch.float64)
        print(grown() + 25.6)
        kept = lazy_memory.copied(table, torch.bfloat16)
        print(grown() + 51.2)
        del kept
        grown()
        kept = lazy_memory.copied(lazy_memory.zeros((10_000_000, 64), torch.float32))
        print(grown())
        """)
    for cost, expected in ((same, 25.6), (wider, 51.2), (narrower, 12.8)):
        assert abs(cost - expected) < 2
    assert unused < 2


@has_pages
def test_memory_is_freed_with_the_last_view(measured: Measure) -> None:
    filled, freed = measured("""
        table = lazy_memory.zeros(50_000_000, torch.float32)
        view = table[10:].fill_(1)
        del table
        print(grown())
        del view
        print(grown())
        """)
    assert filled > 199
    assert freed < -199


@has_pages
def test_copying_needs_little_memory_beside_the_copy() -> None:
    """The peak while a transposed source is converted."""
    with new_process() as process:  # the peak is that of its whole life
        (peak,) = measured_by(
            process,
            """
            source = lazy_memory.zeros((64, 1_000_000), torch.float32)
            source[:, :100] = 1
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            kept = lazy_memory.copied(source.t(), torch.float64)
            print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3)
            """,
        )
    assert peak < 100  # of 512 MB


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_writes_to_its_own() -> None:
    table = lazy_memory.zeros(MIB, torch.float32)
    table[:10] = 1
    child = os.fork()
    if child == 0:
        table.numpy()[:] = 7
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert table.sum() == 10


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (1023,), (0, 5), (3, 4), (1023, 1025), (2**20 + 1,), (1, 2**20)])
def test_zeros_are_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    table = lazy_memory.zeros(shape, dtype)
    expected = torch.zeros(shape, dtype=dtype)
    assert (table.shape, table.dtype, table.is_contiguous()) == (expected.shape, expected.dtype, True)
    assert torch.equal(table, expected)
    table.fill_(1)
    assert torch.equal(table, torch.ones(shape, dtype=dtype))


def test_zeros_take_one_size() -> None:
    assert lazy_memory.zeros(3, torch.int64).shape == (3,)
    assert lazy_memory.zeros(torch.Size([2, 3]), torch.int64).shape == (2, 3)


def test_tables_are_tensors_like_others() -> None:
    table = lazy_memory.zeros((1000, 1000), torch.float32)
    table[3] = 5
    file = io.BytesIO()
    torch.save(table, file)
    file.seek(0)
    expected = torch.zeros(1000, 1000)
    expected[3] = 5
    for other in (torch.load(file), copy.deepcopy(table), table.clone(), table.to(torch.float64).float()):
        assert torch.equal(other, expected)
    row = table[3]
    del table
    gc.collect()
    assert row.sum() == 5000  # a view keeps the memory


def sparsely(shape: tuple[int, ...], dtype: torch.dtype, used: float) -> torch.Tensor:
    """Zeros but for some stretches."""
    if used == 1:
        return torch.randn(shape).to(dtype)
    tensor = torch.zeros(shape, dtype=dtype)
    flat = tensor.view(-1)
    for first in torch.randint(max(1, len(flat)), (int(used * len(flat) / 500),)).tolist():
        flat[first : first + 500] = torch.randn(len(flat[first : first + 500])).to(dtype)
    return tensor


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("used", [0.0, 0.01, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (1023,), (2_000_003,), (500_001, 3)])
def test_copies_are_equal(shape: tuple[int, ...], used: float, dtype: torch.dtype) -> None:
    source = sparsely(shape, dtype, used)
    copied = lazy_memory.copied(source)
    assert copied.dtype == dtype
    assert torch.equal(copied, source)
    assert copied.numel() == 0 or copied.data_ptr() != source.data_ptr()


@pytest.mark.parametrize("target", DTYPES[:4], ids=str)
@pytest.mark.parametrize("dtype", [*DTYPES[:4], torch.bool], ids=str)
def test_copies_convert(dtype: torch.dtype, target: torch.dtype) -> None:
    source = sparsely((3_000_001,), dtype, 0.1)
    assert torch.equal(lazy_memory.copied(source, target), source.to(target))


STRIDED = {
    "transposed": lambda: sparsely((3000, 2001), torch.float32, 0.1).t(),
    "every third": lambda: sparsely((9_000_000,), torch.float32, 0.1)[1::3],
    "shifted by a byte": lambda: sparsely((3_000_001,), torch.bool, 0.1)[1:],
    "expanded": lambda: torch.zeros(1, 1).expand(3000, 1001),
    "long and thin": lambda: sparsely((2, 3_000_000), torch.float64, 0.1).t(),
    "one row": lambda: sparsely((7_000_000, 2), torch.float64, 0.1)[None, :, 1],
    "permuted": lambda: sparsely((30, 400, 500), torch.float32, 0.1).permute(2, 0, 1),
    "conjugate": lambda: sparsely((3_000_000,), torch.complex64, 0.1).conj(),
    "with a gradient": lambda: sparsely((3_000_000,), torch.float32, 0.1).requires_grad_(),
}


@pytest.mark.parametrize("make", STRIDED.values(), ids=STRIDED)
def test_copies_are_contiguous(make: Any) -> None:
    source = make()
    for dtype in (source.dtype, torch.complex128):
        copied = lazy_memory.copied(source, dtype)
        assert copied.is_contiguous()
        assert not copied.requires_grad
        assert torch.equal(copied, source.detach().to(dtype).contiguous())


@pytest.mark.parametrize("at", [0, 1023, 5000, 999_999])
def test_negative_zero_is_kept(at: int) -> None:
    source = torch.zeros(MIB)
    source[at] = -0.0
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        assert np.signbit(lazy_memory.copied(source, dtype).double().numpy()).nonzero()[0].tolist() == [at]


def test_copies_with_few_zero_pages_are_in_ordinary_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(lazy_memory, "zeros", lambda *args: made.append(args) or torch.zeros(args[0], dtype=args[1]))
    dense = torch.ones(MIB)
    assert torch.equal(lazy_memory.copied(dense), dense)
    assert not made
    dense[: MIB // 5] = 0
    assert torch.equal(lazy_memory.copied(dense), dense)
    assert made


def test_results_are_the_same_without_mappings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(mmap, "MADV_NOHUGEPAGE", raising=False)
    test_zeros_are_zeros((1023, 1025), torch.float32)
    test_copies_are_equal((2_000_003,), 0.01, torch.float32)


@has_pages
def test_a_refused_mapping_falls_back_to_ordinary_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("no")

    monkeypatch.setattr(lazy_memory, "_Mapping", refuse)
    test_zeros_are_zeros((1023, 1025), torch.float32)
