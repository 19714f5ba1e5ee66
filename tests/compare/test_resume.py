"""A comparison that is interrupted says so, and goes on where it was."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from compared import arguments, compare, read

from descend.command.cli import main
from descend.compare import journal, work

# A background job starts with SIGINT ignored, unlike a command in a terminal.
LISTENING = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
COMMAND = [sys.executable, "-c", LISTENING + "import sys; from descend.command.cli import main; sys.exit(main())"]
TIMEOUT = 120


def interrupt(args: list[str], seen: str, number: signal.Signals) -> tuple[int, str, str]:
    """Run the command, send a signal once it has printed ``seen``, and return its status and what it printed."""
    with subprocess.Popen([*COMMAND, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        shown = ""
        while seen not in shown:
            part = os.read(process.stdout.fileno(), 4096)
            assert part, "the command ended before it could be interrupted"
            shown += part.decode()
        process.send_signal(number)
        output, errors = process.communicate(timeout=TIMEOUT)
    return process.returncode, shown + output.decode(), errors.decode()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_during_imports_is_one_line(number: signal.Signals, status: int, tmp_path: Path) -> None:
    code, _, errors = interrupt(arguments(tmp_path / "out", "digits"), "digits: ", number)
    assert code == status
    assert errors == "descend compare: interrupted before anything was measured or written.\n"
    assert not (tmp_path / "out").exists()


# A task whose loss waits in the second run, for as long as there is a file "wait" beside it.
WAITING = """
import pathlib, time
import torch

calls = 0

def loss(outputs, targets):
    global calls
    calls += 1
    while calls > 15 and pathlib.Path(__file__).with_name("wait").exists():
        time.sleep(0.01)
    return ((outputs - targets) ** 2).mean()

def task():
    inputs = torch.randn(64, 4)
    return torch.nn.Linear(4, 1), (inputs, inputs.sum(1, keepdim=True)), loss
"""


def test_signal_between_runs_keeps_what_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, task = tmp_path / "out", tmp_path / "task.py"
    task.write_text(WAITING)
    args = arguments(out, str(task), "torch.sgd", "torch.adamw", steps=5)
    (tmp_path / "wait").touch()
    code, output, errors = interrupt(args, "torch.sgd: lr 0.1, seed 0, 5 steps", signal.SIGTERM)
    (tmp_path / "wait").unlink()
    assert (code, errors) == (143, "")
    assert f"Interrupted: 1 run of 2 done. The same command continues in {out}." in output
    _, [first] = read(out)
    assert first["status"] == "finished"
    assert main(args) == 0
    assert "2 runs of 5 steps, 1 of them already there" in capsys.readouterr().out
    _, (same, second) = read(out)
    assert same == first
    assert (second["label"], second["status"]) == ("torch.adamw", "finished")


def test_seeds_run_in_processes_and_are_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    first, runs = compare(out, "digits", "torch.sgd", seeds=3, jobs=2)
    assert first["settings"]["seeds"] == [0, 1, 2]
    assert sorted((run["seed"], run["alone"]) for run in runs) == [(0, True), (1, False), (2, False)]
    assert len({run["losses"][0] for run in runs}) == 3

    # Without the last line the same command makes that run alone, and it is the same run.
    lines = (out / journal.NAME).read_text().splitlines(keepends=True)
    (out / journal.NAME).write_text("".join(lines[:-1]))
    made = []
    whole = work.Work.run
    monkeypatch.setattr(work.Work, "run", lambda *args: made.append(args[1].seed) or whole(*args))
    _, again = compare(out, "digits", "torch.sgd", seeds=3, jobs=1)
    assert made == [runs[-1]["seed"]]
    assert [run["losses"] for run in again] == [run["losses"] for run in runs]


def test_tuned_comparison_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, runs = compare(tmp_path / "out", "digits", "torch.sgd", steps=5, tune=True, jobs=1)
    *tuning, reported = runs
    assert len(tuning) == 10
    assert reported["lr"] in {run["lr"] for run in tuning}
    best = min(tuning[:5], key=lambda run: run["test_losses"][-1])
    assert reported["lr"] >= best["lr"] / 10
    assert "5" in first["tuned"]
    assert " ".join(first["tuned"].split()) in " ".join(capsys.readouterr().out.split())


def test_dead_process_fails_its_run_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "task.py").write_text(TASK)
    _, runs = compare(tmp_path / "out", str(tmp_path / "task.py"), "torch.sgd", seeds=3, jobs=2, status=1)
    assert {run["seed"]: run["status"] for run in runs} == {0: "finished", 1: "failed", 2: "finished"}
    [failed] = [run for run in runs if run["status"] == "failed"]
    assert failed["error"] == "its process ended with exit status 3: out of luck"
    assert "out of luck" in capsys.readouterr().err


TASK = """
import os, sys
import torch

def task():
    if torch.initial_seed() == 1:
        print("out of luck", file=sys.stderr)
        sys.stderr.flush()
        os._exit(3)
    inputs = torch.randn(64, 4)
    return torch.nn.Linear(4, 1), (inputs, inputs.sum(1, keepdim=True)), torch.nn.functional.mse_loss
"""
