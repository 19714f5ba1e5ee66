"""Optimizers whose groups each have a method, as the engine sees them."""

from __future__ import annotations

import dataclasses
import inspect
import math
import os
import sys
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from functools import reduce
from typing import Any, ClassVar
from weakref import WeakMethod

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from descend.core.decision import SKIPPED
from descend.core.groups import Pattern, matches
from descend.core.measures import Observer
from descend.core.method import Method
from descend.core.options import (
    BACKENDS,
    DOCUMENTATION,
    Amp,
    BackendName,
    Cautious,
    DecayBy,
    Nonfinite,
    Rounding,
    Sparse,
    StateDevice,
    StateDtype,
    StatePages,
    StepOptions,
)
from descend.core.undecorated import undecorated
from descend.core.wrapping import wrapped

# Torch's schedulers rewrite these in all groups if the optimizer has them; on another method they have no effect.
_SCHEDULED = ("betas", "momentum")
# What a group gets from its optimizer, and not from its method, if it does not say.
_INHERITED = ("maximize", "differentiable", "capturable", "foreach", "fused")

_classes: dict[str, type[MethodOptimizer]] = {}  # of this library, by what groups call them


class _Option:
    """A field of ``StepOptions`` as an attribute of the optimizer. An edit is checked by the next step."""

    def __init__(self, name: str) -> None:
        self.name, self.__doc__ = name, DOCUMENTATION[name]

    def __get__(self, optimizer: Any, kind: type) -> Any:
        return self if optimizer is None else getattr(optimizer.options, self.name)

    def __set__(self, optimizer: Any, value: Any) -> None:
        options = optimizer.__dict__.get("options") or StepOptions()  # before the constructor has run
        optimizer.options = dataclasses.replace(options, **{self.name: value})


