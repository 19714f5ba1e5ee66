"""Imports point one way, the public surface is what it says, and importing stays cheap."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import descend

SOURCE = Path(descend.__file__).parent
MODULES = sorted(path.relative_to(SOURCE).with_suffix("").as_posix() for path in SOURCE.rglob("*.py"))

# What each shelf may import of the library, beside itself.
ALLOWED = {
    "ops": set(),
    "rules": {"ops"},
    "signature": set(),
    "state": set(),
    "kernels": {"ops"},
    "clip": {"kernels"},
    "plan": {"clip", "kernels", "signature", "state"},
    "checkpoint": set(),
    "optimizer": {"checkpoint", "kernels", "plan", "signature", "state"},
    "from_rule": {"optimizer", "signature"},
    "first_order": {"optimizer", "rules"},
    "__init__": {"clip", "first_order", "from_rule", "kernels", "optimizer"},
}


def imported(path: Path) -> set[str]:
    """Shelves of the library that a file imports, annotations apart."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    shelves = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "descend":
            parts = (node.module or "").split(".")[1:]
            shelves |= {parts[0]} if parts else {alias.name for alias in node.names}
        if isinstance(node, ast.Import):
            shelves |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("descend.")}
    return shelves


@pytest.mark.parametrize("module", [m for m in MODULES if not m.startswith("compare")])
def test_imports_point_one_way(module: str) -> None:
    shelf = module.split("/")[0]
    assert imported(SOURCE / f"{module}.py") <= ALLOWED[shelf] | {shelf}


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith("compare")])
def test_compare_uses_public_names_only(module: str) -> None:
    assert imported(SOURCE / f"{module}.py") <= {"compare"}


def test_public_names_are_frozen() -> None:
    assert sorted(descend.__all__) == [
        "Adam",
        "AdamW",
        "FirstOrder",
        "RuleError",
        "SGD",
        "clip_grad_norm_",
        "clip_grad_value_",
        "clip_grads_with_norm_",
        "from_rule",
        "get_total_norm",
        "warmup",
    ]
    assert all(hasattr(descend, name) for name in descend.__all__)


def test_import_loads_no_compiler_and_no_plots() -> None:
    heavy = ["numba", "triton", "matplotlib", "sklearn", "typer", "descend.compare"]
    code = f"import sys, descend; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
