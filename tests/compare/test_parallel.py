"""``descend compare --nproc``: several ranks train as one process does, report once, and end together."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from compared import Results, arguments, read, write_nothing
from ranks import on_ranks
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

from descend.command.cli import main
from descend.compare import group, report
from descend.compare.group import Group
from descend.compare.parallel import WAYS
from descend.compare.ranks import Ending, Outcome, Ranks
from descend.compare.run import run
from descend.compare.settings import Settings

MODULE = [sys.executable, "-m", "descend", "compare"]
TIMEOUT = 120  # seconds for a whole command

OPTIMIZERS = ("adamw:max_norm=0.5", "torch.adamw")


def run_in(dtype: torch.dtype, settings: Settings, ranks: Ranks | None = None) -> int:
    """Run the request with models in ``dtype``, without a report; ``digits`` takes float32 only."""
    torch.set_default_dtype(dtype)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(report, "write", write_nothing)
            return run(settings, ranks)
    finally:
        torch.set_default_dtype(torch.float32)


def run_on_rank(_: int, dtype: torch.dtype, settings: Settings) -> int:
    return run_in(dtype, settings, Group(PrefixStore("compare", _get_default_store())))


def compare(
    out: Path, task: str, *optimizers: str, nproc: int, dtype: torch.dtype = torch.float64, **options: Any
) -> Results:
    """Run the command on ``nproc`` ranks that exist already, and return what it wrote."""
    settings = Settings(task, optimizers, out=out, nproc=nproc, **{"batch_size": 8, "steps": 3, **options})
    assert on_ranks(nproc, run_on_rank, dtype, settings) == [0] * nproc
    return read(out)


def assert_same_curves(several: Results, one: Results, rel: float = 1e-13) -> None:
    for ours, theirs in zip(several[1], one[1], strict=True):
        assert ours["status"] == theirs["status"] == "finished"
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=rel)
        assert ours["test_losses"] == pytest.approx(theirs["test_losses"], rel=rel)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What one process writes about ``text`` in float64."""
    out, threads = tmp_path_factory.mktemp("one"), torch.get_num_threads()
    assert run_in(torch.float64, Settings("text", OPTIMIZERS, steps=3, batch_size=8, threads=1, out=out)) == 0
    torch.set_num_threads(threads)  # this fixture is older than the one that restores them after each test
    return read(out)


@pytest.mark.parametrize("way", WAYS)
def test_curve_is_that_of_one_process(way: str, one: Results, tmp_path: Path) -> None:
    two = compare(tmp_path, "text", *OPTIMIZERS, nproc=2, parallel=way)
    assert_same_curves(two, one)
    settings = [results[0]["settings"] for results in (one, two)]
    assert [(each["nproc"], each["parallel"]) for each in settings] == [(1, None), (2, way)]
    for run_of_one, run_of_two in zip(one[1], two[1], strict=True):
        assert len(run_of_one["ranks"]) == 1
        each = [rank["state_bytes"] for rank in run_of_two["ranks"]]
        shared = 1 if way == "ddp" else 2
        assert each == pytest.approx([run_of_one["state_bytes"][0] / shared] * 2, rel=0.02)
        assert run_of_two["state_bytes"] == each
        assert all(rank["optimizer_seconds"] > 0 for rank in run_of_two["ranks"])


@pytest.mark.slow
def test_curve_of_four_ranks_is_that_of_one_process(one: Results, tmp_path: Path) -> None:
    four = compare(tmp_path, "text", OPTIMIZERS[-1], nproc=4, parallel="fsdp")
    assert_same_curves(four, (one[0], one[1][-1:]))
    assert len(four[1][0]["ranks"]) == 4


