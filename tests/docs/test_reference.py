"""The reference holds every public name and every command, in a form that mkdocstrings reads."""

from __future__ import annotations

import importlib.util
import re
from types import ModuleType

import pytest
import torch
from doc_pages import ROOT

import descend
from descend import matrix_rules, rules

REFERENCE = ROOT / "docs" / "reference"


def script(name: str) -> ModuleType:
    """A module of docs/site."""
    spec = importlib.util.spec_from_file_location(f"site_{name}", ROOT / "docs" / "site" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_public_name_is_in_the_reference() -> None:
    pages = "\n".join(page.read_text("utf-8") for page in REFERENCE.glob("*.md"))
    documented = {path.rpartition(".")[2] for path in re.findall(r"^::: (\S+)$", pages, re.MULTILINE)}
    torchs = {name for name in descend.__all__ if getattr(descend, name) is getattr(torch.optim, name, None)}
    assert set(descend.__all__) - torchs <= documented
    assert all(f"`{name}`" in (REFERENCE / "index.md").read_text("utf-8") for name in torchs)


def test_every_rule_is_in_the_reference() -> None:
    page = (REFERENCE / "rules.md").read_text("utf-8")
    shown = re.findall(r"^\[source: (\w+)\]\(../../src/descend/rules.py\)", page, re.MULTILINE)
    assert shown == [name for name, rule in vars(rules).items() if getattr(rule, "__module__", "") == rules.__name__]
    shown = re.findall(r"^\[source: (\w+)\]\(../../src/descend/matrix_rules.py\)", page, re.MULTILINE)
    named = vars(matrix_rules).items()
    found = (name for name, each in named if hasattr(each, "cache_info") or getattr(each, "kind", None) == "matrix")
    own = (name for name in found if getattr(matrix_rules, name).__module__ == matrix_rules.__name__)
    assert shown == [name for name in own if not name.startswith("_")]


def test_every_command_is_in_the_reference() -> None:
    typer = pytest.importorskip("typer")
    from descend.command.app import app

    page = (REFERENCE / "command.md").read_text("utf-8")
    commands = typer.main.get_command(app).commands
    assert re.findall(r"^\[help: (\w+)\]", page, re.MULTILINE) == list(commands)
    text = script("command_help").on_page_markdown(page)
    for command in commands.values():
        for param in command.params:
            assert all(f"`{name}" in text for name in param.opts if name.startswith("--"))


def test_docstrings_become_what_griffe_parses() -> None:
    pytest.importorskip("griffe")
    text = "Step.\n\nArgs:\n    foreach, fused: kept.\nRaises:\n    ValueError: never.\nExample:\n    >>> 1\n    1"
    assert script("docstrings").parsable(text) == (
        "Step.\n\nArgs:\n    foreach: kept.\n    fused: kept.\n\nRaises:\n    ValueError: never.\n\nExamples:\n"
        "    >>> 1\n    1"
    )
