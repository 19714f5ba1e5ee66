"""A Python file of the user's: run it, and name the line of it that raises."""

from __future__ import annotations

import importlib.util
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from descend.reporting.errors import UsageError

MODULE = "descend_user_file"


def run_file(path: Path) -> ModuleType:
    """Run the file as Python runs a script, and return it as a module.

    Its folder is on ``sys.path`` from then on, so that its functions may import what lies beside it.

    Args:
        path: the file.
    Raises:
        UsageError: there is no such file, it is not Python, or it raises.
    """
    if not path.is_file():
        raise UsageError(f"there is no file {path}.")
    spec = importlib.util.spec_from_file_location(MODULE, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{path} is not a Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[MODULE] = module  # dataclasses and pickle look themselves up there
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    with errors_located(path):
        spec.loader.exec_module(module)
    return module


@contextmanager
def errors_located(path: Path, doing: str = "") -> Iterator[None]:
    """Turn what the user's code raises into a ``UsageError`` with file and line.

    Args:
        path: the user's file; the last of its lines that was running is named.
        doing: what was done with the file, said if none of its lines was running. Default: nothing.
    """
    try:
        yield
    except UsageError:
        raise
    except SyntaxError as error:
        file = Path(error.filename) if error.filename else path
        name = path if file.resolve() == path.resolve() else file
        place = ":".join(map(str, filter(None, (name, error.lineno))))  # a null byte has no line
        raise UsageError(f"{place}: {type(error).__name__}: {error.msg}.") from error
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == path.resolve()]
        place = f"{path}:{lines[-1]}" if lines else f"{path}"
        where = f" in {doing}" if doing and not lines else ""
        text = shortened(str(error)).rstrip(".")
        raise UsageError(f"{place}: {type(error).__name__}{where}{': ' * bool(text)}{text}.") from error


def shortened(text: str) -> str:
    """Return the text in one line, of at most 200 characters."""
    text = " ".join(text.split())
    return text if len(text) <= 200 else f"{text[:200]}..."
