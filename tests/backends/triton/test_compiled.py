"""Kernels compiled for GPUs that need not be there: wide accesses, no spills, registers, what cannot be compiled."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import one_in
from rule_runs import BRAIN, DOUBLE, HALF, RULES, SINGLE, dtypes_of, values

from descend import rules
from descend.core.signature import signature

triton = pytest.importorskip("triton")

from machine_code import TARGETS, Machine  # noqa: E402
from triton import knobs  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

from descend.backends.triton import library, rows_library, tuning  # noqa: E402

MIXES = [(BRAIN, BRAIN, BRAIN), (BRAIN, BRAIN, SINGLE), (SINGLE, BRAIN, BRAIN), (HALF, HALF, SINGLE), (DOUBLE,) * 3]


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path) -> Any:
    """What is compiled is compiled here, so that the assembler reports registers and spills."""
    with knobs.cache.scope(), knobs.nvidia.scope():
        knobs.cache.dir = str(tmp_path)
        knobs.nvidia.dump_ptxas_log = True
        yield


def assert_good(rule: Any, mix: tuple[torch.dtype, ...], target: str, capsys: pytest.CaptureFixture[str]) -> None:
    dtypes = dtypes_of(rule, *mix)
    machine = Machine(library.update(rule, len(values(rule)), dtypes), target, capsys)
    assert machine.spills == 0
    assert machine.registers <= tuning.REGISTERS
    # With as many bytes a thread of each tensor, in a loop without masks and in one masked block behind it.
    width = tuning.block(dtypes) // tuning.THREADS
    writes = [dtype for i, dtype in enumerate(dtypes) if i != 1]
    reads = writes if rule in (rules.coast, rules.decay) else dtypes  # these read no gradient
    for kind, members in (("loads", reads), ("stores", writes)):
        assert machine.wide[kind] >= 2 * sum(width * dtype.itemsize // tuning.BYTES for dtype in members), kind


# Each rule for an AMD GPU and for one of two NVIDIA GPUs; those marked slow are for the newer one.
@pytest.mark.parametrize(("rule", "target"), [*one_in(1, RULES, ("gfx942",)), *one_in(2, RULES, ("sm_80", "sm_90"))])
def test_rules_in_float32(rule: Any, target: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert_good(rule, (SINGLE,) * 3, target, capsys)


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize("mix", MIXES, ids=str)
def test_mixes_of_dtypes(mix: tuple[torch.dtype, ...], target: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert_good(rules.adamw, mix, target, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_90"])  # the others compile every rule in float32
@pytest.mark.parametrize("mix", MIXES, ids=str)
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rules_in_other_dtypes(
    rule: Any, mix: tuple[torch.dtype, ...], target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_good(rule, mix, target, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_90"])
@pytest.mark.parametrize("mix", [*product((HALF, BRAIN, SINGLE, DOUBLE), repeat=3)], ids=str)
def test_every_mix(mix: tuple[torch.dtype, ...], target: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert_good(rules.adam_amsgrad, mix, target, capsys)  # the most tensors


@pytest.mark.parametrize("target", TARGETS)
def test_other_kernels(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    norms = [library.sums_of_squares(dtype, 1, 4, False) for dtype in (HALF, BRAIN, SINGLE, DOUBLE)]
    others = library.total(False), library.judge(DOUBLE, SINGLE, SINGLE, False), library.scalar_state(SINGLE, False)
    for kernel in (*norms, *others):
        machine = Machine(kernel, target, capsys)
        assert machine.spills == 0
        assert kernel not in norms or machine.wide["loads"] >= 1


@pytest.mark.parametrize(
    ("kernel", "aligned"),
    [
        (library.update(rules.sgd, 2, (SINGLE, SINGLE)), {"chunks", "addresses", "scalars"}),
        (library.sums_of_squares(SINGLE, 1, 2, False), {"chunks", "addresses", "sums"}),
        (library.total(False), {"sums"}),
        (library.judge(DOUBLE, SINGLE, SINGLE, False), set()),
        (library.scalar_state(SINGLE, False), {"addresses"}),
    ],
    ids=["update", "sums_of_squares", "total", "judge", "scalar_state"],
)
def test_only_beginnings_of_allocations_are_said_to_be_aligned(kernel: Any, aligned: set[str]) -> None:
    """A decision may be a slice, the norm lies anywhere, the places of scalar state follow their addresses."""
    text = kernel.compile_for(GPUTarget(*TARGETS["sm_90"])).asm["ttir"]
    assert set(re.findall(r"%(\w+): !tt\.ptr<\w+> \{tt\.divisibility", text)) == aligned


def test_float32_kernels_have_no_float64_arithmetic_on_elements() -> None:
    kernel = library.update(rules.radam, len(signature(rules.radam).scalars), dtypes_of(rules.radam, *[SINGLE] * 3))
    ptx = kernel.compile_for(GPUTarget(*TARGETS["sm_90"])).asm["ptx"]
    assert len(re.findall(r"\b(?:add|sub|mul|fma|div|sqrt)\S*\.f64", ptx)) == 1  # the scale, once a program
    assert "sqrt.rn.f32" in ptx
    assert "sqrt.approx" not in ptx
    assert "fma.rn.f32" in ptx  # products and sums are fused, whatever Triton's default is


# Sparse rows.

ROWS = [(64, (SINGLE,) * 3), (1000, (BRAIN, SINGLE, BRAIN)), (32, (DOUBLE,) * 3)]


def gradient_of(length: int, dtypes: tuple[torch.dtype, ...]) -> rows_library.Gradient:
    compute = library.compute_dtype(dtypes)
    blocks = rows_library.Blocks.of(length, compute)
    return rows_library.Gradient(torch.int32, dtypes[1], compute, True, blocks)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("length", "mix"), ROWS, ids=str)
def test_rules_on_rows(
    length: int, mix: tuple[torch.dtype, ...], target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    dtypes, gradient = dtypes_of(rules.adamw, *mix), gradient_of(length, mix)
    kernel = rows_library.update(rules.adamw, len(values(rules.adamw)), dtypes, gradient, are_aligned=True)
    machine = Machine(kernel, target, capsys)
    assert machine.spills == 0
    assert machine.registers <= tuning.REGISTERS
    numbers = gradient.blocks.tile * gradient.blocks.columns // tuning.THREADS
    param, grad, *state = (max(numbers * dtype.itemsize // tuning.BYTES, 1) for dtype in dtypes)
    # The gradient: of heads, of four more entries at a time, and what later tiles have summed.
    assert machine.wide["loads"] >= param + 5 * grad + 1 + sum(state)
    assert machine.wide["stores"] >= param + sum(state)


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_rows_that_begin_anywhere(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    dtypes = dtypes_of(rules.adamw, SINGLE, SINGLE, SINGLE)
    gradient = gradient_of(64, dtypes)._replace(keys=torch.int64, is_aligned=False)
    kernel = rows_library.update(rules.adamw, len(values(rules.adamw)), dtypes, gradient, are_aligned=False)
    machine = Machine(kernel, target, capsys)
    assert machine.spills == 0
    assert machine.wide["stores"] == 0


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_other_kernels_of_rows(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    gradient = gradient_of(64, (SINGLE,) * 3)
    catching_up = [
        rows_library.catch_up(rule, len(values(rule)), dtypes, gradient.blocks, True, True, len(dtypes) > 1, 1)
        for rule, dtypes in ((rules.coast, (SINGLE,) * 3), (rules.decay, (SINGLE,)))
    ]
    sums = rows_library.carry(gradient, False), rows_library.squares(gradient, False)
    others = rows_library.keys(2, torch.int32, False), rows_library.find(True, False), rows_library.mark(False, False)
    for kernel in (*catching_up, *sums, rows_library.sums(gradient, True, False), *others):
        machine = Machine(kernel, target, capsys)
        assert machine.spills == 0
        assert kernel in others or machine.wide["loads"] >= 1
