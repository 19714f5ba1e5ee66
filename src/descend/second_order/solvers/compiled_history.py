"""The history of L-BFGS by compiled passes, on CPUs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from descend.backends.cpu.vectors import RowPasses
from descend.second_order.mathematics.diagonal import Pair, limits_after, raised
from descend.second_order.mathematics.directions import CompactInverse, is_large
from descend.second_order.mathematics.history import LongHistory, Place
from descend.second_order.mathematics.space import Array, Space, distance_of_samples

LEAST = 1e-37  # entry of the diagonal, with room for the squares that float32 has to hold, and 1 / LEAST is the largest
COMPILED_FROM = 2**15  # numbers in a history for which it pays to compile, seconds once on a machine


class _Scaled(NamedTuple):
    """A vector, and the factor that brings it into the range of float32."""

    vector: Tensor
    factor: float


class CompiledHistory(LongHistory):
    """``LongHistory`` by four compiled passes an iteration, each of which reads its vectors from memory once."""

    is_numpy = True

    def __init__(
        self,
        numel: int,
        history_size: int,
        dtype: torch.dtype,
        device: torch.device,
        renews_always: bool = False,
    ) -> None:
        super().__init__(numel, history_size, dtype, device)
        self.renews_always = renews_always
        self.passes = self._new_passes()
        self.newest: Pair | None = None  # inner products and samples of the newest pair
        self.is_in_range = False  # whether float64 holds the newest pair, if float32 does not
        self.stretched = 1.0  # factor of the diagonal that is not in it yet

    def arrays(self) -> dict[str, Tensor]:
        if self.stretched != 1.0:
            self.diagonal *= self.stretched
            self.stretched = 1.0
        return super().arrays()

    def load(self, state: Mapping[str, Any]) -> None:
        super().load(state)
        self.passes, self.stretched = self._new_passes(), 1.0

    def _new_passes(self) -> RowPasses:
        return RowPasses(self.steps, self.changes, self.result.dtype, distance_of_samples(len(self.learned)))

    def reset(self) -> None:
        super().reset()
        self.stretched = 1.0

    def keep(self, slot: int, s: Tensor, y: Tensor, curvature: Any = None) -> None:
        factor = np.float64(s.dot(y) if curvature is None else curvature) ** -0.5
        self._store(slot, (s, y), (), (factor, factor))

    def keep_between(self, slot: int, old: Place, new: Place, factor: float, curvature: float) -> None:
        scale = np.float64(curvature) ** -0.5
        self._store(slot, (new.x, new.grad), (old.x, old.grad), (scale, scale * factor))

    def _store(self, slot: int, pair: Sequence[Tensor], before: Sequence[Tensor], factors: tuple[Any, Any]) -> None:
        pair, before = ([vector.contiguous() for vector in vectors] for vectors in (pair, before))
        sums, samples = self.passes.keep(slot, pair, before, factors, self.learned)
        self.newest = Pair(*sums, *samples)
        self.is_in_range = self.result.dtype == torch.float64 and 0 < factors[0] < math.inf

    def learn(self, slot: int, pair: Pair | None = None) -> Any:
        may_go = pair is None and self.is_in_range
        pair = pair or self.newest
        assert pair is not None
        y_dy, s_ds, curvature = map(np.float64, pair[:3])
        curvature = raised(curvature, y_dy, s_ds)
        limits = limits_after(pair, curvature)
        if may_go and not (y_dy < math.inf and s_ds < math.inf and limits[0] > LEAST and limits[1] < 1 / LEAST):
            return None
        self.passes.learn(slot, self.learned, (1 / y_dy, 1 / s_ds, curvature / y_dy), limits)
        return curvature

    def take(self, grad: Tensor, largest: float | None, space: Space) -> _Scaled:
        if largest is None:
            largest = space.largest(float(torch.linalg.vector_norm(grad, torch.inf)) if len(grad) else 0.0)
        return _Scaled(grad.contiguous(), 1 / largest if largest else 1.0)

    def _products(self, filled: int, grad: _Scaled, slot: int | None = None) -> list[Array]:
        products = self.passes.products(filled, self.diagonal, *grad, slot)
        products[1::2] *= self.stretched
        return list(products)

    def _change(self, slot: int) -> _Scaled:
        return _Scaled(self.result.copy_(self.changes[slot]), 1.0)

    def _renew(self) -> None:
        super()._renew()
        self.stretched = 1.0

    def _stretch(self, scale: Any) -> None:
        self.stretched *= scale

    def _gram(self, filled: int) -> Array:
        return self.passes.gram(filled, self.diagonal) * self.stretched

    def direction(self, filled: int, grad: _Scaled, u: Array, p: Array) -> Tensor:
        factors, weights = (grad.factor, -1 / grad.factor), (-u, p)
        self.passes.direction(filled, self.diagonal, self.stretched, grad.vector, factors, weights, self.result)
        return self.result


def compact_inverse(
    numel: int, history_size: int, dtype: torch.dtype, device: torch.device, space: Space | None = None
) -> CompactInverse:
    """The L-BFGS inverse; on a CPU its passes are compiled where they take longer than everything else."""
    is_shared = space is not None and space.is_shared
    large = is_large(history_size * (numel if space is None else space.numel))
    # All ranks must keep histories of one kind, whatever they hold of a vector.
    is_compiled = device.type == "cpu" and numel * history_size >= COMPILED_FROM and (large or not is_shared)
    make = partial(CompiledHistory, renews_always=not large) if is_compiled else None
    return CompactInverse(numel, history_size, dtype, device, space, make)
