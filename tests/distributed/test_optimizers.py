"""Every optimizer on DTensors, in every layout, equals torch's on the whole tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import BACKENDS
from ranks import on_ranks
from sharded import LAYOUTS, SOME, TABLE, Sharded, bits, mismatches

OPTIONS: dict[str, dict[str, Any]] = {
    "max_norm": dict(max_norm=0.5),
    "large max_norm": dict(max_norm=1e3),
    "skip": dict(nonfinite="skip"),
    "raise": dict(nonfinite="raise", max_norm=0.5),
    "eager": dict(backend="eager", max_norm=0.5),
}
BOTH: dict[str, dict[str, Any]] = {
    "maximize": dict(maximize=True),
    "foreach": dict(foreach=True),
    "tensor lr": dict(lr=torch.tensor(0.01, dtype=torch.float64)),
}


# In the others, one optimizer of each kind.
ALL_OPTIMIZERS = ("rows of 3", "strided rows", "several meshes")


def follow(name: str, put: Any, both: dict[str, Any], ours: dict[str, Any], runs: int = 1) -> None:
    case = TABLE[name]
    both = {key: value for key, value in both.items() if case.takes(key) or key == "lr"}
    ended = []
    for _ in range(runs):
        pair = Sharded(case, put, both, **ours)
        schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in (pair.ours, pair.theirs)]
        for seed in range(4):
            pair.step(seed)
            if seed == 1:
                for scheduler in schedulers:
                    scheduler.step()
        pair.assert_equal()
        ended.append(bits(pair.ours))
    assert ended[0] == ended[-1]
    if "backend" not in ours:
        assert {placement.backend for placement in pair.ours.backends()} == {BACKENDS[0]}


def compare(rank: int, layout: str) -> list[str]:
    put = LAYOUTS[layout][1]()
    found = mismatches(follow, TABLE if layout in ALL_OPTIMIZERS else SOME, put, {}, {}, 2)
    for label, ours in OPTIONS.items():
        found += [f"{label}: {text}" for text in mismatches(follow, SOME, put, {}, ours)]
    for label, both in BOTH.items():
        found += [f"{label}: {text}" for text in mismatches(follow, SOME, put, both, {})]
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_steps_are_those_of_the_whole_tensors(layout: str) -> None:
    for found in on_ranks(LAYOUTS[layout][0], compare, layout):
        assert not found
