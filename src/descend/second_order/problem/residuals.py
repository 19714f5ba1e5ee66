"""Residuals as functions of one flat vector, with their Jacobian, its products, and counts."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from descend.second_order.mathematics.lsmr import Product
from descend.second_order.mathematics.robust_losses import Rho, cost, scaled_rows
from descend.second_order.mathematics.space import Space, to_floats
from descend.second_order.problem.objective import BATCH, FunctionObjective, free_memory
from descend.second_order.problem.parameters import FlatParameters
from descend.second_order.problem.structure import Structure

DENSE_COPIES = 4  # the Jacobian, its scaled copy, and the workspace of the factorization


class Graph(NamedTuple):
    """Flat residuals with their graph, and the leaves that it begins with."""

    residuals: Tensor
    leaves: Sequence[Tensor]


class ResidualPoint(NamedTuple):
    """A point at which the residuals are known.

    Attributes:
        x: flat vector, never written to.
        residuals: flat and real, before the loss.
        value: the cost, half the sum of the losses; may be NaN or infinite.
        tree: the residuals as the function returned them, detached.
        graph: for derivatives.
    """

    x: Tensor
    residuals: Tensor
    value: float
    tree: Any
    graph: Graph | None = None

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.value)


class ResidualObjective(ABC):
    """Residuals of a flat vector, and half the sum of their losses.

    Args:
        who: the name of the function in errors.
        structure: of the variables.
        rho: the robust loss; None for squares.
        loss_scale: size of a residual from which the loss grows more slowly than its square.
        bounds: flat lower and upper bounds.
    Attributes:
        eps: relative rounding error of the residuals.
        n_eval: evaluations of the residuals.
        n_jac: Jacobians.
        n_hvp: products with the Jacobian or its transpose.
    """

    variables: str  # the caller's name of the argument, for errors
    remedy: str  # further advice where residuals do not depend on it

    def __init__(
        self,
        who: str,
        structure: Structure,
        rho: Rho | None = None,
        loss_scale: float = 1.0,
        bounds: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.who, self.structure = who, structure
        self.rho, self.loss_scale = rho, loss_scale
        self.lower: Tensor | None = None
        self.upper: Tensor | None = None
        if bounds is not None:
            self.lower, self.upper = bounds
        self.space = Space(structure.numel)
        self.eps = structure.eps
        self.n_eval = self.n_jac = self.n_hvp = 0
        self._spec: Any = None
        self._shapes: list[torch.Size] = []
        self._columns_work: bool | None = None  # not known yet

    @abstractmethod
    def _call(self, x: Tensor) -> tuple[Any, Sequence[Tensor]]:
        """The residuals at ``x`` as returned, and the leaves that they depend on."""

    @abstractmethod
    def _split(self, vectors: Tensor) -> Sequence[Tensor]:
        """Each row of a matrix as vectors of the leaves."""

    @abstractmethod
    def _joined(self, parts: Sequence[Tensor | None], like: Tensor) -> Tensor:
        """The inverse of ``_split``; None is zero. ``like``: a tensor with as many rows."""

    def evaluate(self, x: Tensor) -> ResidualPoint:
        """Evaluate and count."""
        self.n_eval += 1
        try:
            with torch.enable_grad():
                tree, leaves = self._call(x)
                flat = self._flat(tree)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            if self._spec is None:  # at the start
                raise
            # A failed factorization means, as NaN does, that x is outside the function's domain.
            return ResidualPoint(x, x.new_full((0,), math.nan), math.nan, None)
        residuals = flat.detach()
        (value,) = to_floats(x.device, cost(residuals, self.rho, self.loss_scale))
        tree = pytree.tree_map(lambda leaf: leaf.detach(), tree)
        return ResidualPoint(x, residuals, value, tree, Graph(flat, leaves))

    def _flat(self, tree: Any) -> Tensor:
        """The residuals as one real vector; an error unless they are tensors, of the same shapes each time."""
        leaves, spec = pytree.tree_flatten(tree)
        for leaf in leaves:
            if not isinstance(leaf, Tensor) or not (leaf.is_floating_point() or leaf.is_complex()):
                got = str(leaf.dtype) if isinstance(leaf, Tensor) else type(leaf).__name__
                raise TypeError(
                    f"{self.who} must return real or complex floating point tensors, or dicts, lists and tuples of "
                    f"such, got {got}."
                )
            if leaf.is_complex() and self.rho is not None:
                raise ValueError(
                    f"{self.who} returned complex residuals, which need loss='linear'. Return torch.view_as_real(...) "
                    "for a loss of each part, or .abs() for a loss of the magnitude."
                )
        shapes = [leaf.shape for leaf in leaves]
        if self._spec is None:
            self._spec, self._shapes = spec, shapes
            self.eps = max([self.eps, *(torch.finfo(leaf.dtype).eps for leaf in leaves)])
        if spec != self._spec or shapes != self._shapes:
            raise ValueError(
                f"{self.who} must return the same structure and shapes at each call, got "
                f"{[tuple(shape) for shape in shapes]} after {[tuple(shape) for shape in self._shapes]}."
            )
        dtype, device = self.structure.dtype, self.structure.device
        parts = [torch.view_as_real(leaf.resolve_conj()) if leaf.is_complex() else leaf for leaf in leaves]
        flats = [part.reshape(-1).to(device, dtype) for part in parts]
        return flats[0] if len(flats) == 1 else torch.cat([torch.zeros(0, dtype=dtype, device=device), *flats])

    def rows_of(self, point: ResidualPoint) -> tuple[Tensor, Tensor | None]:
        """Residuals, and factors of the rows of the Jacobian, that model the cost by squares; None is 1."""
        if self.rho is None:
            return point.residuals, None
        return scaled_rows(point.residuals, self.rho, self.loss_scale)

    def jacobian(self, point: ResidualPoint) -> Tensor:
        """The Jacobian of the residuals, shape (M, N), before the loss; without a call of the function.

        By backward passes, one for each residual, or by differentiating the backward pass, one for each variable,
        whichever are fewer; as many at once as ``BATCH`` numbers allow.
        """
        n_rows, n_columns = len(point.residuals), point.x.numel()
        check_jacobian_fits(self.who, point.x, n_rows)
        self.n_jac += 1
        graph = self._graph_at(point)
        if n_rows == 0 or n_columns == 0:
            return point.x.new_zeros(n_rows, n_columns)
        self._check_depends(graph)
        if not graph.residuals.requires_grad:
            return point.x.new_full((n_rows, n_columns), math.nan)
        with self._used_up_graphs_explained():
            if n_columns < n_rows and self._columns_work is not False:
                columns = self._by_columns(graph, point.x)
                if columns is not None:
                    return columns
            return self._by_rows(graph, point.x)

    @contextmanager
    def _used_up_graphs_explained(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if "a second time" not in str(error):
                raise
            raise RuntimeError(
                f"{self.who} returned residuals whose graph is used up. Return them without calling backward()."
            ) from error

    def _check_depends(self, graph: Graph, parts: Sequence[Tensor | None] | None = None) -> None:
        """Raise an error if the residuals are constants, or if their derivatives by all leaves, ``parts``, are None."""
        is_constant = not graph.residuals.requires_grad if parts is None else all(part is None for part in parts)
        if is_constant and bool(graph.residuals.isfinite().all()):
            raise RuntimeError(
                f"{self.who} returned values that do not depend on {self.variables} as far as autograd can see: "
                f"compute them with torch operations, without detach(), item() or no_grad(){self.remedy}"
            )

    def _by_rows(self, graph: Graph, x: Tensor) -> Tensor:
        def rows(units: Tensor, is_batched: bool) -> Tensor:
            parts = _grad([graph.residuals], graph.leaves, [units], is_batched)
            self._check_depends(graph, parts)
            return self._joined(parts, units)

        return _by_units(rows, x, len(graph.residuals))

    def _by_columns(self, graph: Graph, x: Tensor) -> Tensor | None:
        """J by columns: J'u is linear in u, and the derivative of v'J'u by u is J v. None where that fails.

        Operations whose backward pass has no derivative raise an error, or cut the graph silently. The first Jacobian
        is therefore compared with a plain backward pass.
        """
        try:
            transposed = _by_units(self._multiplier(graph), x, x.numel())
        except RuntimeError:
            if self._columns_work is None:
                self._columns_work = False
                return None
            raise
        if self._columns_work is None:
            probe = torch.linspace(0.5, 1.5, len(graph.residuals), dtype=x.dtype, device=x.device)
            row = self._joined(_grad([graph.residuals], graph.leaves, [probe]), probe)
            error = (transposed.mv(probe) - row).abs()
            noise = math.sqrt(self.eps) * transposed.abs().mv(probe)
            self._columns_work = not bool((error > noise).any())  # NaN is no evidence
        return transposed.T if self._columns_work else None

    def _multiplier(self, graph: Graph) -> Callable[[Tensor, bool], Tensor]:
        """A function that multiplies J by each row of a matrix, or by a vector."""
        dummy = torch.zeros_like(graph.residuals, requires_grad=True)
        with torch.enable_grad():
            parts = torch.autograd.grad(graph.residuals, graph.leaves, dummy, create_graph=True, allow_unused=True)
        self._check_depends(graph, parts)
        if any(part is not None and not part.requires_grad for part in parts):
            raise RuntimeError("a backward pass that autograd cannot see")

        def multiply(vectors: Tensor, is_batched: bool) -> Tensor:
            pairs = [pair for pair in zip(parts, self._split(vectors), strict=True) if pair[0] is not None]
            if not pairs:
                return vectors.new_zeros(*vectors.shape[:-1], len(dummy))
            outputs, pieces = zip(*pairs, strict=True)
            (product,) = _grad(outputs, [dummy], pieces, is_batched)
            return vectors.new_zeros(*vectors.shape[:-1], len(dummy)) if product is None else product

        return multiply

    def product(self, point: ResidualPoint, vector: Tensor) -> Tensor:
        """J v, before the loss, for a vector of N numbers; counts as one product."""
        return self.products(point)[0](vector)

    def transposed_product(self, point: ResidualPoint, vector: Tensor) -> Tensor:
        """J'u, before the loss, for a vector of M numbers; counts as one product."""
        self.n_hvp += 1
        graph = self._graph_at(point)
        self._check_depends(graph)
        return self._joined(_grad([graph.residuals], graph.leaves, [vector]), vector).reshape(-1)

    def products(self, point: ResidualPoint) -> tuple[Product, Product]:
        """Functions that multiply by J and by J', as many vectors as wanted; each call counts as one product."""
        graph = self._graph_at(point)
        self._check_depends(graph)
        with self._used_up_graphs_explained():
            forward = self._multiplier(graph)

        def multiply(vector: Tensor) -> Tensor:
            self.n_hvp += 1
            return forward(vector, False)

        return multiply, lambda vector: self.transposed_product(point, vector)

    def _graph_at(self, point: ResidualPoint) -> Graph:
        assert point.graph is not None
        return point.graph


