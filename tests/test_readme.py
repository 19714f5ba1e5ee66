"""What the README shows runs, from top to bottom, as a newcomer would paste it."""

from __future__ import annotations

import re
from pathlib import Path

import torch

README = Path(__file__).parents[1] / "README.md"


def test_examples_run() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) >= 2
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)  # the project's own text
    optimizer = names["optimizer"]
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert type(optimizer).__name__ == "Lion"
