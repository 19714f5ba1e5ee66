"""The tables of an optimizer in exact mode, and the hooks that bring rows up to date before a module reads them."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from descend.core.optimizer import MethodOptimizer
from descend.sparse.table import ROW_STEP, Table


class Tables(dict[Tensor, Table]):
    """The parameters that an optimizer keeps in exact mode."""

    def of(self, param: Tensor) -> Table:
        """The table of ``param``, made if there is none."""
        if param not in self:
            self[param] = Table(param)
        return self[param]

    def settle(self, optimizer: MethodOptimizer) -> None:
        """Bring all rows of all tables up to date."""
        if optimizer.options.sparse == "exact":
            for group in optimizer.param_groups:
                for param in group["params"]:
                    if ROW_STEP in optimizer.state_of(param):
                        self.of(param)
        for table in list(self.values()):
            table.settle(optimizer)

    def write_schedules(self, optimizer: MethodOptimizer) -> None:
        """Put into the state what a checkpoint needs to bring rows up to date later."""
        for table in self.values():
            table.write_schedule(optimizer)

    def forget_schedules(self) -> None:
        """Another state has been loaded: read the schedules from there when they are next needed."""
        for table in self.values():
            table.forget_schedule()

    def check_dense(self, optimizer: MethodOptimizer, param: Tensor, group: Mapping[str, Any]) -> None:
        """Raise ``RuntimeError`` if an attached table has a dense gradient."""
        is_attached = param in self and self[param].is_attached
        if not is_attached or param.grad is None or param.grad.layout != torch.strided:
            return
        makes_state = group.get("lr") == 0 and not optimizer.state_of(param)  # torch.distributed.checkpoint does
        if not makes_state:
            raise RuntimeError(
                f"{type(optimizer).__name__}: {optimizer.name_of(param)} is a table of sparse='exact', but has a dense "
                "gradient: something reads all of it (tied weights do). Train it with dense gradients, or untie it."
            )


class SettleRows:
    """A hook of a module that reads a table: the rows about to be read are brought up to date.

    It does not keep the optimizer alive. In a copy of the module it has no effect: the copy has weights of its own,
    which are current.
    """

    def __init__(self, optimizer: MethodOptimizer | None, tables: Tables) -> None:
        self._optimizer = weakref.ref(optimizer) if optimizer is not None else lambda: None
        self._tables = tables

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before ``forward``: an embedding reads what its input names, other modules may read everything."""
        if torch.compiler.is_compiling():  # a graph break
            _untraced(self, module, args, kwargs)
            return
        inputs = args[0] if args else kwargs.get("input")
        looks_up = getattr(module.forward, "__func__", None) in (nn.Embedding.forward, nn.EmbeddingBag.forward)
        is_last = next(reversed(module._forward_pre_hooks.values())) is self  # a later hook may change the input
        self._settle(module, inputs if looks_up and is_last and isinstance(inputs, Tensor) else None)

    def before_saving(self, module: nn.Module, *args: Any) -> None:
        """Before a state dict of the module is made."""
        self._settle(module, None)

    def before_loading(self, module: nn.Module, *args: Any) -> None:
        """Before a state dict of the module is loaded."""
        if (optimizer := self._optimizer()) is not None:
            for table in self._tables_in(module):
                table.settle(optimizer)

    def after_forward(self, module: nn.Module, *args: Any) -> None:
        """An embedding with ``max_norm`` has scaled the rows it was about to read, which were current."""
        for table in self._tables_in(module):
            table.note_version()

    def belongs_to(self, optimizer: MethodOptimizer) -> bool:
        """Whether this hook is of ``optimizer``."""
        return self._optimizer() is optimizer

    def give_up(self, param: Tensor, optimizer: MethodOptimizer) -> None:
        """Leave ``param`` to ``optimizer``, another optimizer, if no row is behind.

        Raises:
            RuntimeError: if rows may be behind, and either of the two decays them.
        """
        other, table = self._optimizer(), self._tables.get(param)
        if other is None or other is optimizer or table is None:
            return
        if table.is_settled(other):
            table.is_attached = False
        elif any(each.group_of(param)["weight_decay"] for each in (optimizer, other)):
            raise RuntimeError(
                f"{type(optimizer).__name__}: {optimizer.name_of(param)} is a table of another {type(other).__name__} "
                "with sparse='exact', and weight decay of one of them does not commute with steps of the other. Use "
                "one optimizer, set weight_decay to 0 in both, or call settle() of the other one, which then "
                "gives it up."
            )

    def _tables_in(self, module: nn.Module) -> Iterator[Table]:
        for param in module._parameters.values():
            if param is not None and (table := self._tables.get(param)) is not None:
                yield table

    def _settle(self, module: nn.Module, indices: Tensor | None) -> None:
        optimizer = self._optimizer()
        if optimizer is not None:
            for table in self._tables_in(module):
                table.read(optimizer, indices)

    def __deepcopy__(self, memo: dict[int, Any]) -> SettleRows:
        optimizer = self._optimizer()
        if optimizer is not None:
            for param, table in list(self._tables.items()):
                if id(param) in memo:  # copied already, before it was brought up to date
                    table.read(optimizer)
                    memo[id(param)].data.copy_(param.data)
        return SettleRows(None, Tables())

    def __reduce__(self) -> Any:
        optimizer = self._optimizer()
        if optimizer is not None:
            for table in list(self._tables.values()):
                table.refuse_if_behind(optimizer)
        return SettleRows, (None, Tables())


