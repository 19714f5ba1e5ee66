"""What type checkers of users see of the public names, which are imported when they are first asked for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import torch

import descend as optim
from descend import *

weight = torch.zeros(2, requires_grad=True)
optimizer: AdamW = optim.AdamW([weight], max_norm=1.0)
schedule: torch.optim.lr_scheduler.StepLR = optim.lr_scheduler.StepLR(optimizer, 3)
monitor: Monitor = optim.Monitor(optimizer)
optim.AdamV([weight])
optim.AdamW([weight], learning_rate=1.0)
"""


@pytest.mark.slow
def test_type_checkers_know_the_public_names_and_no_others(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path / "cache"), "program.py"]
    lines = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout.splitlines()
    errors = [line.partition(" error: ")[2] for line in lines if " error: " in line]
    assert len(errors) == 2, lines
    assert errors[0].startswith("Module has no attribute")
    assert errors[1].startswith('Unexpected keyword argument "learning_rate"')
