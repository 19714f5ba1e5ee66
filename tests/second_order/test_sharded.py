"""L-BFGS, Newton and minimize on sharded parameters: the same as one process to rounding, on every rank alike."""

from __future__ import annotations

from typing import Any

import pytest
import sharded_cases as cases
import torch
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
