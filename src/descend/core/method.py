"""What the engine knows of an optimizer: groups, options, its rule, and the scalars that the rule gets."""

from __future__ import annotations

import dataclasses
import os
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

from descend.core.checks import check_kinds, check_lr
from descend.core.decision import SKIPPED
from descend.core.measures import Observer
from descend.core.options import BACKENDS, DOCUMENTATION, Amp, BackendName, Nonfinite, Sparse, StatePages, StepOptions
from descend.core.signature import signature


class StateSpec(NamedTuple):
    """One tensor of a parameter's state, before it is made.

    Attributes:
        name: its key in the state.
        shape: its shape.
        dtype: its dtype when it is new.
        start: what it starts as: a number, or a tensor of this shape.
    """

    name: str
    shape: torch.Size
    dtype: torch.dtype
    start: Any


class _Option:
    """A field of ``StepOptions`` as an attribute of the optimizer. An edit is checked by the next step."""

    def __init__(self, name: str) -> None:
        self.name, self.__doc__ = name, DOCUMENTATION[name]

    def __get__(self, method: Any, kind: type) -> Any:
        return self if method is None else getattr(method.options, self.name)

    def __set__(self, method: Any, value: Any) -> None:
        options = method.__dict__.get("options") or StepOptions()  # before the constructor has run
        method.options = dataclasses.replace(options, **{self.name: value})


