"""L-BFGS, Newton and minimize on sharded parameters: the same as one process to rounding, on every rank alike."""

from __future__ import annotations

from typing import Any

import pytest
import sharded_cases as cases
import torch
import torch.distributed as dist
from ranks import on_ranks
from sharded_cases import Fit


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
LAYOUTS = [("fsdp", 2), ("fsdp", 3), ("hsdp", 4), ("mixed", 3), ("tp", 2)]


def lbfgs(rank: int, *args: Any) -> Fit:
    return cases.fit_lbfgs(*args, rank=rank)


@pytest.mark.parametrize(("wrapping", "world"), LAYOUTS)
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
