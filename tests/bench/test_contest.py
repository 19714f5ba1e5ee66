"""The interleaved clock, the traffic of a step, and the comparison of results."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from descend.bench.agreement import Disagreement
from descend.bench.clock import FEWEST_TURNS, Contender, Pace, Timing, interleave, turns
from descend.bench.contenders import enter
from descend.bench.methods import METHODS, OURS, bytes_moved
from descend.bench.settings import Settings
from descend.bench.shapes import SHAPES, Shape
from descend.bench.workload import workloads


def test_turns_rotate_and_uncounted_steps_are_dropped() -> None:
    taken: list[str] = []
    contenders = {name: Contender(partial(taken.append, name)) for name in "abc"}
    brought = list(turns(contenders, Shape((), burst=2, uncounted=1), Pace(rounds=4, share=1e9)))
    assert [turn.name for turn in brought] == [*"abc", *"abc", *"bca", *"cab", *"abc"]
    assert "".join(taken) == "aabbcc" + "aabbcc" + "bbccaa" + "ccaabb" + "aabbcc"
    assert [len(turn.seconds) for turn in brought] == 3 * [0] + 12 * [1]
    assert [turn.done for turn in brought[3:]] == [number / 12 for number in range(1, 13)]


def test_slow_contenders_have_fewer_turns_over_all_rounds() -> None:
    contenders = {"slow": Contender(lambda: None)}
    brought = list(turns(contenders, Shape((), burst=1, uncounted=0), Pace(rounds=24, share=0.0)))
    assert len(brought) == 1 + FEWEST_TURNS
    assert brought[-1].done == 1


def test_interleave_prepares_each_step_outside_the_clock() -> None:
    events: list[str] = []
    contender = Contender(partial(events.append, "step"), partial(events.append, "prepare"))
    timings = interleave({"x": contender}, Shape((), burst=2, uncounted=0), Pace(rounds=1, share=0.0))
    assert events == 3 * 2 * ["prepare", "step"]
    assert timings["x"].steps == 2


def test_timing_has_median_and_quartiles() -> None:
    assert Timing.of([5.0, 1.0, 2.0, 3.0, 4.0]) == (3.0, 2.0, 4.0, 5)


def test_known_models_have_their_published_sizes() -> None:
    assert SHAPES["gpt2"].numel == 124_439_808
    assert SHAPES["resnet50"].numel == 25_557_032
    assert len(SHAPES["gpt2"].sizes) == 148


def test_bytes_of_a_step_by_hand() -> None:
    # AdamW, float32: parameter, two states read and written, gradient read: 7 numbers. Clipping reads it again: 8.
    assert bytes_moved(4, 8, clip=False) == 28
    assert bytes_moved(4, 8, clip=True) == 32
    # SGD without momentum.
    assert bytes_moved(4, 0, clip=False) == 12


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", METHODS)
def test_state_is_as_large_as_said(name: str, dtype: str) -> None:
    method = METHODS[name]
    [load] = workloads(Settings(sizes="3x5,7", dtypes=(dtype,)))
    values = load.values("cpu")
    for contender in (OURS, *method.rivals):
        params, optimizer, timed = enter(contender, method, values, max_norm=None, fresh=True)
        timed.run(1)
        size = sum(
            tensor.nbytes
            for param in params
            for tensor in optimizer.state[param].values()
            if isinstance(tensor, torch.Tensor) and tensor.shape == param.shape
        )
        assert size == load.state_bytes(method.state, contender == OURS), contender


@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_fresh_gradients_move_and_keep_their_values(max_norm: float | None) -> None:
    values = [torch.randn(50), torch.randn(3)]
    params, _, timed = enter("fused", METHODS["adamw"], values, max_norm, fresh=True)
    before = [param.grad for param in params]
    timed.prepare()
    for param, value, old in zip(params, values, before, strict=True):
        assert param.grad is not None
        assert old is not None
        assert param.grad.data_ptr() != old.data_ptr()
        assert torch.equal(param.grad, value)


@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_results_after_as_many_steps_agree(max_norm: float | None) -> None:
    values = [torch.randn(50), torch.randn(3)]
    untimed = Disagreement(METHODS["adamw"], values, max_norm)
    for name, steps in (("default", 2), ("fused", 5), (OURS, 5)):
        params, _, timed = enter(name, METHODS["adamw"], values, max_norm, fresh=True)
        timed.run(steps)
        assert untimed.after(steps, params) < 1


def test_results_that_differ_are_seen() -> None:
    values = [torch.randn(50), torch.randn(3)]
    untimed = Disagreement(METHODS["adamw"], values, None)
    params, _, timed = enter(OURS, METHODS["adamw"], values, None, fresh=True)
    timed.run(5)
    assert untimed.after(5, params) == 0
    assert untimed.after(6, params) > 1  # a step too few
    untimed = Disagreement(METHODS["adamw"], values, None)
    with torch.no_grad():
        params[1][0] = math.nan
    assert untimed.after(5, params) == math.inf


def test_layout_of_a_template_is_kept() -> None:
    [load] = workloads(Settings(sizes="2x3x4x5"))
    template = load.templates[0].to(memory_format=torch.channels_last)
    [value] = type(load)("x", "float32", (template,), load.shape).values("cpu")
    assert value.is_contiguous(memory_format=torch.channels_last)
