"""A rule on lists of tensors: its arithmetic, and what it calls of ``descend.ops``, as ``torch._foreach_*``."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import cache, partial
from types import FunctionType
from typing import Any, TypeAlias

import torch
from torch import Tensor

from descend import ops
from descend.backends.retarget import retarget

Tensors: TypeAlias = tuple[Tensor, ...] | list[Tensor]  # as torch's stubs have it

# torch._foreach_add would take a 0-dim tensor for a number, and wait for its device to read it.
_ATEN = torch.ops.aten


class TensorList:
    """Tensors of one dtype and device; operators act on each, with a number, a 0-dim tensor or another list.

    The results have the same bits as those of single CPU tensors.
    """

    __slots__ = ("tensors",)
    __array_ufunc__ = None  # NumPy's numbers leave operators to this class

    def __init__(self, tensors: Tensors) -> None:
        self.tensors = tensors

    def __add__(self, other: Any) -> TensorList:
        return self._with(other, torch._foreach_add, _ATEN._foreach_add.Tensor)

    def __sub__(self, other: Any) -> TensorList:
        return self._with(other, torch._foreach_sub, partial(_ATEN._foreach_add.Tensor, alpha=-1))

    def __mul__(self, other: Any) -> TensorList:
        return self._with(other, torch._foreach_mul, _ATEN._foreach_mul.Tensor)

    def __truediv__(self, other: Any) -> TensorList:
        return self._with(other, torch._foreach_div, _ATEN._foreach_div.Tensor)

    def __pow__(self, other: Any) -> TensorList:
        exponent = self._repeated(other) if isinstance(other, Tensor) else _tensors_or_number(other)
        return TensorList(torch._foreach_pow(self.tensors, exponent))

    __radd__, __rmul__ = __add__, __mul__

    def __rsub__(self, other: Any) -> TensorList:
        return (-self).__add__(other)

    def __rtruediv__(self, other: Any) -> TensorList:
        if isinstance(other, Tensor):
            return TensorList(torch._foreach_div(self._repeated(other), self.tensors))
        return TensorList(torch._foreach_reciprocal(self.tensors)).__mul__(other)  # as torch divides a number

    def __rpow__(self, other: Any) -> TensorList:
        return TensorList(
            torch._foreach_pow(self._repeated(other) if isinstance(other, Tensor) else other, self.tensors)
        )

    def __neg__(self) -> TensorList:
        return TensorList(torch._foreach_neg(self.tensors))

    def __abs__(self) -> TensorList:
        return TensorList(torch._foreach_abs(self.tensors))

    def __lt__(self, other: Any) -> TensorList:
        return _each(operator.lt, self, other)

    def __le__(self, other: Any) -> TensorList:
        return _each(operator.le, self, other)

    def __gt__(self, other: Any) -> TensorList:
        return _each(operator.gt, self, other)

    def __ge__(self, other: Any) -> TensorList:
        return _each(operator.ge, self, other)

    def __eq__(self, other: object) -> TensorList:  # type: ignore[override]
        return _each(operator.eq, self, other)

    def __ne__(self, other: object) -> TensorList:  # type: ignore[override]
        return _each(operator.ne, self, other)

    def __and__(self, other: Any) -> TensorList:
        return _each(operator.and_, self, other)

    def __or__(self, other: Any) -> TensorList:
        return _each(operator.or_, self, other)

    __rand__, __ror__ = __and__, __or__

    def __invert__(self) -> TensorList:
        return _each(operator.invert, self)

    def __bool__(self) -> bool:
        raise TypeError("a rule cannot branch on the elements of a tensor: use where.")

    def _with(self, other: Any, foreach: Callable[..., Tensors], with_tensor: Callable[..., Tensors]) -> TensorList:
        if isinstance(other, TensorList):
            return TensorList(foreach(self.tensors, other.tensors))
        first = self.tensors[0]
        if first.is_cpu and first.is_floating_point() and not isinstance(other, Tensor):
            other = torch.tensor(other, dtype=first.dtype, device="cpu")  # read twice as fast as a number
        if isinstance(other, Tensor):
            return TensorList(with_tensor(self.tensors, self._cast(other)))
        return TensorList(foreach(self.tensors, other))

    def _cast(self, number: Tensor) -> Tensor:
        """A 0-dim tensor in the dtype of the results, which it does not widen."""
        dtype = self.tensors[0].dtype
        return number.to(dtype) if dtype.is_floating_point else number

    def _repeated(self, number: Any) -> list[Tensor]:
        first = self.tensors[0]
        one = self._cast(number) if isinstance(number, Tensor) else first.new_full((), number)
        return [one] * len(self.tensors)


def _tensors_or_number(value: Any) -> Any:
    return value.tensors if isinstance(value, TensorList) else value


def _each(function: Callable[..., Tensor], *arguments: Any) -> TensorList:
    """What has no ``torch._foreach_*``: one tensor after the other."""
    count = next(len(value.tensors) for value in arguments if isinstance(value, TensorList))
    columns = [value.tensors if isinstance(value, TensorList) else [value] * count for value in arguments]
    return TensorList(list(map(function, *columns)))


def _unary(op: Callable[[Any], Any], foreach: Callable[..., Tensors]) -> Any:
    return lambda x: TensorList(foreach(x.tensors)) if isinstance(x, TensorList) else op(x)


def _extreme(op: Callable[[Any, Any], Any], foreach: Callable[..., Tensors]) -> Any:
    def extreme(a: Any, b: Any) -> Any:
        first = next((value for value in (a, b) if isinstance(value, TensorList)), None)
        if first is None:
            return op(a, b)
        numbers = [value for value in (a, b) if not isinstance(value, (TensorList, Tensor))]
        if numbers and not first.tensors[0].is_cpu:
            return TensorList(foreach(first.tensors, numbers[0]))
        # On the CPU that would give some zeros another sign.
        columns = [value.tensors if isinstance(value, TensorList) else first._repeated(value) for value in (a, b)]
        return TensorList(foreach(*columns))

    return extreme


def _where(condition: Any, a: Any, b: Any) -> Any:
    if not isinstance(condition, (TensorList, Tensor)):
        return a if condition else b
    if not any(isinstance(value, TensorList) for value in (condition, a, b)):
        return ops.where(condition, a, b)
    return _each(ops.where, condition, a, b)


_OPS = {
    ops.abs: _unary(ops.abs, torch._foreach_abs),
    ops.exp: _unary(ops.exp, torch._foreach_exp),
    ops.log: _unary(ops.log, torch._foreach_log),
    ops.sqrt: _unary(ops.sqrt, torch._foreach_sqrt),
    ops.sign: _unary(ops.sign, torch._foreach_sign),
    ops.maximum: _extreme(ops.maximum, torch._foreach_maximum),
    ops.minimum: _extreme(ops.minimum, torch._foreach_minimum),
    ops.where: _where,
}


@cache
def on_lists(rule: FunctionType) -> Callable[..., Any]:
    """The same rule for ``TensorList`` instead of tensors; numbers and 0-dim tensors stay what they are."""
    return retarget(rule, _OPS, lambda function: function)  # type: ignore[no-any-return]
