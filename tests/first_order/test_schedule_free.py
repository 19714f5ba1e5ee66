"""Schedule-free AdamW: the paper's three points, and the switch between the two that parameters can be."""

from __future__ import annotations

import copy
import io
from typing import Any

import numpy as np
import pytest
import torch
from cases import BACKENDS, assert_unmoved, give_grads, leaves, params_of, snapshot, state_of

from descend import AdamWScheduleFree

OPTIONS = dict(lr=0.1, betas=(0.8, 0.9), weight_decay=0.1, warmup_steps=4)


def walk(optimizer: AdamWScheduleFree, seeds: Any) -> None:
    for seed in seeds:
        give_grads(params_of(optimizer), seed)
        optimizer.step()


def copies(optimizer: AdamWScheduleFree) -> list[torch.Tensor]:
    return [param.detach().clone() for param in params_of(optimizer)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("warmup_steps", "r", "power", "decay"), [(0, 0.0, 2.0, 0.0), (5, 0.0, 2.0, 0.1), (10, 2.0, 0.5, 0.1)]
)
def test_it_is_algorithm_1_of_the_paper(backend: str, warmup_steps: int, r: float, power: float, decay: float) -> None:
    beta1, beta2, eps = 0.9, 0.99, 1e-8
    param = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64, requires_grad=True)
    optimizer = AdamWScheduleFree(
        [param], 0.1, (beta1, beta2), eps, decay, warmup_steps, r, power, backend=backend, max_norm=1e9
    )
    x = z = param.detach().numpy().copy()
    v, total, largest = np.zeros(4), 0.0, 0.0
    random = np.random.default_rng(0)
    for t in range(1, 41):
        y = (1 - beta1) * z + beta1 * x
        np.testing.assert_allclose(param.detach().numpy(), y, rtol=1e-13, atol=1e-14)  # 40 steps of rounding
        g = random.normal(size=4) + y
        param.grad = torch.tensor(g)
        optimizer.step()
        gamma = 0.1 * min(1.0, t / warmup_steps) if warmup_steps else 0.1
        v = beta2 * v + (1 - beta2) * g**2
        z = z - gamma * g / (np.sqrt(v / (1 - beta2**t)) + eps) - gamma * decay * y
        largest = max(largest, gamma)
        weight = t**r * largest**power
        total += weight
        x = (1 - weight / total) * x + weight / total * z
        np.testing.assert_allclose(optimizer.state[param]["z"].numpy(), z, rtol=1e-13, atol=1e-14)
    optimizer.eval()
    np.testing.assert_allclose(param.detach().numpy(), x, rtol=1e-13, atol=1e-14)
    optimizer.train()
    np.testing.assert_allclose(param.detach().numpy(), (1 - beta1) * z + beta1 * x, rtol=1e-13, atol=1e-14)


def test_switching_twice_is_switching_once_and_back_again_changes_nothing() -> None:
    optimizer = AdamWScheduleFree(leaves(), **OPTIONS)
    walk(optimizer, range(5))
    y = copies(optimizer)
    optimizer.train()  # it is training already
    assert all(map(torch.equal, params_of(optimizer), y))
    optimizer.eval()
    x = copies(optimizer)
    optimizer.eval()
    assert all(map(torch.equal, params_of(optimizer), x))
    assert not torch.equal(x[2], y[2])
    optimizer.train()
    for param, before in zip(params_of(optimizer), y, strict=True):
        torch.testing.assert_close(param.detach(), before, rtol=1e-14, atol=1e-15)  # two roundings


def test_before_the_first_step_all_points_are_one() -> None:
    optimizer = AdamWScheduleFree(leaves(), **OPTIONS)
    start = copies(optimizer)
    optimizer.eval()
    optimizer.train()
    assert all(map(torch.equal, params_of(optimizer), start))
    assert not optimizer.state


def test_switching_to_and_fro_does_not_change_the_path() -> None:
    straight, switching = (AdamWScheduleFree(leaves(), **OPTIONS, max_norm=1.0) for _ in range(2))
    for seed in range(10):
        walk(straight, [seed])
        walk(switching, [seed])
        switching.eval()
        switching.train()
    for ours, theirs in zip(params_of(switching), params_of(straight), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-14)  # two roundings a step


@pytest.mark.parametrize("backend", BACKENDS)
def test_step_in_eval_mode_is_refused_and_moves_nothing(backend: str) -> None:
    optimizer = AdamWScheduleFree(leaves(), **OPTIONS, backend=backend)
    walk(optimizer, range(3))
    optimizer.eval()
    before = snapshot(optimizer)
    give_grads(params_of(optimizer), 3)
    with pytest.raises(RuntimeError, match="Optimizer was not in train mode when step is called"):
        optimizer.step()
    optimizer.zero_grad()
    optimizer.step()  # nothing to do, and nothing is counted
    assert_unmoved(optimizer, before)
    optimizer.train()
    walk(optimizer, [3])
    assert optimizer.param_groups[0]["k"] == 4


