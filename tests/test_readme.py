"""What README and documentation show runs, from top to bottom, as a newcomer would paste it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

import descend

ROOT = Path(__file__).parents[1]


def run_examples(path: Path, least: int) -> dict[str, Any]:
    blocks = re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)
    assert len(blocks) >= least
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, path.name, "exec"), names)  # the project's own text
    return names


def test_second_order_examples_run_as_told() -> None:
    path = ROOT / "docs" / "second_order.md"
    names = run_examples(path, 3)
    evaluations = {method: result.n_eval for method, result in names["results"].items()}
    assert evaluations["gd"] > 100 * evaluations["l-bfgs"]
    assert evaluations["newton"] < evaluations["l-bfgs"]
    assert all(result.success for result in names["results"].values())
    assert names["fit"].success
    assert names["optimizer"].result.success
    assert all(f"`{status}`" in path.read_text() for status in descend.Status)


def test_sparse_examples_run_as_told() -> None:
    names = run_examples(ROOT / "docs" / "sparse.md", 2)
    assert names["optimizer"].state_dict()["state"][0]["row_step"].abs().max() == 3
    assert names["largest"] > 0


def test_examples_run() -> None:
    names = run_examples(ROOT / "README.md", 4)
    assert names["result"].success
    optimizer = names["optimizer"]
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert type(optimizer).__name__ == "Signum"
