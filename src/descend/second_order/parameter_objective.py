"""Objectives of parameters that are set in place: a function that reads them, or an optimizer's closure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from descend.second_order.objective import CG_INSTEAD, Curved, Objective, Point, check_dense_fits, scalar
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

    Args:
        who: the caller's name, for errors.
        fun: returns the loss, a scalar tensor, at the parameters' present values.
        point: the parameters.
        needs_curvature: whether ``product`` or ``hessian`` will be called.
        bounds: flat lower and upper bounds.
    """

    def __init__(
        self,
        who: str,
        fun: Callable[[], Any],
        point: FlatParameters,
        *,
        needs_curvature: bool = False,
        bounds: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        super().__init__(point.structure.eps, *(bounds or ()))
        self.who, self.fun, self.point, self.needs_curvature = who, fun, point, needs_curvature
        self.first_loss: Any = None

    def value_and_grad(self, x: Tensor) -> tuple[Tensor | float, Tensor, Any]:
        with torch.no_grad():
            self.point.scatter_(x)
        with torch.enable_grad():
            loss = self.fun()
            value = scalar(loss, self.who)
            parts = self._differentiated(value)
        if self.n_eval == 1:
            self.first_loss = loss
        graph = (parts, self.point.params) if self.needs_curvature else None
        return value.detach(), self.point.structure.flatten(parts), graph

    def _differentiated(self, value: Tensor) -> Sequence[Tensor | None]:
        if value.requires_grad:
            leaves = [param for param in self.point.params if param.requires_grad]
            try:
                found = iter(
                    torch.autograd.grad(value, leaves, create_graph=self.needs_curvature, allow_unused=True)
                    if leaves
                    else ()
                )
            except RuntimeError as error:
                if "a second time" not in str(error):
                    raise
                raise RuntimeError(
                    f"{self.who}: the graph of the loss has been used up. Return the loss without calling backward()."
                ) from error
            parts = [next(found) if param.requires_grad else None for param in self.point.params]
            if any(part is not None for part in parts):
                return parts
        raise RuntimeError(
            f"{self.who} returned a loss that does not depend on the parameters as far as autograd can see. Compute it "
            "from them with torch operations, without detach(), item() or no_grad()."
        )

    def product(self, point: Point, vector: Tensor) -> Tensor:
        self.n_hvp += 1
        parts, leaves = point.graph
        pairs = [
            (part, piece, leaf)
            for part, piece, leaf in zip(parts, self.point.split(vector), leaves, strict=True)
            if part is not None and part.requires_grad
        ]
        if not pairs:  # a linear function
            return torch.zeros_like(vector)
        with torch.inference_mode(False):
            wanted = [leaf for leaf in leaves if leaf.requires_grad]
            found = iter(
                torch.autograd.grad(
                    [part for part, _, _ in pairs],
                    wanted,
                    [piece for _, piece, _ in pairs],
                    retain_graph=True,
                    allow_unused=True,
                )
            )
        return self.point.structure.flatten([next(found) if leaf.requires_grad else None for leaf in leaves])

    def hessian(self, point: Point) -> Tensor:
        check_dense_fits(self.who, point.x, CG_INSTEAD)
        identity = torch.eye(point.x.numel(), dtype=point.x.dtype, device=point.x.device)
        rows = torch.stack([self.product(point, unit) for unit in identity]) if len(identity) else identity
        return (rows + rows.T) / 2
