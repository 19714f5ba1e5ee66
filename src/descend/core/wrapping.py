"""Methods made of methods: what the options ``cautious``, ``decay_by``, ``ema`` and ``rounding`` add to any of them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from descend.core.codecs import Codec, Format
from descend.core.composition import Additions, Decay, cautious_scale, composed
from descend.core.method import Method, StateSpec
from descend.core.options import StepOptions
from descend.core.signature import signature

# What a class says of its methods, and a method made of another says as that does.
_SAID = tuple(name for name, kind in Method.__annotations__.items() if str(kind).startswith("ClassVar"))


def wrapped(method: Method) -> Method:
    """``method`` with what its options add; itself if that is nothing. The same object while the options are."""
    options = method.options
    counts_more = options.rounding == "stochastic" and not method.counts_steps
    if options.cautious is None and options.ema is None and options.decay_by == "lr" and not counts_more:
        return method
    known: Wrapped | None = vars(method).get("_wrapped")
    if known is None or known.options is not options:
        known = vars(method)["_wrapped"] = _class_for(type(method).__name__)(method)
    return known


@cache
def _class_for(name: str) -> type[Wrapped]:
    """Errors call a method by the name of its class, which stays that of the method inside."""
    return type(name, (Wrapped,), {})


class Wrapped(Method):
    """A method whose rule is composed of another's, see ``core/composition.py``.

    Where it decays or makes updates cautious, it asks the method inside for a step without weight decay, and decays by
    itself.

    Args:
        method: the method inside.
    """

    def __init__(self, method: Method) -> None:
        # An optimizer holds what wraps it, and is to be freed when nobody else holds it.
        self._inside: Method = weakref.proxy(method)
        self._kind, self.options, self.defaults = type(method), method.options, method.defaults
        for name in _SAID:
            if hasattr(method, name):
                setattr(self, name, getattr(method, name))
        self._cautious_update = self.options.cautious in ("update", "both")
        self._cautious_decay = self.options.cautious in ("decay", "both")
        self._has_ema = self.options.ema is not None
        if self._has_ema:
            self.optional_state = (*self.optional_state, "ema")  # type: ignore[misc] # of this object
        if self.options.rounding == "stochastic" and not self.counts_steps:
            self.counts_steps = self.counts_for_noise = True  # type: ignore[misc]

    @property
    def kind(self) -> type[Method]:
        return self._kind

    # The rule and its scalars.

    def rule_for(self, group: Mapping[str, Any]) -> Callable[..., Any]:
        self._check(group)
        return self._with_additions(self._inside.rule_for(self._view(group)), group)

    def rule_of(self, param: Tensor, group: Mapping[str, Any]) -> Callable[..., Any]:
        self._check(group)
        return self._with_additions(self._inside.rule_of(param, self._view(group)), group)

    def _with_additions(self, rule: Callable[..., Any], group: Mapping[str, Any]) -> Callable[..., Any]:
        additions = self._additions(group)
        if additions == Additions():
            return rule
        return composed(rule, additions, self._inside.direction if self._cautious_update else None)

    def scalars(self, group: Mapping[str, Any], step: float) -> tuple[Any, ...]:
        step = self._step_inside(step)
        return (*self._inside.scalars(self._view(group), step), *self._added(group, step))

    def scalars_and_state(
        self, group: Mapping[str, Any], step: float, state: Sequence[Tensor]
    ) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        step = self._step_inside(step)
        scalars, next_state = self._inside.scalars_and_state(self._view(group), step, state)
        return (*scalars, *self._added(group, step)), next_state

    def scalars_of_sums(self, group: Mapping[str, Any], sums: Sequence[float], numel: int) -> tuple[Any, ...]:
        if self._cautious_update:
            return (cautious_scale(sums[0], numel),)
        return self._inside.scalars_of_sums(self._view(group), sums, numel)

    def scalars_of_rows(self, group: Mapping[str, Any], sums: np.ndarray, numels: np.ndarray) -> Any:
        if self._cautious_update:
            return cautious_scale(sums, numels[:, None])
        return self._inside.scalars_of_rows(self._view(group), sums, numels)

    def _additions(self, group: Mapping[str, Any]) -> Additions:
        decays = self._cautious_update or self._cautious_decay
        decay = self._inside.decay_of(group) if decays else None
        return Additions(decay, self._cautious_update, self._cautious_decay and decay == "decoupled", self._has_ema)

    def _step_inside(self, step: Any) -> Any:
        """The step as the method inside counts."""
        return min(step, 2.0) if self.counts_for_noise else step

    def _view(self, group: Mapping[str, Any]) -> Mapping[str, Any]:
        """The group as the method inside sees it."""
        if "weight_decay" not in group:
            return group
        if self._additions(group).decay is not None:
            return {**group, "weight_decay": 0.0}
        return group if self.options.decay_by == "lr" else {**group, "weight_decay": self._weight_decay(group)}

    def _added(self, group: Mapping[str, Any], step: float) -> tuple[Any, ...]:
        """The scalars of the additions, but for what is formed of sums."""
        decay = self._additions(group).decay
        added = []
        if decay == "l2":
            added.append(group["weight_decay"])
        if decay == "decoupled":
            added.append(self._inside.decoupled_decay({**group, "weight_decay": self._weight_decay(group)}, step))
        if self.options.ema is not None:
            added.append(1 - self.options.ema)
        return tuple(added)

    def _weight_decay(self, group: Mapping[str, Any]) -> Any:
        """What ``lr`` is multiplied by to give the decoupled decay of a step."""
        decay, by = group["weight_decay"], self.options.decay_by
        if by == "lr" or self._inside.decay_of(group) != "decoupled":
            return decay
        return decay / group["max_lr"] if by == "schedule" else decay * group["lr"] / group["max_lr"]

    # State.

    def initial_state(self, name: str, param: Tensor, group: Mapping[str, Any]) -> Any:
        return param if self._is_ema(name) else self._inside.initial_state(name, param, group)

    def state_shape(self, name: str, param: Tensor, group: Mapping[str, Any]) -> torch.Size:
        return param.shape if self._is_ema(name) else self._inside.state_shape(name, param, group)

    def state_spec(self, name: str, param: Tensor, group: Mapping[str, Any], format: Format) -> StateSpec:
        return (super() if self._is_ema(name) else self._inside).state_spec(name, param, group, format)  # type: ignore[union-attr]

    def format_of_state(self, name: str, param: Tensor, group: Mapping[str, Any]) -> Format:
        if self._is_ema(name):  # whatever ``state_dtype`` says: it takes the place of the weights
            return self.dtype_of_state(name, param)
        return self._inside.format_of_state(name, param, group)

    def format_of_param(self, param: Tensor) -> Format:
        return self._inside.format_of_param(param)

    def codec_of(self, name: str) -> Codec:
        return self._inside.codec_of(name)

    def format_of_dtype(self, dtype: torch.dtype) -> Format:
        return self._inside.format_of_dtype(dtype)

    def dtype_of_state(self, name: str, param: Tensor) -> torch.dtype:
        if not self._is_ema(name):
            return self._inside.dtype_of_state(name, param)
        # In half precision, what a step adds to an average is lost to rounding.
        return torch.promote_types(param.dtype, torch.float32)

    def keeps_exact(self, name: str, group: Mapping[str, Any]) -> bool:
        return self._inside.keeps_exact(name, group)

    def _is_ema(self, name: str) -> bool:
        return self._has_ema and name == "ema"

    # Checks, and what the method inside says.

    def check_group(self, options: Mapping[str, Any]) -> None:
        self._inside.check_group(options)
        self._check({"max_lr": options.get("lr"), **options})

    def check_options(self, options: Mapping[str, Any]) -> None:
        self._inside.check_options(options)

    def check_exact(self, options: Mapping[str, Any]) -> None:
        self._inside.check_exact(options)

    def check_param(self, param: Tensor, group: Mapping[str, Any]) -> None:
        self._inside.check_param(param, group)

    def name_of(self, param: Tensor) -> str:
        return self._inside.name_of(param)

    def meaning_of_sparse(self, param: Tensor, group: Mapping[str, Any]) -> str:
        meaning = self._inside.meaning_of_sparse(param, group)
        if self._cautious_update:
            raise RuntimeError(
                f"{type(self).__name__}: cautious={self.options.cautious!r} counts in the whole tensor which updates "
                f"agree with the gradient, but {self.name_of(param)} has a sparse gradient: make it dense, or leave "
                "cautious out. Nothing has moved."
            )
        return meaning

    def check_takes_rows(self, param: Tensor, group: Mapping[str, Any]) -> None:
        self._inside.check_takes_rows(param, group)

    def decay_of(self, group: Mapping[str, Any]) -> Decay | None:
        return self._inside.decay_of(group)

    def decoupled_decay(self, group: Mapping[str, Any], step: float) -> Any:
        return self._inside.decoupled_decay(group, step)

    def end_step(self, groups: Sequence[dict[str, Any]]) -> None:
        self._inside.end_step(groups)

    @property
    def ends_steps(self) -> bool:
        return self._inside.ends_steps

    def may_decide_on_device(self, group: Mapping[str, Any]) -> bool:
        # What is summed, the host forms scalars of.
        return self._inside.may_decide_on_device(group) and signature(self.rule_for(group)).summed is None

    def _check(self, group: Mapping[str, Any]) -> None:
        """Raise ``ValueError`` if a group cannot have what the options add."""
        options, decay, name = self.options, self._inside.decay_of(group), type(self).__name__
        if options.cautious is not None and self._inside.state_follows_param:
            raise ValueError(
                f"{name}: cautious={options.cautious!r} would change how the parameters move, and the state of {name} "
                "follows them: leave cautious out."
            )
        takes = signature(self._inside.rule_for(group))
        if self._cautious_update and takes.formed:
            raise ValueError(
                f"{name}: cautious={options.cautious!r} counts which updates agree with the gradient, and the rule of "
                f"{name} needs sums or means of its own: leave cautious out, or use 'decay'."
            )
        if self._has_ema and takes.kind == "row":
            raise ValueError(f"{name}: ema={options.ema} needs a number for each weight, and {name} keeps one a row.")
        if self._has_ema and "ema" in (*takes.state, *takes.scalars):
            raise ValueError(f"{name}: ema={options.ema} keeps an average called ema, a name that {name} uses already.")
        # A group of another method than the optimizer's may have nothing to decay.
        if decay == "decoupled" or (decay == "none" and "method" in group):
            if options.decay_by != "lr":
                self._check_max_lr(group)
            return
        for option, needs in ((f"cautious={options.cautious!r}", self._cautious_decay), _decay_by(options)):
            if needs:
                has = {"l2": "is L2 regularization", "none": "does not exist", None: "is its rule's own"}[decay]
                raise ValueError(
                    f"{name}: {option} is about decoupled weight decay, as AdamW, Lion and others have it; here weight "
                    f"decay {has}."
                )

    def _check_max_lr(self, group: Mapping[str, Any]) -> None:
        largest = group.get("max_lr")
        if not isinstance(largest, int | float | Tensor) or not largest > 0:
            raise ValueError(
                f"{type(self).__name__}: decay_by={self.options.decay_by!r} compares lr with its largest value: "
                f"group['max_lr'] must be a number > 0, got {largest!r}."
            )


def _decay_by(options: StepOptions) -> tuple[str, bool]:
    return f"decay_by={options.decay_by!r}", options.decay_by != "lr"
