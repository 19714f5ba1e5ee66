"""Modes of torch around a step: inference mode, another default device, parameters that torch cannot write."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from cases import (
    BACKENDS,
    CASES,
    Case,
    Twins,
    assert_same_bits,
    assert_unmoved,
    give_grads,
    leaves,
    params_of,
    snapshot,
    state_of,
)
from torch import Tensor

from descend import SGD, AdamW, FirstOrder, SparseAdam, clip_grad_norm_, clip_grad_value_, warmup

MODES: dict[str, Callable[[], Any]] = {
    "inference": torch.inference_mode,
    "default device": lambda: torch.device("meta"),
}


def steps(optimizer: FirstOrder, mode: Callable[[], Any]) -> None:
    """Four steps, the first two of them in ``mode``."""
    for seed in range(4):
        give_grads(params_of(optimizer), seed)
        with mode() if seed < 2 else nullcontext():
            optimizer.step()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_mode_changes_no_step(case: Case, backend: str, mode: str) -> None:
    inside, outside = (case.ours(leaves(), **case.options, backend=backend, max_norm=1.0) for _ in range(2))
    steps(inside, MODES[mode])
    steps(outside, nullcontext)
    assert all(map(torch.equal, params_of(inside), params_of(outside)))
    assert_same_bits(state_of(inside), state_of(outside))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_state_made_or_loaded_in_a_mode_is_state_like_any_other(case: Case, mode: str) -> None:
    saved = case.ours(leaves(), **case.options)
    steps(saved, nullcontext)
    loaded, made = (case.ours(leaves(), **case.options) for _ in range(2))
    with MODES[mode]():
        loaded.load_state_dict(saved.state_dict())
        made.init_state()
        warmup(made)
    assert_same_bits(state_of(loaded), state_of(saved))
    steps(loaded, nullcontext)
    steps(made, nullcontext)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("kind", "sparse"), [(SGD, None), (AdamW, "touched"), (AdamW, "exact"), (SparseAdam, "touched")]
)
def test_a_mode_changes_no_sparse_step(kind: Any, sparse: str | None, backend: str, mode: str) -> None:
    tables = []
    for around in (MODES[mode], nullcontext):
        torch.manual_seed(0)
        table = torch.nn.Embedding(50, 4, sparse=True)
        optimizer = kind(table.parameters(), lr=0.1, sparse=sparse, backend=backend, max_norm=1.0)
        if sparse == "exact":
            optimizer.attach(table)
        for index, row in enumerate((1, 3, 1, 5)):
            table(torch.tensor([row, 7, row])).square().sum().backward()
            with around() if index % 2 == 0 else nullcontext():
                optimizer.step()
                optimizer.load_state_dict(optimizer.state_dict())
            optimizer.zero_grad()
        if sparse == "exact":
            optimizer.settle()
        tables.append(table.weight.detach())
    assert torch.equal(*tables)


@pytest.mark.parametrize(
    "clip",
    [lambda params: clip_grad_norm_(params, 2.5), lambda params: clip_grad_value_(params, 0.5)],
    ids=["norm", "value"],
)
def test_clipping_with_another_default_device(clip: Callable[[list[Tensor]], Any]) -> None:
    clipped = []
    for mode in (MODES["default device"], nullcontext):
        params = leaves([(3, 2), (4, 2)])
        give_grads(params, 0)
        params[1].grad = params[1].grad.to_sparse(1)
        with mode():
            clip(params)
        clipped.append([param.grad.to_dense() for param in params])
    assert all(map(torch.equal, *clipped))


def in_inference_mode(values: Tensor) -> Tensor:
    with torch.inference_mode():
        return values.clone()


UNWRITABLE: dict[str, Callable[[Tensor], Tensor]] = {
    "was made in inference mode": in_inference_mode,
    "is expanded": lambda values: values[:1].expand(values.shape),
}


@pytest.mark.parametrize("what", UNWRITABLE)
@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_parameter_that_cannot_be_written_is_refused_before_anything_moves(
    case: Case, backend: str, what: str
) -> None:
    params = [*leaves([(3, 2)]), UNWRITABLE[what](torch.ones(3, 2)), *leaves([(4,)])]
    optimizer = case.ours(params, **case.options, backend=backend)
    give_grads(params, 0)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=rf"param_groups\[0\]\['params'\]\[1\]: the parameter {what}.*Use a clone"):
        optimizer.step()
    assert_unmoved(optimizer, before)


@pytest.mark.parametrize("what", UNWRITABLE)
@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_state_that_cannot_be_written_is_refused_before_anything_moves(backend: str, what: str) -> None:
    optimizer = AdamW(leaves([(3, 2), (3, 2)]), backend=backend)
    steps(optimizer, nullcontext)
    state = optimizer.state[params_of(optimizer)[1]]
    state["exp_avg"] = UNWRITABLE[what](state["exp_avg"])
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=rf"\[1\]: exp_avg {what}.*Use a clone"):
        optimizer.step()
    assert_unmoved(optimizer, before)


def test_a_parameter_made_in_inference_mode_steps_there() -> None:
    twins = Twins(CASES[5], lambda: [in_inference_mode(torch.ones(3, dtype=torch.float64))])
    with torch.inference_mode():
        for seed in range(3):
            twins.step(seed)
    twins.assert_equal()
    with pytest.raises(RuntimeError, match="Nothing has moved"):
        twins.ours.step()


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
@pytest.mark.parametrize("case", [case for case in CASES if case.theirs.__module__.startswith("torch")], ids=str)
def test_an_empty_parameter_listed_twice_counts_its_steps_twice_as_in_torch(case: Case) -> None:
    def groups() -> list[Tensor]:
        (empty,) = leaves([(0,)])
        return [empty, *leaves([(3,)]), empty]

    twins = Twins(case, groups)
    for seed in range(3):
        twins.step(seed)
    twins.assert_equal()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_gradient_that_is_the_parameter_is_read_before_anything_is_written(case: Case) -> None:
    alias, copied = (case.ours(leaves(), **case.options) for _ in range(2))
    for optimizer in (alias, copied):
        for param in params_of(optimizer):
            param.grad = param.detach() if optimizer is alias else param.detach().clone()
        optimizer.step()
    torch.testing.assert_close(params_of(alias), params_of(copied), rtol=1e-12, atol=1e-14)  # eager and compiled
