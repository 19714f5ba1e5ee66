"""The compiled loop of rules with sums: its instructions, its errors, when it is compiled."""

from __future__ import annotations

import platform
import re

import pytest
import torch
from sum_rules import trusted

from descend import RuleError, from_rule, warmup
from descend.backends.cpu import object_files, sums_kernel
from descend.core.signature import signature
from descend.ops import sqrt, summing

SINGLE = torch.float32

on_x86 = pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="reads x86 assembly")


def rooted_sums(param, grad, average, lr, eps):
    return param * param, grad / (sqrt(average) + eps) + 2


@summing(rooted_sums)
def rooted(param, grad, average, lr, eps, squares, total):
    return param - lr * squares * total * grad, average + grad * grad


@on_x86
@pytest.mark.parametrize("rule", [trusted, rooted], ids=lambda rule: rule.__name__)
def test_loop_is_vectorised_and_only_adds_in_double_precision(rule) -> None:
    takes, tensors = signature(rule), 2 + len(signature(rule).state)
    given, scalars = len(takes.given), len(takes.scalars)
    made = sums_kernel.sums_kernel(takes.summed, given, scalars, takes.sums, (SINGLE,) * tensors, SINGLE)
    found = object_files.machine_assembly(made)
    assert re.search(r"^\s+v?addpd\s", found, re.MULTILINE)
    assert re.search(r"^\s+v?cvtps2pd\s", found, re.MULTILINE)
    assert re.search(r"^\s+v?(?:mul|fn?m(?:add|sub)\d+)ps\s", found, re.MULTILINE)
    assert not re.search(r"^\s+v?(?:sqrt|div|cvtpd2p)\w*pd|^\s+v?cvtpd2ps", found, re.MULTILINE)
    assert bool(re.search(r"^\s+v?sqrtps\s", found, re.MULTILINE)) == (rule is rooted)


def test_part_that_cannot_be_compiled_is_named() -> None:
    def branching(param, grad, lr):
        return torch.relu(grad)

    @summing(branching)
    def rule(param, grad, lr, total):
        return param - lr * total * grad

    weight = torch.ones(2, requires_grad=True)
    weight.grad = torch.ones(2)
    with pytest.raises(RuleError, match="the rule branching cannot be compiled for the CPU"):
        from_rule(rule, "Rule")([weight]).step()
    assert weight.tolist() == [1.0, 1.0]


def test_warmup_leaves_nothing_to_compile() -> None:
    def part(param, grad, lr):
        return 0.321 * grad

    @summing(part)
    def rule(param, grad, lr, total):
        return param - lr * total * grad

    def loops() -> set[str]:
        return {key for key in object_files._loaded if key.startswith("sums|")}

    weight = torch.ones(2, requires_grad=True)
    optimizer, before = from_rule(rule, "Rule", lr=1.0)([weight]), loops()
    warmup(optimizer)
    known = loops()
    assert len(known - before) == 1
    weight.grad = torch.ones(2)
    optimizer.step()
    assert loops() == known
    assert weight.tolist() == pytest.approx([1 - 0.642] * 2)