class Method(Optimizer):
    """Base of the optimizers that the engine runs: a rule for each group, and the scalars of each step.

    Knows no mathematics, no backend and no step. ``FirstOrder`` adds the engine.

    Attributes:
        options: see ``StepOptions``; each field is an attribute of the optimizer too, and may be set.
        grad_norm: norm of the last step's gradients before clipping; None before, or if nothing asked for it.
        skipped_steps: steps left out by ``nonfinite="skip"``.
        agreed_meshes: device meshes whose ranks have been found to have the same optimizer.
        state_meshes: the device mesh of each ``shard_state`` that has been used.
        observer: is told of each step; copies and pickles leave it out.
        decisions: numbers of the ``Decision`` of each place where one is taken: a device, and a parameter if it steps
            by itself. Copies and pickles leave them out.
    """

    rule: ClassVar[Callable[..., Any]]
    counts_steps: ClassVar[bool] = True  # state has torch's "step", and ``scalars`` depends on it
    step_is_int: ClassVar[bool] = False  # torch's SparseAdam counts in a Python int, all others in a tensor
    scalar_state: ClassVar[tuple[str, ...]] = ()  # state that is one number a parameter, see ``scalars_and_state``
    nonnegative_state: ClassVar[tuple[str, ...]] = ()  # a file in which such state is negative is damaged
    group_state: ClassVar[tuple[str, ...]] = ()  # keys of a group that steps change: state, and no options
    sums_over: ClassVar[Literal["param", "all"]] = "param"  # what a rule with sums adds up, see ``scalars_of_sums``
    takes_sparse: ClassVar[bool] = False  # without being told what a sparse gradient means
    catch_up_rules: ClassVar[tuple[Callable[..., Any], Callable[..., Any]] | None] = None  # for sparse="exact"
    foreach_is_differentiable: ClassVar[bool] = False  # in torch only SGD's is
    capturable_needs: ClassVar[str] = "params and state_steps"  # on a device, in torch's words

    options: StepOptions
    agreed_meshes: set[Any]
    state_meshes: dict[Any, Any]
    observer: Observer | None = None
    decisions: dict[Any, Tensor]
    _grad_norm: float | Tensor | None
    _skipped_steps: int

    # The fields of ``options``, for type checkers.
    max_norm: float | None
    nonfinite: Nonfinite
    backend: BackendName
    state_dtype: torch.dtype | None
    sparse: Sparse | None
    amp: Amp | None
    state_pages: StatePages
    shard_state: Any

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

    # What a subclass defines.

    def rule_for(self, group: Mapping[str, Any]) -> Callable[..., Any]:
        """The rule of a group, chosen by its options."""
        return self.rule

    def scalars(self, group: Mapping[str, Any], step: float) -> tuple[Any, ...]:
        """The scalars of the rule, in its order, for a parameter's ``step``-th step (1 is the first).

        By default each scalar is the group's option of that name, and ``step`` is the step itself. With
        ``counts_steps = False``, ``step`` is 1 for the first step and 2 for every later one.
        """
        return tuple(step if name == "step" else group[name] for name in signature(self.rule_for(group)).given)

    def scalars_of_sums(self, group: Mapping[str, Any], sums: Sequence[float], numel: int) -> tuple[Any, ...]:
        """The scalars that a rule with sums forms of them, in its order. Default: the sums themselves.

        Called at every step before anything moves, so it changes nothing either.

        Args:
            group: the parameter's group.
            sums: what the rule's part returns, see ``core.signature.summing``, summed in float64 over the elements of
                the parameter; with ``sums_over = "all"``, of all parameters that have a gradient and this method.
            numel: how many elements these are; a complex number is two.
        """
        return tuple(sums)

    def scalars_and_state(
        self, group: Mapping[str, Any], step: float, state: Sequence[Tensor]
    ) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """The scalars of the rule, and the values that the scalar state has after the step.

        For optimizers with ``scalar_state``.

        Args:
            group: the parameter's group.
            step: as in ``scalars``.
            state: 0-dim tensors of the present scalar state, so that arithmetic with them rounds as in torch.
        """
        return self.scalars(group, step), ()

    def initial_state(self, name: str, param: Tensor, group: Mapping[str, Any]) -> Any:
        """What the state called ``name`` starts as: a number, or a tensor like ``param``."""
        return 0.0

    def end_step(self) -> None:
        """Called at the end of each step that was not skipped."""

    def may_decide_on_device(self, group: Mapping[str, Any]) -> bool:
        """Whether a step of ``group`` may be left out without the host knowing: the host counts nothing then."""
        sums = signature(self.rule_for(group)).summed is not None  # the host forms scalars of them
        return not self.step_is_int and not sums and type(self).end_step is Method.end_step

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Raise ``ValueError`` if a group's options are out of range."""
        if "lr" in options:
            check_lr(self, options)

    def check_exact(self, options: Mapping[str, Any]) -> None:
        """Raise ``ValueError`` if steps that a row misses with these options have no closed form."""

    # Groups and parameters.

    def check_group(self, options: Mapping[str, Any]) -> None:
        """Raise ``ValueError`` if a group's options are of another kind than their defaults, or out of range."""
        try:
            self.check_options(options)
        except ValueError:  # torch's words
            raise
        except Exception:
            check_kinds(self, options)
            raise
        check_kinds(self, options)

    def check_step_options(self) -> None:
        """Raise ``ValueError`` if one of ``options`` is out of range, or not one this optimizer has."""
        name = type(self).__name__
        self.options.check(name)
        if self.options.sparse == "exact" and self.catch_up_rules is None:
            raise ValueError(
                f"{name}: sparse='exact' is for Adam and AdamW, whose missed steps have a closed form; try 'touched'."
            )

    def check_param(self, param: Tensor, group: Mapping[str, Any]) -> None:
        """Raise torch's errors for parameters that a group's options do not allow."""
        devices = _get_fused_kernels_supported_devices() if group.get("fused") else []
        if group.get("fused") and not (param.is_floating_point() and param.device.type in devices):
            raise RuntimeError(
                "`fused=True` requires all the params to be floating point Tensors of supported devices: "
                f"{devices}, but {self.name_of(param)} is {param.dtype} on {param.device.type}. Leave `fused` out."
            )
        if group.get("capturable") and param.device.type == "cpu":
            raise AssertionError(
                f"If capturable=True, {self.capturable_needs} must be on supported devices (CUDA, XPU, ...), "
                f"but {self.name_of(param)} is on {param.device}. Leave `capturable` out."
            )
        if group.get("foreach") and group.get("differentiable") and not self.foreach_is_differentiable:
            raise AssertionError(
                f"_foreach ops don't support autograd ({type(self).__name__}: leave foreach or differentiable out)"
            )

    def meaning_of_sparse(self, param: Tensor, group: Mapping[str, Any]) -> str | None:
        """What a parameter's gradient means if it is sparse: "touched", "exact" or "all", zeros for the other rows.

        Raises:
            RuntimeError: if this optimizer, the group's options or the parameter allow no sparse gradient.
        """
        grad = param.grad
        if grad is None or grad.layout == torch.strided:
            return None
        if group.get("differentiable"):
            raise RuntimeError(
                f"{type(self).__name__}: `differentiable` does not support sparse gradients, but {self.name_of(param)} "
                f"has one of layout {grad.layout}."
            )
        if self.options.sparse is None and not self.takes_sparse:
            cures = "sparse='touched'" if self.catch_up_rules is None else "sparse='exact' or sparse='touched'"
            raise RuntimeError(
                f"{type(self).__name__} does not support sparse gradients, please consider SparseAdam instead, or say "
                f"what they mean: {cures} ({self.name_of(param)} has a gradient of layout {grad.layout})"
            )
        if signature(self.rule_for(group)).summed is not None:
            raise RuntimeError(
                f"{type(self).__name__}: a rule that sums over a tensor cannot update single rows, but "
                f"{self.name_of(param)} has a sparse gradient: make it dense."
            )
        if signature(self.rule_for(group)).kind == "matrix":
            raise RuntimeError(
                f"{type(self).__name__}: a rule of whole matrices cannot update single rows, but {self.name_of(param)} "
                "has a sparse gradient: make it dense."
            )
        if param.layout != torch.strided:
            raise RuntimeError(
                f"{type(self).__name__}: gradients may be sparse, parameters may not, but {self.name_of(param)} is of "
                f"layout {param.layout}: store it dense."
            )
        return self.options.sparse or "all"

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

    def state_of(self, param: Tensor) -> dict[str, Any]:
        """The state of ``param`` as it is, read without being exposed."""
        return dict.get(self.state, param) or {}

    def state_shape(self, name: str, param: Tensor, group: Mapping[str, Any]) -> torch.Size:
        """Shape of the state tensor called ``name``. Default: the parameter's, which compiled backends need."""
        return param.shape

    def state_spec(self, name: str, param: Tensor, group: Mapping[str, Any]) -> StateSpec:
        """How a new state tensor called ``name`` is made."""
        shape, dtype = self.state_shape(name, param, group), self.default_state_dtype(param)
        return StateSpec(name, shape, dtype, self.initial_state(name, param, group))

    def default_state_dtype(self, param: Tensor) -> torch.dtype:
        """Dtype of new state tensors of ``param``."""
        if not param.is_floating_point():
            return param.dtype
        return self.options.state_dtype or (torch.float32 if param.dtype == torch.float16 else param.dtype)


for _field in dataclasses.fields(StepOptions):
    setattr(Method, _field.name, _Option(_field.name))