def test_sparse_gradients_are_averaged(tmp_path: Path) -> None:
    assert main(arguments(tmp_path / "one", "embeddings", "torch.sparseadam", steps=2, batch_size=8)) == 0
    options = dict(steps=2, nproc=2, parallel="ddp", dtype=torch.float32)  # a table in float64 takes too much memory
    two = compare(tmp_path / "two", "embeddings", "torch.sparseadam", **options)
    assert_same_curves(two, read(tmp_path / "one"), rel=1e-6)
    assert two[1][0]["helper"] == "torch.optim.adam.Adam"


def test_optimizer_that_fails_on_all_ranks_does_not_stop_the_others(tmp_path: Path) -> None:
    settings = Settings("digits", ["torch.sparseadam", "sgd"], steps=3, batch_size=8, nproc=2, out=tmp_path)
    assert on_ranks(2, run_on_rank, torch.float32, settings) == [1, 0]  # rank 0 tells
    _, (failed, finished) = read(tmp_path)
    assert (failed["status"], finished["status"]) == ("failed", "finished")
    assert failed["error"].startswith("RuntimeError: SparseAdam does not support dense gradients")


def test_seeds_and_tuning_on_ranks(tmp_path: Path) -> None:
    settings = dict(steps=2, nproc=2, seeds=2, tune=True, dtype=torch.float32)
    first, runs = compare(tmp_path, "digits", "sgd", **settings)
    reported = [run for run in runs if not run["tuning"]]
    assert [run["seed"] for run in reported] == first["settings"]["seeds"] == [0, 1]
    assert len(runs) == 12


def end_on_rank(rank: int, endings: list[Outcome | None]) -> Ending | None:
    group.GRACE = 0.3
    mine = endings[rank]
    return Group(_get_default_store()).end("run", mine) if mine else None


OUTCOMES = {
    "both well": ([Outcome(3, 10, None), Outcome(3, 20, None)], True, None),
    "the same error": ([Outcome(2, 10, "E: 1"), Outcome(2, 20, "E: 2")], True, "E: "),
    "errors at different steps": ([Outcome(2, 10, "E: 1"), Outcome(3, 20, "E: 1")], False, "rank "),
    "different errors": ([Outcome(2, 10, "E: 1"), Outcome(2, 20, "F: 1")], False, "rank "),
    "one error": ([Outcome(2, 10, None), Outcome(2, 20, "E: 1")], False, "rank 1: E: 1"),
    "one alone": ([None, Outcome(2, 20, "E: 1")], False, "rank 1: E: 1"),
}


@pytest.mark.parametrize("name", OUTCOMES)
def test_ranks_agree_how_a_run_ended(name: str) -> None:
    outcomes, is_common, error = OUTCOMES[name]
    endings = [ending for ending in on_ranks(2, end_on_rank, outcomes) if ending]
    for ending in endings:
        assert ending.is_common == is_common
        assert ending.state_bytes == tuple(outcome and outcome.state_bytes for outcome in outcomes)
        assert (ending.error or "").startswith(error or "")
        assert (ending.error is None) == (error is None)
    assert len({ending.error for ending in endings}) == 1


def test_command_launches_its_ranks_and_reports_once(tmp_path: Path) -> None:
    args = arguments(tmp_path, "digits", "torch.adamw", "torch.sgd", batch_size=8, nproc=2, parallel="fsdp", threads=1)
    done = subprocess.run([*MODULE, *args[1:]], capture_output=True, text=True, timeout=TIMEOUT)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("torch.adamw: lr 0.002, seed 0, 3 steps, loss") == 1
    assert "fsdp on 2 ranks" in done.stdout
    assert "per rank" in done.stdout
    first, runs = read(tmp_path)
    assert first["machine"]["threads"] == 1
    for one in runs:
        assert len(one["state_bytes"]) == 2
        assert one["state_bytes"][0] == one["state_bytes"][1]


