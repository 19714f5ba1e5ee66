"""``results.jsonl`` survives crashes, and nothing is overwritten."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from descend.compare.journal import NAMES, Journal, open_journal, read
from descend.compare.records import Comparison, Run
from descend.reporting.errors import UsageError

COMPARISON = Comparison("digits", "", "nats", "accuracy", False, {"steps": 3}, {"torch": "2"}, {}, "today")
OTHER = Comparison("digits", "", "nats", "accuracy", False, {"steps": 4}, {"torch": "2"}, {}, "today")


def has_two(runs: Sequence[Run]) -> bool:
    return len(runs) == 2


OPEN: list[Journal] = []


def opened(base: Path, comparison: Comparison = COMPARISON, overwrite: bool = False) -> Journal:
    OPEN.append(open_journal(base, comparison, has_two, overwrite))
    return OPEN[-1]


@pytest.fixture(autouse=True)
def _close() -> Iterator[None]:
    yield
    while OPEN:
        OPEN.pop().close()


def run(seed: int) -> Run:
    return Run("sgd", "sgd", "SGD", {"lr": 0.1}, 0.1, seed, "diverged", losses=[1.0, math.nan], seconds=[0.1, 0.2])


def write(base: Path, *seeds: int) -> Path:
    journal = opened(base)
    for seed in seeds:
        journal.append(run(seed))
    journal.close()
    return journal.folder


def test_runs_come_back_as_they_were(tmp_path: Path) -> None:
    comparison, [found] = read(write(tmp_path, 5))
    assert (comparison, found.seed, found.status) == (COMPARISON, 5, "diverged")
    assert found.losses[0] == 1.0
    assert math.isnan(found.losses[1])


@pytest.mark.parametrize("torn", ["", '{"label": "sgd", "lo', '{"label": "sgd"}'])
def test_unfinished_comparison_goes_on_after_its_last_whole_line(tmp_path: Path, torn: str) -> None:
    folder = write(tmp_path / "out", 0)
    with (folder / "results.jsonl").open("a") as file:
        file.write(torn)
    journal = opened(tmp_path / "out")
    assert (journal.folder, [run.seed for run in journal.runs]) == (folder, [0])
    journal.append(run(1))
    journal.close()
    assert [run.seed for run in read(folder)[1]] == [0, 1]


def test_finished_comparison_is_left_alone(tmp_path: Path) -> None:
    write(tmp_path / "out", 0, 1)
    assert write(tmp_path / "out", 2) == tmp_path / "out-2"
    assert write(tmp_path / "out", 3) == tmp_path / "out-2"
    assert [run.seed for run in read(tmp_path / "out")[1]] == [0, 1]
    assert [run.seed for run in read(tmp_path / "out-2")[1]] == [2, 3]


def test_other_comparison_gets_another_folder(tmp_path: Path) -> None:
    write(tmp_path / "out", 0)
    assert opened(tmp_path / "out", OTHER).folder == tmp_path / "out-2"


@pytest.mark.parametrize("name", NAMES)
def test_files_of_unknown_origin_are_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine\n")
    assert opened(tmp_path / "out").folder == tmp_path / "out-2"
    assert (tmp_path / "out" / name).read_text() == "mine\n"


def test_overwrite_replaces_results_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path / "out", 0, 1)
    for name in ("report.html", "notes.txt"):
        (tmp_path / "out" / name).write_text("old")
    journal = opened(tmp_path / "out", overwrite=True)
    assert (journal.folder, journal.runs) == (tmp_path / "out", [])
    assert sorted(path.name for path in journal.folder.iterdir()) == ["notes.txt", "results.jsonl"]


def test_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    first = opened(tmp_path / "out")
    assert opened(tmp_path / "out").folder == tmp_path / "out-2"
    with pytest.raises(UsageError, match="by another process"):
        opened(tmp_path / "out", overwrite=True)
    first.append(run(0))
    assert len(read(tmp_path / "out")[1]) == 1


def test_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(UsageError, match=r"out is a file: give a folder"):
        opened(tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"
