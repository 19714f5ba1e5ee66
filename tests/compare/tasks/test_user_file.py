"""A user's own task: what a file may hold, and one clear line for everything else."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from task_runs import losses, problem_of, train

from descend.command.cli import main
from descend.compare.tasks import user_file
from descend.compare.tasks.catalog import find_task
from descend.reporting.errors import UsageError
from descend.reporting.user_file import MODULE

EXAMPLE = Path(__file__).parents[3] / "examples/compare/my_task.py"

TENSORS = """\
import torch
from torch import nn
from torch.nn.functional import mse_loss

def task():
    inputs = torch.randn(40, 3)
    return nn.Linear(3, 1), (inputs, inputs.sum(1, keepdim=True)), mse_loss
"""
DATASET = """\
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset

class Parity(Dataset):
    def __len__(self):
        return 50
    def __getitem__(self, row):
        return torch.tensor([row / 50]), row % 2

steps = 7
batch_size = None
lr = {"sgd": 0.5, "lion": 1e-4}
optimizers = ["lbfgs", "minimize.l-bfgs"]

def error_rate(outputs, targets):
    return (outputs.argmax(1) != targets).float().mean()

metric = error_rate
metric_is_error = True

def task():
    return nn.Linear(1, 2), Parity(), cross_entropy
