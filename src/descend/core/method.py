"""What the engine knows of a method: its rule, the scalars that the rule gets, and its state."""

from __future__ import annotations

import weakref
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

from descend.core import codecs
from descend.core.checks import check_kinds, check_lr
from descend.core.codecs import STOCHASTIC, Codec, Format, Rounded
from descend.core.composition import Decay
from descend.core.groups import matches
from descend.core.memory import row_state_shape
from descend.core.options import StepOptions
from descend.core.signature import signature


class StateSpec(NamedTuple):
    """State of one name, before it is made.

    Attributes:
        name: its key in the state.
        shape: its shape.
        format: how it is stored when it is new.
        start: what it starts as: a number, or a tensor of this shape.
    """

    name: str
    shape: torch.Size
    format: Format
    start: Any


class Method:
    """How the parameters of a group are updated: a rule, its scalars and its state. Knows no backend and no step.

    Attributes:
        options: see ``StepOptions``; those of the optimizer.
        defaults: options of a group that does not set them.
    """

    rule: ClassVar[Callable[..., Any]]
    counts_steps: ClassVar[bool] = True  # state has torch's "step", and ``scalars`` depends on it
    step_is_int: ClassVar[bool] = False  # torch's SparseAdam counts in a Python int, all others in a tensor
    scalar_state: ClassVar[tuple[str, ...]] = ()  # state that is one number a parameter, see ``scalars_and_state``
    nonnegative_state: ClassVar[tuple[str, ...]] = ()  # a file in which such state is negative is damaged
    exact_state: ClassVar[tuple[str, ...]] = ()  # no averages, so "8bit" alone leaves it in float32
    counts_for_noise: ClassVar[bool] = False  # counts steps, but ``scalars`` asks only which is the first
    group_state: ClassVar[tuple[str, ...]] = ()  # keys of a group that steps change: state, and no options
    sums_over: ClassVar[Literal["param", "all"]] = "param"  # what a rule with sums adds up, see ``scalars_of_sums``
    takes_sparse: ClassVar[bool] = False  # without being told what a sparse gradient means
    catch_up_rules: ClassVar[tuple[Callable[..., Any], Callable[..., Any]] | None] = None  # for sparse="exact"
    foreach_is_differentiable: ClassVar[bool] = False  # in torch only SGD's is
    capturable_needs: ClassVar[str] = "params and state_steps"  # on a device, in torch's words
    fixed_options: ClassVar[Mapping[str, Any]] = MappingProxyType({})  # of groups, whatever a file says
    is_for_groups: ClassVar[bool] = True  # whether groups of another optimizer may have this method
    optional_state: ClassVar[tuple[str, ...]] = ()  # made where it is missing, whatever else there is
    decay: ClassVar[Decay | None] = None  # what ``weight_decay`` does, see ``decay_of``
    direction: ClassVar[Callable[..., Any] | None] = None  # cheaper than the rule, see ``core.composition.composed``
    state_follows_param: ClassVar[bool] = False  # it holds points, which a longer or shorter step would miss

    options: StepOptions
    defaults: dict[str, Any]

    @property
    def kind(self) -> type[Method]:
        """The class that describes it; options may have added to that."""
        return type(self)

    @abstractmethod
    def name_of(self, param: Tensor) -> str:
        """The parameter's name if it was given with one, else its position in the groups."""

    # What a subclass defines.

    def rule_for(self, group: Mapping[str, Any]) -> Callable[..., Any]:
        """The rule of a group, chosen by its options."""
        return self.rule

    def rule_of(self, param: Tensor, group: Mapping[str, Any]) -> Callable[..., Any]:
        """The rule of one parameter of a group. Default: the group's; another one may depend on the shape.

        It takes the same scalars as the group's, and changes only when that does.
        """
        return self.rule_for(group)

    def scalars(self, group: Mapping[str, Any], step: float) -> tuple[Any, ...]:
        """The scalars of the rule, in its order, for a parameter's ``step``-th step (1 is the first).

        By default each scalar is the group's option of that name, and ``step`` is the step itself. With
        ``counts_steps = False``, ``step`` is 1 for the first step and 2 for every later one.
        """
        return tuple(step if name == "step" else group[name] for name in signature(self.rule_for(group)).given)

    def scalars_of_sums(self, group: Mapping[str, Any], sums: Sequence[float], numel: int) -> tuple[Any, ...]:
        """The scalars that a rule with sums forms of them, in its order. Default: the sums themselves.

        Called at every step before anything moves: for each parameter, or with ``sums_over = "all"`` for each group. It
        changes nothing that may be seen; what it keeps for the next step is for ``end_step`` to write.

        Args:
            group: the parameter's group.
            sums: what the rule's part returns, see ``ops.summing``, summed in float64 over the elements of the
                parameter; with ``sums_over = "all"``, of all parameters that have a gradient and this method.
            numel: how many elements these are; a complex number is two.
        """
        return tuple(sums)

    def scalars_of_rows(self, group: Mapping[str, Any], sums: np.ndarray, numels: np.ndarray) -> Any:
        """``scalars_of_sums`` of many parameters of a group, a row each. Default: one after the other.

        A method that computes with whole arrays saves a call a parameter. Not called with ``sums_over = "all"``.

        Args:
            group: the group of all of them.
            sums: a row a parameter, float64.
            numels: how many elements each has.
        """
        rows = zip(sums.tolist(), numels.tolist(), strict=True)
        return [self.scalars_of_sums(group, row, numel) for row, numel in rows]

    def scalars_and_state(
        self, group: Mapping[str, Any], step: float, state: Sequence[Tensor]
    ) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """The scalars of the rule, and the values that the scalar state has after the step.

        For methods with ``scalar_state``.

        Args:
            group: the parameter's group.
            step: as in ``scalars``.
            state: 0-dim tensors of the present scalar state, so that arithmetic with them rounds as in torch.
        """
        return self.scalars(group, step), ()

    def end_step(self, groups: Sequence[dict[str, Any]]) -> None:
        """Called at the end of each step that was not skipped, with the groups of this method."""

    @property
    def ends_steps(self) -> bool:
        """Whether ``end_step`` does anything."""
        return type(self).end_step is not Method.end_step

    def decay_of(self, group: Mapping[str, Any]) -> Decay | None:
        """What the group's weight decay is: in all of these a step without it does not depend on the parameter.

        ``"decoupled"``: the rule takes a part of the parameter from it, see ``decoupled_decay``. ``"l2"``: the rule
        adds ``weight_decay`` times the parameter to the gradient before anything else. ``"none"``: there is none. None:
        anything else. Default: by the option ``decoupled_weight_decay``; without it, the attribute ``decay``. A
        subclass with another rule must say it anew.
        """
        decoupled = group.get("decoupled_weight_decay")
        return self.decay if decoupled is None else ("decoupled" if decoupled else "l2")

    def decoupled_decay(self, group: Mapping[str, Any], step: float) -> Any:
        """The part of a parameter that decoupled weight decay takes in a step."""
        return group["lr"] * group["weight_decay"]

    def may_decide_on_device(self, group: Mapping[str, Any]) -> bool:
        """Whether a step of ``group`` may be left out without the host knowing: the host counts nothing then."""
        sums = signature(self.rule_for(group)).summed is not None  # the host forms scalars of them
        is_random = self.options.rounding == "stochastic"  # the host makes a key of each step
        return not self.step_is_int and not sums and not self.ends_steps and not is_random

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Raise ``ValueError`` if a group's options are out of range."""
        if "lr" in options:
            check_lr(self, options)

    def check_exact(self, options: Mapping[str, Any]) -> None:
        """Raise ``ValueError`` if steps that a row misses with these options have no closed form."""

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

    def meaning_of_sparse(self, param: Tensor, group: Mapping[str, Any]) -> str:
        """What a parameter's sparse gradient means: "touched", "exact" or "all", zeros for the other rows.

        Raises:
            RuntimeError: if this method or the group's options allow no sparse gradient.
        """
        if self.options.sparse == "exact" and self.catch_up_rules is None:
            raise RuntimeError(
                f"{type(self).__name__}: sparse='exact' is for Adam and AdamW, whose missed steps have a closed form, "
                f"but {self.name_of(param)} has a sparse gradient: try 'touched'."
            )
        if self.options.sparse is None and not self.takes_sparse:
            layout = None if param.grad is None else param.grad.layout
            cures = "sparse='touched'" if self.catch_up_rules is None else "sparse='exact' or sparse='touched'"
            raise RuntimeError(
                f"{type(self).__name__} does not support sparse gradients, please consider SparseAdam instead, or say "
                f"what they mean: {cures} ({self.name_of(param)} has a gradient of layout {layout})"
            )
        self.check_takes_rows(param, group)
        return self.options.sparse or "all"

    def check_takes_rows(self, param: Tensor, group: Mapping[str, Any]) -> None:
        """Raise ``RuntimeError`` if the rule cannot update the rows that a sparse gradient names."""
        takes = signature(self.rule_of(param, group))
        if takes.summed is not None:
            raise RuntimeError(
                f"{type(self).__name__}: a rule that sums over a tensor cannot update single rows, but "
                f"{self.name_of(param)} has a sparse gradient: make it dense."
            )
        if takes.kind == "matrix":
            raise RuntimeError(
                f"{type(self).__name__}: a rule of whole matrices cannot update single rows, but {self.name_of(param)} "
                "has a sparse gradient: make it dense."
            )
        if takes.kind == "row" and not _names_rows(param.grad):
            raise RuntimeError(
                f"{type(self).__name__}: a rule of rows needs gradients that are sparse in the first dimension alone, "
                f"but {self.name_of(param)} has one of {_sparsity(param.grad)}: make it dense."
            )

    # State.

    def initial_state(self, name: str, param: Tensor, group: Mapping[str, Any]) -> Any:
        """What the state called ``name`` starts as: a number, or a tensor like ``param``."""
        return 0.0

    def state_shape(self, name: str, param: Tensor, group: Mapping[str, Any]) -> torch.Size:
        """Shape of the state tensor called ``name``, which compiled backends need.

        Default: the parameter's, and (rows, 1) if the rule is one of rows.
        """
        return row_state_shape(param) if signature(self.rule_of(param, group)).kind == "row" else param.shape

    def state_spec(self, name: str, param: Tensor, group: Mapping[str, Any], format: Format) -> StateSpec:
        """How new state called ``name`` is made, in a format; ``param`` may be a part of the parameter."""
        return StateSpec(name, self.state_shape(name, param, group), format, self.initial_state(name, param, group))

    def dtype_of_state(self, name: str, param: Tensor) -> torch.dtype:
        """Dtype of new state called ``name``, where it is not coded."""
        if not param.is_floating_point():
            return param.dtype
        asked = self.options.state_dtype_of(name)
        if isinstance(asked, torch.dtype):
            return asked
        is_narrow = param.dtype == torch.float16 or asked == "8bit"
        return torch.promote_types(param.dtype, torch.float32) if is_narrow else param.dtype

    def format_of_param(self, param: Tensor) -> Format:
        """How results are stored in a parameter."""
        rounding = self.options.rounding
        return param.dtype if rounding == "nearest" or param.dtype != torch.bfloat16 else Rounded(rounding)

    def format_of_state(self, name: str, param: Tensor, group: Mapping[str, Any]) -> Format:
        """How new state called ``name`` of a parameter is stored."""
        if _is_to_be_coded(self, name, param, group):
            return self.codec_of(name)
        return self.format_of_dtype(self.dtype_of_state(name, param))

    def codec_of(self, name: str) -> Codec:
        """How state called ``name`` is stored in 8 bits."""
        return Codec(name not in self.nonnegative_state, self.options.rounding == "stochastic")

    def format_of_dtype(self, dtype: torch.dtype) -> Format:
        """How state of a dtype is stored: as that, or rounded at random."""
        is_random = self.options.rounding == "stochastic" and dtype == torch.bfloat16
        return STOCHASTIC if is_random else dtype

    def keeps_exact(self, name: str, group: Mapping[str, Any]) -> bool:
        """Whether the digits of state called ``name`` matter: it is a point or a step size rather than an average."""
        return name in self.exact_state


