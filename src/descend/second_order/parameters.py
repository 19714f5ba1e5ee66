"""The parameters of an optimizer as one flat real vector, the closure as a function of it, and the bounds on it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._nn import flatten_dense_tensors, unflatten_dense_tensors

from descend.second_order.structure import Structure

Groups = Sequence[dict[str, Any]]


class FlatParameters:
    """The parameters of some groups, read and written as one flat vector in the groups' order.

    Made anew for each step, because between steps users replace, add and convert parameters. Dtype and device of the
    vector are those of ``Structure``. Everything is copied; autograd sees nothing of it.

    Args:
        groups: an optimizer's ``param_groups``.
        who: the optimizer's name, for errors.
    Raises:
        ValueError: if there are no parameters.
        TypeError: if a parameter is not floating point or complex.
    """

    def __init__(self, groups: Groups, who: str) -> None:
        self.params: list[Tensor] = [param for group in groups for param in group["params"]]
        if not self.params:
            raise ValueError(f"{who}: there are no parameters; param_groups must hold at least one.")
        for param in self.params:
            if not (param.is_floating_point() or param.is_complex()):
                raise TypeError(f"{who}: parameters must be floating point or complex, got {param.dtype}.")
        self.structure = Structure(self.params, who)
        self.numel, self.dtype, self.device = self.structure.numel, self.structure.dtype, self.structure.device
        # Then nothing needs converting, and torch's own loops do for all parameters at once.
        self.is_uniform = all(param.dtype == self.dtype and param.device == self.device for param in self.params)
        self._filled = [param for param in self.params if param.numel()]
        self._scattered: Tensor | None = None
        self._pieces: list[Tensor] = []

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
            if flat is not self._scattered:  # a solver that reuses one vector finds its views made
                self._scattered, self._pieces = flat, unflatten_dense_tensors(flat, self._filled)
            torch._foreach_copy_(self._filled, self._pieces)

    def gather_grad(self) -> Tensor:
        """The gradients, copied; zeros for a parameter without one."""
        grads = [
            torch.zeros_like(param) if grad is None else grad if grad.layout == torch.strided else grad.to_dense()
            for param in self.params
            for grad in [param.grad]
        ]
        return self._flatten(grads)

    def split(self, flat: Tensor) -> list[Tensor]:
        """What a flat vector holds for each parameter, in the parameter's shape, dtype and place."""
        if self.is_uniform and len(self._filled) == len(self.params):
            return unflatten_dense_tensors(flat, self.params)
        return self.structure.split(flat)

    def _flatten(self, tensors: list[Tensor]) -> Tensor:
        if not self.is_uniform or any(tensor.dtype != self.dtype for tensor in tensors):
            return self.structure.flatten(tensors).clone()
        if len(tensors) == 1:
            return tensors[0].detach().clone(memory_format=torch.contiguous_format).view(-1)
        return flatten_dense_tensors(tensors).detach()


class Evaluation:
    """What one call of a closure gave.

    Attributes:
        loss: what the closure returned.
        value: what is minimised: the loss, negated for ``maximize``, plus the penalty of ``weight_decay``.
        grad: its gradient, flat; memory of its own.
    """

    __slots__ = ("_norm", "grad", "loss", "value")

    def __init__(self, loss: Any, value: float, grad: Tensor) -> None:
        self.loss, self.value, self.grad = loss, value, grad
        self._norm: float | None = None

    @property
    def norm(self) -> float:
        """Largest absolute entry of the gradient."""
        if self._norm is None:
            self._norm = largest(self.grad)
        return self._norm

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.value) and math.isfinite(self.norm)


class _UsedUpGraphError(RuntimeError):
    """``backward`` has been called on the loss already."""


