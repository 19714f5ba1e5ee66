"""The optimizer around a rule: groups, state, step, checkpoints. Knows no mathematics and no backend."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypedDict

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer

from descend.backends import BACKENDS
from descend.checkpoint import per_parameter
from descend.checkpoint.reading import set_state
from descend.core.checks import check_kinds, check_lr
from descend.core.groups import grouped, named
from descend.core.signature import signature
from descend.diagnostics.summary import summarize
from descend.sparse.attach import Settling
from descend.sparse.update import check_meaning
from descend.state.container import STATE_DTYPES, Initial, State, new_tensor, stored_number
from descend.step.plan import Placement, Plan
from descend.step.take import AMP, NONFINITE, advance, check_max_norm, forget_scale, refuse_closure

if TYPE_CHECKING:
    from descend.core.groups import Groups, ParamsT
    from descend.step.in_backward import InBackward


class Options(TypedDict, total=False):
    """What every optimizer of this library takes beyond torch's arguments; keyword-only, never in a group."""

    max_norm: float | None
    nonfinite: str
    backend: str
    state_dtype: torch.dtype | None
    sparse: str | None
    groups: Groups | None
    amp: str | None


class FirstOrder(Settling):
    """Base of all element-wise optimizers: a subclass names a rule and says which numbers it gets.

    Args:
        params: parameters, ``(name, parameter)`` pairs, or dicts that define groups, as in ``torch.optim``; or a
            module, whose parameters are then named.
        defaults: options of a group that does not set them.
        max_norm: if given, > 0: before each step the gradients of all groups are scaled, inside the update and
            without being written, so that their joint 2-norm is at most this. Default: None.
        nonfinite: what a NaN or Inf in a gradient does. ``"step"``: torch's behaviour, it spreads. ``"skip"``:
            nothing moves and ``skipped_steps`` grows. ``"raise"``: ``FloatingPointError`` before anything moves.
            Default: ``"step"``.
        backend: ``"auto"``, ``"eager"`` or ``"cpu"`` (an error where no kernel applies). Default: the environment
            variable ``DESCEND_BACKEND``, else ``"auto"``.
        state_dtype: dtype of new state tensors of real parameters. Default: the parameter's, but float32 for
            float16, where squares of gradients underflow.
        sparse: what a sparse gradient means. ``None``: what it means in torch; Adam and AdamW refuse it.
            ``"touched"``: the rule runs on the rows that the gradient names, weight decay included, and nothing
            happens to the others. ``"exact"`` (Adam, AdamW): a gradient of zero for the others, as if it were dense;
            they are brought up to date when they are next read, see ``attach``. Default: None.
        groups: ``(pattern, options)`` pairs that sort named parameters into groups, see docs/groups.md. A pattern is
            a glob or compiled regular expression for whole names, or a collection of names; the first that matches
            decides. Parameters that none matches are the first group. Default: all are one group.
        amp: ``"fused"``: a ``GradScaler`` leaves unscaling, and leaving out steps that overflow, to ``step``, which
            unscales inside the update. None: it does so itself, and rewrites the gradients. Default: None.
    Raises:
        ValueError: if an option is out of range; nothing has been changed then.
    """

    rule: ClassVar[Callable[..., Any]]
    counts_steps: ClassVar[bool] = True  # state has torch's "step", and ``scalars`` depends on it
    step_is_int: ClassVar[bool] = False  # torch's SparseAdam counts in a Python int, all others in a tensor
    keeps: ClassVar[tuple[str, ...]] = ()  # state that is one number a parameter, see ``scalars_and_kept``
    counts: ClassVar[tuple[str, ...]] = ()  # keys of a group that steps change: state, and no options
    takes_sparse: ClassVar[bool] = False  # without being told what a sparse gradient means
    foreach_is_differentiable: ClassVar[bool] = False  # in torch only SGD's is
    capturable_needs: ClassVar[str] = "params and state_steps"  # on a device, in torch's words
    in_backward: InBackward | None = None  # while steps are taken inside backward

    def __init__(
        self,
        params: ParamsT,
        defaults: dict[str, Any],
        *,
        max_norm: float | None = None,
        nonfinite: str = "step",
        backend: str = "auto",
        state_dtype: torch.dtype | None = None,
        sparse: str | None = None,
        groups: Groups | None = None,
        amp: str | None = None,
        **unknown: Any,
    ) -> None:
        name = type(self).__name__
        if unknown:  # Python would name this class, not the one that was called
            raise TypeError(f"{name}.__init__() got an unexpected keyword argument {next(iter(unknown))!r}")
        check_max_norm(self, max_norm)
        if nonfinite not in NONFINITE:
            raise ValueError(f"{name}: nonfinite must be one of {NONFINITE}, got {nonfinite!r}.")
        if backend not in BACKENDS:
            raise ValueError(f"{name}: backend must be one of {BACKENDS}, got {backend!r}.")
        if state_dtype not in STATE_DTYPES:
            raise ValueError(f"{name}: state_dtype must be one of {STATE_DTYPES}, got {state_dtype!r}.")
        check_meaning(self, sparse)
        if amp not in AMP:
            raise ValueError(f"{name}: amp must be one of {AMP}, got {amp!r}.")
        self.max_norm = max_norm
        self.nonfinite = nonfinite
        self.backend = backend
        self.state_dtype = state_dtype
        self.sparse = sparse
        self.amp = amp
        self._step_supports_amp_scaling = amp == "fused"  # what GradScaler asks
        self.tables = {}
        self.skipped_steps = 0
        self.grad_norm: float | None = None
        self._plan: Plan | None = None
        params, self._patterns = (named(params), {}) if groups is None else grouped(name, params, groups, defaults)
        super().__init__(params, defaults)
        self.state = State.owned_by(self)

    # What a subclass defines.

    def rule_for(self, group: Mapping[str, Any]) -> Callable[..., Any]:
        """The rule of a group, chosen by its options."""
        return self.rule

    def scalars(self, group: Mapping[str, Any], step: float) -> tuple[Any, ...]:
        """The numbers of the rule, in its order, for a parameter's ``step``-th step (1 is the first).

        By default each number is the group's option of that name, and ``step`` is the step itself. With
        ``counts_steps = False`` all that ``step`` tells is whether this is the first (1) or a later one.
        """
        return tuple(step if name == "step" else group[name] for name in signature(self.rule_for(group)).numbers)

    def scalars_and_kept(
        self, group: Mapping[str, Any], step: float, kept: Sequence[Tensor]
    ) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """The numbers of the rule, and those to be kept for the next step in place of ``kept``.

        For optimizers with ``keeps``. ``kept`` are the 0-dim tensors of the state, so that arithmetic with them rounds
        as it does in torch.
        """
        return self.scalars(group, step), ()

    def initial_state(self, name: str, param: Tensor, group: Mapping[str, Any]) -> Any:
        """What a state called ``name`` starts as: a number, or a tensor like ``param``."""
        return 0.0

    def end_step(self) -> None:
        """Called at the end of each step that was not skipped."""

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Raise ``ValueError`` if a group's options are out of range."""
        if "lr" in options:
            check_lr(self, options)

    # The step.

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step with the current gradients.

        Args:
            closure: re-evaluates the model and returns the loss; it runs first, with gradients enabled.
        Returns:
            What the closure returned; None without one.
        Raises:
            FloatingPointError: for a gradient with NaN or Inf if ``nonfinite="raise"``; nothing has moved then.
        """
        if torch.compiler.is_compiling():  # a graph break: a compiled program calls the step, it does not trace it
            return _untraced_step(self, closure)
        # torch wraps every ``step`` for hooks and the profiler at 6 us a call; this one does so only when needed. A
        # subclass with a step of its own has been wrapped by torch already.
        is_hooked = type(self).step is FirstOrder.step and (
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or torch_optimizer._global_optimizer_pre_hooks
            or torch_optimizer._global_optimizer_post_hooks
            or torch.autograd.profiler._is_profiler_enabled
        )
        take = _hooked_step if is_hooked else FirstOrder._step
        try:
            return take(self) if closure is None else take(self, closure)
        except BaseException:
            forget_scale(self)
            raise

    step.hooked = True  # type: ignore[attr-defined]

    def _step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            refuse_closure(self)
            with torch.enable_grad():
                loss = closure()
        if self.in_backward is not None:
            self.in_backward.finish()
        else:
            plan, self._plan = self._plan, None  # should the step not end
            self._plan = advance(self, plan)
        return loss

    # State.

    def ensure_state(
        self, param: Tensor, rule: Callable[..., Any], group: Mapping[str, Any], lazy: bool = False
    ) -> dict[str, Any]:
        """The state of ``param``, made where it is missing; ``lazy``: zeros in lazily committed memory."""
        names = signature(rule).state
        if not names and not self.counts_steps:
            return {}
        found = dict.get(self.state, param)
        if found is None or type(found) is Initial:
            found = dict(found or {})
            dict.__setitem__(self.state, param, found)
        if self.step_is_int:
            found.setdefault("step", 0)
        numbers = ("step", *self.keeps) if self.counts_steps and not self.step_is_int else self.keeps
        found.update(zip(numbers, self.stored_numbers(numbers, param, group, found), strict=True))
        for name, dtype in zip(names, self.state_dtypes(rule, param, found), strict=True):
            if not isinstance(found.get(name), Tensor):
                found[name] = new_tensor(param, dtype, self.initial_state(name, param, group), lazy)
        return found

    def stored_numbers(
        self, names: Sequence[str], param: Tensor, group: Mapping[str, Any], found: Mapping[str, Any]
    ) -> list[Tensor]:
        """The numbers in the state of ``param``: those that exist, and those still to be made."""
        return [stored_number(found, name, self.initial_state(name, param, group)) for name in names]

    def state_dtypes(
        self, rule: Callable[..., Any], param: Tensor, found: Mapping[str, Any]
    ) -> tuple[torch.dtype, ...]:
        """Dtypes of the state tensors: of those that exist, and of those still to be made."""
        default = self.default_state_dtype(param)
        tensors = (found.get(name) for name in signature(rule).state)
        return tuple(tensor.dtype if isinstance(tensor, Tensor) else default for tensor in tensors)

    def default_state_dtype(self, param: Tensor) -> torch.dtype:
        """Dtype of new state tensors of ``param``."""
        if not param.is_floating_point():
            return param.dtype
        return self.state_dtype or (torch.float32 if param.dtype == torch.float16 else param.dtype)

    def steps_taken(self, rule: Callable[..., Any], found: Mapping[str, Any]) -> float:
        """Steps a parameter has taken; without step counts, 0 before the first and 1 after."""
        if self.counts_steps:
            return float(found.get("step", 0.0))
        return float(
            type(found) is not Initial and all(isinstance(found.get(name), Tensor) for name in signature(rule).state)
        )

    # Groups.

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

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, its options checked first. See ``torch.optim.Optimizer.add_param_group``."""
        if isinstance(param_group, dict):
            self.check_group({**self.defaults, **param_group})
        # torch's wrapper imports all of torch._dynamo, a second, to keep the compiler out of here.
        inherited = Optimizer.add_param_group
        if not torch.compiler.is_compiling():
            inherited = getattr(inherited, "__wrapped__", inherited)
        inherited(self, param_group)
        if self.in_backward is not None:
            self.in_backward.watch()

    def check_param(self, param: Tensor, group: Mapping[str, Any]) -> None:
        """Raise torch's errors for parameters that a group's options do not allow."""
        if group.get("fused") and not param.is_floating_point():
            raise RuntimeError(
                "`fused=True` requires all the params to be floating point Tensors of supported devices, "
                f"but {self.name_of(param)} is {param.dtype} on {param.device.type}. Leave `fused` out."
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
        is_attached = param in self.tables and self.tables[param].is_attached
        makes_state = group.get("lr") == 0 and not self.state_of(param)  # torch.distributed.checkpoint does
        if is_attached and param.grad is not None and param.grad.layout == torch.strided and not makes_state:
            raise RuntimeError(
                f"{type(self).__name__}: {self.name_of(param)} is a table of sparse='exact', but has a dense gradient: "
                "something reads all of it (tied weights do). Train it with dense gradients, or untie it."
            )

    def meaning_of_sparse(self, param: Tensor, group: Mapping[str, Any]) -> str | None:
        """What a parameter's gradient means if it is sparse: "touched", "exact" or "all", zeros for the other rows."""
        grad = param.grad
        if grad is None or grad.layout == torch.strided:
            return None
        if group.get("differentiable"):
            raise RuntimeError(
                f"{type(self).__name__}: `differentiable` does not support sparse gradients, but {self.name_of(param)} "
                f"has one of layout {grad.layout}."
            )
        if self.sparse is None and not self.takes_sparse:
            cures = "sparse='touched'" if self.coasting is None else "sparse='exact' or sparse='touched'"
            raise RuntimeError(
                f"{type(self).__name__} does not support sparse gradients, please consider SparseAdam instead, or say "
                f"what they mean: {cures} ({self.name_of(param)} has a gradient of layout {grad.layout})"
            )
        if param.layout != torch.strided:
            raise RuntimeError(
                f"{type(self).__name__}: gradients may be sparse, parameters may not, but {self.name_of(param)} is of "
                f"layout {param.layout}: store it dense."
            )
        return self.sparse or "all"

    def name_of(self, param: Tensor) -> str:
        """The parameter's name if it was given with one, else where it stands in the groups."""
        for index, group in enumerate(self.param_groups):
            for position, candidate in enumerate(group["params"]):
                if candidate is param:
                    names = group.get("param_names")
                    return str(names[position]) if names else f"param_groups[{index}]['params'][{position}]"
        return "a parameter that is in no group"

    # Backends.

    def requested_backend(self) -> str:
        """The backend asked for: by the constructor, else by ``DESCEND_BACKEND``, else ``"auto"``."""
        backend = self.backend
        if backend == "auto":
            backend = os.environ.get("DESCEND_BACKEND", backend)
        if backend not in BACKENDS:
            raise ValueError(f"DESCEND_BACKEND must be one of {BACKENDS}, got {backend!r}.")
        if backend == "auto" and torch._C._len_torch_dispatch_stack():
            return "eager"  # make_fx, FakeTensorMode and other modes would see nothing of a kernel
        return backend

    def backends(self) -> list[Placement]:
        """Where each parameter's rule would run now, and why, in the groups' order.

        Example:
            >>> from descend import SGD
            >>> weight = torch.zeros(3, requires_grad=True)
            >>> SGD([("weight", weight)]).backends()
            [Placement(name='weight', backend='cpu', reason='float32')]
        """
        return Plan(self, only_with_grad=False).placements(self)

    summary = summarize

    # Checkpoints.

    def state_dict(self) -> dict[str, Any]:
        """State and options as a dictionary in torch's format; its tensors share memory with the state."""
        self.write_schedules()
        return per_parameter.save(self, super().state_dict)

    load_state_dict = per_parameter.load_state_dict  # type: ignore[assignment]  # takes more than torch's, may return
    init_state = per_parameter.init_state

    def __getstate__(self) -> dict[str, Any]:
        self.write_schedules()
        options = ("max_norm", "nonfinite", "backend", "state_dtype", "sparse", "amp")
        ours = (*options, "skipped_steps", "grad_norm", "_patterns")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in ours}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if self.__dict__.get("tables"):
            self.settle()  # what rows have missed is known to the old state only
        set_state(self, state)
        self._plan = None
        self.__dict__.setdefault("sparse", None)
        self._step_supports_amp_scaling = (
            self.__dict__.setdefault("amp", None) == "fused" or self.in_backward is not None
        )
        for table in self.__dict__.setdefault("tables", {}).values():
            table.forget_schedule()
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)
        if not isinstance(self.state, State):
            content, self.state = self.state, State.owned_by(self)
            self.state.update(content)  # counts as exposed: whoever made it may still hold it


_hooked_step = Optimizer.profile_hook_step(FirstOrder._step)
_untraced_step = _disable_dynamo(FirstOrder.step)
