"""Composed rules are ordinary rules: their arguments, what they compute, their source, their names in caches."""

from __future__ import annotations

import inspect
import linecache
import subprocess
import sys
from typing import Any

import pytest
import torch
from rule_runs import RULES
from torch import Tensor

from descend import ops, rules
from descend.backends.retarget import fingerprint
from descend.core.composition import Additions, cautious_scale, composed
from descend.core.signature import signature
from descend.ops import of_matrices, summing

EMA = Additions(ema=True)
DECAY = Additions("decoupled", cautious_decay=True)
UPDATE = Additions("l2", cautious_update=True)
ALL = Additions("decoupled", cautious_update=True, cautious_decay=True, ema=True)
OPS = {getattr(ops, name): name for name in ops.__all__}


def numbers(count: int, seed: int = 0) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    return list(torch.rand(count, 33, generator=random, dtype=torch.float64) * 0.8 + 0.1)


def test_the_same_arguments_give_the_same_function() -> None:
    assert composed(rules.adamw, EMA) is composed(rules.adamw, EMA)
    assert composed(rules.adamw, EMA) is not composed(rules.adam, EMA)
    assert composed(rules.adamw, EMA) is not composed(rules.adamw, DECAY)


def test_state_and_scalars_are_the_rules_then_those_added() -> None:
    own = signature(rules.adamw)
    takes = signature(composed(rules.adamw, ALL))
    assert takes.state == (*own.state, "ema")
    assert takes.scalars == (*own.scalars, "decay", "ema_gain", "scale")
    assert takes.formed == ("scale",)
    assert takes.kind == "element"
    assert signature(composed(rules.sgd, EMA)).state == ("ema",)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_an_average_leaves_what_the_rule_computes_alone(rule: Any) -> None:
    takes = signature(rule)
    param, grad, *others = numbers(2 + len(takes.state) + len(takes.scalars))
    state, scalars = others[: len(takes.state)], others[len(takes.state) :]
    ema, gain = numbers(2, seed=1)
    expected = rule(param, grad, *state, *scalars)
    expected = expected if takes.state else (expected,)
    given, formed = scalars[: len(takes.given)], scalars[len(takes.given) :]
    found = composed(rule, EMA)(param, grad, *state, ema, *given, gain, *formed)
    for ours, theirs in zip(found, expected, strict=False):
        assert torch.equal(ours, theirs)
    torch.testing.assert_close(found[-1], (1 - gain) * ema + gain * expected[0], rtol=1e-14, atol=1e-15)


def test_an_update_that_is_asked_for_from_zero_keeps_its_digits() -> None:
    param, grad = torch.tensor([1.0, 1.0]), torch.tensor([1e-9, -1e-9])
    (part,) = [signature(composed(rules.sgd, UPDATE)).summed]
    assert part is not None
    assert part(param, grad, 1.0, 0.0, 0.0).tolist() == [1.0, 1.0]  # 1 - 1e-9 is 1 in float32
    subtracted = signature(composed(rules.sgd, Additions(None, cautious_update=True))).summed
    assert subtracted is not None
    assert subtracted(param, grad, 1.0, 0.0).tolist() == [0.0, 0.0]


def test_moves_of_nan_stay_nan() -> None:
    grad = torch.tensor([float("nan"), 1.0])
    assert composed(rules.sgd, UPDATE)(torch.ones(2), grad, 0.5, 0.0, 0.0, 1.0).isnan().tolist() == [True, False]


def test_decay_is_left_out_only_where_it_works_against_the_update() -> None:
    rule = composed(rules.sgd, DECAY)
    param, grad = torch.tensor([1.0, 1.0, -1.0, 1.0, 0.0]), torch.tensor([1.0, -1.0, 1.0, 0.0, 1.0])
    # Along the update, against it twice, beside an update of zero, of a weight of zero.
    assert rule(param, grad, 0.5, 0.0, 0.25).tolist() == [0.25, 1.5, -1.5, 0.75, -0.5]


def test_the_scale_is_the_inverse_of_the_share_that_agrees() -> None:
    assert [cautious_scale(*each) for each in ((3, 4), (4, 4), (0, 4), (1, 10**6), (0, 0))] == [4 / 3, 1, 1e3, 1e3, 1e3]


