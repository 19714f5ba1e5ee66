"""Kernels on disk: found by the next process, and a folder in any condition is no error."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from descend import from_rule, warmup
from descend.backends.cpu import object_files

STEP = """
import sys
import torch, descend
params = [torch.ones(5, requires_grad=True)]
optimizer = descend.AdamW(params, lr=0.1, max_norm=1.0)
for _ in range(3):
    params[0].grad = torch.ones(5)
    optimizer.step()
print("numba" in sys.modules, params[0].tolist())
"""


def run(code: str, folder: Path, **environment: str) -> str:
    """What ``code`` prints in a new process in which warnings are errors."""
    environment = {**os.environ, "DESCEND_CACHE_DIR": str(folder), **environment}
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.strip()


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with what one process compiled, and what that process printed."""
    folder = tmp_path_factory.mktemp("kernels") / "made" / "when needed"
    return folder, run(STEP, folder)


def kernels(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.o")}


def test_second_process_finds_the_kernels(first: tuple[Path, str]) -> None:
    folder, printed = first
    before = kernels(folder)
    assert printed.startswith("True ")  # the first had to compile
    assert any(name.startswith("adamw") for name in before)
    assert run(STEP, folder) == printed.replace("True ", "False ")
    assert kernels(folder) == before


def test_folder_is_private(first: tuple[Path, str]) -> None:
    assert (first[0].stat().st_mode & 0o077) == 0 or os.name == "nt"


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


DAMAGES = [lambda content: b"", lambda content: b"{}\nnonsense", lambda content: content[:-100], flipped]


def test_damaged_files_are_compiled_again(first: tuple[Path, str], tmp_path: Path) -> None:
    folder, printed = first
    intact = kernels(folder)
    damages = dict(
        zip((name for name in intact if not name.startswith("probe")), itertools.cycle(DAMAGES), strict=False)
    )
    assert len(damages) >= len(DAMAGES)  # each kind of damage is done to a file of its own; the probe takes long
    for name, content in intact.items():
        (tmp_path / name).write_bytes(damages[name](content) if name in damages else content)
    assert run(STEP, tmp_path) == printed
    assert kernels(tmp_path).keys() == intact.keys()
    assert run(STEP, tmp_path) == printed.replace("True ", "False ")


def test_without_a_home_the_kernels_work(first: tuple[Path, str]) -> None:
    """Nor is there a folder for them: below a device none can be made."""
    assert run(STEP, Path(), DESCEND_CACHE_DIR="", HOME="", XDG_CACHE_HOME="/dev/null/none") == first[1]


RULE = """
import torch, descend
from descend.ops import sign, sqrt
FACTOR = {factor}
def helper(x, more={default}):
    return {helper}
def make(f, inner):
    def rule(param, grad, lr):
        return param - lr * FACTOR * inner * helper(f(grad))
    return rule
param = torch.zeros(1, requires_grad=True); param.grad = torch.full((1,), 4.0)
descend.from_rule(make({op}, {inner}), "Rule", lr=1.0)([param], backend="cpu").step()
print(param.item())
"""
PLAIN = dict(factor=1.0, helper="x * more", op="sqrt", inner=1.0, default=1.0)
EDITS = [
    (dict(), -2.0),
    (dict(factor=3.0), -6.0),
    (dict(helper="x + more"), -3.0),
    (dict(default=5.0), -10.0),
    (dict(op="sign"), -1.0),
    (dict(inner=0.25), -0.5),
]


def test_edited_rule_is_compiled_again_and_found_again(first: tuple[Path, str], tmp_path: Path) -> None:
    for name, content in kernels(first[0]).items():  # so that only the rules are compiled
        (tmp_path / name).write_bytes(content)
    codes = [RULE.format(**{**PLAIN, **change}) for change, _ in EDITS]
    expected = "\n".join(str(end) for _, end in EDITS)
    assert run("\n".join(codes), tmp_path) == expected
    assert len([name for name in kernels(tmp_path) if name.startswith("rule")]) == len(EDITS)
    moved = "\n\n".join(codes) + "\nimport sys; print('numba' in sys.modules)"  # line numbers play no part
    assert run(moved, tmp_path) == expected + "\nFalse"


def test_import_is_light_and_writes_nothing(tmp_path: Path) -> None:
    modules = run("import sys, descend; print(*sys.modules)", tmp_path / "kernels").split()
    heavy = {"numba", "llvmlite", "triton", "matplotlib", "rich", "typer", "sklearn", "descend.compare"}
    assert heavy & set(modules) <= {"llvmlite"}
    assert not (tmp_path / "kernels").exists()


def test_warmup_leaves_nothing_to_compile_and_touches_nothing() -> None:
    def rule(param, grad, average, lr):
        return param - lr * 0.123 * grad, average + grad

    params = [torch.ones(5, requires_grad=True), torch.ones(5, dtype=torch.bfloat16, requires_grad=True)]
    optimizer = from_rule(rule, "Rule")(params, max_norm=1.0)
    warmup(optimizer)
    assert not optimizer.state
    assert all(param._version == 0 for param in params)
    known = set(object_files._loaded)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    optimizer.step()
    assert set(object_files._loaded) == known