"""


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    yield
    sys.modules.pop(MODULE, None)


def write(folder: Path, text: str) -> str:
    path = folder / "mine.py"
    path.write_text(text)
    return str(path)


def test_file_of_tensors_is_a_task(tmp_path: Path) -> None:
    task = find_task(write(tmp_path, TENSORS))
    assert (task.name, task.steps, task.batch_size, task.metric_name) == ("mine", 300, 64, None)
    problem = problem_of(task, seed=3)
    assert len(problem.data.test[0]) == 4
    train_rows = {tuple(row) for row in problem.data.sample(1000, torch.Generator())[0].tolist()}
    assert len(train_rows) == 36
    assert not train_rows & {tuple(row) for row in problem.data.test[0].tolist()}
    steps, _, model = train(problem, "adamw:lr=0.05", 100)
    assert losses(steps)[-1] < 0.1 * losses(steps)[0]
    assert task.score(model, problem.data.test).loss < 0.5


def test_file_of_a_dataset_is_a_task(tmp_path: Path) -> None:
    task = find_task(write(tmp_path, DATASET))
    assert (task.steps, task.batch_size, task.optimizers) == (7, None, ("lbfgs", "minimize.l-bfgs"))
    assert (task.metric_name, task.metric_is_error) == ("error rate", True)
    assert (task.lr["sgd"], task.lr["lion"], task.lr["adamw"]) == (0.5, 1e-4, user_file.RATES["adam"])
    problem = problem_of(task)
    ours, solver = (losses(train(problem, text, 3)[0]) for text in task.optimizers)
    assert ours[0] == solver[0]
    assert ours[2] < ours[0]
    assert 0 <= task.score(problem.model, problem.data.test).metric <= 1


def test_same_seed_gives_the_same_weights_and_data(tmp_path: Path) -> None:
    path = write(tmp_path, TENSORS)
    first, again, other = (problem_of(find_task(path), seed) for seed in (5, 5, 6))
    assert torch.equal(first.model.get_parameter("weight"), again.model.get_parameter("weight"))
    assert torch.equal(first.data.test[0], again.data.test[0])
    assert not torch.equal(first.model.get_parameter("weight"), other.model.get_parameter("weight"))


def test_example_learns() -> None:
    problem = problem_of(find_task(str(EXAMPLE)))
    steps, _, model = train(problem, "adamw", 150)
    assert losses(steps)[-1] < 0.3 * losses(steps)[0]
    assert problem.task.score(model, problem.data.test).metric < 1


HEAD = TENSORS.partition("def task")[0]
BAD = {
    "no function": ("x = 1\n", ["mine.py defines no function task()"]),
    "syntax": ("def task(:\n", ["mine.py:1: "]),
    "raises at import": ("\nimport no_such_module\n", ["mine.py:2: ModuleNotFoundError", "no_such_module"]),
    "exits": ("import sys\nsys.exit(3)\n", ["mine.py:2: SystemExit: 3"]),
    "raises": ("def task():\n    x = 1\n    return x / 0\n", ["mine.py:3: ZeroDivisionError: division by zero"]),
    "returns nothing": (
        "def task():\n    pass\n",
        ["mine.py:1: task() must return model, data and loss, got NoneType"],
    ),
    "no model": ("def task():\n    return 1, 2, 3\n", ["mine.py:1: task() must return an nn.Module first, got int 1"]),
    "no parameters": (
        HEAD + "def task():\n    return nn.ReLU(), (torch.ones(9, 1), torch.ones(9, 1)), mse_loss\n",
        ["mine.py:5: task() must return a model that has parameters"],
    ),
    "no data": (
        HEAD + "def task():\n    return nn.Linear(1, 1), [1, 2, 3], mse_loss\n",
        ["pair of tensors or a Dataset"],
    ),
    "no loss": (
        HEAD + "def task():\n    return nn.Linear(1, 1), (torch.ones(9, 1), torch.ones(9, 1)), 0.5\n",
        ["mine.py:5: task() must return loss(outputs, targets)", "float 0.5"],
    ),
    "lengths": (
        HEAD + "def task():\n    return nn.Linear(1, 1), (torch.ones(9, 1), torch.ones(8, 1)), mse_loss\n",
        ["mine.py:5", "one length", "(9, 1) and (8, 1)"],
    ),
    "one sample": (
        HEAD + "def task():\n    return nn.Linear(1, 1), (torch.ones(1, 1), torch.ones(1, 1)), mse_loss\n",
        ["at least two samples"],
    ),
    "shapes": (
        HEAD + "def task():\n    return nn.Linear(2, 1), (torch.ones(9, 1), torch.ones(9, 1)), mse_loss\n",
        ["mine.py: RuntimeError in the loss of a batch: ", "shapes cannot be multiplied"],
    ),
    "loss raises": (
        HEAD + "def loss(y, t):\n    raise ValueError('why')\n"
        "def task():\n    return nn.Linear(1, 1), (torch.ones(9, 1), torch.ones(9, 1)), loss\n",
        ["mine.py:6: ValueError: why"],
    ),
    "loss is no scalar": (
        HEAD + "def task():\n    return nn.Linear(1, 1), (torch.ones(9, 1), torch.ones(9, 1)), lambda y, t: y - t\n",
        ["mine.py:5", "scalar tensor"],
    ),
    "loss has no graph": (
        HEAD + "def task():\n    return nn.Linear(1, 1), (torch.ones(9, 1), torch.ones(9, 1)), lambda y, t: t.sum()\n",
        ["mine.py:5", "depends on the model's parameters"],
    ),
    "steps": (TENSORS + "steps = 0\n", ["mine.py: steps must be a whole number >= 1, got 0"]),
    "batch size": (TENSORS + "batch_size = 'all'\n", ["mine.py: batch_size must be", "'all'"]),
    "lr": (TENSORS + "lr = {'sgd': -1}\n", ["mine.py: lr must be", "{'sgd': -1}"]),
    "optimizers": (TENSORS + "optimizers = 3\n", ["mine.py: optimizers must be a list of strings, got 3"]),
    "metric": (TENSORS + "metric = 3\n", ["mine.py: metric must be a function of outputs and targets, got 3"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_file_is_one_line_that_names_it(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text, parts = BAD[name]
    write(tmp_path, text)
    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert main(["compare", "../mine.py", "--steps", "1"]) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1
    assert "Traceback" not in errors
    for part in parts:
        assert part in errors
    assert list(folder.iterdir()) == []


def test_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"there is no file .*other\.py"):
        find_task(str(tmp_path / "other.py"))