class MethodOptimizer(Method, Optimizer):
    """Base of the optimizers that the engine runs. Knows no mathematics, no backend and no step.

    A group has the optimizer itself as its method, or the one that its key ``"method"`` names. ``FirstOrder`` adds the
    engine.

    Attributes:
        options: see ``StepOptions``; each field is an attribute of the optimizer too, and may be set.
        grad_norm: norm of the last step's gradients before clipping; None before, or if nothing asked for it.
        skipped_steps: steps left out by ``nonfinite="skip"``.
        agreed_meshes: device meshes whose ranks have been found to have the same optimizer.
        state_meshes: the device mesh of each ``shard_state`` that has been used.
        host_copies: with ``state_device``, the ``offload.buckets.HostCopy`` of each parameter that has been stepped.
        transfers: the ``offload.transfers.Transfers`` to each of their devices.
        observer: is told of each step; copies and pickles leave it out.
        decisions: numbers of the ``Decision`` of each place where one is taken: a device, and a parameter if it steps
            by itself. Copies and pickles leave them out.
    """

    is_base: ClassVar[bool] = True  # of a class itself: others are made from it, and it is no method

    agreed_meshes: set[Any]
    state_meshes: dict[Any, Any]
    host_copies: WeakIdKeyDictionary
    transfers: dict[torch.device, Any]
    observer: Observer | None = None
    decisions: dict[Any, Tensor]
    _grad_norm: float | Tensor | None
    _skipped_steps: int
    _methods: dict[str, MethodOptimizer]  # that groups have, by name
    _plain: StepOptions | None  # options that add nothing to the method
    _made_by: WeakIdKeyDictionary  # the name of the method that has made a parameter's state, if it has one

    # The fields of ``options``, for type checkers.
    max_norm: float | None
    nonfinite: Nonfinite
    backend: BackendName
    state_dtype: StateDtype | Mapping[str, StateDtype] | None
    float32_state: Pattern | None
    rounding: Rounding
    rounding_seed: int
    sparse: Sparse | None
    amp: Amp | None
    state_pages: StatePages
    shard_state: Any
    state_device: StateDevice | None
    cautious: Cautious | None
    decay_by: DecayBy
    ema: float | None

    @property
    def grad_norm(self) -> float | None:
        """Norm of the last step's gradients before clipping; reading it waits for the device that knows it."""
        return None if self._grad_norm is None else float(self._grad_norm)  # not kept: a CUDA graph may be replayed

    @grad_norm.setter
    def grad_norm(self, norm: float | None) -> None:
        self._grad_norm = norm

    def note_grad_norm(self, norm: float | Tensor | None) -> None:
        """Set ``grad_norm``; a tensor of shape () is read when somebody asks for it."""
        self._grad_norm = norm

    @property
    def skipped_steps(self) -> int:
        """Steps left out by ``nonfinite="skip"``; reading it waits for the devices that know it."""
        return self._skipped_steps + sum(int(values[SKIPPED]) for values in self.decisions.values())

    @skipped_steps.setter
    def skipped_steps(self, count: int) -> None:
        self._skipped_steps = count
        for values in self.decisions.values():
            values[SKIPPED] = 0

    @abstractmethod
    def observe(self, observer: Observer | None) -> None:
        """Tell ``observer`` of all steps from now on; None to tell nobody."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not vars(cls).get("is_base") and str(cls.__module__).startswith(f"{__name__.partition('.')[0]}."):
            _classes[cls.__name__.lower()] = cls

    def _begin(self) -> None:
        """Set what neither copies nor pickles take along."""
        self.decisions, self._grad_norm, self._skipped_steps = {}, None, 0
        self.agreed_meshes, self.state_meshes = set(), {}
        self.host_copies, self.transfers = WeakIdKeyDictionary(), {}
        self._methods, self._plain, self._made_by = {}, None, WeakIdKeyDictionary()

    # Methods.

    def method_of(self, group: Mapping[str, Any]) -> Method:
        """How the parameters of ``group`` are updated; the same object as long as options are the same.

        Raises:
            ValueError: if there is no method of the group's name.
        """
        name = group.get("method")
        if name is not None:
            return wrapped(self._method_called(name))
        if self._plain is self.options:
            return self
        method = wrapped(self)
        if method is self:
            self._plain = self.options
        return method

    def _method_called(self, name: Any) -> MethodOptimizer:
        """An optimizer of the class that groups call ``name``, which only describes."""
        method = self._methods.get(name) if isinstance(name, str) else None
        if method is None:
            kind = self._class_called(name)
            method = self._methods[_name_of(kind)] = self._only_describing(kind)
            name_of = WeakMethod(self.name_of)
            method.name_of = lambda param: name_of()(param)  # type: ignore[method-assign, misc]
        method.options = self.options
        return method

    def _only_describing(self, kind: type[MethodOptimizer]) -> MethodOptimizer:
        try:
            return kind([torch.zeros(0, 0, device="cpu")])  # type: ignore[call-arg]
        except TypeError as error:
            raise ValueError(
                f"{type(self).__name__}: a class that is the method of a group needs a default for each of its "
                f"options: {error}"
            ) from error

    def _class_called(self, name: Any) -> type[MethodOptimizer]:
        kind = name
        if isinstance(name, str):
            module, _, path = name.partition(":")
            kind = _classes.get(name) or reduce(_attribute, path.split("."), sys.modules.get(module))
        if not (isinstance(kind, type) and issubclass(kind, MethodOptimizer) and _may_be_a_method(kind)):
            names = [name for name, each in sorted(_classes.items()) if _may_be_a_method(each)]
            raise ValueError(
                f"{type(self).__name__}: method must be one of {', '.join(names)}, or a class made from FirstOrder, "
                f"got {name!r}."
            )
        return kind

    def check_has_options(self, group: Mapping[str, Any]) -> None:
        """Raise ``ValueError`` if a group's method has been edited, and its options have not."""
        name, own = group.get("method"), type(self).__name__
        if not isinstance(name, str | None):
            raise ValueError(
                f"{own}: group['method'] must be a text, {_name_of(self._class_called(name))!r} here, got {name!r}. "
                "Nothing has moved."
            )
        has_methods = "method" in group or self._methods
        lacking = [key for key in self.method_of(group).defaults if key not in group] if has_methods else []
        if lacking:
            raise ValueError(
                f"{own}: a group with {f'method={name!r}' if name else 'no method of its own'} lacks "
                f"{', '.join(lacking)}: give it the options of its method too. Nothing has moved."
            )

    def check_made_by(self, param: Tensor, group: Mapping[str, Any]) -> None:
        """Raise ``RuntimeError`` if another method than its group's has made the state of ``param``."""
        name = self._foreign_method(group)
        made_by = self._made_by.get(param) if self._made_by else None  # type: ignore[no-untyped-call]
        if made_by != name and self.state_of(param):
            own = type(self).__name__
            raise RuntimeError(
                f"{own}: the state of {self.name_of(param)} was made by {made_by or own}, and its group has the method "
                f"{name or own}. To begin anew, delete it: `del optimizer.state[param]`. Nothing has moved."
            )

    def note_made_by(self, param: Tensor, group: Mapping[str, Any]) -> None:
        """Remember which method has made the state of ``param``."""
        if (name := self._foreign_method(group)) is not None:
            self._made_by[param] = name
        elif self._made_by:
            self._made_by.pop(param, None)  # type: ignore[no-untyped-call]

    def _foreign_method(self, group: Mapping[str, Any]) -> str | None:
        """The name of the group's method; None if that is this class."""
        name = group.get("method")
        return None if name is None or _classes.get(name) is type(self) else name

    def methods(self) -> list[tuple[Method, list[dict[str, Any]]]]:
        """Each method, and the groups that have it."""
        found: dict[Method, list[dict[str, Any]]] = {}
        for group in self.param_groups:
            found.setdefault(self.method_of(group), []).append(group)
        return list(found.items())

    # Groups.

    def completed(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options of a group, with those that its method adds; ``"method"`` is a text, absent for the class itself.

        Raises:
            ValueError: if there is no such method, or it lacks one of the options.
        """
        options = dict(options)
        if (name := options.pop("method", None)) is None or (kind := self._class_called(name)) is type(self):
            return {**self.defaults, **options}
        method = self._method_called(_name_of(kind))
        # Made from a group that exists: see ``add_param_group``.
        kept = [key for key in _SCHEDULED if key in self.defaults]
        lacking = [key for key in options if key not in (*method.defaults, *kept) and _owners(key)]
        if lacking:
            raise ValueError(f"{type(self).__name__}: {_no_option(lacking[0], method, 'a group')}")
        inherited = {key: self.defaults[key] for key in _INHERITED if key in self.defaults and key in method.defaults}
        return {**self.defaults_of(method), **inherited, **options, "method": _name_of(kind)}

    def defaults_of(self, method: Method) -> Mapping[str, Any]:
        """The options of groups with ``method`` that do not set them."""
        return method.defaults

    def check_names(self, options: Mapping[str, Any], where: str) -> None:
        """Raise ``ValueError`` for a name that is no option of the group's method; ``where`` is the group.

        Where there is an ``lr`` there may be an ``lr_scale``, see ``with_lr``.
        """
        name = options.get("method")
        kind = type(self) if name is None else self._class_called(name)
        method = self if kind is type(self) else self._method_called(_name_of(kind))
        for key in options:
            is_scale = key == "lr_scale" and "lr" in method.defaults
            if key not in method.defaults and key != "method" and not is_scale:
                raise ValueError(f"{type(self).__name__}: groups: {_no_option(key, method, where)}")
        scale = options.get("lr_scale", 1.0)
        if not (isinstance(scale, int | float) and 0 <= scale < math.inf):
            raise ValueError(
                f"{type(self).__name__}: groups: lr_scale, for {where}, must be a finite number >= 0, got {scale!r}."
            )

    def with_lr(self, group: dict[str, Any]) -> dict[str, Any]:
        """A group made from an entry of ``groups``, with the entry's ``lr_scale`` multiplied into ``lr``."""
        if "lr_scale" not in group:
            return group
        options = {key: value for key, value in group.items() if key not in ("params", "lr_scale")}
        return {"params": group["params"], **options, "lr": self.completed(options)["lr"] * group["lr_scale"]}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters. See ``torch.optim.Optimizer.add_param_group``.

        Raises:
            ValueError: if an option is out of range; nothing has been added then.
        """
        foreign: Iterable[str] = ()
        if isinstance(param_group, dict):
            options = self.completed(param_group)
            method = self.method_of(options)
            method.check_group(options)
            if self.options.decay_by != "lr" and "lr" in options:  # what lr is compared with, whatever becomes of it
                options.setdefault("max_lr", float(options["lr"]))
            if method is not self:
                foreign = self.defaults.keys() - options.keys() - set(_SCHEDULED)
            if "method" not in options:
                param_group.pop("method", None)
            param_group.update(options)
        undecorated(Optimizer.add_param_group)(self, param_group)
        for key in foreign:  # torch has added the options of this class
            del self.param_groups[-1][key]

    def check_step_options(self) -> None:
        """Raise ``ValueError`` if one of ``options`` is out of range, or not one this optimizer has."""
        name = type(self).__name__
        self.options.check(name)
        self._check_float32_state()
        if self.options.sparse == "exact" and not any(method.catch_up_rules for method, _ in self.methods()):
            raise ValueError(
                f"{name}: sparse='exact' is for Adam and AdamW, whose missed steps have a closed form; try 'touched'."
            )

    def _check_float32_state(self) -> None:
        """Raise ``ValueError`` if ``float32_state`` names no parameter."""
        pattern = self.options.float32_state
        if pattern is None:
            return
        names = [name for group in self.param_groups for name in group.get("param_names", ())]
        if not any(matches(pattern, name) for name in names):
            has = f"none of {len(names)} names matches" if names else "the parameters have no names: give the model"
            raise ValueError(f"{type(self).__name__}: float32_state={pattern!r}: {has}.")

    def name_of(self, param: Tensor) -> str:
        """The parameter's name if it was given with one, else its position in the groups."""
        for index, group in enumerate(self.param_groups):
            for position, candidate in enumerate(group["params"]):
                if candidate is param:
                    names = group.get("param_names")
                    return str(names[position]) if names else f"param_groups[{index}]['params'][{position}]"
        return "a parameter that is in no group"

    def group_of(self, param: Tensor) -> dict[str, Any]:
        """The group that ``param`` is in."""
        return next(group for group in self.param_groups if any(candidate is param for candidate in group["params"]))

    def requested_backend(self) -> str:
        """The backend asked for: by the constructor, else by ``DESCEND_BACKEND``, else ``"auto"``.

        Raises:
            ValueError: if there is no backend of that name.
        """
        backend: str = self.options.backend
        if backend == "auto":
            backend = os.environ.get("DESCEND_BACKEND", backend)
        if backend not in BACKENDS:
            raise ValueError(f"DESCEND_BACKEND must be one of {tuple(BACKENDS)}, got {backend!r}.")
        if backend == "auto" and torch._C._len_torch_dispatch_stack():
            return "eager"  # make_fx, FakeTensorMode and other modes would see nothing of a kernel
        return backend

    # State.

    def meaning_of_gradient(self, param: Tensor, group: Mapping[str, Any]) -> str | None:
        """What a parameter's gradient means if it is sparse, see ``Method.meaning_of_sparse``; else None.

        Raises:
            RuntimeError: if the method, the group's options or the parameter allow no sparse gradient.
        """
        grad = param.grad
        if grad is None or grad.layout == torch.strided:
            return None
        method = self.method_of(group)
        name = type(method).__name__
        if group.get("differentiable"):
            raise RuntimeError(
                f"{name}: `differentiable` does not support sparse gradients, but {self.name_of(param)} has one of "
                f"layout {grad.layout}."
            )
        meaning = method.meaning_of_sparse(param, group)
        if param.layout != torch.strided:
            raise RuntimeError(
                f"{name}: gradients may be sparse, parameters may not, but {self.name_of(param)} is of layout "
                f"{param.layout}: store it dense."
            )
        return meaning

    def state_of(self, param: Tensor) -> dict[str, Any]:
        """The state of ``param`` as it is, read without being exposed."""
        return dict.get(self.state, param) or {}


for _field in dataclasses.fields(StepOptions):
    setattr(MethodOptimizer, _field.name, _Option(_field.name))


def _may_be_a_method(kind: type[MethodOptimizer]) -> bool:
    return kind.is_for_groups and not vars(kind).get("is_base")


def _name_of(kind: type[MethodOptimizer]) -> str:
    """What groups call a class: a short name, or where it is found. It must be found there again."""
    name = kind.__name__.lower()
    if _classes.get(name) is kind:
        return name
    found: Any = reduce(_attribute, kind.__qualname__.split("."), sys.modules.get(kind.__module__))
    if found is not kind:
        raise ValueError(
            f"{kind.__name__}: a group can only have a method that checkpoints can name: assign the class to "
            f"{kind.__qualname__} in {kind.__module__}."
        )
    return f"{kind.__module__}:{kind.__qualname__}"


def _attribute(holder: Any, name: str) -> Any:
    return getattr(holder, name, None)


def _no_option(key: str, method: Method, where: str) -> str:
    owners = _owners(key)
    having = f" {', '.join(owners)} {'has' if len(owners) == 1 else 'have'} it." if owners else ""
    return (
        f"{key!r}, for {where}, is no option of {type(method).__name__}.{having} There are "
        f"{', '.join(method.defaults)}."
    )


def is_option(key: str) -> bool:
    """Whether some class of this library has an option of this name."""
    return bool(_owners(key))


def _owners(option: str) -> list[str]:
    """The classes of this library whose groups have an option."""
    if option in ("params", "param_names"):
        return []
    return [kind.__name__ for kind in _classes.values() if option in inspect.signature(kind.__init__).parameters]
