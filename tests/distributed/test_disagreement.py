"""Gradients that are not finite, and ranks that disagree: every rank does the same, and says the same."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ranks import on_ranks
from sharded import LAYOUTS, TABLE, Sharded, bits, local, place
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from descend import LBFGS, SGD, AdamW, in_backward


def said(work: Callable[[], Any]) -> str:
    """The class and text of what a call raises."""
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


ADAMW = next(name for name in TABLE if name.startswith("AdamW-"))


def nonfinite_on(rank: int, layout: str, bad: int, index: int, value: float, option: str, norm: Any) -> list[Any]:
    """Three steps; in the second, the gradient of one parameter has ``value`` on one rank."""
    pair = Sharded(TABLE[ADAMW], LAYOUTS[layout][1](), nonfinite=option, max_norm=norm)
    pair.step(0)
    pair.give_grads(1)
    if rank == bad:
        local(pair.params[index].grad).view(-1)[-1] = value
    before = bits(pair.ours)
    text = said(pair.ours.step)
    assert bits(pair.ours) == before
    pair.step(2)
    pair.assert_equal()
    return [text, pair.ours.skipped_steps]


@pytest.mark.parametrize("option", ["skip", "raise"])
@pytest.mark.parametrize("value", [math.nan, -math.inf])
@pytest.mark.parametrize(
    ("layout", "bad", "index", "norm"),
    [
        ("rows of 2", 1, 3, None),
        ("rows of 3", 2, 0, 0.5),
        ("copies of rows", 3, 0, None),
        ("several meshes", 2, 3, 0.5),
    ],
)
def test_all_ranks_step_or_none(option: str, value: float, layout: str, bad: int, index: int, norm: Any) -> None:
    first, *others = on_ranks(LAYOUTS[layout][0], nonfinite_on, layout, bad, index, value, option, norm)
    assert all(other == first for other in others)
    name = f"param_groups[{int(index >= 3)}]['params'][{index % 3}] on rank {bad}"
    if option == "skip":
        assert first == ["nothing", 1]
    else:
        assert first[0].startswith("FloatingPointError: AdamW: NaN or Inf in the gradient of " + name + ".")
        assert first[1] == 0


# Layouts of gradients and parameters.


def placed(rank: int, param: Any, grad: Any) -> str:
    mesh = init_device_mesh("cpu", (2,))
    value = torch.ones(4, 2)
    weight = torch.nn.Parameter(place(value, mesh, param))
    weight.grad = place(value, mesh, grad)
    optimizer = SGD([("weight", weight)], lr=0.1)
    before = local(weight).clone()
    text = said(optimizer.step)
    assert torch.equal(local(weight), before)
    return text


@pytest.mark.parametrize(("param", "grad"), [(Shard(0), Shard(1)), (Shard(0), Replicate()), (Replicate(), Shard(0))])
def test_gradient_of_another_layout_is_an_error_that_names_both(param: Any, grad: Any) -> None:
    first, other = on_ranks(2, placed, param, grad)
    assert first == other
    assert first.startswith("RuntimeError: SGD: weight has placements")
    assert f"weight has placements ({param!r},)" in first
    assert f"its gradient has placements ({grad!r},)" in first


def partial_param(rank: int) -> list[str]:
    mesh = init_device_mesh("cpu", (2,))
    weight = torch.nn.Parameter(DTensor.from_local(torch.ones(4), mesh, [Partial()]))
    weight.grad = DTensor.from_local(torch.ones(4), mesh, [Partial()])
    return [said(SGD([("weight", weight)], lr=0.1, **options).step) for options in ({}, dict(max_norm=1.0))]


def test_partial_parameter_is_an_error() -> None:
    first, other = on_ranks(2, partial_param)
    assert first == other
    for text in first:
        assert text.startswith(
            "RuntimeError: SGD: weight: a tensor of placements (Partial(sum),) must be reduced first"
        )


def partial_grad(rank: int, options: dict[str, Any]) -> float:
    mesh = init_device_mesh("cpu", (2,))
    for placement in (Shard(0), Replicate()):
        weight = torch.nn.Parameter(place(torch.zeros(3), mesh, placement))
        weight.grad = DTensor.from_local(torch.full((3,), 1.0 + rank), mesh, [Partial()])
        optimizer = SGD([weight], lr=1.0, **options)
        for _ in range(2):
            optimizer.step()
        assert local(weight).eq(-6.0).all()
    return optimizer.grad_norm


def test_partial_gradient_is_reduced() -> None:
    assert on_ranks(2, partial_grad, {}) == [None, None]
    norms = on_ranks(2, partial_grad, dict(max_norm=100.0))
    assert norms == [pytest.approx(27**0.5)] * 2


# Ranks that disagree.


def build(rank: int, what: str) -> Any:
    """An optimizer that is another one on the last rank."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    differs = rank == mesh.size() - 1
    values = [torch.ones(4, 3), torch.ones(5)]
    if differs and what == "shape":
        values[1] = torch.ones(6)
    params = [torch.nn.Parameter(place(value, mesh, Shard(0))) for value in values]
    for param in params:
        param.grad = torch.ones_like(param)
    groups = [dict(params=params[:1]), dict(params=params[1:])]
    options: dict[str, Any] = dict(lr=0.1, weight_decay=0.0)
    kind: Any = AdamW
    if differs:
        if what == "groups":
            groups = [dict(params=params)]
        elif what == "class":
            kind = SGD
        elif what == "order":
            groups.reverse()
        elif what in OPTIONS:
            options |= OPTIONS[what]
    return kind(groups, **options)