def test_error_of_the_ranks_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    assert main(arguments(tmp_path / "out", "digits", "sgd", "torch.adamw:lr=-1", batch_size=8, nproc=2)) == 2
    output, errors = capfd.readouterr()
    assert output.count("\n") <= 1  # the name of the task
    assert errors == "descend compare: --optimizer torch.adamw:lr=-1: Invalid learning rate: -1\n"
    assert {number: signal.getsignal(number) for number in handlers} == handlers
    assert list(tmp_path.iterdir()) == []


# What Python runs first in each process: on rank 1 torch's SGD goes wrong in its third step after the warm-up's three.
FAULT = """
import os
if os.environ.get("RANK") == "1":
    import torch
    whole, steps = torch.optim.SGD.step, []
    def step(*args):
        steps.append(1)
        if len(steps) == 6:
            {}
        return whole(*args)
    torch.optim.SGD.step = step
"""
FAULTS = {
    "raises": (
        "raise ValueError('no luck')",
        "torch.sgd failed after 2 steps: rank 1: ValueError: no luck",
        [("failed", 2)],
    ),
    "killed": ("os.kill(os.getpid(), 9)", "rank 1 was ended by SIGKILL.", []),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["raises", "killed"])
def test_rank_that_fails_ends_the_others(fault: str, tmp_path: Path) -> None:
    code, message, failures = FAULTS[fault]
    (tmp_path / "sitecustomize.py").write_text(FAULT.format(code))
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    args = arguments(
        tmp_path / "out", "digits", "torch.adamw", "torch.sgd", "torch.adam", steps=8, batch_size=8, nproc=2
    )
    done = subprocess.run(
        [*MODULE, *args[1:]], capture_output=True, text=True, timeout=TIMEOUT, env={**os.environ, "PYTHONPATH": path}
    )
    assert (done.returncode, done.stderr) == (1, f"descend compare: {message}\n")
    _, (finished, *failed) = read(tmp_path / "out")  # the third was not started
    assert (finished["status"], len(finished["losses"])) == ("finished", 8)
    assert [(run["status"], len(run["losses"])) for run in failed] == failures


def test_interrupt_ends_all_ranks_and_keeps_what_was_measured(tmp_path: Path) -> None:
    args = arguments(tmp_path, "digits", "torch.sgd", "torch.adamw", steps=100_000, batch_size=8, nproc=2)
    terminal = {**os.environ, "FORCE_COLOR": "1"}  # shows live bars, although stdout is a pipe
    with subprocess.Popen(
        [*MODULE, *args[1:]], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=terminal
    ) as process:
        assert process.stdout is not None
        shown = ""
        while not re.search(r"\b[1-9]\d*/100000", shown):
            part = os.read(process.stdout.fileno(), 4096)
            assert part, "the command ended before it could be interrupted"
            shown += part.decode()
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=TIMEOUT)  # returns once no rank has the pipe open
    assert (process.returncode, errors) == (130, b"")
    assert b"interrupted" in output
    _, runs = read(tmp_path)
    assert runs == []  # it is shown, and starts again when the comparison is continued


BAD = {
    "digits --nproc 0": ["--nproc", "'0'"],
    "digits --nproc 3": ["multiple of 3, got 64", "--batch-size"],
    "digits --nproc 128": ["multiple of 128, got 64"],
    "digits --parallel ddp": ["--parallel ddp needs", "--nproc"],
    "digits --nproc 2 --parallel fdsp": ["'fdsp'", "did you mean fsdp?", "ddp, fsdp, zero1"],
    "embeddings --nproc 2 --parallel fsdp --optimizer adamw:sparse=exact": ["adamw:sparse=exact", "sparse gradients"],
    "digits --nproc 2 --optimizer adamq": ["'adamq'"],
}


@pytest.mark.parametrize("words", BAD)
def test_bad_combination_is_one_line(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *words.split()]) == 2
    output, errors = capsys.readouterr()
    assert (output.count("\n") <= 1, errors.count("\n")) == (True, 1)
    assert all(part in errors for part in BAD[words])