def test_names_that_a_rule_uses_are_left_to_it() -> None:
    def rule(weight: Any, slope: Any, param: Any, rule: Any, decay: Any, move: Any, scale: Any, where: Any) -> Any:
        return weight - decay * slope, param + move * scale * where, rule

    ours = composed(rule, ALL)
    takes = signature(ours)
    assert takes.state == ("param", "rule", "ema")
    assert takes.scalars == ("decay", "move", "scale", "where", "decay_", "ema_gain", "scale_")
    ones = torch.ones(1, dtype=torch.float64)
    found = ours(2 * ones, ones, ones, ones, 2 * ones, 0.5, 0.25, 1.0, 1.0, 0.0, 0.5, 1.0)
    assert [each.item() for each in found] == [1.5, 1.25, 1.0, 1.75]
    assert takes.summed is not None
    assert takes.summed(2 * ones, ones, ones, ones, 2 * ones, 0.5, 0.25, 1.0, 1.0, 0.0, 0.5).item() == 1.0


def test_state_called_ema_is_refused() -> None:
    def rule(param: Any, grad: Any, ema: Any, lr: Any) -> Any:
        return param - lr * ema, ema + grad

    with pytest.raises(ValueError, match="the rule rule uses the name ema"):
        composed(rule, EMA)


def total(param: Any, grad: Any, buffer: Any, lr: Any) -> Any:
    return grad * grad


@summing(total)
def normalized(param: Any, grad: Any, buffer: Any, lr: Any, size: Any) -> Any:
    return param - lr * grad / size, buffer + grad


def test_a_rule_with_sums_keeps_them_beside_an_average() -> None:
    takes = signature(composed(normalized, EMA))
    assert (takes.state, takes.scalars, takes.formed) == (("buffer", "ema"), ("lr", "ema_gain", "size"), ("size",))
    assert takes.summed is not None
    assert takes.summed(0.0, 3.0, 0.0, 0.0, 0.5, 0.1) == 9.0


def test_a_rule_with_sums_cannot_be_cautious_in_its_update() -> None:
    with pytest.raises(ValueError, match="the rule normalized is formed of sums of its own"):
        composed(normalized, UPDATE)


def test_a_rule_of_rows_stays_one() -> None:
    rule = composed(rules.rowwise_adagradw, DECAY)
    takes = signature(rule)
    assert (takes.kind, takes.state, takes.formed) == ("row", ("sum",), ("mean_square",))
    assert takes.scalars == ("lr", "weight_decay", "eps", "decay", "mean_square")
    assert takes.averaged is not None
    assert takes.averaged(0.0, 3.0, 0.0, 0.0, 0.0, 0.0, 0.0) == 9.0
    with pytest.raises(ValueError, match="the rule rowwise_adagradw keeps one number a row"):
        composed(rules.rowwise_adagradw, EMA)


def product(param: Any, grad: Any, lr: Any) -> Any:
    return param - lr * grad @ grad.mT @ grad


of_matrices(product, stacked=lambda: product)


def test_a_rule_of_matrices_stays_one_and_counts_by_itself() -> None:
    rule = composed(product, ALL)
    takes = signature(rule)
    assert (takes.kind, takes.formed, takes.summed) == ("matrix", (), None)
    param, grad = (
        torch.randn(2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in (1, 2)
    )
    move = -0.1 * grad @ grad.mT @ grad
    mask = (move * grad < 0).double()
    for stacked, share in ((False, mask.mean()), (True, mask.mean((1, 2), keepdim=True))):
        each = rule.stacked() if stacked else rule  # type: ignore[attr-defined]
        found, ema = each(param, grad, param, 0.1, 0.0, 0.25)
        torch.testing.assert_close(found, param + move * mask / share, rtol=1e-12, atol=0)
        torch.testing.assert_close(ema, 0.75 * param + 0.25 * found)


def test_source_is_found_and_compiles_for_other_backends() -> None:
    rule = composed(rules.adamw, ALL)
    assert inspect.getsource(rule).startswith("def adamw_cautious_ema(param, grad, exp_avg, exp_avg_sq, ema, lr, ")
    linecache.checkcache()
    assert "where(" in inspect.getsource(rule)


def test_fingerprint_depends_on_the_rule_and_not_on_the_process() -> None:
    prints = [fingerprint(composed(rule, ALL), OPS) for rule in (rules.adam, rules.adamw)]
    assert prints[0] != prints[1]
    program = (
        "from descend import ops, rules; from descend.backends.retarget import fingerprint\n"
        "from descend.core.composition import Additions, composed\n"
        "ops = {getattr(ops, name): name for name in ops.__all__}\n"
        "print(fingerprint(composed(rules.adamw, Additions('decoupled', True, True, True)), ops))"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout == prints[1] + "\n"