OPTIONS: dict[str, dict[str, Any]] = {
    "lr": dict(lr=0.2),
    "weight_decay": dict(weight_decay=0.1),
    "max_norm": dict(max_norm=1.0),
    "nonfinite": dict(nonfinite="raise"),
    "state_dtype": dict(state_dtype="8bit"),
    "rounding": dict(rounding="stochastic"),
    "rounding_seed": dict(rounding_seed=1),
}
EXPECTED = {
    "shape": "parameter 0: (5,) torch.float32 (Shard(dim=0),) and (6,) torch.float32 (Shard(dim=0),)",
    "groups": "group 1",
    "class": "class: AdamW and SGD",
    "order": "(4, 3)",
    "lr": "group 0, lr: 0.1 and 0.2; group 1, lr: 0.1 and 0.2",
    "weight_decay": "group 0, weight_decay: 0.0 and 0.1",
    "max_norm": "max_norm: None and 1.0",
    "nonfinite": "nonfinite: 'step' and 'raise'",
    "state_dtype": "state_dtype: None and '8bit'",
    "rounding": "rounding: 'nearest' and 'stochastic'",
    "rounding_seed": "rounding_seed: 0 and 1",
}


def first_step(rank: int, whats: list[str]) -> list[str]:
    texts = []
    for what in whats:
        optimizer = build(rank, what)
        before = bits(optimizer)
        texts.append(said(optimizer.step))
        assert bits(optimizer) == before
    return texts


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_that_disagree_are_told_at_the_first_step(world: int) -> None:
    first, *others = on_ranks(world, first_step, list(EXPECTED))
    for what, text in zip(EXPECTED, first, strict=True):
        assert text.startswith("RuntimeError: AdamW: ranks 0 and")
        assert f"ranks 0 and {world - 1} disagree about " in text
        assert EXPECTED[what] in text
        assert "Nothing has moved." in text
    for other in others:
        for what, text, same in zip(EXPECTED, other, first, strict=True):
            assert text == same or (what == "class" and text.replace("SGD:", "AdamW:") == same)


def later_step(rank: int, what: str) -> list[str]:
    optimizer = build(rank, "nothing")
    optimizer.max_norm = 1.0
    optimizer.step()
    optimizer.step()
    if rank == 1:
        if what == "lr":
            optimizer.param_groups[1]["lr"] = 0.7
        elif what == "nonfinite":
            optimizer.nonfinite = "skip"
        elif what == "group":
            extra = torch.nn.Parameter(torch.ones(2))
            extra.grad = torch.ones(2)
            optimizer.add_param_group(dict(params=[extra]))
    before = bits(optimizer)
    text = said(optimizer.step)
    assert bits(optimizer) == before
    if what == "lr":  # the cure works
        optimizer.param_groups[1]["lr"] = 0.1
        optimizer.step()
    return [text]


@pytest.mark.parametrize("what", ["lr", "nonfinite", "group"])
def test_ranks_that_disagree_later_are_told_at_a_step_with_a_norm(what: str) -> None:
    first, other = on_ranks(2, later_step, what)
    assert first == other
    assert first[0].startswith("RuntimeError: AdamW: ranks 0 and 1 disagree about ")
    expected = {"lr": "group 1, lr: 0.1 and 0.7", "nonfinite": "nonfinite: 'step' and 'skip'", "group": "group 2, lr"}
    assert expected[what] in first[0]


def gradient_inside_backward(rank: int) -> str:
    """A gradient comes on one rank only, where each parameter steps by itself."""
    mesh = init_device_mesh("cpu", (2,))
    params = [torch.nn.Parameter(place(torch.ones(4, 3), mesh, Shard(0))) for _ in range(2)]
    optimizer = AdamW(params, max_norm=1.0)
    in_backward(optimizer, clip="parameter")
    for param in params[rank:]:
        param.grad = torch.ones_like(param)
    return said(optimizer.step)


def test_gradient_on_one_rank_inside_backward_is_an_error() -> None:
    first, other = on_ranks(2, gradient_inside_backward, timeout=5)
    names = "param_groups[0]['params'][0] and param_groups[0]['params'][1]"
    for text in (first, other):
        assert f"ranks 0 and 1 disagree about which gradient is next: {names}" in text


def fail_before_the_norm(rank: int) -> tuple[str, float]:
    optimizer = build(rank, "nothing")
    optimizer.max_norm = 1.0
    optimizer.step()
    if rank == 1:
        param = optimizer.param_groups[0]["params"][0]
        param.grad = place(torch.ones(4, 3), param.device_mesh, Replicate())  # will be refused
    began = time.monotonic()
    text = said(optimizer.step)
    waited = time.monotonic() - began
    if rank == 1:
        time.sleep(4)  # the process lives on
    return text, waited


def test_rank_that_raises_leaves_the_others_waiting_no_longer_than_the_timeout() -> None:
    (waited, seconds), (raised, _) = on_ranks(2, fail_before_the_norm, timeout=2)
    assert "its gradient has placements" in raised
    assert "Timed out" in waited
    assert seconds < 3.5


def lbfgs_that_differs(rank: int) -> tuple[str, bool]:
    mesh = init_device_mesh("cpu", (2,))
    param = torch.nn.Parameter(place(torch.ones(5, dtype=torch.float64), mesh, Shard(0)))
    optimizer = LBFGS([param], lr=0.5 if rank else 1, max_iter=3)
    text = said(lambda: optimizer.step(lambda: param.square().sum()))
    return text, torch.equal(param.full_tensor(), torch.ones(5, dtype=torch.float64))


def test_ranks_with_different_lbfgs_say_so() -> None:
    for text, is_unmoved in on_ranks(2, lbfgs_that_differs):
        assert text.startswith("RuntimeError: LBFGS: ranks 0 and 1 disagree about group 0, lr: 1 and 0.5.")
        assert is_unmoved
