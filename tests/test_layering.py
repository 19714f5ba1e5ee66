"""Imports point one way, and the public names are these."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

import descend

ROOT = Path(descend.__file__).parent

# What the files of each shelf may import of descend beside their own shelf; imports for type checkers count.
ARROWS = {
    "ops": set(),
    "rules": {"ops"},
    "newton_schulz": {"ops"},
    "matrix_rules": {"newton_schulz", "ops"},
    "core": {"ops"},
    "backends": {"core", "ops"},
    "offload": {"core"},
    "distributed": {"core", "offload"},
    "norms": {"backends", "core", "distributed"},
    "state": {"backends", "core", "distributed", "offload"},
    "sparse": {"backends", "core", "distributed", "state"},
    "step": {"backends", "core", "distributed", "norms", "offload", "sparse", "state"},
    "checkpoint": {"core", "distributed", "offload", "sparse", "state"},
    "diagnostics": {"core", "distributed", "reporting"},
    "first_order": {
        "checkpoint",
        "core",
        "diagnostics",
        "distributed",
        "matrix_rules",
        "newton_schulz",
        "ops",
        "rules",
        "sparse",
        "state",
        "step",
    },
    "second_order": {"backends", "checkpoint", "core", "distributed"},
    "fit": {"core", "second_order"},
    "public": {"backends", "checkpoint", "core", "diagnostics", "first_order", "fit", "norms", "second_order"},
    "__init__": {"public"},
    "reporting": set(),
    "compare": {"__init__", "reporting"},
    "bench": {"__init__", "reporting", "state"},
    "command": {"__init__", "bench", "compare", "diagnostics", "reporting"},
    "__main__": {"command"},
}


# What the folders of second_order may import of it beside themselves; the files above them are what users call.
FOLDERS = {"mathematics": set(), "problem": {"mathematics"}, "solvers": {"mathematics", "problem"}}


def modules() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def shelf(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """The modules of descend that ``path`` imports, as dotted paths below descend; "" is the package itself."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "descend"}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            if node.module and node.module.split(".")[0] == "descend":
                for alias in node.names:
                    full = f"{node.module}.{alias.name}"
                    below = ROOT.joinpath(*full.split(".")[1:])
                    found.add(full if below.is_dir() or below.with_suffix(".py").exists() else node.module)
    return {name.removeprefix("descend").lstrip(".") for name in found}


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_arrows_point_one_way(path: Path) -> None:
    shelves = {name.split(".")[0] or "__init__" for name in imported(path)}
    assert shelves - {shelf(path)} <= ARROWS[shelf(path)], "docs/design.md says which shelf imports which"


def assert_no_circle(arrows: dict[str, set[str]]) -> None:
    order: list[str] = []
    while len(order) < len(arrows):
        ready = [name for name, needs in arrows.items() if name not in order and needs - {name} <= set(order)]
        assert ready, f"a circle among {set(arrows) - set(order)}"
        order += ready


def test_shelves_have_no_circle() -> None:
    assert_no_circle(ARROWS)


def test_files_have_no_circle() -> None:
    names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in modules()}
    names = {path: name.removesuffix("__init__").rstrip(".") for path, name in names.items()}
    assert_no_circle({name: imported(path) for path, name in names.items()})


@pytest.mark.parametrize("folder", FOLDERS)
def test_folders_of_second_order_point_one_way(folder: str) -> None:
    allowed = {f"second_order.{name}" for name in (folder, *FOLDERS[folder])}
    for path in (ROOT / "second_order" / folder).glob("*.py"):
        found = {name for name in imported(path) if name.startswith("second_order")}
        assert {".".join(name.split(".")[:2]) for name in found} <= allowed, path


def test_mathematics_of_second_order_is_pure() -> None:
    for path in (ROOT / "second_order" / "mathematics").glob("*.py"):
        assert all(name.startswith("second_order.mathematics") for name in imported(path)), (
            f"{path.name} is mathematics: it knows neither objectives nor optimizers"
        )


def test_every_shelf_is_known() -> None:
    assert {shelf(path) for path in modules()} - set(ARROWS) == set()


def test_rules_import_only_operations() -> None:
    tree = ast.parse((ROOT / "rules.py").read_text(encoding="utf-8"))
    sources = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert sources == {"__future__", "descend.ops"}
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Import)]


def test_numba_is_imported_only_where_something_is_compiled() -> None:
    compilers = {path.name for path in modules() if "numba" in path.read_text(encoding="utf-8").split("import ", 1)[-1]}
    top = {
        path.name
        for path in modules()
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if (isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "numba")
        or (isinstance(node, ast.Import) and any(alias.name.split(".")[0] == "numba" for alias in node.names))
    }
    assert top <= {
        "kernels.py",
        "intrinsics.py",
        "probe_kernel.py",
        "rows_kernel.py",
        "stored.py",
        "vectors_kernel.py",
        "row_loops.py",
    }
    assert top <= compilers


TORCHS = ("Optimizer", "lr_scheduler", "swa_utils")
if torch.__version__ >= "2.13":
    TORCHS += ("swap_in_optimizer_params_and_state",)
if torch.__version__ >= "2.15":
    TORCHS += ("functional",)


def test_public_names_are_frozen() -> None:
    names = (
        "SGD ASGD Lion Rprop Adagrad RMSprop Adadelta Adam AdamW Adamax NAdam RAdam AdamWScheduleFree ADOPT AdEMAMix "
        "Adan MARS LAMB Prodigy Muon NorMuon RowwiseAdagrad SparseAdam Adafactor SOAP LBFGS LeastSquares Newton "
        "FirstOrder Monitor BatchedResult BestResult ConstrainedResult IncompatibleKeys RuleError LeastSquaresResult "
        "Progress Result Status eq ineq clip_grad_norm_ clip_grad_value_ clip_grads_with_norm_ combined from_rule "
        "get_total_norm in_backward layer_decay least_squares minimize no_decay scipy_minimize warmup"
    )
    assert sorted(descend.__all__) == sorted([*names.split(), *TORCHS])
    assert dir(descend) == sorted(descend.__all__)
    assert all(getattr(descend, name).__doc__ for name in names.split())
    assert descend.__version__.count(".") == 2


def test_names_that_are_torchs_are_torchs_own() -> None:
    assert all(getattr(descend, name) is getattr(torch.optim, name) for name in TORCHS)


DATA = (
    "BatchedResult",
    "BestResult",
    "ConstrainedResult",
    "IncompatibleKeys",
    "LeastSquaresResult",
    "Progress",
    "Result",
    "RuleError",
    "Status",
)


@pytest.mark.parametrize("name", [name for name in descend.__all__ if name not in (*DATA, *TORCHS)])
def test_public_functions_show_an_example_or_their_errors(name: str) -> None:
    documentation = getattr(descend, name).__doc__
    assert ">>>" in documentation or "Raises:" in documentation
