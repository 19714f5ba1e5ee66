"""Kernels on disk: found by the next process, and a folder in any condition is no error."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

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
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(code)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.strip()


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with what one process compiled, and what that process printed."""
    folder = tmp_path_factory.mktemp("kernels")
    return folder, run(STEP, folder)


def kernels(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_second_process_finds_the_kernels(first: tuple[Path, str]) -> None:
    folder, printed = first
    before = kernels(folder)
    assert printed.startswith("True ")  # the first had to compile
    assert any(name.startswith("adamw") for name in before)
    assert run(STEP, folder) == printed.replace("True ", "False ")
    assert kernels(folder) == before


@pytest.mark.parametrize("damage", [b"", b"\n", b"nonsense", None], ids=["empty", "newline", "nonsense", "truncated"])
def test_damaged_file_is_compiled_again(first: tuple[Path, str], damage: bytes | None, tmp_path: Path) -> None:
    folder, printed = first
    for name, content in kernels(folder).items():
        (tmp_path / name).write_bytes(content[:-100] if damage is None else damage)
    assert run(STEP, tmp_path) == printed
    assert run(STEP, tmp_path) == printed.replace("True ", "False ")


def test_flipped_bit_is_noticed(first: tuple[Path, str], tmp_path: Path) -> None:
    folder, printed = first
    for name, content in kernels(folder).items():
        middle = len(content) // 2
        (tmp_path / name).write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    assert run(STEP, tmp_path) == printed


def test_folder_that_cannot_be_written_is_no_error(first: tuple[Path, str], tmp_path: Path) -> None:
    blocked = tmp_path / "a file"
    blocked.touch()
    assert run(STEP, blocked / "below") == first[1]
    assert run(STEP, blocked) == first[1]


def test_without_a_home_the_kernels_work(first: tuple[Path, str]) -> None:
    assert run(STEP, Path(), DESCEND_CACHE_DIR="", HOME="", XDG_CACHE_HOME="/dev/null/none") == first[1]


def test_folder_is_private_and_made_when_needed(tmp_path: Path, first: tuple[Path, str]) -> None:
    folder = tmp_path / "deep" / "er"
    run(STEP, folder)
    assert kernels(folder).keys() == kernels(first[0]).keys()
    assert (folder.stat().st_mode & 0o077) == 0 or os.name == "nt"


RULE = """
import sys
import torch, descend
from descend.ops import sign, sqrt
FACTOR = {factor}
def helper(x, more={default}):
    return {helper}
def make(f, inner):
    def rule(param, grad, lr):
        return param - lr * FACTOR * inner * helper(f(grad))
    return rule
rule = make({op}, {inner})
param = torch.zeros(1, requires_grad=True); param.grad = torch.full((1,), 4.0)
descend.from_rule(rule, "Rule", lr=1.0)([param], backend="cpu").step()
print("numba.core.compiler" in sys.modules, param.item())
"""
PLAIN = dict(factor=1.0, helper="x * more", op="sqrt", inner=1.0, default=1.0)
EDITS = [
    (dict(), -2.0),
    (dict(factor=3.0), -6.0),
    (dict(helper="x + more"), -3.0),
    (dict(default=5.0), -10.0),
    (dict(op="sign"), -1.0),
    (dict(inner=0.5), -1.0),
]


def test_edited_rule_is_compiled_again_and_found_again(tmp_path: Path) -> None:
    for change, expected in EDITS:
        code = RULE.format(**{**PLAIN, **change})
        assert run(code, tmp_path) == f"True {expected}"
    for change, expected in EDITS[::3]:
        assert run("\n\n\n" + RULE.format(**{**PLAIN, **change}), tmp_path) == f"False {expected}"  # lines play no part
    assert len([name for name in kernels(tmp_path) if name.startswith("rule")]) == len(EDITS)


@pytest.mark.parametrize("module", ["numba", "triton", "matplotlib", "rich", "typer", "sklearn", "descend.compare"])
def test_import_is_light(module: str, loaded: set[str]) -> None:
    assert module not in loaded


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    return set(run("import sys, descend; print(*sys.modules)", tmp_path_factory.mktemp("empty")).split())


def test_import_writes_nothing(tmp_path: Path) -> None:
    run("import descend", tmp_path / "kernels")
    assert not (tmp_path / "kernels").exists()


def test_warmup_leaves_nothing_to_compile(tmp_path: Path) -> None:
    code = """
    import torch, descend
    from descend.kernels import native
    params = [torch.ones(5, requires_grad=True), torch.ones(5, dtype=torch.bfloat16, requires_grad=True)]
    optimizer = descend.Adam(params, max_norm=1.0)
    descend.warmup(optimizer)
    assert not optimizer.state and all(param._version == 0 for param in params)
    known = set(native._loaded)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    optimizer.step()
    print(len(known) > 0 and known == set(native._loaded))
    """
    assert run(code, tmp_path) == "True"
