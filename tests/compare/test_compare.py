"""``descend compare``, end to end on a small budget."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from compared import compare

import descend
from descend.command.cli import main
from descend.compare import specs, train
from descend.compare.tasks.catalog import SUMMARIES, find_task
from descend.reporting.errors import UsageError


@pytest.fixture(autouse=True)
def _keep_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "task", ["digits", *(pytest.param(task, marks=pytest.mark.slow) for task in ("text", "embeddings"))]
)
def test_compare_trains_every_optimizer_alike(task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "folder"
    first, runs = compare(out, task, "sgd", "adamw:weight_decay=0.1", "torch.adamw:weight_decay=0.1", seed=1)
    sgd, ours, torchs = runs
    assert sgd["losses"][0] == ours["losses"][0] == torchs["losses"][0]
    assert ours["losses"] == pytest.approx(torchs["losses"], rel=1e-4)
    assert sgd["losses"][1:] != pytest.approx(ours["losses"][1:], rel=1e-4)

    settings = first["settings"]
    assert (first["task"], settings["seeds"], settings["steps"], settings["batch_size"]) == (task, [1], 3, 8)
    assert first["versions"]["torch"] == torch.__version__
    assert [run["label"] for run in runs] == ["sgd", "adamw:weight_decay=0.1", "torch.adamw:weight_decay=0.1"]
    assert ours["optimizer"] == "descend.first_order.adam.AdamW"
    assert ours["lr"] == ours["options"]["lr"] == find_task(task).lr["adamw"]
    assert ours["options"]["weight_decay"] == 0.1
    assert ours["status"] == "finished"
    assert (ours["evaluations"], ours["test_steps"]) == ([1, 2, 3], [3])
    assert len(ours["losses"]) == 3
    assert all(0 <= metric <= 1 for metric in ours["test_metrics"])
    assert {*ours["parts"]} == {"data", "forward", "backward", "optimizer"}
    assert 0 < ours["parts"]["optimizer"] < ours["seconds"][-1]
    assert ours["seconds"] == sorted(ours["seconds"])
    assert ours["first_step_seconds"] > 0
    weights = sum(param.numel() for param in find_task(task).model().parameters())
    assert (sgd["state_bytes"], ours["state_bytes"]) == ([0], torchs["state_bytes"])
    assert torchs["state_bytes"] == [pytest.approx(8 * weights, rel=0.01)]

    output, errors = capsys.readouterr()
    assert "torch.adamw" in output
    assert errors == ""


@pytest.mark.parametrize("task", ["digits", pytest.param("text", marks=pytest.mark.slow)])
def test_same_seed_gives_same_curve(task: str, tmp_path: Path) -> None:
    curves = [compare(tmp_path / str(i), task, "adamw", seed=seed)[1][0]["losses"] for i, seed in enumerate((5, 5, 6))]
    assert curves[0] == curves[1]
    assert curves[0] != curves[2]


def test_digits_default_optimizers_learn(tmp_path: Path) -> None:
    _, runs = compare(tmp_path / "digits", "digits", steps=120, batch_size=64)
    assert [run["label"] for run in runs] == ["sgd", "adam:weight_decay=1e-3", "adamw", "torch.adamw"]
    assert min(run["test_metrics"][-1] for run in runs) > 0.85  # by chance: 0.1
    assert all(len(run["test_steps"]) == 10 for run in runs)


def test_same_spec_twice_gets_two_labels_and_one_curve(tmp_path: Path) -> None:
    _, (first, second) = compare(tmp_path / "out", "digits", "adamw", "adamw")
    assert (first["label"], second["label"]) == ("adamw", "adamw #2")
    assert first["losses"] == second["losses"]


def test_clipping_of_torch_optimizers_is_a_part_of_its_own(tmp_path: Path) -> None:
    _, (ours, torchs) = compare(tmp_path / "out", "digits", "sgd:max_norm=0.1", "torch.sgd:max_norm=0.1", steps=5)
    assert ours["losses"] == pytest.approx(torchs["losses"], rel=1e-5)
    assert "norm" in torchs["parts"]
    assert "norm" not in ours["parts"]


def test_parameters_in_another_dtype(tmp_path: Path) -> None:
    _, (single, ours, torchs) = compare(
        tmp_path / "out", "digits", "adamw", "adamw:dtype=bfloat16", "torch.adamw:dtype=bfloat16", steps=4
    )
    numbers = sum(param.numel() for param in find_task("digits").model().parameters())
    assert [run["parameters"] for run in (single, ours, torchs)] == 3 * [numbers]
    steps = 4 * 8  # a step count for each tensor
    assert [run["state_bytes"] for run in (single, ours, torchs)] == [
        [8 * numbers + steps],
        *2 * [[4 * numbers + steps]],
    ]
    assert ours["losses"] == pytest.approx(single["losses"], rel=0.02)
    assert ours["losses"] == pytest.approx(torchs["losses"], rel=0.02)
    assert ours["losses"] != single["losses"]
    rounded = torch.tensor(ours["losses"]).bfloat16().tolist()
    assert ours["losses"] != rounded  # the loss has more digits


def test_divergence_is_never_a_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, (wild, hopeless, tame) = compare(
        tmp_path / "out", "digits", "sgd:lr=1e30", "sgd:lr=100", "sgd", steps=50, batch_size=64
    )
    assert wild["status"] == "diverged"
    assert len(wild["losses"]) == wild["diverged_at"] < 50
    assert wild["losses"][-1] is None
    assert f"at step {wild['diverged_at']}" in wild["stopped"]
    assert (hopeless["status"], len(hopeless["losses"])) == ("diverged", 50)
    assert hopeless["losses"][hopeless["diverged_at"] - 1] > 10 * hopeless["losses"][0]
    assert tame["status"] == "finished"
    output = capsys.readouterr().out
    assert f"diverged at step {wild['diverged_at']}" in output
    table = output[output.index("optimizer") :]
    for line in table.splitlines():
        if line.startswith(" sgd:lr="):
            assert line.split()[2:5] == ["-", "-", "-"]


def test_failing_optimizer_does_not_stop_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, (failed, finished) = compare(tmp_path / "out", "digits", "torch.sparseadam", "sgd", status=1)
    assert (failed["status"], failed["losses"], finished["status"]) == ("failed", [], "finished")
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("descend compare: torch.sparseadam failed after 0 steps: RuntimeError: ")


def test_exact_curve_lies_on_the_dense_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, (dense, exact, touched, torchs) = compare(tmp_path / "out", "embeddings", steps=10, batch_size=64)
    assert exact["losses"] == pytest.approx(dense["losses"], rel=1e-5)
    assert exact["test_losses"] == pytest.approx(dense["test_losses"], rel=1e-5)
    away = [max(abs(a - b) for a, b in zip(run["losses"], dense["losses"], strict=True)) for run in (touched, exact)]
    assert away[0] > 20 * away[1]
    assert [run["helper"] for run in (dense, exact, touched, torchs)] == [None, None, None, "torch.optim.adam.Adam"]
    output = " ".join(capsys.readouterr().out.split())
    assert "Largest difference: between a loss and that of torch.adamw at the same step" in output


def test_evaluation_does_not_change_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, [often] = compare(tmp_path / "often", "digits", "adamwschedulefree", steps=10)
    monkeypatch.setattr(train, "test_steps", lambda steps: [steps])
    _, [once] = compare(tmp_path / "once", "digits", "adamwschedulefree", steps=10)
    assert often["losses"] == once["losses"]
    assert (often["test_steps"], once["test_steps"]) == ([5, 10], [10])
    assert often["test_losses"][-1] == once["test_losses"][-1]


BAD = {
    "digit": ["did you mean digits?", "digits, embeddings, "],
    "digits --optimizer adamq": ["'adamq'", "did you mean adam", "torch.rmsprop"],
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
    "digits --optimizer adamw:dtype=int8": ["adamw:dtype=int8", "dtype must be bfloat16"],
    "digits --optimizer torch.adamw:dtype=half8": ["torch.adamw:dtype=half8", "'half8'"],
    "digits --steps 0": ["--steps", "'0'"],
    "digits --steps many": ["--steps", "'many'"],
    "digits --seed -1": ["--seed", "'-1'"],
    "digits --stepz 3": ["--stepz", "--steps", "--threads"],
    "digits text": ["text"],
    "digits --out /dev/null/out": ["--out /dev/null/out", "Not a directory"],
    "digits --out /dev/null": ["--out /dev/null is a file"],
    "digits --out /proc": ["--out /proc cannot be written"],
    "digits --seeds 0": ["--seeds", "'0'"],
    "digits --jobs none": ["--jobs", "'none'"],
    "digits --sweep lr": ["--sweep lr", "LOW..HIGH:COUNT"],
    "digits --sweep lr=1..0.1:3": ["0 < LOW < HIGH"],
    "digits --sweep lr=1,1": ["must differ"],
    "digits --sweep lr=1,x": ["must be a number", "'x'"],
    "digits --sweep lrr=1,2": ["'lrr'", "did you mean lr?"],
    "digits --sweep lr=1,2 --sweep lr=3": ["lr is given twice"],
    "digits --sweep lr=1,2 --optimizer adamw:lr=1": ["adamw:lr=1 has a learning rate already"],
    "digits --sweep lr=1,2 --tune": ["--tune", "--sweep lr"],
    "digits --sweep lr=1,2 --optimizer lbfgs": ["--sweep lr", "got lbfgs"],
    "digits --tune --optimizer lbfgs --optimizer newton": ["--tune", "got lbfgs and newton"],
    "digits --jobs 2 --nproc 2": ["--jobs", "--nproc"],
    "": ["TASK", "--list"],
}


@pytest.mark.parametrize("arguments", BAD)
def test_bad_input_is_one_line(
    arguments: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["compare", *arguments.split()]) == 2
    output, errors = capsys.readouterr()
    assert output.count("\n") <= 1  # the name of the task
    assert errors.count("\n") == 1
    assert errors.startswith("descend compare: ")
    assert "Traceback" not in errors
    for part in BAD[arguments]:
        assert part in errors
    assert list(tmp_path.iterdir()) == []


def test_wrong_command_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compar", "digits"]) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1
    assert errors.startswith("descend: ")
    assert "'compar'" in errors


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["compare", "--help"]])
def test_help_needs_no_torch(arguments: list[str]) -> None:
    code = (
        f"import sys; from descend.command.cli import main; main({arguments}); "
        "print({'torch', 'numba'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert done.stdout.endswith("set()\n")
    assert done.stderr == ""


def test_first_line_comes_before_torch(tmp_path: Path) -> None:
    code = (
        "import sys, builtins; from descend.command.cli import main; show = builtins.print; "
        "builtins.print = lambda *words, **more: (show(*words, 'torch' in sys.modules), sys.exit()); "
        "main(['compare', 'digits'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True, cwd=tmp_path)
    assert done.stdout == f"digits: {SUMMARIES['digits']} False\n"


def test_list_names_tasks_and_optimizers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"  digits: {SUMMARIES['digits']}" in lines
    assert {f"  {name}" for name in specs.names()} <= {*lines}


def test_every_optimizer_has_a_rate_of_the_task() -> None:
    """``--help`` promises that the default lr is the task's."""
    for contestant in specs.parse_all([*specs.classes()], find_task("digits").lr):
        assert contestant.lr is not None, contestant.text


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
    output, errors = capsys.readouterr()
    assert output.count("\n") <= 1  # the name of the task
    assert errors == f"descend compare: this needs {name}: pip install 'descend[compare]'.\n"
    assert list(tmp_path.iterdir()) == []


