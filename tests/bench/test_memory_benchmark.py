"""``benchmarks/memory.py``: what it measures, and what it leaves out."""

from __future__ import annotations

import memory as script
import pytest
import torch
from memory import KINDS, Found, Kind, figures
from torch import Tensor
from torch.optim import Optimizer

from descend.bench.clock import Pace
from descend.bench.shapes import Shape

SHAPE = Shape(((17, 300), (5,)), burst=1, uncounted=0)
PACE = Pace(rounds=2, share=0.0)


def test_state_and_moved_bytes_are_measured() -> None:
    kinds = {name: KINDS[name] for name in ("float32-fused", "8bit", "bfloat16-compensated")}
    found = script.run(kinds, SHAPE, PACE)
    numbers, steps = 17 * 300 + 5, 2 * 4
    scales, small = 2 * 4 * 17 * 2, 2 * 4 * 5
    state = {
        "float32-fused": 8 * numbers + steps,
        "8bit": 2 * 17 * 300 + scales + small + steps,
        "bfloat16-compensated": 6 * numbers + steps,
    }
    for name, size in (("float32-fused", 4), ("8bit", 4), ("bfloat16-compensated", 2)):
        each = found[name]
        assert each.state == state[name] / numbers
        assert each.moved == pytest.approx(3 * size + 2 * each.state)
        assert len(each.seconds) == 2
        assert each.first > 0
        assert each.rate == pytest.approx(each.moved * numbers / each.median)


def test_contender_that_cannot_run_is_left_out_and_named(capsys: pytest.CaptureFixture[str]) -> None:
    def refuses(params: list[Tensor]) -> Optimizer:
        raise NotImplementedError("GPUs only")

    kinds = {"theirs": Kind(refuses, needs="torch"), "fused": KINDS["float32-fused"]}
    assert list(script.run(kinds, SHAPE, PACE)) == ["fused"]
    assert capsys.readouterr().out == "theirs is left out: NotImplementedError: GPUs only\n"


def test_contender_that_does_not_fit_is_left_out_and_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "available_memory", lambda: script.MARGIN)
    assert script.run({"fused": KINDS["float32-fused"]}, SHAPE, PACE) == {}
    assert "fused is left out: it may need" in capsys.readouterr().out


def test_figures_compare_with_the_right_contender() -> None:
    times = {"float32": 3.0, "8bit": 2.0, "bfloat16-state": 2.5, "bfloat16-nearest": 1.0, "bfloat16-stochastic": 1.2}
    found = {name: Found(2.0, 16.0, 9.0, [second], 1e9) for name, second in times.items()}
    reached = {name: [figure.is_reached for figure in each] for name, each in figures(found).items()}
    assert reached == {"8bit": [True, True], "bfloat16-state": [False], "bfloat16-stochastic": [False]}
    assert figures({"float32": found["float32"]}) == {}


def test_every_contender_of_ours_can_be_made() -> None:
    for kind in KINDS.values():
        if kind.needs is None:
            kind.build([torch.zeros(3, dtype=kind.dtype, requires_grad=True)])
