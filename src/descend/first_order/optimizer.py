"""The base of the first-order optimizers: a method, and the engine that steps it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer
from torch.utils.weak import WeakIdKeyDictionary
from typing_extensions import Unpack

from descend.checkpoint import per_parameter
from descend.checkpoint.consolidate import consolidated
from descend.checkpoint.matching import Hyperparameters, IncompatibleKeys, Match
from descend.checkpoint.reading import set_state
from descend.core.docstrings import summary_of, with_sections
from descend.core.groups import Groups, ParamsT, grouped, named
from descend.core.measures import Observer
from descend.core.optimizer import MethodOptimizer
from descend.core.options import DOCUMENTATION, Options, StepOptions, shows_options
from descend.core.undecorated import undecorated
from descend.diagnostics.summary import Row, summarize
from descend.distributed.shard_state import state_mesh
from descend.sparse.attach import Tables, attach
from descend.state.averages import averages_in_place
from descend.state.container import State
from descend.state.make import init_state
from descend.step.driver import Driver, WholeStep
from descend.step.in_backward import Clip, InBackward
from descend.step.plan import Placement, Plan
from descend.step.scaling import forget_scale, refuse_closure
from descend.step.take import compiled


class FirstOrder(MethodOptimizer):
    """Base of all first-order optimizers: a subclass names a rule and forms its scalars.

    Args:
        params: a module, whose parameters then have names; or parameters, ``(name, parameter)`` pairs, or dicts that
            define groups, as in torch.
        defaults: options of a group that does not set them.
    Raises:
        ValueError: if an option is out of range; nothing has been changed then.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__doc__:
            cls.__doc__ = with_sections(cls.__doc__, _shared_sections())

    is_base = True
    _is_averaged = False  # whether the weights are their averages now

    @shows_options
    def __init__(self, params: ParamsT, defaults: dict[str, Any], **options: Unpack[Options]) -> None:
        name = type(self).__name__
        for key in options:
            if key not in Options.__annotations__:  # Python would name this class, not the one that was called
                raise TypeError(f"{name}.__init__() got an unexpected keyword argument {key!r}")
        groups = options.pop("groups", None)
        self.options = StepOptions(**options)  # type: ignore[misc] # groups were popped
        self.options.check(name)
        self._begin()
        self._tables = Tables()
        self._use(WholeStep(self._tables))
        self.defaults = defaults
        self.method_of(defaults).check_group(defaults)  # before a generator of parameters is used up
        sorted_params, self._patterns = self._sorted(params, groups)
        if groups is not None:
            sorted_params = [self.with_lr(group) for group in sorted_params]
        super().__init__(sorted_params, defaults)
        self.state = State.owned_by(self)
        self.check_step_options()
        state_mesh(self)  # raises for what shard_state cannot be

    def _sorted(self, params: ParamsT, groups: Groups | None) -> tuple[Any, dict[str, str]]:
        """The parameters as torch takes them, and by name what has put them where they are."""
        if groups is None:
            return named(params), {}
        return grouped(type(self).__name__, params, groups, self.check_names)

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
        run = _hooked_step if is_hooked else FirstOrder._step
        try:
            return run(self) if closure is None else run(self, closure)
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
        self._driver.step(self)
        return loss

    def observe(self, observer: Observer | None) -> None:
        """Tell ``observer`` of all steps from now on; None to tell nobody. ``Monitor`` calls it.

        Raises:
            RuleError: if a rule cannot be compiled.
        """
        self._driver.forget_plan()
        self.observer = observer
        if observer is not None:
            try:
                warmup(self)
            except BaseException:
                self.observer = None
                raise

    def _use(self, driver: Driver) -> None:
        """Leave the steps to ``driver``."""
        self._driver = driver
        self._step_supports_amp_scaling = driver.takes_scaler or self.options.amp == "fused"  # what GradScaler asks

    @property
    def in_backward(self) -> InBackward | None:
        """The handle of ``descend.in_backward`` while steps are taken inside backward, else None."""
        return self._driver.handle  # type: ignore[no-any-return]

    def step_in_backward(
        self, accumulate: int, clip: Clip | None, nonfinite: Literal["parameter"] | None
    ) -> InBackward:
        """Take steps inside backward from now on. See ``descend.in_backward``, which checks the arguments first."""
        ordinary = self._driver

        def restore() -> None:
            if self._driver is handle:
                self._use(ordinary)
                ordinary.forget_plan()

        handle = InBackward(self, self._tables, accumulate, clip, nonfinite, restore)
        self._use(handle)
        return handle

    # Groups.

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters. See ``torch.optim.Optimizer.add_param_group``.

        Raises:
            ValueError: if an option is out of range; nothing has been added then.
        """
        super().add_param_group(param_group)
        self._driver.watch()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Set all gradients to None, or to zeros. See ``torch.optim.Optimizer.zero_grad``."""
        undecorated(Optimizer.zero_grad)(self, set_to_none)

    # Tables in exact mode.

    def attach(self, model: nn.Module | Tensor, replicated: bool | None = None) -> None:
        """Bring rows up to date before ``model`` reads them. Call it once, before training with ``sparse="exact"``.

        Embeddings (``nn.Embedding``, ``nn.EmbeddingBag`` with ``sparse=True``) settle the rows that their input names,
        before each forward pass. Other modules that own the same weight settle all rows. So do ``state_dict`` and
        ``load_state_dict`` of the modules: a pass over all rows that are behind. The model does not keep the optimizer
        alive, and its copies are not attached.

        Args:
            model: the model; or a single parameter that code of yours reads after calling ``settle`` itself.
            replicated: whether other processes hold the same tables and read other rows, whose gradients come here too.
                Rows of the gradient that are behind are brought up to date then, instead of an error. Default: whether
                ``model`` is or contains a ``DistributedDataParallel`` of several processes; else as it was.
        Raises:
            RuntimeError: if ``sparse`` is not ``"exact"``, or another such optimizer has a table and one of them decays
                it.
            ValueError: if there is nothing to attach, or a replicated embedding has ``max_norm``.
        Example:
            >>> from descend import AdamW
            >>> model = torch.nn.EmbeddingBag(1000, 4, sparse=True)
            >>> optimizer = AdamW(model.parameters(), sparse="exact")
            >>> optimizer.attach(model)
            >>> model(torch.tensor([[1, 2, 2]])).sum().backward()
            >>> optimizer.step()
        """
        attach(self, self._tables, model, replicated)

    def settle(self) -> None:
        """Bring all rows of all tables up to date: a pass over those that are behind. For ``sparse="exact"``.

        Where tables are replicated, all processes call it between the same two steps.
        """
        self._tables.settle(self)

    @contextmanager
    def settled(self) -> Iterator[None]:
        """Bring all rows up to date, for a block of code that reads or writes the weights itself."""
        self.settle()
        yield

    def __del__(self) -> None:
        with suppress(Exception):  # when the interpreter ends, what it takes may be gone
            if self._tables:
                self.settle()  # afterwards nobody could

    # Averages.

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the averages that ``ema`` keeps in the place of the weights, for a block of code.

        The weights come back when the block ends, however it ends. Memory for one copy of the parameters is needed if
        they are narrower than their averages, as bfloat16 is; else for none. Parameters that have taken no step with
        ``ema`` keep their values. With ``shard_state``, all ranks enter and leave the block together.

        Raises:
            ValueError: if ``ema`` is None.
            RuntimeError: for a block inside a block; inside the block also by ``step``, ``state_dict``,
                ``load_state_dict`` and copies of the optimizer.
        Example:
            >>> from descend import SGD
            >>> weight = torch.ones(2, requires_grad=True)
            >>> optimizer = SGD([weight], lr=1.0, ema=0.75)
            >>> weight.grad = torch.ones(2)
            >>> optimizer.step()
            >>> with optimizer.averaged():
            ...     print(weight.tolist())
            [0.75, 0.75]
            >>> weight.tolist()
            [0.0, 0.0]
        """
        if self.options.ema is None:
            raise ValueError(f"{type(self).__name__}: there are no averages: pass ema=0.999 when it is made.")
        self.check_not_averaged()
        self._driver.forget_plan()  # so that a step inside makes a new plan, and is refused
        try:
            self._is_averaged = True
            with averages_in_place(self):
                yield
        finally:
            self._is_averaged = False

    def check_not_averaged(self) -> None:
        """Raise ``RuntimeError`` while the weights are their averages."""
        if self._is_averaged:
            raise RuntimeError(
                f"{type(self).__name__}: inside `with optimizer.averaged()` the weights are their averages. Step, "
                "save, load and copy the optimizer outside of it."
            )

    def check_step_options(self) -> None:
        self.check_not_averaged()
        super().check_step_options()

    # What it holds, and where it runs.

    def backends(self) -> list[Placement]:
        """Where each parameter's rule would run now, and why, in the groups' order. Compiles nothing.

        Example:
            >>> from descend import SGD
            >>> weight = torch.zeros(3, requires_grad=True)
            >>> SGD([("weight", weight)]).backends()
            [Placement(name='weight', backend='cpu', reason='float32')]
        """
        return Plan(self, self._tables, only_with_grad=False).placements(self)

    def summary(self, file: Any = None) -> tuple[Row, ...]:
        """Print a table of the parameter groups as they are now.

        Args:
            file: where to print. Default: standard output.
        Returns:
            The rows of the table.
        Example:
            >>> from descend import AdamW
            >>> optimizer = AdamW(torch.nn.Linear(2, 3), groups=[("bias", dict(weight_decay=0))])
            >>> optimizer.init_state()
            >>> rows = optimizer.summary()
            group  pattern  parameters  numbers  state  per number  formats  options that differ
                0  -                 1        6   52 B      8.67 B  float32
                1  bias              1        3   28 B      9.33 B  float32  weight_decay=0
            total                    2        9   80 B      8.89 B  float32
        """
        return summarize(self, self._patterns, file)

    # Checkpoints.

    def init_state(self) -> None:
        """Make the state of all parameters that require gradients, without a step.

        ``torch.distributed.checkpoint`` loads into existing state; if there is none, it takes a step to make it. After
        ``init_state`` the next step is still the first.

        Example:
            >>> from descend import AdamW
            >>> optimizer = AdamW([torch.zeros(2, requires_grad=True)])
            >>> optimizer.init_state()
            >>> optimizer.state_dict()["state"][0]
            {'step': tensor(0.), 'exp_avg': tensor([0., 0.]), 'exp_avg_sq': tensor([0., 0.])}
        """
        init_state(self)
        self._driver.forget_plan()

    def state_dict(self) -> dict[str, Any]:
        """State and options as a dictionary in torch's format; its tensors share memory with the state."""
        self.check_not_averaged()
        self._tables.write_schedules(self)
        return per_parameter.save(self, undecorated(Optimizer.state_dict))

    def consolidated_state_dict(self, to: int = 0) -> dict[str, Any] | None:
        """The whole state of an optimizer with ``shard_state`` in torch's format, on one rank. All ranks must call it.

        ``load_state_dict`` takes it on any number of ranks, as do torch's optimizers. The state travels bucket by
        bucket: the other ranks need memory for one bucket. What ``rounding="compensated"`` keeps is gathered too. It is
        int16, which neither gloo nor NCCL sends: torch's ``full_state_dict=True`` raises ``RuntimeError`` for it.

        Args:
            to: the rank, in the process group of ``shard_state``, that receives it. Default: 0.
        Returns:
            On rank ``to`` the dictionary, the parts that were on several ranks in new memory on the CPU; else None.
        Raises:
            ValueError: if there is no such rank.
        """
        return consolidated(self, self.state_dict(), to)

    def load_state_dict(  # type: ignore[override]  # takes more than torch's, and may return what it left out
        self,
        state_dict: Mapping[str, Any],
        strict: bool = True,
        match: Match = "auto",
        hyperparameters: Hyperparameters = "loaded",
    ) -> IncompatibleKeys | None:
        """Load a dictionary returned by ``state_dict``, of this library or of torch.

        Everything is copied. State gets the format that ``state_dtype`` asks for, and a warning says what that loses;
        without ``state_dtype``, the wider of its saved dtype and that of new state. Flags that choose how to run
        (``foreach``, ``fused``, ``capturable``, ``differentiable``) are not taken from the dictionary.

        Args:
            state_dict: the dictionary.
            strict: if True, every parameter of the optimizer and of the dictionary must have its counterpart. If False,
                matching state is loaded, and the other parameters keep their state. Default: True.
            match: ``"name"``, an error where names are missing; ``"order"``; or ``"auto"``: by name if every parameter
                has one on both sides, else by order. Default: ``"auto"``.
            hyperparameters: options of the groups: ``"loaded"`` takes them from the dictionary, ``"current"`` keeps lr,
                weight decay and the rest as they are. Default: ``"loaded"``.
        Returns:
            None; with ``strict=False`` the parameters that were not loaded: ``(missing_keys, unexpected_keys)``.
        Raises:
            TypeError, ValueError: if the dictionary does not fit or is damaged; nothing has been changed then.
        Example:
            >>> from descend import AdamW
            >>> old, new = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
            >>> optimizer = AdamW(new, lr=0.1)
            >>> optimizer.load_state_dict(AdamW(old, lr=0.5).state_dict(), strict=False, hyperparameters="current")
            IncompatibleKeys(missing_keys=[], unexpected_keys=[])
            >>> optimizer.param_groups[0]["lr"]
            0.1
        """
        self.check_not_averaged()
        return per_parameter.load(self, state_dict, strict, match, hyperparameters)

    def __getstate__(self) -> dict[str, Any]:
        self.check_not_averaged()
        self._tables.write_schedules(self)
        ours = ("skipped_steps", "grad_norm", "_patterns")
        # A process group cannot be copied; its mesh can, and finds the group by its name.
        options = {**vars(self.options), "shard_state": state_mesh(self)}
        options["_made_by"] = list(self._made_by.items())  # type: ignore[no-untyped-call]
        return {**super().__getstate__(), **options, **{name: getattr(self, name) for name in ours}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "_tables" in self.__dict__:
            self.settle()  # first: the steps that rows have missed are on record only in the state about to be replaced
        options = {key: state[key] for key in StepOptions.__dataclass_fields__ if key in state}
        counts = {key: state[key] for key in ("grad_norm", "skipped_steps") if key in state}
        is_new = "_tables" not in self.__dict__
        if is_new:
            self._begin()
        before = {param: self.state_of(param) for param in dict.keys(self.__dict__.get("state", {}))}
        apart = {*options, *counts, "_made_by"}
        set_state(self, {key: value for key, value in state.items() if key not in apart})
        for name, value in counts.items():
            setattr(self, name, value)
        self.options = replace(self.__dict__.get("options", StepOptions()), **options)
        if is_new:
            self._tables = Tables()
            self._driver = WholeStep(self._tables)
        self._use(self._driver)
        self._driver.forget_plan()
        self._tables.forget_schedules()
        for group in self.param_groups:
            method = self.method_of(group)
            for key, value in method.defaults.items():
                group.setdefault(key, value)
            group.update(method.fixed_options)
            for param in group["params"]:
                if is_new or self.state_of(param) is not before.get(param):  # loaded, and not kept
                    self.note_made_by(param, group)
        if "_made_by" in state:
            self._made_by = WeakIdKeyDictionary(state["_made_by"])
        if not isinstance(self.state, State):
            content, self.state = self.state, State.owned_by(self)
            self.state.update(content)  # counts as exposed: whoever made it may still hold it


def _shared_sections() -> dict[str, dict[str, str]]:
    """What the docstring of every class says of the options and methods that all have."""
    methods = (
        "step",
        "zero_grad",
        "summary",
        "backends",
        "state_dict",
        "load_state_dict",
        "init_state",
        "add_param_group",
        "attach",
        "settle",
        "averaged",
    )
    return {
        "Keyword Args": DOCUMENTATION,
        "Attributes": {
            "grad_norm": "norm of the last step's gradients before clipping; None if nothing asked for it. Reading it "
            "waits for the device.",
            "skipped_steps": 'steps left out by ``nonfinite="skip"``. Reading it waits for the device.',
            "max_norm, nonfinite, ...": "the options above; all but ``groups`` may be set anew between steps.",
            "param_groups, state": "as in torch.",
        },
        "Methods": {name: summary_of(getattr(FirstOrder, name)) for name in methods},
    }


FirstOrder.__doc__ = with_sections(FirstOrder.__doc__ or "", _shared_sections())

_hooked_step = Optimizer.profile_hook_step(FirstOrder._step)
_untraced_step = _disable_dynamo(FirstOrder.step)


def warmup(optimizer: FirstOrder) -> None:
    """Compile, or load from disk, all that ``optimizer.step`` will need, so that the first step is fast.

    Where there are no gradients yet, they are assumed to have their parameters' dtypes. State is not touched.

    Args:
        optimizer: of this library, not ``LBFGS`` or ``Newton``.
    Raises:
        RuleError: if a rule cannot be compiled.
    Example:
        >>> import torch
        >>> from descend import AdamW
        >>> optimizer = AdamW([torch.zeros(3, requires_grad=True)])
        >>> warmup(optimizer)
    """
    plan = compiled(Plan(optimizer, optimizer._tables, only_with_grad=False), optimizer, optimizer._tables)
    if optimizer.options.sparse is not None:
        plan.compile_rows(optimizer)
