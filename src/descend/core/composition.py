"""Rules made of rules: what the options ``cautious`` and ``ema`` add to a rule, as one function.

A composed rule is an ordinary rule. Its source is written here, once for each rule and choice of options, so that
backends that read code and backends that read source compile it like any other; it calls the rule as a helper.
"""

from __future__ import annotations

import hashlib
import inspect
import linecache
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from descend.core.signature import signature
from descend.ops import of_matrices, of_rows, summing, where

Decay: TypeAlias = Literal["decoupled", "l2", "none"]
Rule: TypeAlias = Callable[..., Any]


class Additions(NamedTuple):
    """What a composed rule does beside the rule.

    Attributes:
        decay: what weight decay is, where the rule is given none and the composed rule decays itself: ``"l2"`` adds
            ``decay * param`` to the gradient, ``"decoupled"`` takes it from the parameter, ``"none"`` does neither.
            None leaves it to the rule.
        cautious_update: leave out what moves against the gradient, and multiply the rest by the last scalar.
        cautious_decay: leave out decoupled decay that moves against the update.
        ema: keep an average of the parameter, the state ``ema``.
    """

    decay: Decay | None = None
    cautious_update: bool = False
    cautious_decay: bool = False
    ema: bool = False


@cache
def composed(rule: Rule, additions: Additions, direction: Rule | None = None, stacked: int = 0) -> Rule:
    """``rule`` with ``additions``. The same arguments give the same function.

    Its state is that of ``rule``, then ``ema``. Its scalars are those that ``rule`` is given; then those of the
    additions, if they have them: the decay and what the average gains a step; then those that are formed of sums: the
    rule's, or what a cautious update is multiplied by.

    Args:
        rule: the rule.
        additions: what to add.
        direction: a function of some of the rule's arguments, by name, with the sign of what the rule takes from the
            parameter apart from decay. A cautious update then counts without applying the rule. Default: None.
        stacked: of a rule of matrices, how many leading dimensions are a batch of parameters. Default: 0.
    Raises:
        ValueError: if the rule uses the name ``ema``; if it has sums or means of its own beside a cautious update; if
            it is one of rows beside an average.
    """
    takes = signature(rule)
    if additions.ema and "ema" in (*takes.state, *takes.scalars):
        raise ValueError(f"the rule {rule.__name__} uses the name ema, which an average of the weights needs.")
    if additions.cautious_update and takes.formed:
        raise ValueError(f"the rule {rule.__name__} is formed of sums of its own: its update cannot be cautious.")
    if additions.ema and takes.kind == "row":
        raise ValueError(f"the rule {rule.__name__} keeps one number a row, and no average of the weights.")
    text = _Text(rule, additions, direction, stacked)
    words = ["cautious"] * (additions.cautious_update or additions.cautious_decay) + ["ema"] * additions.ema
    name = "_".join([rule.__name__.strip("<>"), *(words or ["decay"])])
    namespace = {
        "rule": rule,
        "part": takes.summed or takes.averaged,
        "direction": direction,
        "where": where,
        "zeros_like": torch.zeros_like,
        "scale_of": _scale_of,
    }
    function = _function(name, [*text.given, *text.formed], [*text.moved(), *text.changed()], namespace)
    if takes.kind == "matrix":
        stack: Callable[[], Rule] | None = getattr(rule, "stacked", None)
        again = None if stack is None else lambda: composed(stack(), additions, direction, stacked + 1)
        return of_matrices(function, len(takes.state) + additions.ema, again)
    if text.formed:
        part = text.counted() if additions.cautious_update else text.rules_part()
        mark = of_rows if takes.kind == "row" else summing
        return mark(_function(f"{name}_part", text.given, part, namespace))(function)
    return function


