"""Which tensors the backend takes and why not the others, when Triton is imported, where kernels are kept."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from rule_runs import SINGLE, Run

from descend import SGD, rules
from descend.backends import available
from descend.backends.triton import backend as triton_backend
from descend.backends.triton.backend import TritonBackend
from descend.ops import of_matrices


def why_not(param: torch.Tensor, grad: Any = None, state: Any = (), rule: Any = rules.sgd) -> str | None:
    return TritonBackend().why_not(rule, param, grad, state)


def test_cpu_tensors_are_left_to_the_cpu_backend() -> None:
    assert why_not(torch.zeros(3)) == "on cpu"
    assert why_not(torch.zeros(3, device="meta")) == "on meta"
    assert [backend.name for backend in available("auto")].index("cpu") == 0
    param = torch.ones(3, requires_grad=True)
    param.grad = torch.ones(3)
    with pytest.raises(RuntimeError, match="on cpu"):
        SGD([param], backend="triton").step()


def test_interpreter_does_not_take_cpu_tensors_from_the_cpu_backend(interpreter: None) -> None:
    assert SGD([torch.ones(3, requires_grad=True)]).backends()[0].backend == "cpu"


def test_reasons(interpreter: None) -> None:
    param = torch.zeros(4, 3)
    assert why_not(param) is None
    assert why_not(param.t()) is None
    assert "stride" in str(why_not(torch.zeros(6)[::2]))
    assert "stride" in str(why_not(torch.zeros(1).expand(3)))
    assert "complex64" in str(why_not(torch.zeros(3, dtype=torch.complex64)))
    assert "layout" in str(why_not(torch.zeros(3).to_sparse()))
    assert "gradient: on meta" in str(why_not(param, param.to("meta")))
    assert "gradient: shape" in str(why_not(param, torch.zeros(3, 4).t()))
    assert "buffer: dtype torch.int32" in str(why_not(param, None, [("buffer", torch.zeros(4, 3, dtype=torch.int32))]))
    assert "whole matrices" in str(why_not(param, rule=of_matrices(lambda param, grad, lr: param - lr * grad)))


def test_machine_without_triton_says_so(monkeypatch: pytest.MonkeyPatch, interpreter: None) -> None:
    monkeypatch.setattr(triton_backend, "find_spec", lambda name: None)
    triton_backend._why_not_triton.cache_clear()
    try:
        assert why_not(torch.zeros(3)) == "triton is not installed"
    finally:
        triton_backend._why_not_triton.cache_clear()


def run_python(program: str, **environment: str) -> None:
    variables = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", program], check=True, env={**variables, **environment})


def test_environment_turns_the_interpreter_on() -> None:
    program = """
import torch, descend
param = torch.ones(3, requires_grad=True)
param.grad = torch.ones(3)
optimizer = descend.AdamW([param], lr=0.5, weight_decay=0, max_norm=1.0, backend="triton")
optimizer.step()
assert torch.allclose(param, torch.tensor(0.5)), param
"""
    run_python(program, TRITON_INTERPRET="1")


def test_kernels_are_kept_below_the_chosen_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from triton import knobs
    from triton.backends.compiler import GPUTarget

    from descend.backends.triton import library

    kernel, before = library.total(False), knobs.cache.dir
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.setenv("DESCEND_CACHE_DIR", str(tmp_path / "ours"))
    kernel.compile_for(GPUTarget("cuda", 90, 32))
    assert list((tmp_path / "ours" / "triton").rglob("*.cubin"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "theirs"))
    kernel.compile_for(GPUTarget("cuda", 90, 32))
    assert list((tmp_path / "theirs").rglob("*.cubin"))
    monkeypatch.undo()
    assert knobs.cache.dir == before


def test_one_thread_at_a_time_changes_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from descend.backends.triton import library

    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.setenv("DESCEND_CACHE_DIR", str(tmp_path))
    has_entered = threading.Event()

    def enter() -> None:
        with library._cache_folder():
            has_entered.set()

    thread = threading.Thread(target=enter)
    with library._cache_folder():
        thread.start()
        assert not has_entered.wait(0.2), "it would take the other's folder for the user's, and put that back"
    assert has_entered.wait(60)
    thread.join()
    assert "TRITON_CACHE_DIR" not in os.environ


def test_spans_of_memory_that_is_written(interpreter: None) -> None:
    run = Run(rules.momentum, [SINGLE] * 3, [3, 0])
    written = run.launch(TritonBackend()).written()
    want = [(row.data_ptr(), row.data_ptr() + 12) for row in (run.tensors[0][0], run.tensors[0][2])]
    assert sorted(map(tuple, written.tolist())) == sorted(want)
