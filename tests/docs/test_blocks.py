"""Every ``python`` block of the documentation runs, and prints what the page says.

The blocks of a page are pasted from top to bottom into one program. Comments in lines of their own directly below a
``print`` are what it prints, and so is a ``text`` block directly below. Blocks marked ``py`` do not run.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from doc_pages import PAGES, ROOT, name_of, python_blocks

import descend
from descend.core import codecs

WITH_BLOCKS = [page for page in PAGES if python_blocks(page)]
CLAIM = re.compile(r"^ *print\(.*\n((?: *# .*\n?)+)", re.MULTILINE)


def claims(code: str) -> list[str]:
    """The lines that a block says it prints."""
    return [line.strip().removeprefix("# ") for found in CLAIM.finditer(code) for line in found[1].splitlines()]


@pytest.mark.parametrize("page", WITH_BLOCKS, ids=name_of)
def test_blocks_run_and_print_what_the_page_says(
    page: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, Any] = {"__name__": "page"}
    for block in python_blocks(page):
        exec(compile("\n" * (block.line - 1) + block.code, name_of(page), "exec"), names)
        printed = capsys.readouterr().out
        said = claims(block.code)
        assert [line for line in said if line not in printed.splitlines()] == []
        assert block.output is None or block.output == printed
    CHECKS.get(name_of(page), lambda names, text: None)(names, page.read_text("utf-8"))


def check_readme(names: dict[str, Any], text: str) -> None:
    assert isinstance(names["optimizer"], descend.AdamW)
    assert issubclass(names["Signum"], torch.optim.Optimizer)
    assert names["result"].success


def check_second_order(names: dict[str, Any], text: str) -> None:
    evaluations = {method: result.n_eval for method, result in names["results"].items()}
    assert evaluations["gd"] > 100 * evaluations["l-bfgs"]
    assert evaluations["newton"] < evaluations["l-bfgs"]
    assert all(result.success for result in names["results"].values())
    assert names["fit"].success
    assert names["optimizer"].result.success
    assert all(f"`{status}`" in text for status in descend.Status)


def check_training(names: dict[str, Any], text: str) -> None:
    assert names["optimizer"].in_backward is None
    assert all(param.grad is None for param in names["model"].parameters())


def check_sparse(names: dict[str, Any], text: str) -> None:
    assert names["optimizer"].state_dict()["state"][0]["row_step"].abs().max() == 3
    assert names["largest"] > 0


def check_state_in_8_bits(names: dict[str, Any], text: str) -> None:
    codes, scale = torch.arange(256, dtype=torch.uint8), torch.tensor([3.7])
    for signed in (True, False):
        numbers = codecs.decode(codes, scale, codecs.Codec(signed))
        assert np.array_equal(names["decode"](codes.numpy(), scale.numpy(), signed), numbers.numpy())
    params, compensation = codecs.split(numbers)
    bits = params.view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(names["joined"](bits, compensation.numpy()), numbers.numpy())


def check_groups(names: dict[str, Any], text: str) -> None:
    assert len(names["optimizer"].param_groups) == 3


CHECKS: dict[str, Callable[[dict[str, Any], str], None]] = {
    "README.md": check_readme,
    "docs/groups.md": check_groups,
    "docs/reference/state-in-8-bits.md": check_state_in_8_bits,
    "docs/second_order.md": check_second_order,
    "docs/sparse.md": check_sparse,
    "docs/training.md": check_training,
}


def test_pages_to_be_checked_exist() -> None:
    assert {name_of(page) for page in WITH_BLOCKS} >= CHECKS.keys()


def test_a_claim_is_what_stands_below_a_print() -> None:
    assert claims("print(1)\n# 1\n# 2\nx = 1\n# no claim\nprint(3)\n# 3\n") == ["1", "2", "3"]
    assert claims("# no claim\nprint(1)  # nor this\n") == []


def test_a_text_block_is_the_output_of_the_block_above_it(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```python\nprint(1)\n```\n\n```text\n1\n```\n\n```python\npass\n```\n\nsay\n\n```text\n2\n```\n")
    assert [(block.code, block.line, block.output) for block in python_blocks(page)] == [
        ("print(1)\n", 2, "1\n"),
        ("pass\n", 10, None),
    ]


def test_every_page_is_found() -> None:
    assert ROOT / "docs" / "learn" / "adam.md" in PAGES
