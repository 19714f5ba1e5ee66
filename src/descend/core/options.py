"""The options that every first-order optimizer takes beyond torch's arguments.

A new option is a field of ``StepOptions``, with what docstrings say of it; for type checkers, a key of ``Options`` and
an annotation in ``Method``; and the place that uses it. Constructors, attributes, copies, pickles and the docstrings of
all optimizers follow.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeAlias, TypedDict, TypeVar, get_args

import torch

from descend.core.groups import Groups, Pattern, check_pattern

Nonfinite: TypeAlias = Literal["step", "skip", "raise"]
BackendName: TypeAlias = Literal["auto", "eager", "foreach", "cpu", "triton", "matrix"]
Sparse: TypeAlias = Literal["touched", "exact"]
Amp: TypeAlias = Literal["fused"]
StatePages: TypeAlias = Literal["auto", "touched", "all"]
Cautious: TypeAlias = Literal["update", "decay", "both"]
DecayBy: TypeAlias = Literal["lr", "schedule", "lr_squared"]
StateDevice: TypeAlias = Literal["cpu"]
Rounding: TypeAlias = Literal["nearest", "stochastic", "compensated"]
StateDtype: TypeAlias = torch.dtype | Literal["8bit"]

BACKENDS: list[str] = list(get_args(BackendName))  # ``backends.register`` appends to it
STATE_DTYPES: tuple[StateDtype, ...] = (torch.float16, torch.bfloat16, torch.float32, torch.float64, "8bit")


class Options(TypedDict, total=False):
    """What constructors take beyond torch's arguments, keyword-only: ``StepOptions``, and ``groups``."""

    max_norm: float | None
    nonfinite: Nonfinite
    backend: BackendName
    state_dtype: StateDtype | Mapping[str, StateDtype] | None
    float32_state: Pattern | None
    rounding: Rounding
    rounding_seed: int
    sparse: Sparse | None
    groups: Groups | None
    amp: Amp | None
    state_pages: StatePages
    shard_state: Any
    state_device: StateDevice | None
    cautious: Cautious | None
    decay_by: DecayBy
    ema: float | None


