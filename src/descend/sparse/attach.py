"""How tables in exact mode are read: what an optimizer offers for it, and the hooks that do it by themselves."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from descend.sparse.table import ROW_STEP, Table


class Settling(Optimizer):
    """The part of an optimizer that keeps tables in exact mode."""

    coasting: ClassVar[tuple[Callable[..., Any], Callable[..., Any]] | None] = None  # rules for sparse="exact"

    sparse: str | None
    tables: dict[Tensor, Table]  # the parameters in exact mode

    def rule_for(self, group: Mapping[str, Any]) -> Callable[..., Any]:
        """The rule of a group."""
        raise NotImplementedError

    def requested_backend(self) -> str:
        """The backend asked for."""
        raise NotImplementedError

    def name_of(self, param: Tensor) -> str:
        """The parameter's name."""
        raise NotImplementedError

    def check_exact(self, options: Mapping[str, Any]) -> None:
        """Raise ``ValueError`` if steps that a row misses with these options have no closed form."""

    def attach(self, model: torch.nn.Module | Tensor) -> None:
        """Bring rows up to date before ``model`` reads them. Call it once, before training with ``sparse="exact"``.

        Embeddings (``nn.Embedding``, ``nn.EmbeddingBag`` with ``sparse=True``) settle the rows that their input names,
        before each forward pass. Other modules that own the same weight settle all rows. So do ``state_dict`` and
        ``load_state_dict`` of the modules: a pass over all rows that are behind. The model does not keep the optimizer
        alive, and its copies are not attached.

        Args:
            model: the model; or a single parameter that code of yours reads after calling ``settle`` itself.
        Raises:
            RuntimeError: if ``sparse`` is not ``"exact"``.
            ValueError: if there is nothing to attach.
        Example:
            >>> from descend import AdamW
            >>> model = torch.nn.EmbeddingBag(1000, 4, sparse=True)
            >>> optimizer = AdamW(model.parameters(), sparse="exact")
            >>> optimizer.attach(model)
            >>> model(torch.tensor([[1, 2, 2]])).sum().backward()
            >>> optimizer.step()
        """
        attach(self, model)

    def settle(self) -> None:
        """Bring all rows of all tables up to date: a pass over those that are behind. For ``sparse="exact"``."""
        if self.sparse == "exact":
            for group in self.param_groups:
                for param in group["params"]:
                    if ROW_STEP in self.state_of(param):
                        self.table_of(param)
        for table in list(self.tables.values()):
            table.settle(self)

    def __del__(self) -> None:
        with suppress(Exception):  # when the interpreter ends, what it takes may be gone
            if self.tables:
                self.settle()  # afterwards nobody could

    @contextmanager
    def settled(self) -> Iterator[None]:
        """For code that reads the weights itself: they are up to date until the next step."""
        self.settle()
        yield

    def table_of(self, param: Tensor) -> Table:
        """What is known of the rows of ``param``, a parameter in exact mode."""
        if param not in self.tables:
            self.tables[param] = Table(param)
        return self.tables[param]

    def state_of(self, param: Tensor) -> dict[str, Any]:
        """The state of ``param`` as it is, read without being exposed."""
        return dict.get(self.state, param) or {}

    def group_of(self, param: Tensor) -> dict[str, Any]:
        """The group that ``param`` is in."""
        return next(group for group in self.param_groups if any(candidate is param for candidate in group["params"]))

    def write_schedules(self) -> None:
        """Put into the state what a checkpoint needs to know of steps that rows have missed."""
        for param, table in self.tables.items():
            if found := self.state_of(param):
                table.write_schedule(found)


class SettleRows:
    """A hook of a module that reads a table: the rows about to be read are brought up to date.

    It knows the optimizer weakly. In a copy of the module it has no effect: the copy has weights of its own, which are
    current.
    """

    def __init__(self, optimizer: Settling | None) -> None:
        self._optimizer = weakref.ref(optimizer) if optimizer is not None else lambda: None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before ``forward``: an embedding reads what its input names, other modules may read everything."""
        if torch.compiler.is_compiling():  # a graph break
            _untraced(self, module, args, kwargs)
            return
        inputs = args[0] if args else kwargs.get("input")
        looks_up = getattr(module.forward, "__func__", None) in (nn.Embedding.forward, nn.EmbeddingBag.forward)
        is_last = next(reversed(module._forward_pre_hooks.values())) is self  # a later hook may change the input
        self._settle(module, inputs if looks_up and is_last and isinstance(inputs, Tensor) else None)

    def all_rows(self, module: nn.Module, *args: Any) -> None:
        """Before a state dict of the module is made or loaded."""
        self._settle(module, None)

    def belongs_to(self, optimizer: Settling) -> bool:
        """Whether this hook is of ``optimizer``."""
        return self._optimizer() is optimizer

    def _settle(self, module: nn.Module, indices: Tensor | None) -> None:
        optimizer = self._optimizer()
        if optimizer is not None:
            for param in module._parameters.values():
                if param is not None and (table := optimizer.tables.get(param)) is not None:
                    table.settle(optimizer, indices)

    def __deepcopy__(self, memo: dict[int, Any]) -> SettleRows:
        optimizer = self._optimizer()
        if optimizer is not None:
            for param, table in list(optimizer.tables.items()):
                if id(param) in memo:  # copied already, before it was brought up to date
                    table.settle(optimizer)
                    memo[id(param)].data.copy_(param.data)
        return SettleRows(None)

    def __reduce__(self) -> Any:
        optimizer = self._optimizer()
        if optimizer is not None:
            for table in list(optimizer.tables.values()):
                table.refuse_if_behind(optimizer)
        return SettleRows, (None,)


_untraced = _disable_dynamo(SettleRows.__call__)


def attach(optimizer: Settling, model: nn.Module | Tensor) -> None:
    """See ``Settling.attach``."""
    name = type(optimizer).__name__
    if optimizer.sparse != "exact":
        raise RuntimeError(f"{name}: attach is for sparse='exact', this optimizer has sparse={optimizer.sparse!r}.")
    owned = {param for group in optimizer.param_groups for param in group["params"]}
    if isinstance(model, Tensor):
        if model not in owned:
            raise ValueError(f"{name}: attach got a tensor that is not one of this optimizer's parameters.")
        optimizer.table_of(model).is_attached = True
        return
    tables: set[Tensor] = {
        module.weight
        for module in model.modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse and module.weight in owned
    }
    if not tables:
        raise ValueError(
            f"{name}: attach found no nn.Embedding or nn.EmbeddingBag with sparse=True in {type(model).__name__} whose "
            "weight is one of this optimizer's parameters. To read a table in your own code, pass the parameter itself."
        )
    for param in tables:
        optimizer.table_of(param).is_attached = True
    for module in _readers(model, tables):
        hooks = module._forward_pre_hooks.values()
        if not any(isinstance(hook, SettleRows) and hook.belongs_to(optimizer) for hook in hooks):
            hook = SettleRows(optimizer)
            module.register_forward_pre_hook(hook, with_kwargs=True)
            module.register_state_dict_pre_hook(hook.all_rows)  # type: ignore[no-untyped-call]
            module.register_load_state_dict_pre_hook(hook.all_rows)  # type: ignore[no-untyped-call]


def _readers(model: nn.Module, tables: set[Tensor]) -> Iterator[nn.Module]:
    for module in model.modules():
        if any(param in tables for param in module._parameters.values() if param is not None):
            yield module
