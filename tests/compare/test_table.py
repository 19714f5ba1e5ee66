"""The terminal's table in any width."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from descend.compare.records import Comparison, Run
from descend.compare.table import show

LABELS = ("adamw", "torch.sgd:momentum=0.9,nesterov=true", "sgd:lr=[1e30]")
SETTINGS = {"steps": 40, "batch_size": 8, "seeds": [0, 1, 2], "sweep": [], "nproc": 1, "parallel": None}
COMPARISON = Comparison("digits", "", "cross-entropy in nats", "accuracy", False, SETTINGS, {}, {}, "", tuned=None)


def made(label: str, seed: int, status: str = "finished", loss: float = 0.25) -> Run:
    return Run(
        label,
        label,
        "torch.optim.SGD",
        {},
        0.1,
        seed,
        status,
        diverged_at=7 if status == "diverged" else None,
        losses=[2.0] * 20 + [loss] * 20,
        seconds=[0.01 * i for i in range(40)],
        evaluations=[*range(1, 41)],
        test_losses=[0.5 + seed / 100],
        test_metrics=[0.9],
        state_bytes=[12_000],
        ranks=[{"first_step_seconds": 0.5, "optimizer_seconds": 1e-4, "state_bytes": 12_000}],
        parameters=5_900,
    )


def shown(width: int, runs: list[Run]) -> str:
    stream = io.StringIO()
    show(Console(file=stream, width=width), COMPARISON, runs)
    return stream.getvalue()


def every() -> list[Run]:
    return [
        made(label, seed, "diverged" if label == LABELS[2] else "finished") for seed in range(3) for label in LABELS
    ]


@pytest.mark.parametrize("width", [30, 40, 60, 80, 120, 200])
def test_names_and_losses_are_there_in_every_width(width: int) -> None:
    text = shown(width, every())
    assert max(map(len, text.splitlines())) <= width
    joined = text.replace("\n", "").replace(" ", "")
    assert all(label in joined or label[:30] in joined for label in LABELS)
    assert "0.2500" in text
    assert "divergedat" in joined or "diverged3of3" in joined
    assert "\x1b" not in text


def test_wide_terminal_has_every_column() -> None:
    text = shown(160, every())
    assert "Not shown" not in text
    assert "100 us" in text
    assert "12 kB" in text
    assert "2.03 B" in text


def test_hidden_columns_are_named() -> None:
    assert "Not shown in 80 columns: " in shown(80, every())


def test_diverged_run_has_no_number() -> None:
    [line] = [line for line in shown(160, every()).splitlines() if line.lstrip().startswith("sgd:lr=")]
    assert line.split()[2:4] == ["-", "-"]


def test_one_of_three_that_diverged_counts_as_infinite() -> None:
    runs = [made("a", 0), made("a", 1, "diverged"), made("a", 2, loss=0.5)]
    text = shown(160, runs)
    assert "diverged 1 of 3 at step 7" in text
    assert "0.5000" in text
    assert "to diverged" in text


def test_run_that_blew_up_and_came_back_says_so() -> None:
    run = made("a", 0)
    run.losses = [*run.losses, 1e15, *run.losses]
    assert f"blew up: 1e+15 at step {len(run.losses) // 2 + 1}" in shown(120, [run])


def test_runs_that_chose_a_rate_are_not_shown() -> None:
    run = made("a", 10_000)
    run.tuning = True
    assert "0.25" not in shown(120, [run])


def test_times_are_of_runs_alone() -> None:
    together = made("a", 1)
    together.alone, together.ranks = False, [{"first_step_seconds": 9.0, "optimizer_seconds": 9.0, "state_bytes": 1}]
    text = shown(160, [made("a", 0), together])
    assert "100 us" in text
    assert "9 s" not in text
    assert "had the machine to themselves" in text