_untraced = _disable_dynamo(SettleRows.__call__)


def attach(optimizer: MethodOptimizer, tables: Tables, model: nn.Module | Tensor, replicated: bool | None) -> None:
    """See ``FirstOrder.attach``."""
    name = type(optimizer).__name__
    if optimizer.options.sparse != "exact":
        raise RuntimeError(
            f"{name}: attach is for sparse='exact', this optimizer has sparse={optimizer.options.sparse!r}."
        )
    owned = {param for group in optimizer.param_groups for param in group["params"]}
    if isinstance(model, Tensor):
        if model not in owned:
            raise ValueError(f"{name}: attach got a tensor that is not one of this optimizer's parameters.")
        tables.of(model).attach(replicated)
        return
    params: set[Tensor] = {
        module.weight
        for module in model.modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse and module.weight in owned
    }
    if not params:
        raise ValueError(
            f"{name}: attach found no nn.Embedding or nn.EmbeddingBag with sparse=True in {type(model).__name__} whose "
            "weight is one of this optimizer's parameters. To read a table in your own code, pass the parameter itself."
        )
    readers = list(_readers(model, params))
    replicated = True if replicated is None and _is_in_replicas(model, params) else replicated
    _refuse_scaling(optimizer, readers, replicated)
    for module in readers:
        for hook in _hooks_of(module):
            for param in params.intersection(module._parameters.values()):
                hook.give_up(param, optimizer)
    for param in params:
        tables.of(param).attach(replicated)
    for module in readers:
        if not any(hook.belongs_to(optimizer) for hook in _hooks_of(module)):
            hook = SettleRows(optimizer, tables)
            module.register_forward_pre_hook(hook, with_kwargs=True)
            module.register_state_dict_pre_hook(hook.before_saving)  # type: ignore[no-untyped-call]
            module.register_load_state_dict_pre_hook(hook.before_loading)  # type: ignore[no-untyped-call]
            if getattr(module, "max_norm", None) is not None:
                module.register_forward_hook(hook.after_forward)


def _is_in_replicas(model: nn.Module, params: set[Tensor]) -> bool:
    """Whether a ``DistributedDataParallel`` of several ranks in ``model`` averages the gradients of ``params``."""
    return any(
        dist.get_world_size(module.process_group) > 1 and not params.isdisjoint(module.parameters())
        for module in model.modules()
        if isinstance(module, nn.parallel.DistributedDataParallel)
    )


def _refuse_scaling(optimizer: MethodOptimizer, readers: list[nn.Module], replicated: bool | None) -> None:
    if replicated and any(getattr(module, "max_norm", None) is not None for module in readers):
        raise ValueError(
            f"{type(optimizer).__name__}: an embedding with max_norm scales the rows it reads. Other ranks read other "
            "rows, so their replicas would drift apart: leave max_norm of the embedding out."
        )


def _hooks_of(module: nn.Module) -> list[SettleRows]:
    return [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, SettleRows)]


def _readers(model: nn.Module, params: set[Tensor]) -> Iterator[nn.Module]:
    for module in model.modules():
        if any(param in params for param in module._parameters.values() if param is not None):
            yield module