def _is_to_be_coded(method: Method, name: str, param: Tensor, group: Mapping[str, Any]) -> bool:
    """Whether new state is stored in 8 bits."""
    options = method.options
    if options.state_dtype_of(name) != "8bit" or not param.is_floating_point():
        return False
    if method.keeps_exact(name, group) and not isinstance(options.state_dtype, Mapping):
        return False
    if method.state_shape(name, param, group) != param.shape or not codecs.is_worth_coding(param):
        return False
    if name + codecs.SCALE in signature(method.rule_of(param, group)).state:  # whose name scales would take
        return False
    if options.shard_state is not None and param.dim() < 2:  # parts would not end where blocks do
        return False
    return options.float32_state is None or not matches(options.float32_state, method.name_of(param))


def _names_rows(grad: Tensor | None) -> bool:
    """Whether a sparse gradient names rows."""
    return grad is None or (grad.layout is torch.sparse_coo and grad.sparse_dim() == 1)


def _sparsity(grad: Any) -> str:
    is_coo = grad.layout is torch.sparse_coo
    return f"{grad.sparse_dim()} sparse dimensions" if is_coo else f"layout {grad.layout}"


# Finds a method and does not keep it alive; those of one method are equal.
MethodRef: TypeAlias = Callable[[], Method]


def ref_to(method: Method) -> MethodRef:
    """A weak reference: an optimizer holds what it plans, and may be the method itself."""
    return cast("MethodRef", weakref.ref(method))
