"""Object files on disk: found by a second process, harmless when damaged or impossible."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

STEP = """
import sys, torch, descend
{rule}
weight = torch.ones(5, requires_grad=True)
weight.grad = torch.full((5,), 2.0)
descend.{make}([weight], lr=0.5, max_norm=100.0, backend="cpu").step()
print(weight.tolist(), "numba" in sys.modules)
"""
OWN = """
def rule(param, grad, lr):
    return param - {factor} * lr * grad
descend.Own = descend.from_rule(rule, "Own")
"""


def step(cache: Path, make: str = "AdamW", rule: str = "") -> str:
    """What a new process prints that takes one step with this cache folder."""
    environment = {**os.environ, "DESCEND_CACHE_DIR": str(cache)}
    code = STEP.format(make=make, rule=rule)
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout.strip()


def test_second_process_needs_no_compiler(tmp_path: Path) -> None:
    first = step(tmp_path)
    files = sorted(tmp_path.iterdir())
    second = step(tmp_path)
    assert first.endswith("True")
    assert second == first.replace("True", "False")
    assert sorted(tmp_path.iterdir()) == files


@pytest.mark.parametrize("damage", [b"", b"not an object file", b'{"sha256": "0", "symbols": []}\nxyz'], ids=repr)
def test_damaged_file_is_compiled_again(tmp_path: Path, damage: bytes) -> None:
    first = step(tmp_path)
    for path in tmp_path.iterdir():
        path.write_bytes(damage)
    assert step(tmp_path) == first
    assert step(tmp_path) == first.replace("True", "False")


def test_truncated_file_is_compiled_again(tmp_path: Path) -> None:
    first = step(tmp_path)
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:-100])
    assert step(tmp_path) == first


def test_folder_that_cannot_exist_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert step(tmp_path / "file" / "cache") == step(tmp_path / "good")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder_is_no_error(tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    assert step(locked) == step(tmp_path / "good")
    assert list(locked.iterdir()) == []


def test_edited_rule_is_compiled_again(tmp_path: Path) -> None:
    assert step(tmp_path, "Own", OWN.format(factor=1)).startswith("[0.0,")
    assert step(tmp_path, "Own", OWN.format(factor=3)).startswith("[-2.0,")
    assert step(tmp_path, "Own", OWN.format(factor=1)) == "[0.0, 0.0, 0.0, 0.0, 0.0] False"
