"""Accelerate: prepare, parameters swapped after construction, resuming from a folder."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import FIRST_ORDER, Words, assert_same_model, bags, build, exact_adamw, loss_of, network
from torch import nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    accelerate = pytest.importorskip("accelerate", reason="needs pip install 'descend[stack]'")

# Their advice, and their dependencies' deprecations; but not what we say, nor schedulers that see no step.
pytestmark = pytest.mark.filterwarnings("ignore", "error:::descend", "error:Detected call of `lr_scheduler.step")


def prepared(kind: Any, **options: Any) -> tuple[Any, nn.Module, Any, Any]:
    """Accelerator, model, optimizer and scheduler."""
    accelerator = accelerate.Accelerator(cpu=True, **options)
    model = network()
    optimizer = build(kind, model.parameters(), lr=0.01, max_norm=1.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=8)
    return accelerator, *accelerator.prepare(model, optimizer, scheduler)


def train(accelerator: Any, model: nn.Module, optimizer: Any, scheduler: Any, seeds: Any) -> None:
    for seed in seeds:
        with accelerator.accumulate(model):
            optimizer.zero_grad()
            accelerator.backward(loss_of(model, seed))
            optimizer.step()
            scheduler.step()


@pytest.mark.parametrize("name", FIRST_ORDER)
def test_prepared_training_equals_plain_training(name: str) -> None:
    run = prepared(FIRST_ORDER[name])
    train(*run, range(6))
    model = network()
    optimizer = build(FIRST_ORDER[name], model.parameters(), lr=0.01, max_norm=1.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=8)
    for seed in range(6):
        optimizer.zero_grad()
        loss_of(model, seed).backward()
        optimizer.step()
        scheduler.step()
    assert_same_model(run[1], model)
    assert run[2].optimizer.max_norm == 1.0


def test_steps_wait_for_accumulated_gradients() -> None:
    run = prepared(FIRST_ORDER["AdamW"], gradient_accumulation_steps=2)
    train(*run, range(4))
    assert {float(state["step"]) for state in run[2].optimizer.state.values()} == {2.0}


@pytest.mark.parametrize("name", FIRST_ORDER)
def test_run_resumed_from_a_folder_equals_an_uninterrupted_one(name: str, tmp_path: Path) -> None:
    whole, first, second = (prepared(FIRST_ORDER[name]) for _ in range(3))
    train(*whole, range(8))
    train(*first, range(4))
    first[0].save_state(str(tmp_path / "half"))
    second[0].load_state(str(tmp_path / "half"))
    train(*second, range(4, 8))
    assert_same_model(second[1], whole[1])


@pytest.mark.parametrize("name", FIRST_ORDER)
def test_parameters_swapped_after_construction_are_the_ones_that_move(name: str) -> None:
    first, model, plain = network(seed=1), network(), network()
    optimizer = build(FIRST_ORDER[name], first.parameters(), lr=0.01)
    loss_of(model, 0).backward()
    swapped = dict(zip(first.parameters(), model.parameters(), strict=True))
    for group in optimizer.param_groups:  # as Accelerate does for FSDP
        group["params"] = [swapped[param] for param in group["params"]]
    optimizer.step()
    loss_of(plain, 0).backward()
    build(FIRST_ORDER[name], plain.parameters(), lr=0.01).step()
    assert_same_model(model, plain)


def test_exact_sparse_training_is_dense_training() -> None:
    models = [Words(is_sparse) for is_sparse in (True, False)]
    ours, theirs = exact_adamw(models[0]), torch.optim.AdamW(models[1].parameters(), lr=0.01, weight_decay=0.1)
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(models[0], ours)
    for first in range(0, 32, 4):
        words, labels = (part[first : first + 4] for part in bags())
        optimizer.zero_grad()
        accelerator.backward(model(words, labels)["loss"])
        optimizer.step()
        theirs.zero_grad()
        models[1](words, labels)["loss"].backward()
        theirs.step()
    ours.settle()
    torch.testing.assert_close(models[0].state_dict(), models[1].state_dict(), rtol=1e-4, atol=1e-5)  # float32, 8 steps


def test_accelerate_clips() -> None:
    accelerator, model, optimizer, _ = prepared(FIRST_ORDER["SGD"])
    accelerator.backward(loss_of(model, 0))
    accelerator.clip_grad_norm_(model.parameters(), 1e-3)
    optimizer.step()
    assert optimizer.optimizer.grad_norm == pytest.approx(1e-3, rel=2e-3)  # torch adds 1e-6 to the norm