class ClosureFunction:
    """A closure as a function of the parameters, with its gradient.

    The closure runs with gradients enabled. If it has not called ``backward``, that is done here, and the parameters'
    ``.grad`` hold the result all the same. It has called it if a gradient is another tensor than before or has been
    written to, and not all are missing or zero.

    Args:
        closure: returns the loss at the parameters' present values.
        point: the parameters.
        groups: their groups, for each one's ``weight_decay``.
        weight_decay: that of groups without one of their own.
        maximize: minimise the negative loss.
        who: the optimizer's name, for errors.
    """

    def __init__(
        self,
        closure: Callable[[], Any],
        point: FlatParameters,
        groups: Groups,
        *,
        weight_decay: float = 0,
        maximize: bool = False,
        who: str,
    ) -> None:
        if not callable(closure):
            raise TypeError(f"{who}: closure must be a function that returns the loss, got {type(closure).__name__}.")
        self.closure, self.point, self.maximize, self.who = closure, point, maximize, who
        self.decays = _decays(point, groups, weight_decay)
        self.n_eval = 0
        self._leaves_backward_to_us = False
        self._unmarked: Tensor | None = None  # last gradient of a closure of which we see only numbers

    def evaluate(self) -> Evaluation:
        """Call the closure.

        Raises:
            TypeError: if it returns no real number.
            ValueError: if it returns a tensor of several elements.
            RuntimeError: if neither the closure nor autograd gives a gradient.
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
                value += 0.5 * decay * float(part.dot(part))
                grad[start:stop].add_(part, alpha=decay)
        return Evaluation(loss, value, grad)

    def _gradient(self, loss: Any, before: list[tuple[Tensor | None, int]]) -> Tensor:
        params = self.point.params
        is_graph = isinstance(loss, Tensor) and loss.requires_grad
        is_missing = all(param.grad is None for param in params)
        is_new = any(
            param.grad is not grad or (grad is not None and grad._version != version)
            for param, (grad, version) in zip(params, before, strict=True)
        )
        if is_graph and (is_missing or not is_new):
            self._backward(loss)
            return self.point.gather_grad()
        if is_missing:
            raise RuntimeError(
                f"{self.who}: the closure gave no gradient: its loss does not require grad and every .grad is None. "
                "Compute the loss from the parameters with gradients enabled, or set their .grad."
            )
        flat = self.point.gather_grad()
        # New and all zero: truly, or by zero_grad(set_to_none=False) without backward?
        is_asked = self._leaves_backward_to_us or self.n_eval == 1
        if is_graph and is_asked and not flat[:1].any() and not flat.any():  # the first entry mostly answers
            try:
                self._backward(loss)
            except _UsedUpGraphError:
                return flat
            return self.point.gather_grad()
        if not is_new and not is_graph:
            # Written past autograd, as through numpy? Then it is another one now.
            if self._unmarked is not None and torch.equal(flat, self._unmarked):
                raise RuntimeError(
                    f"{self.who}: the closure did not compute the gradient at the new parameters: its loss does not "
                    "require grad and no .grad has changed. Call loss.backward() in the closure, or return a loss that "
                    "requires grad."
                )
            self._unmarked = flat.clone()
        return flat

    def _backward(self, loss: Tensor) -> None:
        params = [param for param in self.point.params if param.requires_grad]
        kept = [param.grad for param in params]
        for param in params:
            param.grad = None
        try:
            torch.autograd.backward(loss, inputs=params)
            if all(param.grad is None for param in params):
                raise RuntimeError(
                    f"{self.who}: the closure's loss does not depend on any parameter of the optimizer. "
                    "Was the model replaced after the optimizer was made?"
                )
            self._leaves_backward_to_us = True
        except RuntimeError as error:
            for param, grad in zip(params, kept, strict=True):
                param.grad = grad
            if "through the graph a second time" in str(error):
                raise _UsedUpGraphError(
                    f"{self.who}: the closure returned a loss whose graph is used up, and changed no gradient. "
                    "It must compute the loss anew at each call."
                ) from error
            raise


def largest(flat: Tensor) -> float:
    """Largest absolute entry of a vector; NaN if there is one, 0 if there is none."""
    if not len(flat):
        return 0.0
    low, high = torch.aminmax(flat)
    return float(max(-low.item(), high.item()))


def _decays(point: FlatParameters, groups: Groups, default: float) -> list[tuple[int, int, float]]:
    """Where in the flat vector each group with weight decay begins and ends, and its factor."""
    found, start, sizes = [], 0, iter(point.structure.sizes)
    for group in groups:
        stop = start + sum(next(sizes) for _ in group["params"])
        if decay := float(group.get("weight_decay", default)):
            found.append((start, stop, decay))
        start = stop
    return found


def _number(loss: Any, who: str) -> float:
    must = f"{who}: the closure must return the loss, a real scalar tensor or number, got"
    if loss is None:
        raise TypeError(f"{must} None. Does it end with `return loss`?")
    if isinstance(loss, Tensor):
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