def test_extra_is_imported_only_when_needed() -> None:
    code = (
        "import sys, descend; import descend.command.cli; "
        "extra = {'typer', 'rich', 'matplotlib', 'sklearn', 'descend.compare.app'}; print(extra & {*sys.modules})"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout == "set()\n"


def test_first_step_is_measured_alone(tmp_path: Path) -> None:
    _, [run] = compare(tmp_path / "out", "digits", "torch.sgd", steps=1)
    assert run["parts"] == {}  # the only step is the first
    assert run["first_step_seconds"] > 0


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
    "adamw:lr=1,dtype=bfloat16,rounding=stochastic,rounding_seed=3": (
        descend.AdamW,
        {"lr": 1, "rounding": "stochastic", "rounding_seed": 3},
    ),
    "adamw:lr=1,state_dtype={'exp_avg':'8bit','exp_avg_sq':'float32'}": (
        descend.AdamW,
        {"lr": 1, "state_dtype": {"exp_avg": "8bit", "exp_avg_sq": torch.float32}},
    ),
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


@pytest.mark.parametrize("value", ["8bit", "{'exp_avg':'8bit'}"])
def test_spec_takes_state_in_8_bits(value: str) -> None:
    [spec] = specs.parse_all([f"adamw:lr=1,state_dtype={value}"], LR)
    param = torch.nn.Parameter(torch.ones(16, 300))
    optimizer: Any = spec.build([param])
    optimizer.init_state()
    assert optimizer.state[param]["exp_avg"].dtype == torch.uint8


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
        ("rowwiseadagrad", True, ["RowwiseAdagrad"]),
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


def test_rowwise_adagrad_takes_dense_gradients_where_there_are_no_others() -> None:
    table = torch.nn.Embedding(5, 2, sparse=True)
    [spec] = specs.parse_all(["rowwiseadagrad"], LR)
    assert not spec.is_sparse
    spec.set_gradients(table, takes_sparse=False)
    assert not table.sparse


def test_spec_with_open_bracket_is_refused() -> None:
    with pytest.raises(UsageError, match=r"got '\(0\.8'"):
        specs.parse_all(["torch.adamw:betas=(0.8,0.9"], LR)


def test_every_listed_optimizer_builds() -> None:
    """Each optimizer that ``--help`` lists can be built from parameters alone."""
    assert {"muon", "torch.muon", "lion", "torch.lion"} & {*specs.classes()} == {"muon", "torch.muon", "lion"}
    for name in specs.classes():
        [spec] = specs.parse_all([name], {})
        assert spec.build([torch.nn.Parameter(torch.ones(2, 2))]).param_groups
