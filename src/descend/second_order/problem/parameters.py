"""The parameters of an optimizer as one flat real vector, and its closure as a function of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._nn import flatten_dense_tensors, unflatten_dense_tensors

from descend.core.caller import warn_caller
from descend.second_order.mathematics.space import Space
from descend.second_order.problem.shared_space import full_of
from descend.second_order.problem.structure import Structure

ParamGroups = Sequence[dict[str, Any]]


class FlatParameters:
    """The parameters of some groups, read and written as one flat vector in the groups' order.

    Made anew for each step, because users replace, add and convert parameters between steps. Dtype and device of the
    vector are those of ``Structure``. Everything is copied and detached.

    Args:
        groups: an optimizer's ``param_groups``.
        who: the optimizer's name, for errors.
    Attributes:
        spare: vectors that ``gather_grad`` may write to.
        space: of the vector. If ranks share it, then ``numel``, and the vectors of every method, are this rank's.
    Raises:
        ValueError: if there are no parameters.
        TypeError: if a parameter is not floating point or complex.
    """

    def __init__(self, groups: ParamGroups, who: str) -> None:
        self.params: list[Tensor] = [param for group in groups for param in group["params"]]
        if not self.params:
            raise ValueError(f"{who}: there are no parameters; param_groups must hold at least one.")
        for param in self.params:
            if not (param.is_floating_point() or param.is_complex()):
                raise TypeError(f"{who}: parameters must be floating point or complex, got {param.dtype}.")
        self.structure = Structure(self.params, who)
        self.numel, self.dtype, self.device = self.structure.numel, self.structure.dtype, self.structure.device
        # Nothing needs converting then, and torch's multi-tensor functions handle all parameters at once.
        self.is_uniform = all(param.dtype == self.dtype and param.device == self.device for param in self.params)
        self._filled = [param for param in self.params if param.numel()]
        self.space = Space(self.numel)
        self._scattered: Tensor | None = None
        self._pieces: list[Tensor] = []
        self.spare: list[Tensor] = []

    def gather(self) -> Tensor:
        """The parameters' values, copied."""
        return self._flatten(self.params)

    def scatter_(self, flat: Tensor) -> None:
        """Copy a flat vector into the parameters, in place."""
        if not self.is_uniform:
            for param, piece in zip(self.params, self.structure.split(flat), strict=True):
                param.copy_(piece)
        elif len(self.params) == 1:
            self.params[0].copy_(flat.view(self.structure.shapes[0]))
        elif self._filled:
            if flat is not self._scattered:  # a solver may reuse one vector, and so its views
                self._scattered, self._pieces = flat, unflatten_dense_tensors(flat, self._filled)
            torch._foreach_copy_(self._filled, self._pieces)

    def restore_(self, flat: Tensor) -> None:
        """``scatter_`` after an exception, too: an interrupt may have left gradients enabled."""
        with torch.no_grad():
            self.scatter_(flat)

    def gather_grad(self) -> Tensor:
        """The gradients, copied; zeros for a parameter without one."""
        grads = [
            torch.zeros_like(param) if grad is None else grad if grad.layout == torch.strided else grad.to_dense()
            for param in self.params
            for grad in [param.grad]
        ]
        return self._flatten(grads, self.spare.pop() if self.spare else None)

    def split(self, flat: Tensor) -> list[Tensor]:
        """A flat vector as one tensor per parameter, of its shape, dtype and device."""
        if self.is_uniform and len(self._filled) == len(self.params):
            return unflatten_dense_tensors(flat, self.params)
        return self.structure.split(flat)

    def flatten(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Tensors like the parameters as a flat vector, which may share memory with one; None becomes zeros."""
        return self.structure.flatten(tensors)

    def spans(self, groups: ParamGroups) -> list[tuple[dict[str, Any], int, int]]:
        """Groups, each with start and stop of entries of its own in the flat vector."""
        spans, start, sizes = [], 0, iter(self.structure.sizes)
        for group in groups:
            stop = start + sum(next(sizes) for _ in group["params"])
            spans.append((group, start, stop))
            start = stop
        return spans

    def narrow(self, whole: Tensor) -> Tensor:
        """The entries of a whole vector, or of each row of a matrix, that are held here."""
        return whole

    def whole(self, held: Tensor) -> Tensor:
        """A whole vector, or matrix of rows, from the entries held here: the inverse of ``narrow``."""
        return held

    def _flatten(self, tensors: list[Tensor], out: Tensor | None = None) -> Tensor:
        if not self.is_uniform or any(tensor.dtype != self.dtype for tensor in tensors):
            return self.structure.flatten(tensors).clone()
        if out is not None:
            return torch.cat([tensor.detach().reshape(-1) for tensor in tensors], out=out)
        if len(tensors) == 1:
            return tensors[0].detach().clone(memory_format=torch.contiguous_format).view(-1)
        return flatten_dense_tensors(tensors).detach()


class Evaluation:
    """The result of one call of a closure.

    Attributes:
        loss: as the closure returned it.
        value: to be minimized: the loss, negated for ``maximize``, plus the penalty of ``weight_decay``.
        grad: flat gradient of ``value``, in memory of its own.
    """

    __slots__ = ("_norm", "_slope", "grad", "loss", "value")

    def __init__(
        self, loss: Any, value: float, grad: Tensor, norm: float | None = None, slope: float | None = None
    ) -> None:
        self.loss, self.value, self.grad = loss, value, grad
        self._norm, self._slope = norm, slope

    @property
    def norm(self) -> float:
        """Largest absolute entry of the gradient."""
        if self._norm is None:
            self._norm = largest(self.grad)
        return self._norm

    def slope(self, direction: Tensor) -> float:
        """Inner product of the gradient and the direction that led here."""
        return self.grad.dot(direction).item() if self._slope is None else self._slope

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.value) and math.isfinite(self.norm)


class NoGradientError(RuntimeError):
    """A closure gave no gradient."""


class _UsedUpGraphError(NoGradientError):
    """``backward`` has already been called on the loss."""


class ClosureFunction:
    """A closure as a function of the parameters, with its gradient.

    The closure runs with gradients enabled. If it has not called ``backward``, that happens here, and the gradients are
    in ``.grad`` all the same. It has called ``backward`` if some gradient is another tensor than before or has been
    written to, unless all are missing or zero.

    Args:
        closure: returns the loss at the parameters' present values.
        point: the parameters.
        groups: their groups, for each one's ``weight_decay``.
        weight_decay: that of groups without one of their own.
        maximize: minimize the negative loss.
        needs_gradient: whether a closure that computes no gradient is an error. Otherwise gradients are as in torch:
            missing ones are zero, old ones still hold, and a warning says if none can have been computed.
        who: the optimizer's name, for errors.
    """

    def __init__(
        self,
        closure: Callable[[], Any],
        point: FlatParameters,
        groups: ParamGroups,
        *,
        weight_decay: float = 0,
        maximize: bool = False,
        needs_gradient: bool = True,
        who: str,
    ) -> None:
        self.closure, self.point, self.maximize, self.who = closure, point, maximize, who
        self.needs_gradient = needs_gradient
        self.decays = _decays(point, groups, weight_decay)
        self.n_eval = 0
        self._lacks_backward = False
        self._last_unchanged: Tensor | None = None  # the last gradient that autograd has not seen to change

    def evaluate(self, direction: Tensor | None = None) -> Evaluation:
        """Call the closure; where ranks share the parameters, give the value, norm and slope of all, on every rank.

        Args:
            direction: along which a line search looks, if one does.
        """
        here, space = self.evaluate_here(), self.point.space
        if not space.is_shared:
            return here
        low, high = torch.aminmax(here.grad) if len(here.grad) else (0.0, 0.0)
        slopes = [] if direction is None else [here.grad.dot(direction)]
        value, low, high, *totals = space.evaluation(here.grad.device, here.value, low, high, *slopes)
        return Evaluation(here.loss, value, here.grad, max(-low, high), *map(float, totals))

    def evaluate_here(self) -> Evaluation:
        """Call the closure; where ranks share the parameters, their mean of ``value`` is minimized.

        Raises:
            TypeError: if it returns no real number.
            ValueError: if it returns a tensor of several elements.
            NoGradientError: if neither the closure nor autograd gives a gradient that is needed.
        """
        before = [(grad, -1 if grad is None else grad._version) for param in self.point.params for grad in [param.grad]]
        with torch.enable_grad():
            loss = self.closure()
        self.n_eval += 1
        value = _number(loss, self.who)
        grad = self._gradient(loss, before)
        if self.maximize:
            value = -value
            grad.neg_()
        if self.decays:
            x = self.point.gather()
            for start, stop, decay in self.decays:
                part = x[start:stop]
                value += self.point.space.n_ranks * 0.5 * decay * float(part.dot(part))
                grad[start:stop].add_(part, alpha=decay)
        return Evaluation(loss, value, grad)

    def _gradient(self, loss: Any, before: list[tuple[Tensor | None, int]]) -> Tensor:
        params = self.point.params
        has_graph = isinstance(loss, Tensor) and loss.requires_grad
        is_missing = all(param.grad is None for param in params)
        is_new = any(
            param.grad is not grad or (grad is not None and grad._version != version)
            for param, (grad, version) in zip(params, before, strict=True)
        )
        if has_graph and (is_missing or not is_new):
            try:
                self._backward(loss)
            except NoGradientError as error:
                self._report(error, is_missing)
            return self.point.gather_grad()
        if is_missing:
            text = (
                f"{self.who}: the closure gave no gradient: its loss does not require grad and every .grad is None. "
                "Compute the loss from the parameters with gradients enabled, or set their .grad."
            )
            self._report(NoGradientError(text), is_missing)
        flat = self.point.gather_grad()
        # New and all zero: computed, or left so by zero_grad(set_to_none=False)?
        may_lack_backward = has_graph and (self._lacks_backward or self.n_eval == 1)
        if may_lack_backward and not self._is_nonzero(flat):
            try:
                self._backward(loss)
            except _UsedUpGraphError:
                return flat
            except NoGradientError as error:
                self._report(error, is_missing)
            return self.point.gather_grad()
        if self.needs_gradient and not is_new and not has_graph:
            # The gradient may have been written past autograd, as through NumPy; then its values differ.
            last = self._last_unchanged
            if last is not None and not self.point.space.largest(not torch.equal(flat, last)):
                raise NoGradientError(
                    f"{self.who}: the closure did not compute the gradient at the new parameters: its loss does not "
                    "require grad and no .grad has changed. Call loss.backward() in the closure, or return a loss that "
                    "requires grad."
                )
            self._last_unchanged = flat.clone()
        return flat

    def _is_nonzero(self, flat: Tensor) -> bool:
        return bool(self.point.space.largest(bool(flat[:1].any() or flat.any())))  # the first entry usually decides

    def _report(self, error: NoGradientError, is_missing: bool) -> None:
        """Raise the error if a gradient is needed; else warn if there is none at all."""
        if self.needs_gradient:
            raise error
        if is_missing:
            warn_caller(str(error))

    def _backward(self, loss: Tensor) -> None:
        params = [param for param in self.point.params if param.requires_grad]
        before = [param.grad for param in params]
        for param in params:
            param.grad = None
        try:
            if params:
                # The leaves of a model wrapped by FSDP are not its parameters, which get their gradients from hooks.
                torch.autograd.backward(loss, inputs=None if self.point.space.is_shared else params)
            if all(param.grad is None for param in params):
                raise NoGradientError(
                    f"{self.who}: the closure's loss does not depend on any parameter of the optimizer. "
                    "Was the model replaced after the optimizer was made?"
                )
            self._lacks_backward = True
        except RuntimeError as error:
            for param, grad in zip(params, before, strict=True):
                param.grad = grad
            if "through the graph a second time" in str(error):
                raise _UsedUpGraphError(
                    f"{self.who}: the closure returned a loss whose graph is used up, and changed no gradient. "
                    "It must compute the loss anew at each call."
                ) from error
            raise


def largest(flat: Tensor) -> float:
    """Largest absolute entry of a vector; NaN if it holds one, 0 if it is empty."""
    if not len(flat):
        return 0.0
    low, high = torch.aminmax(flat)
    return float(max(-low.item(), high.item()))


def _decays(point: FlatParameters, groups: ParamGroups, default: float) -> list[tuple[int, int, float]]:
    """Start, stop and factor, in the flat vector, of entries with weight decay."""
    decays = [(start, stop, float(g.get("weight_decay", default))) for g, start, stop in point.spans(groups)]
    return [decay for decay in decays if decay[-1]]


def _number(loss: Any, who: str) -> float:
    must = f"{who}: the closure must return the loss, a real scalar tensor or number, got"
    if loss is None:
        raise TypeError(f"{must} None. Does it end with `return loss`?")
    if isinstance(loss, Tensor):
        loss = full_of(loss)
        if loss.numel() != 1:
            raise ValueError(f"{must} a tensor of shape {tuple(loss.shape)}. Reduce it, e.g. with .sum() or .mean().")
        if loss.is_complex():
            raise TypeError(f"{must} a {loss.dtype} tensor. Take a real number of it, e.g. .abs() or .real.")
        return float(loss.detach())
    try:
        if isinstance(loss, str | bytes):
            raise TypeError
        return float(loss)
    except (TypeError, ValueError):
        raise TypeError(f"{must} {type(loss).__name__}.") from None
