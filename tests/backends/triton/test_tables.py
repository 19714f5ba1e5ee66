"""Uploads: only what has changed, from memory that no copy still reads; and what a CUDA graph replays."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from descend.backends.triton import library, tables, tuning


class Event:
    """Stands for a CUDA event: the test says when the copy before it is over."""

    def __init__(self) -> None:
        self.is_over = False

    def record(self) -> None:
        self.is_over = False

    def query(self) -> bool:
        return self.is_over


class Piece:
    """Stands for pinned memory."""

    made: list[Piece] = []  # noqa: RUF012

    def __init__(self, like: torch.Tensor) -> None:
        self.tensor = torch.zeros(like.shape, dtype=like.dtype)
        self.array = self.tensor.numpy()
        self.event = Event()
        self.made.append(self)


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> tables.Table:
    """A table on a device that remembers nothing, so that only the traffic is seen."""
    monkeypatch.setattr(tables, "_Piece", Piece)
    monkeypatch.setattr(tables, "_captured", [])
    monkeypatch.setattr(Piece, "made", [])
    return tables.Table((2, 3), torch.int64, torch.device("meta"))


def content(number: int) -> np.ndarray:
    return np.full((2, 3), number, np.int64)


def test_equal_content_is_not_uploaded_again(table: tables.Table) -> None:
    rows = content(1)
    assert table.upload(rows)
    assert not table.upload(rows)
    rows[1, 2] = 5
    assert table.upload(rows)
    assert not table.upload(rows)


def test_memory_is_used_again_when_its_copy_is_over(table: tables.Table) -> None:
    table.upload(content(1))
    table.upload(content(2))
    used = [piece for piece in Piece.made if piece.array.any()]
    assert [int(piece.array[0, 0]) for piece in used] == [1, 2], "a copy may still read the first"
    used[0].event.is_over = True
    count = len(Piece.made)
    for number in range(3, 9):
        table.upload(content(number))
        for piece in used:
            piece.event.is_over = True
    assert len(Piece.made) == count, "a steady state allocates nothing"
    assert {int(piece.array[0, 0]) for piece in used} == {7, 8}


def test_graph_has_memory_of_its_own_for_good(table: tables.Table) -> None:
    table.upload(content(1))
    count = len(Piece.made)
    assert table.upload(content(1), is_capturing=True), "a replay may follow other steps"
    assert len(Piece.made) == count, "nothing is allocated while a graph is captured"
    ((_, piece),) = tables._captured
    for number in range(2, 6):
        assert table.upload(content(number))
        for other in Piece.made:
            other.event.is_over = True
    assert (piece.array == 1).all()
    assert table.upload(content(5)), "a replay may have come in between"


def test_table_on_the_host_holds_every_bit() -> None:
    table = tables.Table((2,), torch.float32, torch.device("cpu"))
    for numbers in ([0.0, float("nan")], [-0.0, float("inf")]):
        given = np.array(numbers, np.float32)
        assert table.upload(given)
        assert table.tensor.numpy().tobytes() == given.tobytes()


def test_graph_keeps_what_its_launches_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "_captured", [])
    tables.keep(kept := torch.zeros(1))
    assert tables._captured == [(kept,)]


@pytest.mark.parametrize("sizes", [[0], [1], [1023, 1024, 1025], [0, 3_000_000, 7, 0, 40_000_000]])
def test_chunks_cover_every_element_once(sizes: list[int]) -> None:
    rows = np.arange(len(sizes)) % 2
    chunks = tuning.chunk_table(np.array(sizes), rows)
    for tensor, size in enumerate(sizes):
        mine = chunks[chunks[:, 0] == tensor]
        assert (mine[:, 1] == rows[tensor]).all()
        assert mine[:, 3].sum() == size
        assert (mine[1:, 2] == np.cumsum(mine[:, 3])[:-1]).all()
        assert (mine[:, 2] % max(tuning.NORM, tuning.block([torch.bfloat16])) == 0).all()
        assert (mine[:, 3] > 0).all()


def test_chunks_are_many_and_long() -> None:
    count = [len(tuning.chunk_table(np.array([size]), np.array([0]))) for size in (10**6, 10**8, 10**9)]
    assert count[0] > 900, "one for each multiprocessor, several times"
    assert count[2] * tuning.CHUNK[1] < 1.01 * 10**9


def test_launcher_gets_addresses_and_constants(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class Compiled:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *arguments: calls.append((grid, arguments))

    kernel = library.scalar_state(torch.float32, False)
    monkeypatch.setattr(kernel, "_compiled", {3: Compiled()})
    tensor = torch.zeros(2)
    kernel.bind(7, torch.device("cuda", 3), tensor, 5)()
    assert calls == [((7, 1, 1), (tensor.data_ptr(), 5, *kernel.constants.values()))]
