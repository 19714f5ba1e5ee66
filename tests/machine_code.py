"""What a kernel has become for a GPU that need not be there."""

from __future__ import annotations

import re
from typing import Any

import pytest
from triton.backends.compiler import GPUTarget

TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}


class Machine:
    """A kernel's machine code.

    Args:
        kernel: to compile.
        target: one of ``TARGETS``.
        capsys: what the assembler of CUDA has said.
    Attributes:
        text: assembler's.
        registers: of a thread.
        spills: registers, or bytes, that did not fit.
        wide: how many loads and stores are of sixteen bytes.
    """

    def __init__(self, kernel: Any, target: str, capsys: pytest.CaptureFixture[str]) -> None:
        compiled = kernel.compile_for(GPUTarget(*TARGETS[target]))
        if target == "gfx942":
            text = log = compiled.asm["amdgcn"]
            # Scalar registers that do not fit go to lanes of vector registers, not to memory.
            spills, registers = r"vgpr_spill_count:\s*(\d+)", r"\.vgpr_count:\s*(\d+)"
            wide = r"(?:global|buffer|flat)_%s_dwordx4", {"loads": "load", "stores": "store"}
        else:
            text, log = compiled.asm["ptx"], capsys.readouterr().out
            spills, registers = r"(\d+) bytes spill", r"Used (\d+) registers"
            wide = r"%s\.global\S*\.(?:v4\.b32|v2\.b64)", {"loads": "ld", "stores": "st"}
        self.text = text
        assert re.search(spills, log), "the assembler says nothing of spills"
        self.spills = sum(map(int, re.findall(spills, log)))
        (self.registers,) = map(int, re.findall(registers, log))
        pattern, names = wide
        self.wide = {kind: len(re.findall(pattern % name, text)) for kind, name in names.items()}
