"""Files of the user's: run once, and blamed by line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from descend.reporting.errors import UsageError
from descend.reporting.user_file import MODULE, errors_located, run_file


@pytest.fixture(autouse=True)
def own_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "modules", {**sys.modules})


def test_functions_may_import_what_lies_beside_the_file(tmp_path: Path) -> None:
    (tmp_path / "beside_the_task.py").write_text("NUMBER = 3\n")
    path = tmp_path / "task.py"
    path.write_text("def number():\n    from beside_the_task import NUMBER\n    return NUMBER\n")
    module = run_file(path)
    assert module.number() == 3
    assert sys.modules[MODULE] is module


def test_errors_name_the_file_that_they_are_in(tmp_path: Path) -> None:
    (tmp_path / "broken_beside.py").write_text("\n\n)\n")
    path = tmp_path / "task.py"
    path.write_text("x = 1\nimport broken_beside\n")
    with pytest.raises(UsageError, match=r"broken_beside\.py:3: SyntaxError: unmatched '\)'\.$"):
        run_file(path)
    path.write_text("x = 1\nraise ValueError('two\\nlines.')\n")
    with pytest.raises(UsageError, match=r"task\.py:2: ValueError: two lines\.$"):
        run_file(path)
    with pytest.raises(UsageError, match=r"task\.py: KeyError in its loss\.$"), errors_located(path, "its loss"):
        raise KeyError
    with pytest.raises(UsageError, match=r"there is no file .*nothing\.py\.$"):
        run_file(tmp_path / "nothing.py")


def test_errors_of_ours_pass(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^as it is$"), errors_located(tmp_path / "task.py"):
        raise UsageError("as it is")
