"""The examples in the README and the documentation run, pasted from top to bottom."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

import descend

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def blocks_of(path: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)


def run_examples(path: Path, least: int) -> dict[str, Any]:
    blocks = blocks_of(path)
    assert len(blocks) >= least
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, path.name, "exec"), names)
    return names


# Pages with a test of their own below.
TESTED = ("second_order.md", "training.md", "sparse.md", "groups.md", "checkpoints.md")
PAGES = sorted(
    path.relative_to(DOCS).as_posix()
    for path in DOCS.rglob("*.md")
    if "```python\n" in path.read_text() and path.relative_to(DOCS).as_posix() not in TESTED
)


@pytest.mark.parametrize("page", PAGES)
def test_examples_of_the_page_run_and_print_what_it_says(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Lines that begin with ``# `` after a block's last call are what it prints."""
    monkeypatch.chdir(tmp_path)
    run_examples(DOCS / page, 1)
    printed = capsys.readouterr().out.splitlines()
    told = re.findall(r"^# (.+)$", "\n".join(blocks_of(DOCS / page)), re.MULTILINE)
    assert [line for line in told if line not in printed] == []


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


def test_training_examples_run() -> None:
    names = run_examples(ROOT / "docs" / "training.md", 3)
    assert names["optimizer"].in_backward is None
    assert all(param.grad is None for param in names["model"].parameters())


def test_sparse_examples_run_as_told() -> None:
    names = run_examples(ROOT / "docs" / "sparse.md", 2)
    assert names["optimizer"].state_dict()["state"][0]["row_step"].abs().max() == 3
    assert names["largest"] > 0


def test_groups_examples_run_as_told(capsys: pytest.CaptureFixture[str]) -> None:
    path = ROOT / "docs" / "groups.md"
    names = run_examples(path, 3)
    table, *entries = re.split(r"(?<=0 B)\n(?=\(\()", capsys.readouterr().out.rstrip())
    assert textwrap.indent(table, "    ") in path.read_text()
    assert all(f"# {entry}" in path.read_text() for entry in entries)
    assert len(names["optimizer"].param_groups) == 3


def test_checkpoint_examples_run_as_told(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = ROOT / "docs" / "checkpoints.md"
    run_examples(path, 3)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2
    assert all(f"# {line}" in path.read_text() for line in printed)


def test_examples_of_the_readme_run() -> None:
    names = run_examples(ROOT / "README.md", 4)
    assert names["result"].success
    assert isinstance(names["optimizer"], descend.AdamW)
    assert issubclass(names["Signum"], torch.optim.Optimizer)


def test_links_of_the_readme_lead_to_files() -> None:
    text = (ROOT / "README.md").read_text()
    links = re.findall(r"\]\(([^)#:]+)", text) + re.findall(r"^\[\w+\]: ([^#\s]+)", text, re.MULTILINE)
    assert len(links) > 20
    assert [link for link in links if not (ROOT / link).exists()] == []
