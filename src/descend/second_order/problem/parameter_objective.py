"""Objectives of parameters set in place: a function that reads them, or an optimizer's closure."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from descend.second_order.problem.objective import (
    CG_INSTEAD,
    Curved,
    Objective,
    Point,
    check_dense_fits,
    dense_hessian,
    scalar,
)
from descend.second_order.problem.parameters import ClosureFunction, Evaluation, FlatParameters
from descend.second_order.problem.shared_space import full_of


class ClosureObjective(Objective):
    """An optimizer's closure, which may call ``backward`` itself.

    Args:
        function: the closure.
        first: the first evaluation.
        point: the parameters.
        bounds: flat lower and upper bounds.
    """

    def __init__(
        self,
        function: ClosureFunction,
        first: Callable[[], Evaluation],
        point: FlatParameters,
        bounds: tuple[Tensor, Tensor] | None,
    ) -> None:
        super().__init__(point.space, point.structure.eps, *(bounds or ()))
        self.function, self.first, self.point = function, first, point
        self.first_loss: Any = None
        self._spare: list[Tensor] = []

    def spare_vector(self) -> Tensor | None:
        return self._spare.pop() if self._spare else None

    def recycle(self, point: Point) -> None:
        self._spare.append(point.x)
        self.point.spare.append(point.grad)

    def value_and_grad(self, x: Tensor) -> tuple[Tensor | float, Tensor, Any]:
        self.point.scatter_(x)
        if self.n_eval > 1:
            evaluation = self.function.evaluate_here()
        else:
            evaluation = self.first()
            self.first_loss = evaluation.loss
        return evaluation.value, evaluation.grad, None


class ParameterObjective(Curved):
    """A function that computes a loss from parameters, differentiated here, twice if needed; ``.grad`` is not touched.

    Moving the parameters invalidates the graph of the point before. Second derivatives at any point but the last one
    evaluated cost another evaluation. Parameters wrapped by FSDP get their gradients from hooks of ``backward``, which
    cannot be differentiated again: there a product is a central difference of two more gradients.

    Args:
        who: the name of ``fun`` in errors.
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
        super().__init__(point.space, point.structure.eps, *(bounds or ()))
        self.who, self.fun, self.point = who, fun, point
        self.needs_curvature, self.maximize = needs_curvature, maximize
        self.first_loss: Any = None
        self._x: Tensor | None = None  # where the parameters were last set
        self._graph: list[Tensor | None] | None = None  # of the gradient there
        self._is_hooked = False  # whether FSDP keeps autograd from the parameters

    def move_to(self, x: Tensor) -> None:
        """Set the parameters to ``x``, unless they are there."""
        if self._x is not x:
            self.point.scatter_(x)
            self._x, self._graph = x, None

    def forget_x(self) -> None:
        """Mark the parameters as changed from outside, so that the next evaluation sets them again."""
        self._x = self._graph = None

    def value_and_grad(self, x: Tensor) -> tuple[Tensor | float, Tensor, Any]:
        self.move_to(x)
        with torch.enable_grad():
            loss = self.fun()
            value = scalar(full_of(loss) if isinstance(loss, Tensor) else loss, self.who)
            value = -value if self.maximize else value
            parts = self._gradient_parts(value)
        if self.n_eval == 1:
            self.first_loss = loss.detach()  # its graph does not survive the next step
        if self.needs_curvature:
            self._graph = parts
        return value.detach(), self._flat(parts), None

    def _gradient_parts(self, value: Tensor) -> list[Tensor | None]:
        """The gradient, one tensor for each parameter that requires it."""
        try:
            parts = self._differentiate(value) if value.requires_grad else []
        except RuntimeError as error:
            if "a second time" not in str(error):
                raise
            raise RuntimeError(
                f"{self.who} returned a loss whose graph is used up. Return it without calling backward()."
            ) from error
        if all(part is None for part in parts):
            if not math.isfinite(value.item()):  # a constant that marks the end of the domain
                return [torch.full_like(leaf, math.nan) for leaf in self._leaves]
            raise RuntimeError(
                f"{self.who} returned a loss that does not depend on the parameters as far as autograd can see. "
                "Compute it from them with torch operations, without detach(), item() or no_grad(). Do they "
                "require gradients, and are they those of the model that is evaluated?"
            )
        return parts

    def _differentiate(self, value: Tensor) -> list[Tensor | None]:
        is_shared = self.space.is_shared
        if not is_shared or (self.needs_curvature and not self._is_hooked):
            parts = _grad([value], self._leaves, create_graph=self.needs_curvature)
            self._is_hooked = is_shared and any(part is None for part in parts)
        return self._by_backward(value) if is_shared and (self._is_hooked or not self.needs_curvature) else parts

    def _by_backward(self, value: Tensor) -> list[Tensor | None]:
        """The gradient by way of ``.grad``, which is restored."""
        leaves = self._leaves
        before = [leaf.grad for leaf in leaves]
        for leaf in leaves:
            leaf.grad = None
        try:
            torch.autograd.backward(value)
            return [leaf.grad for leaf in leaves]
        finally:
            for leaf, grad in zip(leaves, before, strict=True):
                leaf.grad = grad

    @property
    def _leaves(self) -> list[Tensor]:
        return [param for param in self.point.params if param.requires_grad]

    def _flat(self, parts: Sequence[Tensor | None]) -> Tensor:
        return self.point.flatten(self._with_frozen(parts))

    def _with_frozen(self, parts: Sequence[Tensor | None]) -> list[Tensor | None]:
        """One part for each parameter: None for those that require no gradient."""
        remaining = iter(parts)
        return [next(remaining) if param.requires_grad else None for param in self.point.params]

    def _graph_at(self, point: Point) -> list[Tensor | None]:
        if self._x is not point.x or self._graph is None:
            self.n_eval += 1
            self.value_and_grad(point.x)
        assert self._graph is not None, "needs_curvature is False"
        return self._graph

    def product(self, point: Point, vector: Tensor) -> Tensor:
        self.n_hvp += 1
        if self._is_hooked:
            return self._difference(point.x, vector)
        pieces = zip(self.point.params, self.point.split(vector), strict=True)
        return self._flat(self._backward_twice(point, [piece for param, piece in pieces if param.requires_grad]))

    def _difference(self, x: Tensor, vector: Tensor) -> Tensor:
        """The Hessian times a vector by a central difference.

        Source: Nocedal & Wright 2006, section 8.1, for the length of the difference.
        """
        length = torch.finfo(x.dtype).eps ** (1 / 3) * (1 + self.space.length(x)) / self.space.length(vector)
        ahead, behind = (self.value_and_grad(torch.add(x, vector, alpha=sign * length))[1] for sign in (1, -1))
        return ahead.sub_(behind).div_(2 * length)

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
        check_dense_fits(self.who, point.x, CG_INSTEAD, self.space)
        self.n_hvp += point.x.numel()
        structure = self.point.structure
        multiply = torch.vmap(lambda unit: [*structure.split(unit)])

        def rows(units: Tensor) -> Tensor:
            pieces = zip(self.point.params, multiply(units), strict=True)
            vectors = [piece for param, piece in pieces if param.requires_grad]
            parts = self._with_frozen(self._backward_twice(point, vectors, is_batched=True))
            return torch.stack(
                [structure.flatten([None if p is None else p[i] for p in parts]) for i in range(len(units))]
            )

        def row(unit: Tensor) -> Tensor:
            self.n_hvp -= 1  # already counted
            return self.product(point, unit)

        return dense_hessian(point.x, rows, row)


def _grad(outputs: Sequence[Tensor], inputs: Sequence[Tensor], vectors: Any = None, **options: Any) -> list[Any]:
    return list(torch.autograd.grad(outputs, inputs, vectors, allow_unused=True, **options)) if inputs else []
