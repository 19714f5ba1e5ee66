"""Residuals of many problems: one call of the user's function for all that have not finished, with Jacobians."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from descend.second_order.mathematics.arrays import array_of, largest_entries, library, tensor_of
from descend.second_order.mathematics.robust_losses import Rho, cost, scaled_rows
from descend.second_order.mathematics.space import Array
from descend.second_order.problem.batched_objective import BatchedObjective
from descend.second_order.problem.batched_structure import BatchedStructure
from descend.second_order.problem.objective import free_memory

COPIES = 8  # of all Jacobians: trials, current, best and final ones, and the workspace of their factorization
SMALL = 2**16  # numbers in all Jacobians up to which one backward pass for all columns is faster


class BatchedResiduals(BatchedObjective):
    """Residuals of K problems at once, half the sums of their losses, and dense Jacobians, all at each evaluation.

    Args:
        who, fun, structure, args, bounds: as in ``BatchedObjective``; ``fun`` returns residuals (K, ...).
        rho: the loss, of tensors of any shape; None for squares.
        loss_scale: size of a residual from which the loss grows more slowly than its square.
    Attributes:
        needed_below: costs (K,), above all of which no Jacobians are needed; None if they always are.
        n_residuals: M, the real numbers among the residuals of one problem; None before the first evaluation.
        fits: the last evaluation, (K, n + 2, M): columns of the Jacobian, and residuals, as the cost is modelled by
            squares, and residuals before the loss; with a loss (K, n + 3, M), with the factors of the rows.
    """

    name = "residuals"

    def __init__(
        self,
        who: str,
        fun: Callable[..., Any],
        structure: BatchedStructure,
        args: tuple[Any, ...],
        bounds: tuple[Tensor, Tensor] | None,
        rho: Rho | None,
        loss_scale: float,
    ) -> None:
        super().__init__(who, fun, structure, args, bounds=bounds)
        self.rho, self.loss_scale = rho, loss_scale
        self.n_residuals: int | None = None
        self.result_spec: Any = None
        self.result_leaves: list[tuple[torch.Size, torch.dtype]] = []  # shape without the first dimension
        self.columns_work: bool | None = None  # not known yet
        self.batches_work = True  # as far as is known
        self.needed_below: Array | None = None

    def evaluate(self, x: Array) -> tuple[Array, Array, Array]:
        """Costs in float64, gradients, and their largest (projected) absolute entries; (K,), (K, n) and (K,).

        Gradients are zero where no Jacobians are needed.
        """
        point = tensor_of(x)
        with torch.enable_grad():
            leaf, version = point.detach().requires_grad_(), point._version
            flat, _ = self._values(leaf, self.leaves)
            residuals, n = flat.detach(), leaf.shape[1]
            value = cost(residuals, self.rho, self.loss_scale).double()
            fits = point.new_empty(len(point), n + 2 + (self.rho is not None), residuals.shape[1])
            if self.needed_below is None or bool((value <= tensor_of(self.needed_below)).any()):
                self._set_jacobians(fits[:, :n], flat, leaf)
            else:
                fits[:, :n] = 0.0
        if point._version != version:
            raise RuntimeError(f"{self.who}: residuals changed their argument in place. Let them work on a copy.")
        fits[:, n] = fits[:, n + 1] = residuals
        if self.rho is not None:
            fits[:, n], fits[:, n + 2] = scaled_rows(residuals, self.rho, self.loss_scale)
            fits[:, :n] *= fits[:, n + 2 :]
        self.fits = array_of(fits)
        norm_of = slope = array_of((fits[:, :n] @ fits[:, n].unsqueeze(2)).squeeze(2))
        if self.lower is not None:
            xp: Any = library(x)
            norm_of = xp.maximum(xp.minimum(slope, x - self.lower), x - self.upper)
            norm_of = xp.where(xp.isfinite(slope), norm_of, slope)  # there is no model of an infinite Jacobian
        return array_of(value), slope, largest_entries(norm_of)

    def tree_of(self, residuals: Tensor) -> Any:
        """The structure that the function returns, from residuals (B, M)."""
        if self.result_spec is None:
            return residuals
        sizes = [shape.numel() * (1 + dtype.is_complex) for shape, dtype in self.result_leaves]
        leaves = []
        for part, (shape, dtype) in zip(torch.split(residuals, sizes, 1), self.result_leaves, strict=True):
            part = part.to(dtype.to_real())
            if dtype.is_complex:
                part = torch.view_as_complex(part.reshape(len(part), *shape, 2).contiguous())
            leaves.append(part.reshape(len(part), *shape))
        return pytree.tree_unflatten(leaves, self.result_spec)

    def _call(self, x: Tensor, leaves: list[Any]) -> tuple[Tensor, Tensor | None]:
        self.n_calls += 1
        return self._flat(
            self.fun(self.structure.unflatten(x), *pytree.tree_unflatten(leaves, self.spec)), len(x)
        ), None

    def _outside(self, x: Tensor) -> Tensor:
        return x.sum(1, keepdim=True) * math.nan  # repeated when the number of residuals is known

    def _joined(self, parts: tuple[Tensor, ...]) -> Tensor:
        width = max(part.shape[1] for part in parts) if self.n_residuals is None else self.n_residuals
        return torch.cat([part.expand(-1, width) for part in parts])

    def _compared(self, returned: Any, count: int) -> Tensor:
        return cost(self._flat(returned, count), self.rho, self.loss_scale)

    def _flat(self, tree: Any, count: int) -> Tensor:
        """The residuals as a real matrix (K, M); an error unless they are tensors (K, ...) of constant shape."""
        who, (leaves, spec) = f"{self.who}: residuals", pytree.tree_flatten(tree)
        for leaf in leaves:
            if not isinstance(leaf, Tensor) or not (leaf.is_floating_point() or leaf.is_complex()):
                got = str(leaf.dtype) if isinstance(leaf, Tensor) else type(leaf).__name__
                raise TypeError(f"{who} must return floating point or complex tensors of shape (K, ...), got {got}.")
            if leaf.shape[:1] != (count,):
                raise ValueError(
                    f"{who} must return tensors whose first dimension counts the problems, {count}; got shape "
                    f"{tuple(leaf.shape)}."
                )
            if leaf.is_complex() and self.rho is not None:
                raise ValueError(f"{who} returned complex residuals, which need loss='linear'. Return their .abs().")
        shapes = [(leaf.shape[1:], leaf.dtype) for leaf in leaves]
        if self.n_residuals is None:
            self.result_spec, self.result_leaves = spec, shapes
            self.n_residuals = sum(shape.numel() * (1 + dtype.is_complex) for shape, dtype in shapes)
            self.eps = max([self.eps, *(torch.finfo(dtype).eps for _, dtype in shapes)])
        if (spec, shapes) != (self.result_spec, self.result_leaves):
            raise ValueError(
                f"{who} must return the same structure, shapes and dtypes for each problem at each call, got "
                f"{[tuple(shape) for shape, _ in shapes]} after {[tuple(shape) for shape, _ in self.result_leaves]}."
            )
        whole = self.structure.whole
        parts = [torch.view_as_real(leaf.resolve_conj()) if leaf.is_complex() else leaf for leaf in leaves]
        flats = [part.reshape(count, part[:1].numel()).to(whole.device, whole.dtype) for part in parts]
        return torch.cat([torch.zeros(count, 0, dtype=whole.dtype, device=whole.device), *flats], 1)

    def _set_jacobians(self, columns: Tensor, residuals: Tensor, leaf: Tensor) -> None:
        """Set (K, n, M): a backward pass of each residual's sum over the problems, or of each variable's, if fewer."""
        n_rows, n_columns = residuals.shape[1], leaf.shape[1]
        if not n_rows or not n_columns:
            return
        self._check_fits(residuals, n_columns)
        depends = residuals.requires_grad
        by_columns = n_columns < n_rows and depends and self.columns_work is not False
        if by_columns and self._set_by_columns(columns, residuals, leaf):
            return
        rows = [_grad(residuals[:, row].sum(), leaf) if depends else None for row in range(n_rows)]
        if all(row is None for row in rows):
            if bool(residuals.isfinite().any()):
                raise RuntimeError(
                    f"{self.who}: residuals do not depend on x0 as far as autograd can see: compute them with torch "
                    "operations, without detach(), item() or no_grad()."
                )
            columns.fill_(math.nan)
        else:
            columns.copy_(torch.stack([torch.zeros_like(leaf) if row is None else row for row in rows], 2).detach())

    def _check_fits(self, residuals: Tensor, n_columns: int) -> None:
        needed = COPIES * residuals.numel() * (n_columns + 2) * residuals.element_size()
        if needed > 2**28 and needed > (available := free_memory(residuals.device)):
            raise MemoryError(
                f"{self.who}: Jacobians of {len(residuals):,} problems with {residuals.shape[1]:,} residuals and "
                f"{n_columns:,} variables need {needed / 2**30:,.1f} GiB, {available / 2**30:,.1f} GiB are free. Use "
                "fewer problems at once, or minimize(batched=True) on the sums of squares."
            )

    def _set_by_columns(self, columns: Tensor, residuals: Tensor, leaf: Tensor) -> bool:
        """Set J by columns: J'u is linear in u, and the derivative of an entry by u is a column. Whether that works.

        Operations whose backward pass has no derivative raise an error, or cut the graph silently. The first Jacobians
        are therefore compared with a plain backward pass.
        """
        weights = torch.zeros_like(residuals, requires_grad=True)
        try:
            product = _grad((residuals * weights).sum(), leaf, create_graph=True)
            if product is None or not product.requires_grad:
                return False
            self._differentiate(columns, product, weights)
        except RuntimeError:
            if self.columns_work:
                raise
            self.columns_work = False
            return False
        if self.columns_work is None:
            n_rows = residuals.shape[1]
            probe = torch.linspace(0.5, 1.5, n_rows, dtype=leaf.dtype, device=leaf.device)
            weighted = (residuals * probe).sum()  # torch imports a lot before it takes gradients of matrices
            error = (columns @ probe - _grad(weighted, leaf)).abs()
            noise = math.sqrt(self.eps) * (columns.abs() @ probe)
            self.columns_work = not bool((error > noise).any())  # NaN is no evidence
        return self.columns_work

    def _differentiate(self, columns: Tensor, product: Tensor, weights: Tensor) -> None:
        """Set columns to the derivatives of the entries of J'u by u."""
        if columns.numel() <= SMALL and self.batches_work:
            total = product.sum()

            def derivative(unit: Tensor) -> Tensor:
                # As grad_outputs=unit would, for which torch imports for a third of a second.
                handle = product.register_hook(lambda grad: unit)  # type: ignore[no-untyped-call]
                try:
                    found = _grad(total, weights)
                finally:
                    handle.remove()
                return torch.zeros_like(weights) if found is None else found

            units = torch.eye(product.shape[1], dtype=product.dtype, device=product.device)
            try:
                columns.copy_(torch.vmap(derivative, out_dims=1)(units.unsqueeze(1).expand(-1, *product.shape)))
                return
            except RuntimeError:  # some operations cannot be batched
                self.batches_work = False
        for column in range(product.shape[1]):
            found = _grad(product[:, column].sum(), weights)
            columns[:, column] = 0.0 if found is None else found.detach()


def _grad(output: Tensor, leaf: Tensor, create_graph: bool = False) -> Any:
    """The gradient of a number; None if it does not depend on the leaf."""
    return torch.autograd.grad(output, leaf, retain_graph=True, create_graph=create_graph, allow_unused=True)[0]
