"""L-BFGS, Newton and minimize on sharded parameters: the same as one process to rounding, on every rank alike."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import sharded_cases as cases
import torch
import torch.distributed as dist
from ranks import on_ranks
from sharded import LAYOUTS, Put, values
from sharded_cases import Fit
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

import descend
from descend.distributed.dtensors import is_dtensor
from descend.second_order.problem.shared_space import full_of


def assert_fits(fits: list[Fit], expected: Fit, rtol: float) -> None:
    """Every rank has the same as the first, bit for bit, and that is what one process has, to rounding."""
    first = fits[0]
    assert first.counts == expected.counts
    assert first.value == pytest.approx(expected.value, rel=rtol)
    torch.testing.assert_close(first.params, expected.params, rtol=rtol, atol=rtol)
    for fit in fits[1:]:
        assert fit[:3] == first[:3]
        assert torch.equal(fit.params, first.params)


LBFGS_OPTIONS: dict[str, dict[str, Any]] = {
    "fixed": dict(max_iter=10),
    "strong_wolfe": dict(max_iter=10, line_search_fn="strong_wolfe"),
    "short history": dict(max_iter=10, line_search_fn="strong_wolfe", history_size=3, weight_decay=0.01),
    "tensor lr": dict(max_iter=6, line_search_fn="strong_wolfe", lr=torch.tensor(0.5, dtype=torch.float64)),
    "hager_zhang": dict(max_iter=10, line_search_fn="hager_zhang", history_size=5),
    "numpy": dict(max_iter=10, line_search_fn="hager_zhang", history_size=4, weight_decay=0.01),
    "bounds": dict(max_iter=10, line_search_fn="hager_zhang", bounds={"first.weight": (-0.3, 0.3)}),
    "box": dict(max_iter=8, line_search_fn="hager_zhang", bounds=(-0.4, 0.4), history_size=4),
}
WRAPPED = [("fsdp", 2), ("fsdp", 3), ("hsdp", 4), ("mixed", 3), ("tp", 2), ("fsdp x tp", 4)]


def lbfgs(rank: int, *args: Any) -> Fit:
    return cases.fit_lbfgs(*args, rank=rank)


@pytest.mark.parametrize(("wrapping", "world"), WRAPPED)
@pytest.mark.parametrize("name", LBFGS_OPTIONS)
def test_lbfgs_equals_one_process(name: str, wrapping: str, world: int) -> None:
    options = LBFGS_OPTIONS[name]
    assert_fits(on_ranks(world, lbfgs, wrapping, options), cases.fit_lbfgs(None, options), rtol=1e-9)


def model(rank: int, *args: Any) -> Fit:
    return cases.fit_model(*args, rank=rank)


@pytest.mark.parametrize(("wrapping", "world", "rtol"), [("fsdp", 2, 1e-5), ("mixed", 3, 1e-5), ("tp", 2, 1e-9)])
@pytest.mark.parametrize("options", [dict(method="l-bfgs", max_iter=15), dict(method="newton-cg", max_iter=6)], ids=str)
def test_minimize_fits_a_model_as_one_process(options: dict[str, Any], wrapping: str, world: int, rtol: float) -> None:
    rtol = 1e-9 if options["method"] == "l-bfgs" else rtol  # products of FSDP's parameters are differences
    assert_fits(on_ranks(world, model, wrapping, options), cases.fit_model(None, options), rtol)


def quartic(rank: int, options: dict[str, Any]) -> Fit:
    return cases.minimize_quartic(cases.distributed(cases.make_start()), options)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "options",
    [
        dict(method="l-bfgs"),
        dict(method="l-bfgs", bounds=({"a": -0.2, "b": None, "c": 0.6}, 1.0)),
        dict(method="gd", max_iter=15),
        dict(method="newton-cg", tol=1e-9),
    ],
    ids=str,
)
def test_minimize_equals_one_process(options: dict[str, Any], world: int) -> None:
    expected = cases.minimize_quartic(cases.make_start(), options)
    assert_fits(on_ranks(world, quartic, options), expected, rtol=1e-9)


def layout(rank: int, name: str, options: dict[str, Any]) -> Fit:
    return of_any_layout(LAYOUTS[name][1](), options)


def of_any_layout(put: Put, options: dict[str, Any]) -> Fit:
    params = [torch.nn.Parameter(put(index, value)) for index, value in enumerate(values(0))]
    targets = [put(index, value) for index, value in enumerate(values(1))]
    optimizer = descend.LBFGS(params, tolerance_grad=1e-9, tolerance_change=1e-14, **options)

    def loss() -> Tensor:
        parts = [((p - t) ** 2 * (i + 1) + p**4).sum() for i, (p, t) in enumerate(zip(params, targets, strict=True))]
        return sum(map(full_of, parts), torch.zeros((), dtype=torch.float64))

    optimizer.step(loss)
    return cases.fit_of([optimizer.result], params)


@pytest.mark.parametrize("line_search_fn", ["strong_wolfe", "hager_zhang"])
@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "some ranks"])
def test_lbfgs_equals_one_process_on_any_layout(name: str, line_search_fn: str) -> None:
    options = dict(line_search_fn=line_search_fn, max_iter=8, weight_decay=0.01)
    expected = of_any_layout(lambda index, tensor: tensor.clone(), options)
    assert_fits(on_ranks(LAYOUTS[name][0], layout, name, options), expected, rtol=1e-9)


# Every rank, every run.


def test_two_runs_are_identical() -> None:
    options = LBFGS_OPTIONS["hager_zhang"]
    first, second = (on_ranks(3, lbfgs, "fsdp", options)[0] for _ in range(2))
    assert first[:3] == second[:3]
    assert torch.equal(first.params, second.params)


def count_reductions(rank: int, options: dict[str, Any]) -> tuple[Fit, int]:
    calls, real = [], dist.all_reduce

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return real(*args, **kwargs)

    dist.all_reduce = counted
    try:
        return cases.fit_lbfgs("fsdp", options, n_steps=1, rank=rank), len(calls)
    finally:
        dist.all_reduce = real


@pytest.mark.parametrize(("line_search_fn", "per_iteration"), [("hager_zhang", 1), ("strong_wolfe", 2), (None, 2)])
@pytest.mark.parametrize("history_size", [3, 100])
def test_an_iteration_reduces_once_beside_its_evaluations(
    line_search_fn: str | None, per_iteration: int, history_size: int
) -> None:
    options = dict(max_iter=12, line_search_fn=line_search_fn, history_size=history_size)
    fit, n_reductions = on_ranks(2, count_reductions, options)[0]
    ((_, n_iter, n_eval, _),) = fit.counts
    assert n_iter == 12
    assert n_reductions <= n_eval + per_iteration * n_iter + 4


# Checkpoints.

KINDS = ["strong_wolfe", "hager_zhang", "bounds", "newton"]


def run_on_ranks(rank: int, *args: Any) -> tuple[Fit, Any]:
    return cases.run_on(*args, rank=rank)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_goes_on_on_any_number_of_ranks(kind: str) -> None:
    rtol = 1e-5 if kind == "newton" else 1e-9  # products of FSDP's parameters are differences
    _, saved_by_one = cases.run_on(None, kind)
    expected, _ = cases.run_on(None, kind, saved_by_one, 2)
    _, saved = on_ranks(2, run_on_ranks, "fsdp", kind)[1]
    for world in (2, 3):
        for checkpoint in (saved, saved_by_one):
            assert_fits([fit for fit, _ in on_ranks(world, run_on_ranks, "fsdp", kind, checkpoint, 2)], expected, rtol)
    assert_fits([cases.run_on(None, kind, saved, 2)[0]], expected, rtol)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_goes_on_as_if_nothing_had_happened(kind: str) -> None:
    whole, _ = on_ranks(3, run_on_ranks, "fsdp", kind, None, 3)[0]
    _, saved = on_ranks(3, run_on_ranks, "fsdp", kind)[0]
    resumed, _ = on_ranks(3, run_on_ranks, "fsdp", kind, saved, 2)[2]
    assert resumed.counts == whole.counts[1:]
    assert torch.equal(resumed.params, whole.params)


@pytest.mark.parametrize("kind", KINDS)
def test_state_dicts_are_those_of_one_process(kind: str) -> None:
    _, expected = cases.run_on(None, kind)
    _, saved = on_ranks(2, run_on_ranks, "hsdp" if kind == "bounds" else "fsdp", kind)[0]
    ours, theirs = saved["optimizer"]["state"][0], expected["optimizer"]["state"][0]
    assert set(theirs) <= set(ours)
    rtol = 1e-3 if kind == "newton" else 1e-6
    vectors = theirs["learned"] if "learned" in theirs else {"d": theirs["d"], "old_dirs": theirs["old_dirs"]}
    for name, expected_vector in vectors.items():
        vector = ours.get("learned", ours)[name]
        torch.testing.assert_close(vector, expected_vector, rtol=rtol, atol=rtol)


def distributed_checkpoint(rank: int, kind: str, path: str, saves: bool) -> Fit:
    model, loss = cases.problem("fsdp", rank)
    optimizer = cases.optimizer_of(model, kind)
    optimizer.init_state()
    if saves:
        optimizer.step(loss)
    else:
        saved = torch.load(path, weights_only=False)
        set_model_state_dict(model, saved["model"], options=WHOLE)
        set_optimizer_state_dict(model, optimizer, saved["optimizer"])
    whole = {
        "model": get_model_state_dict(model, options=WHOLE),
        "optimizer": get_optimizer_state_dict(model, optimizer),
    }
    if saves and rank == 0:
        torch.save(whole, path)
    results = []
    for _ in range(2):
        optimizer.step(loss)
        results.append(optimizer.result)
    return cases.fit_of(results, model.parameters())


WHOLE = StateDictOptions(full_state_dict=True)


@pytest.mark.parametrize("kind", ["strong_wolfe", "hager_zhang"])
def test_optimizer_state_dicts_of_torch_distributed_go_on(kind: str, tmp_path: Path) -> None:
    path = str(tmp_path / "saved.pt")
    expected = on_ranks(2, distributed_checkpoint, kind, path, True)[0]
    assert_fits(on_ranks(3, distributed_checkpoint, kind, path, False), expected, rtol=1e-9)


# Long vectors, and others than real ones of one dtype.


def long_problem(start: Tensor, options: dict[str, Any], part: slice = slice(None)) -> Fit:
    """Most variables of a badly scaled quadratic; their scales differ so much that the learned diagonal is clipped."""
    scales = torch.logspace(0, 9, start.numel(), dtype=start.dtype)[torch.arange(start.numel()) * 7 % start.numel()]

    def loss(p: dict[str, Tensor]) -> Tensor:
        x = p["x"]
        here = scales if x is start or not is_dtensor(x) else distribute_tensor(scales, x.device_mesh, x.placements)
        return full_of(((x - 1) ** 2 * here).sum() + (x**4).sum())

    result = descend.minimize(loss, {"x": start}, **options)
    return cases.fit_of([result], result.x.values())


def long_problem_on_ranks(rank: int, numel: int, options: dict[str, Any]) -> Fit:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return long_problem(distribute_tensor(torch.zeros(numel, dtype=torch.float64), mesh, [Shard(0)]), options)


@pytest.mark.parametrize(("numel", "rtol"), [(2501, 1e-9), (20_001, 1e-4)], ids=["sampled", "in float32"])
def test_long_vectors_are_as_in_one_process(numel: int, rtol: float) -> None:
    options = dict(max_iter=8, tol=1e-12)
    expected = long_problem(torch.zeros(numel, dtype=torch.float64), options)
    assert_fits(on_ranks(3, long_problem_on_ranks, numel, options), expected, rtol)


def mixed_kinds(options: dict[str, Any], wrap: bool) -> Fit:
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(7, generator=generator, dtype=torch.float32)
    complex_ = torch.randn(3, 2, generator=generator, dtype=torch.complex128)
    double = torch.randn(5, generator=generator, dtype=torch.float64)
    params = [real, complex_, double]
    if wrap:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        params = [distribute_tensor(real, mesh, [Shard(0)]), distribute_tensor(complex_, mesh, [Shard(0)]), double]
    leaves = [torch.nn.Parameter(param) for param in params]
    optimizer = descend.LBFGS(leaves, tolerance_grad=1e-9, tolerance_change=1e-14, **options)

    def loss() -> Tensor:
        parts = [(abs(leaf) ** 2 + (abs(leaf) ** 2 - 0.5) ** 2).sum().double() for leaf in leaves]
        return sum(full_of(part) for part in parts)

    optimizer.step(loss)
    return cases.fit_of([optimizer.result], [torch.view_as_real(full_of(p.detach()).cdouble()) for p in leaves])


def mixed_kinds_on_ranks(rank: int, options: dict[str, Any]) -> Fit:
    return mixed_kinds(options, wrap=True)


@pytest.mark.parametrize("line_search_fn", ["strong_wolfe", "hager_zhang"])
def test_complex_and_narrow_parameters_are_as_in_one_process(line_search_fn: str) -> None:
    options = dict(line_search_fn=line_search_fn, max_iter=6)
    assert_fits(on_ranks(2, mixed_kinds_on_ranks, options), mixed_kinds(options, wrap=False), rtol=1e-5)


# What goes wrong.


def nan_on_one_rank(rank: int, line_search_fn: str | None) -> tuple[str, int]:
    """The loss of the last rank is NaN wherever the line search looks first."""
    model, loss = cases.problem("fsdp", rank)
    optimizer = descend.LBFGS(model.parameters(), line_search_fn=line_search_fn, max_iter=4, lr=0.5)
    calls = []

    def closure() -> Tensor:
        calls.append(None)
        return loss() * (math.nan if rank == 1 and len(calls) == 2 else 1.0)

    optimizer.step(closure)
    assert all(bool(full_of(param.detach()).isfinite().all()) for param in model.parameters())
    return str(optimizer.result.status), len(calls)


@pytest.mark.parametrize("line_search_fn", [None, "strong_wolfe", "hager_zhang"])
def test_nan_on_one_rank_is_met_by_all(line_search_fn: str | None) -> None:
    first, *others = on_ranks(2, nan_on_one_rank, line_search_fn)
    assert others == [first]


def errors(rank: int) -> list[str]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    x = distribute_tensor(torch.ones(5, dtype=torch.float64), mesh, [Shard(0)])
    partial = DTensor.from_local(torch.ones(2), mesh, [Partial()])
    calls = [
        lambda: descend.minimize(torch.sum, x, method="newton"),
        lambda: descend.minimize(torch.sum, x, method="bfgs"),
        lambda: descend.minimize(torch.sum, x, jac=True),
        lambda: descend.Newton([torch.nn.Parameter(x)], solver="cholesky").step(lambda: x.sum()),
        lambda: descend.LBFGS([torch.nn.Parameter(partial)]).step(lambda: partial.sum()),
    ]
    messages = []
    for call in calls:
        with pytest.raises(ValueError, match=r"sharded|DTensors|partial sum") as caught:
            call()
        messages.append(str(caught.value))
    return messages


def test_errors_say_what_to_do() -> None:
    assert on_ranks(2, errors)[0] == [
        "minimize: method='newton': a dense matrix needs all variables in one process, but they are sharded. "
        "Use minimize(method='newton-cg') or Newton(solver='cg').",
        "minimize: method='bfgs': a dense matrix needs all variables in one process, but they are sharded. "
        "Use method='l-bfgs'.",
        "minimize: derivatives are functions of values, but x0 is made of DTensors, which are set in place. "
        "Leave jac and hvp out.",
        "Newton: a dense matrix needs all variables in one process, but they are sharded. "
        "Use minimize(method='newton-cg') or Newton(solver='cg').",
        "LBFGS: a parameter has placements (Partial(sum),) on a mesh of shape (2,): it is a partial sum. "
        "Redistribute it.",
    ]


def stop_on_one_rank(rank: int) -> tuple[str, int]:
    x = distribute_tensor(torch.ones(5, dtype=torch.float64), init_device_mesh("cpu", (2,)), [Shard(0)])
    result = descend.minimize(lambda x: (x**4).sum(), x, callback=lambda progress: rank == 1 and progress.n_iter == 2)
    return str(result.status), result.n_iter


def test_a_callback_on_one_rank_stops_all() -> None:
    assert on_ranks(2, stop_on_one_rank) == [("stopped_by_callback", 2)] * 2


def backward_in_the_closure(rank: int, options: dict[str, Any], set_to_none: bool) -> Fit:
    model, loss = cases.problem("fsdp", rank)
    optimizer = descend.LBFGS(model.parameters(), tolerance_grad=1e-9, tolerance_change=1e-14, **options)

    def closure() -> Tensor:
        optimizer.zero_grad(set_to_none)
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)
    return cases.fit_of([optimizer.result], model.parameters())


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("name", ["strong_wolfe", "hager_zhang"])
def test_closures_may_call_backward(name: str, set_to_none: bool) -> None:
    options = LBFGS_OPTIONS[name]
    expected = cases.fit_lbfgs(None, options, n_steps=1)
    assert_fits(on_ranks(2, backward_in_the_closure, options, set_to_none), expected, rtol=1e-9)


def bounds_on_ranks(rank: int) -> Tensor:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    weight = torch.nn.Parameter(distribute_tensor(torch.zeros(5, dtype=torch.float64), mesh, [Shard(0)]))
    lower = torch.tensor([-1.0, 0.5, -1.0, -1.0, 0.25], dtype=torch.float64)
    bounds = (distribute_tensor(lower, mesh, [Shard(0)]), lower + 1)
    optimizer = descend.LBFGS([weight], line_search_fn="hager_zhang", bounds=bounds)
    optimizer.step(lambda: ((weight - 0.3) ** 2).sum())
    return full_of(weight.detach())


def test_bounds_may_be_sharded_or_whole_tensors() -> None:
    expected = torch.tensor([0.0, 0.5, 0.0, 0.0, 0.3], dtype=torch.float64)
    for found in on_ranks(3, bounds_on_ranks):
        torch.testing.assert_close(found, expected)


def raise_on_one_rank(rank: int) -> str:
    model, loss = cases.problem("fsdp", rank)
    optimizer = descend.LBFGS(model.parameters(), line_search_fn="hager_zhang")

    def closure() -> Tensor:
        if rank == 1:
            raise ZeroDivisionError
        return loss()

    with pytest.raises((ZeroDivisionError, RuntimeError)) as caught:
        optimizer.step(closure)
    return caught.type.__name__


def test_a_rank_that_raises_leaves_nobody_waiting_beyond_the_time_out() -> None:
    assert on_ranks(2, raise_on_one_rank, timeout=5)[1] == "ZeroDivisionError"
