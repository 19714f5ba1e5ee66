"""A model that a user's file builds."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from descend.reporting.errors import UsageError
from descend.reporting.user_file import errors_located, run_file


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
    namespace = vars(run_file(path))
    build = namespace.get(function)
    if not callable(build):
        functions = [name for name, value in namespace.items() if callable(value) and not name.startswith("_")]
        raise UsageError(f"--model: {file} has no function {function}; it has {', '.join(functions) or 'none'}.")
    with errors_located(path, function):
        model = build()
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
