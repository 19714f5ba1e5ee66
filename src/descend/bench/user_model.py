"""A model that a user's file builds."""

from __future__ import annotations

import importlib.util
import sys
import traceback
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from descend.reporting.errors import UsageError

MODULE = "descend_bench_model"


def build_model(text: str) -> nn.Module:
    """Run the function that ``text`` names and return its model.

    Args:
        text: ``FILE.py:FUNCTION``; the function takes no arguments.
    Raises:
        UsageError: there is no such file or function, one of them raises, or the result is not a module; the message
            has file and line.
    """
    file, colon, function = text.rpartition(":")
    if not colon or not function.isidentifier():
        raise UsageError(f"--model must be FILE.py:FUNCTION, as in model.py:build, got {text!r}.")
    path = Path(file)
    if not path.is_file():
        raise UsageError(f"--model: there is no file {file}.")
    namespace = _run(path, text)
    build = namespace.get(function)
    if not callable(build):
        functions = [name for name, value in namespace.items() if callable(value) and not name.startswith("_")]
        raise UsageError(f"--model: {file} has no function {function}; it has {', '.join(functions) or 'none'}.")
    try:
        model = build()
    except (Exception, SystemExit) as error:
        raise _located(path, text, error) from None
    if not isinstance(model, nn.Module):
        raise UsageError(f"--model: {text} must return a torch.nn.Module, got {type(model).__name__}.")
    return model


def trained(model: nn.Module, text: str) -> list[Tensor]:
    """Return the parameters of ``model`` that an optimizer trains; raise a ``UsageError`` if there are none.

    Args:
        model: a user's model.
        text: how the user named it.
    """
    params = list(model.parameters())
    if any(isinstance(param, UninitializedParameter) for param in params):
        raise UsageError(f"--model: {text} has lazy parameters without a size; call the model once in the function.")
    found: list[Tensor] = [param for param in params if param.requires_grad and param.numel()]
    if not found:
        raise UsageError(f"--model: {text} has no parameters to train.")
    return found


def _run(path: Path, text: str) -> dict[str, Any]:
    spec = importlib.util.spec_from_file_location(MODULE, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"--model: {path} is not a Python file.")
    module = importlib.util.module_from_spec(spec)
    folder = str(path.resolve().parent)
    sys.modules[MODULE] = module  # dataclasses and pickle look themselves up there
    sys.path.insert(0, folder)  # as if the file were run
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise _located(path, text, error) from None
    finally:
        sys.path.remove(folder)
    return vars(module)


def _located(path: Path, text: str, error: BaseException) -> UsageError:
    """Return the error that names the last line of the user's file that was running."""
    if isinstance(error, SyntaxError):
        line: int | str = error.lineno or "?"
        problem = error.msg
    else:
        frames = [
            frame
            for frame in traceback.extract_tb(error.__traceback__)
            if Path(frame.filename).resolve() == path.resolve()
        ]
        line = frames[-1].lineno or "?" if frames else "?"
        problem = str(error)
    return UsageError(f"--model {text}: {path}, line {line}: {type(error).__name__}: {problem.rstrip('.')}.")
