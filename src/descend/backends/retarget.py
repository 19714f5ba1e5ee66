"""Rebinds what a rule calls: the same code object, with other functions behind the names it uses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import CellType, FunctionType
from typing import Any


def retarget(
    function: FunctionType,
    ops: Mapping[Any, Any],
    compiled: Callable[[FunctionType], Any],
) -> Any:
    """``compiled(function)``, where ``function`` finds the backend's operations behind its own names.

    Args:
        function: a rule, or a helper that a rule calls.
        ops: the backend's operation for each function of ``descend.ops``.
        compiled: makes the rebound function, and every plain Python helper it calls, callable in the backend.
    """

    def rebound(value: Any) -> Any:
        try:
            if value in ops:
                return ops[value]
        except TypeError:  # unhashable: not an operation
            return value
        return retarget(value, ops, compiled) if isinstance(value, FunctionType) else value

    names = {
        name: rebound(function.__globals__[name])
        for name in function.__code__.co_names
        if name in function.__globals__ and function.__globals__[name] is not function
    }
    cells = tuple(CellType(rebound(cell.cell_contents)) for cell in function.__closure__ or ())
    copy = FunctionType(
        function.__code__,
        {**function.__globals__, **names},
        function.__name__,
        function.__defaults__,
        cells,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__module__, copy.__qualname__ = function.__module__, function.__qualname__
    return compiled(copy)


def fingerprint(function: FunctionType, ops: Mapping[Any, str]) -> str:
    """Text that determines what ``function`` computes: its code, and the values and helpers it refers to.

    It does not need the source, so it works for rules typed at a prompt; line numbers play no part.

    Args:
        function: a rule, or a helper that a rule calls.
        ops: the name of each function of ``descend.ops``.
    """

    def described(value: Any) -> str:
        if not isinstance(value, FunctionType):
            return repr(value)
        return ops[value] if value in ops else "itself" if value is function else fingerprint(value, ops)

    code = function.__code__
    cells = zip(code.co_freevars, function.__closure__ or (), strict=True)
    referred = {name: function.__globals__[name] for name in code.co_names if name in function.__globals__}
    referred |= {name: cell.cell_contents for name, cell in cells}
    parts = {name: described(value) for name, value in referred.items()}
    defaults = (function.__defaults__, function.__kwdefaults__)
    return repr((code.co_code, code.co_varnames, code.co_names, code.co_consts, defaults, parts))