def _says(documentation: str) -> dict[str, str]:
    """A field's metadata: what docstrings say of it."""
    return {"documentation": documentation}


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """How an optimizer steps, whatever its method; never in a group."""

    max_norm: float | None = field(
        default=None,
        metadata=_says(
            "clip, inside the update: gradients act as if scaled until their joint 2-norm is at most this, > 0. "
            "Default: None."
        ),
    )
    nonfinite: Nonfinite = field(
        default="step",
        metadata=_says(
            'what a NaN or Inf in a gradient does: ``"step"``, it spreads, as in torch; ``"skip"``, nothing moves and '
            '``skipped_steps`` grows; ``"raise"``, ``FloatingPointError`` before anything moves. Default: ``"step"``.'
        ),
    )
    backend: BackendName = field(
        default="auto",
        metadata=_says(
            'what runs the rule: ``"auto"``; ``"cpu"``, ``"triton"`` or ``"foreach"``, an error where it cannot; or '
            '``"eager"``. Default: the environment variable ``DESCEND_BACKEND``, else ``"auto"``.'
        ),
    )
    state_dtype: StateDtype | Mapping[str, StateDtype] | None = field(
        default=None,
        metadata=_says(
            'how new state of real parameters is stored: a dtype; ``"8bit"``, one byte a number and a scale for every '
            "256, where a tensor is large and its state averages; or a dict of these by the name of the state. "
            "Default: the parameter's dtype, but float32 for float16, where squares of gradients underflow."
        ),
    )
    float32_state: Pattern | None = field(
        default=None,
        metadata=_says(
            'names of parameters whose state ``"8bit"`` leaves in float32: a glob, a compiled regular expression or a '
            "collection of names. Default: None."
        ),
    )
    rounding: Rounding = field(
        default="nearest",
        metadata=_says(
            'how results are rounded to bfloat16 and to 8 bits. ``"nearest"``, which loses steps that are small '
            'against a parameter; ``"stochastic"``, up or down at random, so that none is lost on average; '
            '``"compensated"``, to nearest, and bfloat16 parameters keep what was lost in two more bytes of state: '
            'both together are a float32. Default: ``"nearest"``.'
        ),
    )
    rounding_seed: int = field(
        default=0,
        metadata=_says(
            'seed of ``rounding="stochastic"``, whose noise depends on this, a parameter\'s number, its step and the '
            "place in it alone. Default: 0."
        ),
    )
    sparse: Sparse | None = field(
        default=None,
        metadata=_says(
            "what a sparse gradient means. None: what it means in torch, where Adam and AdamW refuse it. "
            '``"touched"``: rows that it does not name stay as they are. ``"exact"`` (Adam, AdamW): their gradient is '
            "zero, as if it were dense; they catch up when they are next read, see ``attach``. Default: None."
        ),
    )
    amp: Amp | None = field(
        default=None,
        metadata=_says(
            '``"fused"``: a ``GradScaler`` leaves unscaling, and leaving out steps that overflow, to the update. '
            "None: it rewrites the gradients itself. Default: None."
        ),
    )
    state_pages: StatePages = field(
        default="auto",
        metadata=_says(
            'memory for the state of sparse parameters: ``"touched"``, only the pages of touched rows; ``"all"``, '
            'all at the first step; ``"auto"``, all if memory is plentiful and rows are scattered. Default: ``"auto"``.'
        ),
    )
    # Checked by ``distributed/shard_state.py``, which knows what is allowed.
    shard_state: Any = field(
        default=None,
        metadata=_says(
            "a process group or one-dimensional ``DeviceMesh`` whose ranks all have the whole parameters, as under "
            "DistributedDataParallel: each keeps and updates the state of its part (ZeRO-1). Default: None."
        ),
    )
    state_device: StateDevice | None = field(
        default=None,
        metadata=_says(
            '``"cpu"``: the state of parameters on a device stays in the host\'s memory, where copies of them are '
            "stepped while gradients come and parameters go. Default: None, where the parameters are."
        ),
    )
    # These three make one method of another, see ``core/wrapping.py``.
    cautious: Cautious | None = field(
        default=None,
        metadata=_says(
            '``"update"``: leave out what would move a weight against its gradient, and lengthen the rest to make up; '
            '``"decay"``: leave out decoupled weight decay where it works against the update; ``"both"``. '
            "Default: None."
        ),
    )
    decay_by: DecayBy = field(
        default="lr",
        metadata=_says(
            'what decoupled ``weight_decay`` is multiplied by. ``"lr"``, as in torch; ``"schedule"``, the lr as a part '
            'of its largest; ``"lr_squared"``, lr times that part. The largest is the ``max_lr`` of the group: its lr '
            'when it was made, unless it is set. Default: ``"lr"``.'
        ),
    )
    ema: float | None = field(
        default=None,
        metadata=_says(
            "keep an average of the weights, of which a step keeps this part, in [0, 1). ``averaged`` puts it in their "
            "place. Default: None."
        ),
    )

    def state_dtype_of(self, name: str) -> StateDtype | None:
        """What is asked for the state called ``name``; None for the default."""
        asked = self.state_dtype
        return asked.get(name) if isinstance(asked, Mapping) else asked

    @property
    def may_have_codes(self) -> bool:
        """Whether some state may be in 8 bits."""
        asked = self.state_dtype
        return "8bit" in (asked.values() if isinstance(asked, Mapping) else (asked,))

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
            "rounding": get_args(Rounding),
            "sparse": (None, *get_args(Sparse)),
            "amp": (None, *get_args(Amp)),
            "state_pages": get_args(StatePages),
            "state_device": (None, *get_args(StateDevice)),
            "cautious": (None, *get_args(Cautious)),
            "decay_by": get_args(DecayBy),
        }
        for name, values in allowed.items():
            if (value := getattr(self, name)) not in values:
                raise ValueError(f"{who}: {name} must be one of {values}, got {value!r}.")
        by_name = self.state_dtype if isinstance(self.state_dtype, Mapping) else {"": self.state_dtype}
        for name, asked in by_name.items():
            if asked not in (None, *STATE_DTYPES):
                raise ValueError(
                    f"{who}: state_dtype must be one of {(None, *STATE_DTYPES)}, or a dict of these by the name of the "
                    f"state, got {asked!r}{f' for {name!r}' if name else ''}."
                )
        if self.float32_state is not None:
            check_pattern(f"{who}: float32_state", self.float32_state)
        if not isinstance(self.rounding_seed, int) or isinstance(self.rounding_seed, bool):
            raise ValueError(f"{who}: rounding_seed must be an integer, got {self.rounding_seed!r}.")
        if self.ema is not None and not (
            isinstance(self.ema, int | float) and not isinstance(self.ema, bool) and 0 <= self.ema < 1
        ):
            raise ValueError(f"{who}: ema must be a number in [0, 1), or None for no average, got {self.ema!r}.")
        if self.sparse == "exact":
            self._check_exact(who)
        if self.state_device is not None and self.shard_state is not None:
            raise ValueError(
                f"{who}: state_device={self.state_device!r} and shard_state cannot be combined: leave one of them out."
            )

    def _check_exact(self, who: str) -> None:
        if self.shard_state is not None:
            raise ValueError(f"{who}: sparse='exact' keeps whole tables on every rank; with shard_state use 'touched'.")
        if self.state_device is not None:
            raise ValueError(
                f"{who}: sparse='exact' keeps its tables beside the parameters; with state_device use 'touched'."
            )
        others = (("cautious", None), ("decay_by", "lr"), ("ema", None), ("rounding", "nearest"))
        for name, default in others:
            if (value := getattr(self, name)) != default:
                raise ValueError(
                    f"{who}: sparse='exact' cannot catch up with {name}={value!r}: steps that rows miss would have no "
                    "closed form. Leave one of them out, or use 'touched'."
                )
        if self.may_have_codes:
            raise ValueError(f"{who}: sparse='exact' needs state of a floating dtype: with '8bit' use 'touched'.")


DOCUMENTATION: dict[str, str] = {
    **{each.name: each.metadata["documentation"] for each in fields(StepOptions)},
    "groups": "``(pattern, options)`` pairs that sort named parameters into groups: a glob, a compiled regular "
    "expression or a collection of names. The first that matches decides; what none matches is the first group. "
    "Default: one group.",
}

Function = TypeVar("Function", bound=Callable[..., Any])


def shows_options(function: Function) -> Function:
    """Let ``inspect.signature`` and ``help`` show the options that ``function`` takes as ``**options``."""
    options = [
        inspect.Parameter(each.name, inspect.Parameter.KEYWORD_ONLY, default=each.default, annotation=each.type)
        for each in fields(StepOptions)
    ]
    options.append(
        inspect.Parameter("groups", inspect.Parameter.KEYWORD_ONLY, default=None, annotation="Groups | None")
    )
    signature = inspect.signature(function)
    named = [each for each in signature.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
    function.__signature__ = signature.replace(parameters=[*named, *options])  # type: ignore[attr-defined]
    return function
