"""Rules made of rules: what the options ``cautious`` and ``ema`` add to a rule, as one function.

A composed rule is an ordinary rule. Its source is written here, once for each rule and choice of options, so that
backends that read code and backends that read source compile it like any other; it calls the rule as a helper.
"""

from __future__ import annotations

import hashlib
import linecache
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from descend.core.signature import of_matrices, signature, summing
from descend.ops import where

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
def composed(rule: Rule, additions: Additions) -> Rule:
    """``rule`` with ``additions``. The same arguments give the same function.

    Its state is that of ``rule``, then ``ema``. Its scalars are those of ``rule`` that are not formed from sums; then
    those of the additions, if they have them: the decay and what the average gains a step; then those formed from sums:
    the rule's, or what a cautious update is multiplied by.

    Raises:
        ValueError: if the rule has state called ``ema``, or sums of its own beside a cautious update.
    """
    takes = signature(rule)
    if additions.ema and "ema" in takes.state:
        raise ValueError(f"the rule {rule.__name__} has state called ema: an average of the weights needs that name.")
    if additions.cautious_update and takes.summed is not None:
        raise ValueError(f"the rule {rule.__name__} is formed from sums: it cannot be made cautious in its update.")
    taken = {*takes.state, *takes.scalars, "rule", "part", "where", "zeros_like", "scale_of"}
    param, grad, move, decay, gain, scale = (
        _free(name, taken) for name in ("param", "grad", "move", "decay", "ema_gain", "scale")
    )
    has_decay = additions.decay in ("decoupled", "l2")
    added = [*[decay] * has_decay, *[gain] * additions.ema]
    given = [param, grad, *takes.state, *["ema"] * additions.ema, *takes.given, *added]
    is_matrix = takes.kind == "matrix"
    sums_agreement = additions.cautious_update and not is_matrix
    formed = [scale] if sums_agreement else list(takes.formed)

    # What the rule is asked for: the new parameter, or the move from zero, which has all digits of a small update.
    asked = [param, grad]
    lines = []
    if additions.decay == "l2":
        lines.append(f"{grad} = {grad} + {decay} * {param}")
    if additions.decay is not None:
        asked[0] = f"zeros_like({param})" if is_matrix else "0.0"
    target = param if additions.decay is None and not additions.cautious_update else move
    call = f"rule({', '.join([*asked, *takes.state, *takes.scalars])})"
    lines.append(f"{', '.join([target, *takes.state])} = {call}")
    if target == move and additions.decay is None:
        lines.append(f"{move} = {move} - {param}")
    counted = [*lines, f"return where({move} * {grad} < 0.0, 1.0, 0.0)"]

    if additions.cautious_update and is_matrix:
        lines.append(f"{scale} = scale_of({move} * {grad} < 0.0)")
    if additions.cautious_update:  # a move of NaN stays one
        lines.append(f"{move} = where({move} * {grad} >= 0.0, 0.0, {scale} * {move})")
    if additions.decay == "decoupled":
        amount = f"{decay} * {param}"
        if additions.cautious_decay:
            amount = f"where({move} * {param} > 0.0, 0.0, {amount})"
        lines.append(f"{move} = {move} - {amount}")
    if target == move:
        lines.append(f"{param} = {param} + {move}")
    if additions.ema:
        lines.append(f"ema = ema + {gain} * ({param} - ema)")
    results = [param, *takes.state, *["ema"] * additions.ema]
    lines.append(f"return {', '.join(results)}")

    words = ["cautious"] * (additions.cautious_update or additions.cautious_decay) + ["ema"] * additions.ema
    name = "_".join([rule.__name__.strip("<>"), *(words or ["decay"])])
    namespace: dict[str, Any] = {"rule": rule, "where": where}
    if is_matrix:
        namespace |= {"zeros_like": torch.zeros_like, "scale_of": _scale_of}
    function = _function(name, [*given, *formed], lines, namespace)
    if is_matrix:
        return of_matrices(function)
    if sums_agreement:
        return summing(_function(f"{name}_agreeing", given, counted, namespace))(function)
    if takes.summed is not None:
        part = [f"return part({', '.join([param, grad, *takes.state, *takes.given])})"]
        return summing(_function(f"{name}_sums", given, part, {"part": takes.summed}))(function)
    return function


def cautious_scale(agreeing: float, numel: int) -> float:
    """What is left of a cautious update is multiplied by this: the inverse of its share, of at least 1/1000.

    Args:
        agreeing: elements whose update agrees with the gradient.
        numel: all elements.
    """
    return 1 / max(agreeing / max(numel, 1), 1e-3)


def _scale_of(agrees: Tensor) -> Tensor:
    """The same for each matrix of a batch."""
    return 1 / agrees.float().mean((-2, -1), keepdim=True).clamp(min=1e-3)


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
