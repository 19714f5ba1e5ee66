"""Ranks that disagree about an optimizer are told so, before they wait for each other in vain."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence, Set
from types import MappingProxyType
from typing import Any

from torch.optim import Optimizer

from descend.core.optimizer import MethodOptimizer
from descend.core.update import number
from descend.distributed.dtensors import is_dtensor
from descend.distributed.ranks import Ranks, gather, share_of
from descend.distributed.shard_state import as_sharded

Description = Mapping[str, str]
NOTHING: Description = MappingProxyType({})


class Agreement:
    """What the ranks of each mesh must agree about: class, options, parameters and their groups.

    Each rank sends a digest of it as a few numbers and their squares, along with whatever it reduces anyway.

    Args:
        ranks: of its parameters.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._digests: dict[Any, int] = {}  # of the parameters on each mesh, which stay the same
        self._options: Any = None  # of the step, and what describes them: they are replaced, and not edited
        self._description = ""

    def numbers(self, optimizer: Optimizer, more: Description = NOTHING) -> dict[Any, list[float]]:
        """What to sum over each mesh; ``more`` is what the ranks must agree about in this step only."""
        for mesh in self._ranks.meshes:
            if mesh not in self._digests:
                self._digests[mesh] = _digest(repr(_parameters(optimizer, mesh)))
        if isinstance(optimizer, MethodOptimizer) and self._options is not optimizer.options:
            self._options, self._description = optimizer.options, repr(_step_options(optimizer))
        options = self._description + repr(_values(optimizer)) + "".join(more.values())
        return {mesh: _bytes_and_squares(_digest(options, digest)) for mesh, digest in self._digests.items()}

    def check(self, optimizer: Optimizer, sums: Mapping[Any, Sequence[float]], more: Description = NOTHING) -> None:
        """Raise ``RuntimeError``, on every rank of the mesh, if the summed ``numbers`` differ between its ranks."""
        for mesh, summed in sums.items():
            half, ranks = len(summed) // 2, mesh.size()
            # Numbers x are equal if n * sum(x^2) = sum(x)^2. Of bytes, all of this is exact in float64.
            if any(ranks * square != x * x for x, square in zip(summed[:half], summed[half:], strict=True)):
                described = {**_parameters(optimizer, mesh), **_options(optimizer), **more}
                raise RuntimeError(message(type(optimizer).__name__, gather([mesh], described)))

    def confirm(self, optimizer: Optimizer, more: Description = NOTHING) -> None:
        """Wait for all ranks. Raise ``RuntimeError``, on every rank, if they disagree; ``more`` as in ``numbers``."""
        self.check(optimizer, self._ranks.reduce({}, self.numbers(optimizer, more))[1], more)

    def shake_hands(self, optimizer: MethodOptimizer) -> None:
        """Raise ``RuntimeError`` if ranks disagree. Once, at the first step: later ones may reduce nothing."""
        if fresh := [mesh for mesh in self._ranks.meshes if mesh not in optimizer.agreed_meshes]:
            self.confirm(optimizer)
            optimizer.agreed_meshes.update(fresh)


def check_agreement(optimizer: Optimizer) -> None:
    """Raise ``RuntimeError``, on every rank, if the ranks of an optimizer's DTensors disagree about it."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    ranks = Ranks(map(share_of, params))
    if ranks.meshes:
        Agreement(ranks).confirm(optimizer)


def message(who: str, by_rank: Mapping[int, Description]) -> str:
    """What the first rank and the first that differs from it disagree about."""
    (first, expected), *others = by_rank.items()
    rank, other = next((pair for pair in others if pair[1] != expected), others[0])
    keys = [key for key in {**expected, **other} if expected.get(key) != other.get(key)]
    listed = "; ".join(f"{key}: {expected.get(key, 'none')} and {other.get(key, 'none')}" for key in keys[:3])
    rest = f"; and {len(keys) - 3} more" if len(keys) > 3 else ""
    return (
        f"{who}: ranks {first} and {rank} disagree about {listed}{rest}. Make the optimizer in the same way, and edit "
        "its groups in the same way, on every rank. Nothing has moved."
    )


def _parameters(optimizer: Optimizer, mesh: Any) -> Description:
    """The parameters that lie on a mesh, in their order."""
    described = {"class": type(optimizer).__name__}
    for index, group in enumerate(optimizer.param_groups):
        names = group.get("param_names") or range(len(group["params"]))
        for name, param in zip(names, group["params"], strict=True):
            sharded: Any = as_sharded(optimizer, param) if isinstance(optimizer, MethodOptimizer) else param
            if is_dtensor(sharded) and sharded.device_mesh == mesh:
                what = f"{tuple(param.shape)} {param.dtype} {sharded.placements}"
                if sharded is not param:  # it is gathered if it is updated
                    what += " without a gradient" if param.grad is None else f" with a gradient, {param.grad.layout}"
                described[f"group {index}, parameter {name}"] = what
    return described


def _options(optimizer: Optimizer) -> Description:
    """The options of the step and of the groups."""
    described = {name: repr(value) for name, value in _step_options(optimizer).items()}
    for index, group in enumerate(optimizer.param_groups):
        keys = _keys(optimizer, group)
        described |= {f"group {index}, {key}": repr(_plain(group[key])) for key in keys if key in group}
    return described


def _values(optimizer: Optimizer) -> list[list[Any]]:
    """The options of the groups, without the words: a step has time for no more."""
    return [[_plain(group[key]) for key in _keys(optimizer, group) if key in group] for group in optimizer.param_groups]


def _keys(optimizer: Optimizer, group: Mapping[str, Any]) -> Iterable[str]:
    """The names of a group's options."""
    if not isinstance(optimizer, MethodOptimizer) or "method" not in group:
        return optimizer.defaults
    return ("method", *optimizer.method_of(group).defaults)


def _step_options(optimizer: Optimizer) -> Mapping[str, Any]:
    """The options that are in no group, but for the process group itself."""
    options = vars(optimizer.options) if isinstance(optimizer, MethodOptimizer) else {}
    return {name: _in_order(value) for name, value in options.items() if name != "shard_state"}


def _in_order(value: Any) -> Any:
    """An option that has the same ``repr`` on all ranks: sets are in another order in each process."""
    if isinstance(value, Mapping):
        return dict(sorted(value.items(), key=repr))
    return sorted(value, key=repr) if isinstance(value, Set) else value


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(map(number, value))
    return number(value)


def _digest(text: str, before: int = 0) -> int:
    """Four bytes that depend on a text, and on the digest of what stands before it."""
    return zlib.crc32(text.encode(), before)


def _bytes_and_squares(digest: int) -> list[float]:
    numbers = [float(byte) for byte in digest.to_bytes(4, "big")]
    return numbers + [number * number for number in numbers]
