"""Rules that options have composed, in Triton."""

from __future__ import annotations

import pytest
import torch
from rule_runs import BRAIN, DOUBLE, SINGLE, Run, dtypes_of

from descend import rules
from descend.core.composition import Additions, composed
from descend.core.signature import signature

pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget

from descend.backends.triton import library

EMA = Additions(ema=True)
DECAY = Additions("decoupled", cautious_decay=True)
ALL = Additions("decoupled", cautious_update=True, cautious_decay=True, ema=True)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("additions", [EMA, DECAY], ids=["ema", "decay"])
@pytest.mark.parametrize("dtype", [SINGLE, DOUBLE], ids=str)
def test_triton_runs_it(additions: Additions, dtype: torch.dtype) -> None:
    rule = composed(rules.adamw, additions)
    run = Run(rule, dtypes_of(rule, dtype, dtype, dtype), [5, 1030])
    run.run()
    run.assert_as_expected(20 * 2**-24 if dtype is SINGLE else 20 * 2**-53)


@pytest.mark.parametrize("additions", [EMA, ALL], ids=["ema", "all"])
@pytest.mark.parametrize("dtype", [BRAIN, DOUBLE], ids=str)
def test_triton_compiles_it_for_gpus(additions: Additions, dtype: torch.dtype) -> None:
    rule = composed(rules.adamw, additions)
    dtypes = dtypes_of(rule, dtype, dtype, dtype)
    compiled = library.update(rule, len(signature(rule).scalars), dtypes).compile_for(GPUTarget("cuda", 90, 32))
    assert ".entry" in compiled.asm["ptx"]
