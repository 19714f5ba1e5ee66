"""The options that every element-wise optimizer takes beyond torch's arguments.

A new option is a field of ``StepOptions``; for type checkers, a key of ``Options`` and an annotation in ``Method``; and
the place that uses it. Constructors, attributes, copies and pickles follow.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeAlias, TypedDict, TypeVar, get_args

import torch

from descend.core.groups import Groups

Nonfinite: TypeAlias = Literal["step", "skip", "raise"]
BackendName: TypeAlias = Literal["auto", "eager", "cpu"]
Sparse: TypeAlias = Literal["touched", "exact"]
Amp: TypeAlias = Literal["fused"]
StatePages: TypeAlias = Literal["auto", "touched", "all"]

BACKENDS: list[str] = list(get_args(BackendName))  # ``backends.register`` appends to it
STATE_DTYPES = (None, torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Options(TypedDict, total=False):
    """What constructors take beyond torch's arguments, keyword-only: ``StepOptions``, and ``groups``."""

    max_norm: float | None
    nonfinite: Nonfinite
    backend: BackendName
    state_dtype: torch.dtype | None
    sparse: Sparse | None
    groups: Groups | None
    amp: Amp | None
    state_pages: StatePages
    shard_state: Any


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """How an optimizer steps, whatever its method; never in a group. ``FirstOrder`` documents each option."""

    max_norm: float | None = None
    nonfinite: Nonfinite = "step"
    backend: BackendName = "auto"
    state_dtype: torch.dtype | None = None
    sparse: Sparse | None = None
    amp: Amp | None = None
    state_pages: StatePages = "auto"
    shard_state: Any = None  # checked by ``distributed/shard_state.py``, which knows what is allowed

    @property
    def wants_norm(self) -> bool:
        """Whether a step needs the norm of all gradients."""
        return self.max_norm is not None or self.nonfinite != "step"

    def check(self, who: str) -> None:
        """Raise ``ValueError`` if an option is out of range.

        Args:
            who: the optimizer's name, for the message.
        """
        if self.max_norm is not None and not (isinstance(self.max_norm, int | float) and self.max_norm > 0):
            raise ValueError(f"{who}: max_norm must be a number > 0, or None not to clip, got {self.max_norm!r}.")
        allowed: dict[str, tuple[Any, ...]] = {
            "nonfinite": get_args(Nonfinite),
            "backend": tuple(BACKENDS),
            "state_dtype": STATE_DTYPES,
            "sparse": (None, *get_args(Sparse)),
            "amp": (None, *get_args(Amp)),
            "state_pages": get_args(StatePages),
        }
        for name, values in allowed.items():
            if (value := getattr(self, name)) not in values:
                raise ValueError(f"{who}: {name} must be one of {values}, got {value!r}.")
        if self.sparse == "exact" and self.shard_state is not None:
            raise ValueError(f"{who}: sparse='exact' keeps whole tables on every rank; with shard_state use 'touched'.")


Function = TypeVar("Function", bound=Callable[..., Any])


def shows_options(function: Function) -> Function:
    """Let ``inspect.signature`` and ``help`` show the options that ``function`` takes as ``**options``."""
    options = [
        inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type)
        for field in fields(StepOptions)
    ]
    options.append(
        inspect.Parameter("groups", inspect.Parameter.KEYWORD_ONLY, default=None, annotation="Groups | None")
    )
    signature = inspect.signature(function)
    named = [each for each in signature.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
    function.__signature__ = signature.replace(parameters=[*named, *options])  # type: ignore[attr-defined]
    return function
