"""Which runs a request asks for, and which learning rate is chosen."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from descend.compare import specs
from descend.compare.plan import FACTORS, TUNING_SEEDS, Entry, candidates, tuned, variants
from descend.compare.records import Run
from descend.compare.sweep import combinations, parse_sweeps

LR = {"sgd": 0.2, "adamw": 2e-3}


def planned(*texts: str, sweeps: list[str]) -> list[tuple[str, str, float | None]]:
    found = variants(specs.parse_all(texts, LR), parse_sweeps(sweeps), LR, seed=0)
    return [(entry.label, entry.text, entry.lr) for entry in found]


def test_range_is_even_in_the_logarithm() -> None:
    values = [float(text) for text in parse_sweeps(["lr=1e-4..1e-1:7"])["lr"]]
    assert values == pytest.approx([10 ** (-4 + i / 2) for i in range(7)], rel=1e-3)


def test_combinations_are_all_of_them() -> None:
    assert combinations({"a": ["1", "2"], "b": ["3", "4"]}) == [
        {"a": "1", "b": "3"},
        {"a": "1", "b": "4"},
        {"a": "2", "b": "3"},
        {"a": "2", "b": "4"},
    ]


def test_runs_that_differ_in_the_rate_share_a_label() -> None:
    assert planned("sgd", sweeps=["lr=1,2"]) == [("sgd", "sgd", 1.0), ("sgd", "sgd", 2.0)]


def test_other_options_are_part_of_the_label() -> None:
    assert planned("adamw:eps=1e-6", sweeps=["weight_decay=0,0.1"]) == [
        ("adamw:eps=1e-6,weight_decay=0", "adamw:eps=1e-6,weight_decay=0", 2e-3),
        ("adamw:eps=1e-6,weight_decay=0.1", "adamw:eps=1e-6,weight_decay=0.1", 2e-3),
    ]


def test_optimizer_without_a_rate_runs_once_in_a_sweep() -> None:
    assert planned("newton", "sgd", sweeps=["lr=1,2"]) == [
        ("newton", "newton", None),
        ("sgd", "sgd", 1),
        ("sgd", "sgd", 2),
    ]


def test_swept_rate_is_the_optimizers() -> None:
    [_, entry] = variants(specs.parse_all(["torch.adamw"], LR), parse_sweeps(["lr=1,0.5"]), LR, seed=0)
    assert entry.contestant(LR).options["lr"] == 0.5


ENTRY = Entry("sgd", "sgd", "sgd", 0.2, seed=3)


def finished(entry: Entry, loss: float, status: str = "finished") -> Run:
    return Run(entry.label, entry.spec, "SGD", {}, entry.lr, entry.seed, status, test_losses=[9.0, loss], tuning=True)


def test_every_optimizer_has_the_same_budget_and_seeds_of_its_own() -> None:
    tried = candidates(ENTRY)
    assert len(tried) == len(FACTORS) * TUNING_SEEDS
    assert sorted({entry.lr for entry in tried if entry.lr}) == [0.02, 0.063, 0.2, 0.63, 2.0]
    assert all(entry.tuning and entry.seed >= 10_000 for entry in tried)
    assert candidates(replace(ENTRY, lr=None)) == []


def test_rate_with_the_lowest_held_out_loss_is_chosen() -> None:
    runs = {entry.key: finished(entry, abs(math.log(entry.lr or 1) - math.log(0.6))) for entry in candidates(ENTRY)}
    assert tuned(ENTRY, runs) == replace(ENTRY, lr=0.63)


def test_rate_that_diverges_once_is_not_chosen() -> None:
    runs = {entry.key: finished(entry, entry.lr or 0) for entry in candidates(ENTRY)}
    worst = next(entry for entry in candidates(ENTRY) if entry.lr == 0.02)
    runs[worst.key] = finished(worst, 0.0, "diverged")
    assert tuned(ENTRY, runs).lr == 0.063


def test_rate_stays_if_all_diverge() -> None:
    assert tuned(ENTRY, {entry.key: finished(entry, 1.0, "diverged") for entry in candidates(ENTRY)}) == ENTRY
