"""Objectives of parameters that are set in place: a function that reads them, or an optimizer's closure."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from descend.second_order.objective import CG_INSTEAD, Curved, Objective, Point, check_dense_fits, dense_hessian, scalar
from descend.second_order.parameters import ClosureFunction, Evaluation, FlatParameters


class ClosureObjective(Objective):
    """An optimizer's closure, which may call ``backward`` itself.

    Args:
        function: the closure.
        first: evaluates it the first time.
        point: its parameters.
        bounds: flat lower and upper bounds.
    """

    def __init__(
        self,
        function: ClosureFunction,
        first: Callable[[], Evaluation],
        point: FlatParameters,
        bounds: tuple[Tensor, Tensor] | None,
    ) -> None:
        super().__init__(point.structure.eps, *(bounds or ()))
        self.function, self.first, self.point = function, first, point
        self.first_loss: Any = None

    def value_and_grad(self, x: Tensor) -> tuple[Tensor | float, Tensor, Any]:
        self.point.scatter_(x)
        if self.n_eval > 1:
            evaluation = self.function.evaluate()
        else:
            evaluation = self.first()
            self.first_loss = evaluation.loss
        return evaluation.value, evaluation.grad, None


class ParameterObjective(Curved):
    """A function that returns a loss of parameters, differentiated here, twice if need be; ``.grad`` is left alone.

    Setting the parameters to another point ends the life of the graphs before. Second derivatives at a point other
    than the one evaluated last cost another evaluation.

    Args:
        who: what ``fun`` is called in errors.
        fun: returns the loss, a scalar tensor, at the parameters' present values.
        point: the parameters.
        needs_curvature: whether ``product`` or ``hessian`` will be called.
        maximize: minimize the negative loss.
        bounds: flat lower and upper bounds.
    """

    def __init__(
        self,
        who: str,
        fun: Callable[[], Any],
        point: FlatParameters,
        *,
        needs_curvature: bool = False,
        maximize: bool = False,
        bounds: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        super().__init__(point.structure.eps, *(bounds or ()))
        self.who, self.fun, self.point = who, fun, point
        self.needs_curvature, self.maximize = needs_curvature, maximize
        self.first_loss: Any = None
        self._placed: Tensor | None = None
        self._graph: list[Tensor | None] | None = None  # of the gradient there

    def place(self, x: Tensor) -> None:
        """Set the parameters to ``x``, unless they are."""
        if self._placed is not x:
            self.point.scatter_(x)
            self._placed, self._graph = x, None

    def value_and_grad(self, x: Tensor) -> tuple[Tensor | float, Tensor, Any]:
        self.place(x)
        with torch.enable_grad():
            loss = self.fun()
            value = scalar(loss, self.who)
            value = -value if self.maximize else value
            parts = self._differentiated(value)
        if self.n_eval == 1:
            self.first_loss = loss.detach()  # its graph does not outlive the next step
        if self.needs_curvature:
            self._graph = parts
        return value.detach(), self._flat(parts), None

    def _differentiated(self, value: Tensor) -> list[Tensor | None]:
        """The gradient's parts, for the parameters that require one."""
        try:
            found = _grad([value], self._leaves, create_graph=self.needs_curvature) if value.requires_grad else []
        except RuntimeError as error:
            if "a second time" not in str(error):
                raise
            raise RuntimeError(
                f"{self.who} returned a loss whose graph is used up. Return it without calling backward()."
            ) from error
        if all(part is None for part in found):
            if not math.isfinite(value.item()):  # a constant that stands for a wall
                return [torch.full_like(leaf, math.nan) for leaf in self._leaves]
            raise RuntimeError(
                f"{self.who} returned a loss that does not depend on the parameters as far as autograd can see. "
                "Compute it from them with torch operations, without detach(), item() or no_grad()."
            )
        return found

    @property
    def _leaves(self) -> list[Tensor]:
        return [param for param in self.point.params if param.requires_grad]

    def _flat(self, parts: Sequence[Tensor | None]) -> Tensor:
        found = iter(parts)
        return self.point.structure.flatten(
            [next(found) if param.requires_grad else None for param in self.point.params]
        )

    def _graph_at(self, point: Point) -> list[Tensor | None]:
        if self._placed is not point.x or self._graph is None:
            self.n_eval += 1
            self.value_and_grad(point.x)
        assert self._graph is not None, "made for needs_curvature"
        return self._graph

    def product(self, point: Point, vector: Tensor) -> Tensor:
        self.n_hvp += 1
        pieces = zip(self.point.params, self.point.split(vector), strict=True)
        return self._flat(self._backward_twice(point, [piece for param, piece in pieces if param.requires_grad]))

    def _backward_twice(self, point: Point, vectors: Sequence[Tensor], *, is_batched: bool = False) -> Sequence[Any]:
        pairs = [
            (part, vector)
            for part, vector in zip(self._graph_at(point), vectors, strict=True)
            if part is not None and part.requires_grad
        ]
        if not pairs:  # a linear function
            return [None] * len(vectors)
        parts, vectors = zip(*pairs, strict=True)
        return _grad(parts, self._leaves, vectors, retain_graph=True, is_grads_batched=is_batched)

    def hessian(self, point: Point) -> Tensor:
        check_dense_fits(self.who, point.x, CG_INSTEAD)
        self.n_hvp += point.x.numel()
        structure = self.point.structure
        multiply = torch.vmap(lambda unit: [*structure.split(unit)])

        def rows(units: Tensor) -> Tensor:
            pieces = zip(self.point.params, multiply(units), strict=True)
            vectors = [piece for param, piece in pieces if param.requires_grad]
            found = iter(self._backward_twice(point, vectors, is_batched=True))
            parts = [next(found) if param.requires_grad else None for param in self.point.params]
            return torch.stack(
                [structure.flatten([None if p is None else p[i] for p in parts]) for i in range(len(units))]
            )

        def row(unit: Tensor) -> Tensor:
            self.n_hvp -= 1  # counted above
            return self.product(point, unit)

        return dense_hessian(point.x, rows, row)


def _grad(outputs: Sequence[Tensor], inputs: Sequence[Tensor], vectors: Any = None, **options: Any) -> list[Any]:
    return list(torch.autograd.grad(outputs, inputs, vectors, allow_unused=True, **options)) if inputs else []