class _Text:
    """The source of a composed rule, and of what is summed for it.

    Args:
        rule, additions, direction, stacked: see ``composed``.
    Attributes:
        given: names of the arguments that are known before anything is summed.
        formed: names of the scalars that are formed of sums or means.
    """

    def __init__(self, rule: Rule, additions: Additions, direction: Rule | None, stacked: int) -> None:
        self._takes, self._additions, self._stacked = signature(rule), additions, stacked
        self._is_matrix = self._takes.kind == "matrix"
        taken = {
            *self._takes.state,
            *self._takes.scalars,
            "rule",
            "part",
            "direction",
            "where",
            "zeros_like",
            "scale_of",
        }
        names = ("param", "grad", "move", "decay", "ema_gain", "scale")
        self._param, self._grad, self._move, self._decay, self._gain, self._scale = (
            _free(name, taken) for name in names
        )
        self._ema = ["ema"] * additions.ema
        added = [*[self._decay] * (additions.decay in ("decoupled", "l2")), *[self._gain] * additions.ema]
        self.given = [self._param, self._grad, *self._takes.state, *self._ema, *self._takes.given, *added]
        counts = additions.cautious_update and not self._is_matrix  # a rule of matrices counts by itself
        self.formed = [self._scale] if counts else [*self._takes.formed]
        read = [] if direction is None else [*inspect.signature(direction).parameters]
        self._direction = f"direction({', '.join(read)})" if read and {*read} <= {*self.given} else None

    def moved(self) -> list[str]:
        """Apply the rule, to the parameter if nothing is done with its step; else to zero, and the step is ``move``.

        From zero, a small step has all its digits. A rule that decays by itself may not be asked so.
        """
        asked, found, after = self._param, self._param, []
        if self._additions.decay is not None:
            asked, found = f"zeros_like({self._param})" if self._is_matrix else "0.0", self._move
        elif self._additions.cautious_update:
            found, after = self._move, [f"{self._move} = {self._move} - {self._param}"]
        state, arguments = self._takes.state, [asked, self._grad, *self._takes.state, *self._takes.scalars]
        return [*self._with_l2(), f"{', '.join([found, *state])} = rule({', '.join(arguments)})", *after]

    def counted(self) -> list[str]:
        """Return 1 for an element whose update agrees with its gradient, else 0."""
        if self._direction is not None:
            return [*self._with_l2(), f"return where({self._direction} * {self._grad} > 0.0, 1.0, 0.0)"]
        return [*self.moved(), f"return where({self._move} * {self._grad} < 0.0, 1.0, 0.0)"]

    def rules_part(self) -> list[str]:
        """Return what the rule's own part does."""
        return [f"return part({', '.join([self._param, self._grad, *self._takes.state, *self._takes.given])})"]

    def changed(self) -> list[str]:
        """Change ``move``, move the parameter, and average it."""
        param, move, additions = self._param, self._move, self._additions
        lines = []
        if additions.cautious_update:  # a move of NaN stays one
            if self._is_matrix:
                lines.append(f"{self._scale} = scale_of({move}, {self._grad}, {self._stacked})")
            lines.append(f"{move} = where({move} * {self._grad} >= 0.0, 0.0, {self._scale} * {move})")
        if additions.decay == "decoupled":
            decay = f"{self._decay} * {param}"
            if additions.cautious_decay:
                decay = f"where({move} * {param} > 0.0, 0.0, {decay})"
            lines.append(f"{move} = {move} - {decay}")
        if additions.cautious_update or additions.decay is not None:
            lines.append(f"{param} = {param} + {move}")
        if additions.ema:
            lines.append(f"ema = ema + {self._gain} * ({param} - ema)")
        return [*lines, f"return {', '.join([param, *self._takes.state, *self._ema])}"]

    def _with_l2(self) -> list[str]:
        """Add L2 regularization to the gradient, if it is not the rule that does so."""
        grad = self._grad
        return [f"{grad} = {grad} + {self._decay} * {self._param}"] if self._additions.decay == "l2" else []


def cautious_scale(agreeing: Any, numel: Any) -> Any:
    """What is left of a cautious update is multiplied by this: the inverse of its share, of at least 1/1000.

    Args:
        agreeing: elements whose update agrees with the gradient; a number, or an array of them.
        numel: all elements.
    """
    return 1 / np.maximum(agreeing / np.maximum(numel, 1), 1e-3)


def _scale_of(move: Tensor, grad: Tensor, stacked: int) -> Tensor:
    """The same for each parameter of a batch, over whose first dimensions parameters are stacked."""
    agreeing = (move * grad < 0).sum(tuple(range(stacked, move.dim())), keepdim=True)
    numel = move.numel() // max(agreeing.numel(), 1)
    return 1 / (agreeing.to(move.dtype) / max(numel, 1)).clamp(min=1e-3)


def _free(name: str, taken: set[str]) -> str:
    """``name``, or if that is taken, with underscores; it is taken from now on."""
    while name in taken:
        name += "_"
    taken.add(name)
    return name


def _function(name: str, arguments: Sequence[str], lines: Sequence[str], namespace: Mapping[str, Any]) -> Rule:
    """A function of this body whose source ``inspect`` finds."""
    text = f"def {name}({', '.join(arguments)}):\n" + "".join(f"    {line}\n" for line in lines)
    file = f"<descend {name} {hashlib.sha256(text.encode()).hexdigest()[:16]}>"
    # Without a modification time, linecache never drops a file that does not exist.
    linecache.cache[file] = len(text), None, text.splitlines(keepends=True), file
    made: dict[str, Any] = {**namespace, "__name__": __name__}
    exec(compile(text, file, "exec"), made)
    function: Rule = made[name]
    return function