class FunctionResiduals(ResidualObjective):
    """Residuals of a structure of tensors, differentiated by autograd or by the caller's own function.

    Args:
        who, structure, rho, loss_scale, bounds: as in ``ResidualObjective``.
        fun: maps the structure to the residuals.
        jac: None, or maps the structure to the Jacobian.
    """

    variables, remedy = "x0", ", or give their Jacobian as jac=."

    def __init__(
        self,
        who: str,
        fun: Callable[..., Any],
        structure: Structure,
        *,
        jac: Callable[..., Any] | None = None,
        rho: Rho | None = None,
        loss_scale: float = 1.0,
        bounds: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        super().__init__(who, structure, rho, loss_scale, bounds)
        self.fun, self.jac = fun, jac

    def _call(self, x: Tensor) -> tuple[Any, Sequence[Tensor]]:
        leaf, version = x.detach().requires_grad_(self.jac is None), x._version
        tree = self.fun(self.structure.unflatten(leaf))
        if x._version != version:
            raise RuntimeError(f"{self.who} changed its argument in place. Let it work on a copy.")
        return tree, [leaf]

    def _split(self, vectors: Tensor) -> Sequence[Tensor]:
        return [vectors]

    def _joined(self, parts: Sequence[Tensor | None], like: Tensor) -> Tensor:
        (part,) = parts
        if part is None:
            return like.new_zeros(*like.shape[:-1], self.structure.numel)
        return part

    def jacobian(self, point: ResidualPoint) -> Tensor:
        if self.jac is None:
            return super().jacobian(point)
        check_jacobian_fits(self.who, point.x, len(point.residuals))
        self.n_jac += 1
        with torch.enable_grad():
            given = self.jac(self.structure.unflatten(point.x.clone()))
        n_rows, n_columns = len(point.residuals), point.x.numel()
        parts = pytree.tree_leaves(given)
        is_whole = len(parts) == 1 and len(self.structure.shapes) > 1
        shapes = [torch.Size([n_columns])] if is_whole else self.structure.shapes
        sizes = [shape.numel() for shape in shapes]
        is_like = len(parts) == len(shapes) and all(map(self._is_jacobian, parts, shapes))
        if not is_like or any(dtype.is_complex for dtype in self.structure.dtypes):
            got = [tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__ for part in parts]
            raise ValueError(
                f"{self.who.split(':')[0]}: jac must return a real tensor of shape ({n_rows}, {n_columns}), or of the "
                f"residuals' shape and then that of x0, or a structure like x0 of such; got {got}."
            )
        dense = [part.detach().to_dense() if part.layout != torch.strided else part.detach() for part in parts]
        rows = [part.reshape(n_rows, size).to(point.x) for part, size in zip(dense, sizes, strict=True)]
        return torch.cat(rows, dim=1)  # a copy: the caller may reuse its buffer

    def as_function(self, who: str) -> FunctionObjective:
        """The cost as a function like any other, differentiated by autograd; ``who`` is the caller's name, for errors.

        Its Hessian has the second derivatives of residuals and losses, which that of Gauss and Newton leaves out.
        """

        def fun(x: Any) -> Tensor:
            return cost(self._flat(self.fun(x)), self.rho, self.loss_scale)

        bounds = None if self.lower is None or self.upper is None else (self.lower, self.upper)
        return FunctionObjective(who, fun, self.structure, bounds=bounds)

    def _is_jacobian(self, part: Any, shape: torch.Size) -> bool:
        """Whether ``part`` may be the Jacobian by a variable of that shape."""
        if not isinstance(part, Tensor) or not part.is_floating_point():
            return False
        n_rows = sum(shape.numel() for shape in self._shapes)
        allowed = [(n_rows, shape.numel()), (n_rows, *shape)]
        if len(self._shapes) == 1:
            allowed.append((*self._shapes[0], *shape))
        return tuple(part.shape) in allowed


class ParameterResiduals(ResidualObjective):
    """Residuals computed from parameters that are set in place; ``.grad`` is not touched.

    Moving the parameters invalidates the graph of the point before: derivatives at any point but the last one evaluated
    cost another evaluation.

    Args:
        who, rho, loss_scale, bounds: as in ``ResidualObjective``.
        fun: returns the residuals at the parameters' present values.
        point: the parameters.
    """

    variables = "the parameters"
    remedy = ". Do the parameters require gradients, and are they those of the model that is evaluated?"

    def __init__(
        self,
        who: str,
        fun: Callable[[], Any],
        point: FlatParameters,
        *,
        rho: Rho | None = None,
        loss_scale: float = 1.0,
        bounds: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        super().__init__(who, point.structure, rho, loss_scale, bounds)
        self.fun, self.point = fun, point
        self._x: Tensor | None = None  # where the parameters were last set

    def move_to(self, x: Tensor) -> None:
        """Set the parameters to ``x``, unless they are there."""
        if self._x is not x:
            with torch.no_grad():
                self.point.scatter_(x)
            self._x = x

    def forget_x(self) -> None:
        """Mark the parameters as changed from outside, so that the next evaluation sets them again."""
        self._x = None

    def _call(self, x: Tensor) -> tuple[Any, Sequence[Tensor]]:
        self.move_to(x)
        return self.fun(), [param for param in self.point.params if param.requires_grad]

    def _graph_at(self, point: ResidualPoint) -> Graph:
        if self._x is not point.x:
            point = self.evaluate(point.x)
        return super()._graph_at(point)

    def _split(self, vectors: Tensor) -> Sequence[Tensor]:
        split = self.structure.split
        pieces = torch.vmap(lambda vector: [*split(vector)])(vectors) if vectors.dim() == 2 else split(vectors)
        return [piece for param, piece in zip(self.point.params, pieces, strict=True) if param.requires_grad]

    def _joined(self, parts: Sequence[Tensor | None], like: Tensor) -> Tensor:
        rows = like.shape[:-1]
        remaining, joined = iter(parts), []
        for param, size in zip(self.point.params, self.structure.sizes, strict=True):
            part = next(remaining) if param.requires_grad else None
            if part is None:
                part = like.new_zeros(*rows, size)
            elif part.is_complex():
                part = torch.view_as_real(part.resolve_conj())
            joined.append(part.reshape(*rows, size).to(like))
        return torch.cat(joined, dim=-1)


def _grad(outputs: Sequence[Tensor], inputs: Sequence[Tensor], vectors: Any, is_batched: bool = False) -> list[Any]:
    if not inputs:
        return []
    return list(
        torch.autograd.grad(outputs, inputs, vectors, retain_graph=True, allow_unused=True, is_grads_batched=is_batched)
    )


def _by_units(multiply: Callable[[Tensor, bool], Tensor], x: Tensor, n_units: int) -> Tensor:
    """The products with all unit vectors as rows: many at once, or one by one where an operation cannot be batched."""
    block = max(1, BATCH // max(n_units, 1))
    blocks = []
    for start in range(0, n_units, block):
        units = x.new_zeros(min(block, n_units - start), n_units)
        units.diagonal(start).fill_(1.0)
        try:
            blocks.append(multiply(units, True))
        except RuntimeError:
            blocks.append(torch.stack([multiply(unit, False).reshape(-1) for unit in units]))
    return torch.cat(blocks)


def check_jacobian_fits(who: str, x: Tensor, n_rows: int) -> None:
    """Raise ``MemoryError`` if a dense Jacobian, with its factors, would not fit into memory."""
    needed = DENSE_COPIES * n_rows * x.numel() * x.element_size()
    if needed > 2**28 and needed > (available := free_memory(x.device)):
        raise MemoryError(
            f"{who.split(':')[0]}: a dense Jacobian of {n_rows:,} residuals and {x.numel():,} variables needs "
            f"{needed / 2**30:,.1f} GiB with its factors, {available / 2**30:,.1f} GiB are free. Use "
            "jac='products', which needs a few vectors only."
        )
