"""Launches of single rules, and the same in eager mode."""

from __future__ import annotations

from collections.abc import Sequence
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from descend import rules
from descend.backends import eager
from descend.backends.triton.backend import TritonBackend
from descend.core.decision import Decision
from descend.core.signature import signature

# Those of elements; functions that are parts of other rules left out.
ALL = [rule for rule in vars(rules).values() if isinstance(rule, FunctionType) and rule.__module__ == rules.__name__]
PARTS = [rules.first_average, *(part for rule in ALL for part in (signature(rule).averaged, signature(rule).summed))]
RULES = [rule for rule in ALL if rule not in PARTS and signature(rule).kind == "element"]
HALF, BRAIN, SINGLE, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64
FILL = 7.0


def values(rule: Any) -> list[float]:
    """Scalars for any rule: positive, below one, none of them exact in binary."""
    return [0.3 / (i + 1) for i in range(len(signature(rule).scalars))]


class Padded:
    """A tensor in the midst of memory that nobody may write.

    Args:
        size: number of elements.
        dtype: of the elements.
        offset: of the first in the memory, so that it is aligned or is not.
    """

    def __init__(self, size: int, dtype: torch.dtype, offset: int = 0) -> None:
        self.memory = torch.full((offset + size + 9,), FILL, dtype=dtype)
        self.tensor = self.memory[offset : offset + size]
        self.tensor.copy_(torch.rand(size, dtype=DOUBLE) + 0.1)  # averages of squares are positive

    def is_intact(self) -> bool:
        """Whether the memory around the tensor is as it was."""
        around = self.memory.clone()
        start = self.tensor.storage_offset()
        around[start : start + len(self.tensor)] = FILL
        return bool((around == FILL).all())


class Run:
    """One rule on some parameters.

    Args:
        rule: the rule.
        dtypes: of parameter, gradient and each state tensor.
        sizes: of the parameters.
        offset: of each in its memory; or one for each dtype.
    """

    def __init__(
        self, rule: Any, dtypes: Sequence[torch.dtype], sizes: Sequence[int], offset: int | Sequence[int] = 0
    ) -> None:
        self.rule, self.dtypes = rule, tuple(dtypes)
        offsets = [offset] * len(dtypes) if isinstance(offset, int) else offset
        self.rows = [[Padded(size, *each) for each in zip(dtypes, offsets, strict=True)] for size in sizes]
        self.tensors = [[padded.tensor for padded in row] for row in self.rows]
        for param, grad, *_ in self.tensors:
            grad.neg_()
            param.grad_dtype = None
            param.grad = grad
        self.before = [[tensor.clone() for tensor in row] for row in self.tensors]

    def launch(self, backend: TritonBackend, wants_norm: bool = False) -> Any:
        """A launch that is ready to run, its first row of scalars set."""
        params = [row[0] for row in self.tensors]
        scalars, given = values(self.rule), len(signature(self.rule).given)
        launch = backend.launch(self.rule, given, self.dtypes, params, [0] * len(params))
        launch.compile(wants_norm)
        launch.set_state([row[2:] for row in self.tensors])
        launch.set_scalars(0, 0.5, scalars[:given])
        if scalars[given:]:
            launch.sums()
            launch.set_formed(np.array([scalars[given:]] * len(params)))
        return launch

    def run(self, decision: Decision | None = None) -> None:
        """Run it with Triton."""
        backend = TritonBackend()
        launch, none = self.launch(backend), backend.scalar_state([])
        backend.together([row[0] for row in self.tensors], [launch], none, none)(torch.zeros(0).numpy(), decision)

    def expected(self, decision: Decision | None = None) -> list[list[Tensor]]:
        """The same from the same start in eager mode."""
        rows = [[tensor.clone() for tensor in row] for row in self.before]
        for param, grad, *state in rows:
            eager.run(self.rule, param, grad, state, values(self.rule), 0.5, decision=decision)
        return rows

    def assert_as_expected(self, rtol: float = 0.0, decision: Decision | None = None) -> None:
        """Assert that the results are those of eager mode, and nothing else was written."""
        for ours, theirs in zip(self.tensors, self.expected(decision), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol, equal_nan=True)
        assert all(padded.is_intact() for row in self.rows for padded in row)


def dtypes_of(rule: Any, param: torch.dtype, grad: torch.dtype, state: torch.dtype) -> tuple[torch.dtype, ...]:
    """The signature of a launch."""
    return (param, grad, *[state] * len(signature(rule).state))
