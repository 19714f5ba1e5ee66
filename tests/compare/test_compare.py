"""``descend compare``, end to end on a small budget."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from descend.command.cli import main
from descend.compare import specs
from descend.compare.tasks.catalog import SUMMARIES, find_task
from descend.reporting.errors import UsageError

COMMAND = [sys.executable, "-c", "import sys; from descend.command.cli import main; sys.exit(main())"]


@pytest.fixture(autouse=True)
def _keep_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def compare(out: Path, task: str, *optimizers: str, steps: int = 3, seed: int = 0, status: int = 0) -> dict[str, Any]:
    """Run the command, assert its exit status, and return what it wrote."""
    named = [argument for optimizer in optimizers for argument in ("--optimizer", optimizer)]
    options = ["--steps", str(steps), "--seed", str(seed), "--batch-size", "8", "--out", str(out)]
    assert main(["compare", task, *named, *options]) == status
    return read(out)


def read(out: Path) -> dict[str, Any]:
    """Return the contents of ``results.json``; assert that it is standard JSON, without NaN, and that a PNG exists."""
    assert sorted(path.name for path in out.iterdir()) == ["curves.png", "results.json"]
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    results: dict[str, Any] = json.loads((out / "results.json").read_text(), parse_constant=pytest.fail)
    return results


@pytest.mark.parametrize("task", SUMMARIES)
def test_compare_trains_every_optimizer_alike(task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "folder"
    results = compare(out, task, "sgd", "adamw:weight_decay=0.1", "torch.adamw:weight_decay=0.1", seed=1)
    sgd, ours, torchs = results["runs"]
    assert sgd["losses"][0] == ours["losses"][0] == torchs["losses"][0]
    assert ours["losses"] == pytest.approx(torchs["losses"], rel=1e-4)
    assert sgd["losses"][1:] != pytest.approx(ours["losses"][1:], rel=1e-4)

    assert (results["task"], results["seed"], results["steps"], results["batch_size"]) == (task, 1, 3, 8)
    assert results["versions"]["torch"] == torch.__version__
    assert [run["label"] for run in results["runs"]] == [
        "sgd",
        "adamw:weight_decay=0.1",
        "torch.adamw:weight_decay=0.1",
    ]
    assert ours["optimizer"] == "descend.first_order.adam.AdamW"
    assert ours["options"]["lr"] == find_task(task).lr["adamw"]
    assert ours["options"]["weight_decay"] == 0.1
    assert ours["status"] == "finished"
    assert ours["steps"] == len(ours["losses"]) == 3
    assert ours["final_loss"] == ours["losses"][-1]
    assert ours["best_loss"] == min(ours["losses"])
    assert 0 <= ours["test_accuracy"] <= 1
    assert 0 < ours["optimizer_seconds"] < ours["total_seconds"]
    assert ours["first_step_seconds"] > 0
    assert sgd["peak_state_bytes"] == 0
    weights = sum(param.numel() for param in find_task(task).model().parameters())
    assert torchs["peak_state_bytes"] == pytest.approx(8 * weights, rel=0.01)
    assert ours["peak_state_bytes"] == torchs["peak_state_bytes"]

    output, errors = capsys.readouterr()
    assert "torch.adamw" in output
    assert errors == ""


@pytest.mark.parametrize("task", SUMMARIES)
def test_same_seed_gives_same_curve(task: str, tmp_path: Path) -> None:
    curves = [
        compare(tmp_path / str(i), task, "adamw", seed=seed)["runs"][0]["losses"] for i, seed in enumerate((5, 5, 6))
    ]
    assert curves[0] == curves[1]
    assert curves[0] != curves[2]


def test_digits_default_optimizers_learn(tmp_path: Path) -> None:
    out = tmp_path / "digits"
    assert main(["compare", "digits", "--steps", "300", "--out", str(out)]) == 0
    runs = read(out)["runs"]
    assert [run["label"] for run in runs] == ["sgd", "adam:weight_decay=1e-3", "adamw", "torch.adamw"]
    assert min(run["test_accuracy"] for run in runs) > 0.95


def test_same_spec_twice_gets_two_labels_and_one_curve(tmp_path: Path) -> None:
    first, second = compare(tmp_path / "out", "digits", "adamw", "adamw")["runs"]
    assert (first["label"], second["label"]) == ("adamw", "adamw #2")
    assert first["losses"] == second["losses"]


def test_divergence_is_reported_and_valid_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wild, tame = compare(tmp_path / "out", "digits", "sgd:lr=1e30", "sgd", steps=5)["runs"]
    assert wild["status"] == "diverged"
    assert wild["losses"][wild["diverged_at"] - 1] is None
    assert wild["final_loss"] is None
    assert wild["best_loss"] == wild["losses"][0]
    assert tame["status"] == "finished"
    assert f"diverged at step {wild['diverged_at']}" in capsys.readouterr().out


def test_failing_optimizer_does_not_stop_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    failed, finished = compare(tmp_path / "out", "digits", "torch.sparseadam", "sgd", status=1)["runs"]
    assert (failed["status"], failed["steps"], finished["status"]) == ("failed", 0, "finished")
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("compare: torch.sparseadam failed after 0 steps: RuntimeError: ")


def test_exact_curve_lies_on_the_dense_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["compare", "embeddings", "--steps", "10", "--batch-size", "64", "--out", str(out)]) == 0
    results = read(out)
    dense, exact, touched, torchs = results["runs"]
    assert results["reference"] == dense["label"] == "torch.adamw"
    assert dense["largest_difference"] == 0
    assert exact["losses"] == pytest.approx(dense["losses"], rel=1e-5)
    assert exact["test_loss"] == pytest.approx(dense["test_loss"], rel=1e-5)
    for rows_only in (touched, torchs):
        assert rows_only["largest_difference"] > 20 * exact["largest_difference"]
    assert [run["helper"] for run in results["runs"]] == [None, None, None, "torch.optim.adam.Adam"]
    assert "the largest difference between a loss and that of torch.adamw" in " ".join(capsys.readouterr().out.split())


def test_dense_runs_have_no_reference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = compare(tmp_path / "out", "digits", "sgd", "torch.adamw")
    assert results["reference"] is None
    assert [run["largest_difference"] for run in results["runs"]] == [None, None]
    assert "diff." not in capsys.readouterr().out


BAD = {
    "digit": ["did you mean digits?", "digits, embeddings, text"],
    "digits --optimizer adamq": ["'adamq'", "did you mean adam", "torch.rmsprop"],
    "digits --optimizer torch.lbfgs": ["'torch.lbfgs'", "torch.adamw"],  # its step needs a closure
    "digits --optimizer firstorder": ["'firstorder'", "adamw"],
    "digits --optimizer adamw:lrr=1": ["'lrr'", "did you mean lr?", "weight_decay", "max_norm"],
    "digits --optimizer adamw:lr": ["key=value", "'lr'"],
    "digits --optimizer adamw:": ["key=value"],
    "digits --optimizer adamw:lr=1,lr=2": ["lr is given twice"],
    "digits --optimizer adamw:lr=abc": ["adamw:lr=abc", "'abc'"],
    "digits --optimizer adamw:lr=nan": ["adamw:lr=nan"],
    "digits --optimizer adamw:lr=-1": ["adamw:lr=-1", "Invalid learning rate"],
    "digits --optimizer sgd --optimizer torch.adamw:lr=-1": ["torch.adamw:lr=-1", "Invalid learning rate"],
    "digits --optimizer adamw:backend=gpu": ["'gpu'", "eager"],
    "digits --optimizer torch.muon": ["torch.muon", "2D"],
    "digits --steps 0": ["--steps", "'0'"],
    "digits --steps many": ["--steps", "'many'"],
    "digits --seed -1": ["--seed", "'-1'"],
    "digits --stepz 3": ["--stepz", "--steps", "--threads"],
    "digits text": ["text"],
    "digits --out /dev/null/out": ["--out /dev/null/out", "Not a directory"],
    "": ["TASK", "digits, text, embeddings"],
}


@pytest.mark.parametrize("arguments", BAD)
def test_bad_input_is_one_line(
    arguments: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["compare", *arguments.split()]) == 2
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.count("\n") == 1
    assert "Traceback" not in errors
    for part in BAD[arguments]:
        assert part in errors
    assert list(tmp_path.iterdir()) == []


def test_wrong_command_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compar", "digits"]) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1
    assert "'compar'" in errors


@pytest.mark.parametrize("arguments", [[], ["--help"], ["compare", "--help"]])
def test_help(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    output, errors = capsys.readouterr()
    assert "compare" in output
    assert errors == ""


@pytest.mark.parametrize("module", ["typer", "rich", "matplotlib", "sklearn"])
def test_missing_extra_is_one_line(
    module: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # makes its import raise
    monkeypatch.chdir(tmp_path)
    assert main(["compare", "digits", "--steps", "1"]) == 2
    name = {"sklearn": "scikit-learn"}.get(module, module)
    assert capsys.readouterr() == ("", f"descend: this needs {name}: pip install 'descend[compare]'.\n")
    assert list(tmp_path.iterdir()) == []


def test_extra_is_imported_only_when_needed() -> None:
    code = (
        "import sys, descend; import descend.command.cli; "
        "extra = {'typer', 'rich', 'matplotlib', 'sklearn', 'descend.compare.app'}; print(extra & {*sys.modules})"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout == "set()\n"


def test_module_is_the_command(tmp_path: Path) -> None:
    arguments = ["digits", "--optimizer", "torch.sgd", "--steps", "1", "--out", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-m", "descend", "compare", *arguments], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert read(tmp_path / "out")["runs"][0]["optimizer_seconds"] is None  # the only step is the first


def test_interrupt_keeps_what_was_measured(tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["compare", "digits", "--optimizer", "sgd", "--optimizer", "torch.adamw", "--optimizer", "torch.adam"]
    steps = ["--steps", "400", "--batch-size", "32", "--out", str(out)]
    terminal = {**os.environ, "FORCE_COLOR": "1"}  # shows live bars, although stdout is a pipe
    # A background job starts with SIGINT ignored, unlike a command in a terminal.
    listening = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    command = [*COMMAND[:-1], listening + COMMAND[-1], *arguments, *steps]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=terminal) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        shown = ""
        # Wait until the first optimizer has finished and the second has started.
        while not re.search(r"400/400.*\b(?!400/)[1-9]\d*/400", shown, re.DOTALL):
            part = os.read(process.stdout.fileno(), 4096)
            assert part, "the command ended before it could be interrupted"
            shown += part.decode()
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == b""
    assert b"interrupted" in output
    finished, interrupted = read(out)["runs"]
    assert (finished["status"], finished["steps"]) == ("finished", 400)
    assert interrupted["status"] == "interrupted"
    assert 0 < interrupted["steps"] == len(interrupted["losses"]) < 400
    assert interrupted["test_accuracy"] is None
    assert math.isfinite(interrupted["final_loss"])


LR = {"sgd": 0.2, "adamw": 3e-3}

SPECS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "torch.adamw": (torch.optim.AdamW, {"lr": 3e-3}),
    "torch.AdamW:lr=1e-2": (torch.optim.AdamW, {"lr": 1e-2}),
    "torch.adam": (torch.optim.Adam, {}),  # not in LR: the class's default
    "torch.sgd:momentum=0.9": (torch.optim.SGD, {"lr": 0.02, "momentum": 0.9}),
    "torch.sgd:momentum=0.9,lr=1": (torch.optim.SGD, {"lr": 1, "momentum": 0.9}),
    "torch.sgd:nesterov=true,lr=1": (torch.optim.SGD, {"lr": 1, "nesterov": True}),
    "torch.sgd: lr = 1 , foreach = None ": (torch.optim.SGD, {"lr": 1, "foreach": None}),
    "torch.adamw:lr=1,betas=(0.8,0.9),eps=0": (torch.optim.AdamW, {"lr": 1, "betas": (0.8, 0.9), "eps": 0}),
    "torch.adamw:betas=[0.8,0.9],lr=1": (torch.optim.AdamW, {"betas": [0.8, 0.9], "lr": 1}),
    "torch.muon:adjust_lr_fn=original": (torch.optim.Muon, {"adjust_lr_fn": "original"}),
}


@pytest.mark.parametrize("text", SPECS)
def test_spec_names_class_and_options(text: str) -> None:
    [spec] = specs.parse_all([text], LR)
    assert (spec.optimizer, dict(spec.options)) == SPECS[text]


def test_spec_takes_the_options_of_descend() -> None:
    text = "adamw:lr=1,backend=eager,max_norm=1.0,nonfinite=skip,state_dtype=torch.bfloat16"
    [spec] = specs.parse_all([text], LR)
    optimizer: Any = spec.build([torch.nn.Parameter(torch.ones(2))])
    found = (optimizer.backend, optimizer.max_norm, optimizer.nonfinite, optimizer.state_dtype)
    assert found == ("eager", 1.0, "skip", torch.bfloat16)


@pytest.mark.parametrize(
    ("text", "is_sparse", "built"),
    [
        ("torch.adamw", False, ["AdamW"]),
        ("adamw", False, ["AdamW"]),
        ("adamw:sparse=none", False, ["AdamW"]),
        ("sgd:lr=1,sparse=touched", True, ["SGD"]),
        ("adam:sparse=exact", True, ["Adam"]),
        ("sparseadam", True, ["SparseAdam", "Adam"]),
        ("torch.sparseadam", True, ["SparseAdam", "Adam"]),
    ],
)
def test_embeddings_get_gradients_that_suit_the_optimizer(text: str, is_sparse: bool, built: list[str]) -> None:
    table = torch.nn.Embedding(5, 2, sparse=not is_sparse)
    [spec] = specs.parse_all([text], LR)
    model = torch.nn.Sequential(table, torch.nn.Linear(2, 3))
    spec.set_gradients(model)
    optimizers = spec.build_for(model)
    assert table.sparse == is_sparse
    assert [type(optimizer).__name__ for optimizer in optimizers] == built
    assert len({type(optimizer).__module__.partition(".")[0] for optimizer in optimizers}) == 1
    assert sum(len(group["params"]) for optimizer in optimizers for group in optimizer.param_groups) == 3


def test_spec_with_open_bracket_is_refused() -> None:
    with pytest.raises(UsageError, match=r"got '\(0\.8'"):
        specs.parse_all(["torch.adamw:betas=(0.8,0.9"], LR)


def test_every_listed_optimizer_builds() -> None:
    """Each optimizer that ``--help`` lists can be built from parameters alone."""
    assert {"lion", "muon", "torch.muon"} & {*specs.classes()} == {"lion", "torch.muon"}  # no class has two names
    for name in specs.classes():
        [spec] = specs.parse_all([name], {})
        assert spec.build([torch.nn.Parameter(torch.ones(2, 2))]).param_groups