@pytest.mark.parametrize("way", ["loaded", "current", "deepcopy"])
@pytest.mark.parametrize("training", [True, False])
def test_checkpoint_of_either_mode_goes_on(training: bool, way: str) -> None:
    straight, saved = (AdamWScheduleFree(leaves(), **OPTIONS, max_norm=1.0) for _ in range(2))
    for optimizer in (straight, saved):
        walk(optimizer, range(5))
        if not training:
            optimizer.eval()
    if way == "deepcopy":
        loaded = copy.deepcopy(saved)
    else:
        file = io.BytesIO()
        torch.save([copies(saved), saved.state_dict()], file)
        file.seek(0)
        params, state = torch.load(file, weights_only=True)
        options = OPTIONS if way == "current" else {}
        loaded = AdamWScheduleFree([param.requires_grad_() for param in params], **options, max_norm=1.0)
        loaded.load_state_dict(state, hyperparameters=way)
    for optimizer in (straight, loaded):
        optimizer.train()
        walk(optimizer, range(5, 9))
        optimizer.eval()
    assert all(map(torch.equal, params_of(loaded), params_of(straight)))
    assert loaded.param_groups[0]["weight_sum"] == straight.param_groups[0]["weight_sum"]


def test_average_of_another_shape_moves_nothing() -> None:
    optimizer = AdamWScheduleFree(leaves(), **OPTIONS)
    walk(optimizer, range(3))
    optimizer.state[params_of(optimizer)[-1]]["z"] = torch.zeros(7, 7, dtype=torch.float64)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"z of .* has shape \(7, 7\), expected"):
        optimizer.eval()
    assert_unmoved(optimizer, before)


def test_skipped_steps_are_not_counted() -> None:
    optimizer = AdamWScheduleFree(leaves(), **OPTIONS, nonfinite="skip")
    walk(optimizer, range(3))
    before = snapshot(optimizer)
    give_grads(params_of(optimizer), 3)
    params_of(optimizer)[2].grad[0, 0] = torch.nan
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert_unmoved(optimizer, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.complex64], ids=str)
def test_state_wider_than_parameters_and_complex_numbers_switch_too(dtype: torch.dtype) -> None:
    param = torch.ones(100, dtype=dtype, requires_grad=True)
    optimizer = AdamWScheduleFree([param], lr=0.25, betas=(0.5, 0.9), state_dtype=torch.float32)
    for _ in range(2):
        param.grad = torch.full_like(param, 1 + 1j if dtype.is_complex else 1)
        optimizer.step()
    start = torch.complex(torch.tensor(1.0), torch.tensor(0.0)) if dtype.is_complex else torch.tensor(1.0)
    move = torch.complex(torch.tensor(0.25), torch.tensor(0.25)) if dtype.is_complex else torch.tensor(0.25)
    tolerance = dict(rtol=1e-2, atol=1e-2) if dtype == torch.bfloat16 else dict(rtol=2e-3, atol=2e-3)  # y is rounded
    optimizer.eval()
    torch.testing.assert_close(param.detach(), (start - 1.5 * move).to(dtype).expand(100), **tolerance)
    optimizer.train()
    torch.testing.assert_close(param.detach(), (start - 1.75 * move).to(dtype).expand(100), **tolerance)


def test_parameter_that_joins_late_starts_where_it_is() -> None:
    params = leaves()
    optimizer = AdamWScheduleFree(params, **OPTIONS)
    for seed in range(3):
        give_grads(params, seed)
        params[3].grad = None
        optimizer.step()
    start = params[3].detach().clone()
    assert 3 not in state_of(optimizer)
    give_grads(params, 3)
    optimizer.step()
    # z took one step of AdamW: decay, and at most lr / sqrt(1 - beta2**4) * sqrt(1 - beta2) along the gradient.
    moved = optimizer.state[params[3]]["z"] - start * (1 - 0.1 * 0.1)
    assert float(moved.abs().max()) == pytest.approx(0.1 / (1 - 0.9**4) ** -0.5 / 0.1**0.5, rel=1e-6)


def test_its_average_beats_the_last_step_on_a_noisy_valley() -> None:
    """What the method is for: x settles where steps of constant length keep jumping about."""
    torch.manual_seed(0)
    param = torch.full((50,), 3.0, dtype=torch.float64, requires_grad=True)
    optimizer = AdamWScheduleFree([param], lr=0.1)
    for _ in range(500):
        param.grad = param.detach() + torch.randn(50, dtype=torch.float64)
        optimizer.step()
    last = optimizer.state[param]["z"].norm()
    optimizer.eval()
    assert param.norm() < 0.5 * last


def test_first_beta_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="Invalid beta parameter at index 0: 0"):
        AdamWScheduleFree(leaves(), betas=(0.0, 0.9))
