"""What the newer methods do at the edges: first steps, gradients of zero, huge ones, groups that join."""

from __future__ import annotations

import io
import re
from typing import Any

import numpy as np
import pytest
import torch
from cases import BACKENDS, DENSE_BACKENDS, give_grads, leaves
from torch import Tensor

from descend import ADOPT, LAMB, MARS, AdamW, Adan, AdEMAMix, FirstOrder, Prodigy

NEW = [ADOPT, AdEMAMix, Adan, MARS, LAMB, Prodigy]


def param_with(grad: float, dtype: torch.dtype = torch.float64) -> Tensor:
    param = torch.linspace(-1, 1, 37, dtype=dtype).requires_grad_()
    param.grad = torch.full_like(param, grad)
    return param


@pytest.mark.parametrize("backend", DENSE_BACKENDS)
@pytest.mark.parametrize("kind", NEW)
def test_gradients_at_the_end_of_the_range_give_no_nan(kind: type[FirstOrder], backend: str) -> None:
    param = torch.linspace(-1, 1, 37).requires_grad_()
    optimizer = kind([param], lr=0.1, backend=backend)
    for grad in (3e38, -3e38, 3e38, 1.0, 0.0):
        param.grad = torch.full_like(param, grad)
        optimizer.step()
    assert bool(param.isfinite().all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("decoupled", [False, True])
def test_adopt_only_fills_its_average_in_the_first_step(decoupled: bool, backend: str) -> None:
    param = param_with(2.0)
    optimizer = ADOPT([param], weight_decay=0.0, decoupled_weight_decay=decoupled, backend=backend)
    optimizer.param_groups[0]["weight_decay"] = 0.5 if decoupled else 0.0
    before = param.detach().clone()
    optimizer.step()
    assert torch.equal(param, before)
    state = optimizer.state[param]
    assert torch.equal(state["exp_avg_sq"], torch.full_like(param, 4.0))
    assert not state["exp_avg"].any()


@pytest.mark.parametrize("backend", DENSE_BACKENDS)
def test_adopt_needs_no_eps_where_gradients_are_zero(backend: str) -> None:
    param = param_with(0.0)
    before = param.detach().clone()
    optimizer = ADOPT([param], lr=0.1, eps=0, backend=backend)
    for grad in (0.0, 0.0, 1.0):
        param.grad = torch.full_like(param, grad)
        optimizer.step()
    # The gradient of the third step is infinitely longer than all before: it is clipped at 2 ** 0.25.
    torch.testing.assert_close(before - param.detach(), torch.full_like(param, 0.1 * 0.1 * 2**0.25))


def test_ademamix_grows_into_its_slow_average() -> None:
    optimizer = AdEMAMix(leaves(), betas=(0.9, 0.999, 0.99), alpha=4.0, beta3_warmup=10, alpha_warmup=8)
    group = optimizer.param_groups[0]

    def slow(step: float) -> tuple[float, float]:
        scalars = optimizer.scalars(group, step)
        return 1 - scalars[3], scalars[4]

    half_life = torch.log(torch.tensor([0.9, slow(5)[0], 0.99], dtype=torch.float64)).reciprocal()
    torch.testing.assert_close(half_life[1], (half_life[0] + half_life[2]) / 2)  # half way
    assert [slow(step)[1] for step in (4, 8, 9)] == [2.0, 4.0, 4.0]
    assert slow(10)[0] == slow(1000)[0] == 0.99
    assert 0 < AdEMAMix(leaves(), betas=(0.0, 0.9, 0.99), beta3_warmup=10).scalars(group, 5)[3] < 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_adan_has_no_change_in_a_parameters_first_step(backend: str) -> None:
    first, late = param_with(1.0), param_with(1.0)
    late.grad = None
    optimizer = Adan([first, late], lr=0.1, backend=backend)
    optimizer.step()
    late.grad = torch.full_like(late, 7.0)
    optimizer.step()
    assert not optimizer.state[late]["exp_avg_diff"].any()
    assert torch.equal(optimizer.state[late]["previous_grad"], late.grad)


@pytest.mark.parametrize("kind", [Adan, MARS])
def test_previous_gradients_are_those_that_the_step_has_used(kind: type[FirstOrder]) -> None:
    param = param_with(1.0)
    optimizer = kind([param], max_norm=1.0, maximize=True)
    optimizer.step()
    previous = optimizer.state[param]["previous_grad"]
    torch.testing.assert_close(previous.norm(), torch.ones_like(previous[0]))
    assert bool((previous < 0).all())


@pytest.mark.parametrize("backend", DENSE_BACKENDS)
def test_mars_clips_each_tensor_by_its_own_norm(backend: str) -> None:
    params = leaves([(6,), (4, 5)])
    optimizer = MARS(params, betas=(0.0, 0.0), backend=backend)  # the average is the corrected gradient itself
    params[0].grad, params[1].grad = torch.full_like(params[0], 3.0), torch.full_like(params[1], 0.01)
    optimizer.step()
    long, short = (optimizer.state[param]["exp_avg"] for param in params)
    torch.testing.assert_close(long, params[0].grad / params[0].grad.norm())
    assert torch.equal(short, params[1].grad)


@pytest.mark.parametrize("backend", DENSE_BACKENDS)
def test_lambs_step_is_as_long_as_lr_times_the_norm(backend: str) -> None:
    params = leaves([(6,), (4, 5), (3,)])
    with torch.no_grad():
        params[2].zero_()  # without a norm: a trust ratio of 1
    before = [param.detach().clone() for param in params]
    give_grads(params, 0)
    LAMB(params, lr=0.1, clamp_value=3.0, backend=backend).step()
    lengths = [float((old - new.detach()).norm()) for old, new in zip(before, params, strict=True)]
    norms = [min(float(old.norm()), 3.0) for old in before[:2]]
    assert norms[1] == 3.0
    assert lengths == pytest.approx([0.1 * norms[0], 0.1 * norms[1], 0.1 * 3**0.5], rel=1e-4)  # eps is 1e-6


def quadratic(params: list[Tensor]) -> None:
    """Gradients of a loss whose solution is at 3."""
    for param in params:
        param.grad = param.detach() - 3.0


@pytest.mark.parametrize("backend", BACKENDS)
def test_prodigy_finds_the_distance(backend: str) -> None:
    params = [torch.zeros(5, dtype=torch.float64, requires_grad=True), torch.zeros((), requires_grad=True)]
    optimizer = Prodigy(params, d0=1e-3, backend=backend)
    for _ in range(150):
        quadratic(params)
        optimizer.step()
    # The paper bounds the estimate by the distance in the largest component.
    assert 0.5 < optimizer.param_groups[0]["d"] <= 3.0
    assert all(bool(((param - 3).abs() < 0.1).all()) for param in params)


def test_groups_of_prodigy_share_one_estimate_even_if_they_join_later() -> None:
    params = [
        torch.zeros(5, requires_grad=True),
        torch.zeros(2, requires_grad=True),
        torch.zeros(3, requires_grad=True),
    ]
    optimizer = Prodigy([{"params": params[:1]}, {"params": params[1:2], "lr": 0.5}], d0=1e-3)
    for _ in range(10):
        quadratic(params[:2])
        optimizer.step()
    optimizer.add_param_group({"params": params[2:]})
    quadratic(params)
    optimizer.step()
    keys = ("d", "d_max", "d_numerator", "k")
    first, *others = ([group[key] for key in keys] for group in optimizer.param_groups)
    assert first[0] > 1e-3
    assert all(other == first for other in others)


def test_prodigys_estimate_survives_a_checkpoint_whose_options_are_not_wanted() -> None:
    params = leaves([(6,)])
    optimizer = Prodigy(params, d0=1e-3)
    for _ in range(10):
        quadratic(params)
        optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    copies = [param.detach().clone().requires_grad_() for param in params]
    resumed = Prodigy(copies, d0=1e-3, lr=0.5)
    resumed.load_state_dict(torch.load(file), hyperparameters="current")
    assert resumed.param_groups[0]["d"] == optimizer.param_groups[0]["d"] > 1e-3
    assert resumed.param_groups[0]["lr"] == 0.5
    assert torch.equal(resumed.state[copies[0]]["p0"], leaves([(6,)])[0])


def test_prodigys_start_keeps_the_parameters_digits() -> None:
    params = leaves([(6,)], torch.float32)
    optimizer = Prodigy(params, state_dtype=torch.bfloat16)
    give_grads(params, 0)
    before = params[0].detach().clone()
    optimizer.step()
    state = optimizer.state[params[0]]
    assert torch.equal(state["p0"], before)
    assert state["s"].dtype == torch.bfloat16


def test_a_step_without_gradients_changes_nothing_of_prodigy() -> None:
    params = leaves([(6,)])
    optimizer = Prodigy(params)
    optimizer.step()
    give_grads(params, 0)
    optimizer.step()
    group = dict(optimizer.param_groups[0])
    params[0].grad = None
    optimizer.step()
    assert {key: group[key] for key in Prodigy.group_state} == {
        key: optimizer.param_groups[0][key] for key in Prodigy.group_state
    }


@pytest.mark.parametrize("method", ["mars", "lamb", "prodigy"])
def test_methods_with_sums_work_beside_adamw(method: str) -> None:
    kind = {"mars": MARS, "lamb": LAMB, "prodigy": Prodigy}[method]
    together, alone = leaves([(6,), (4, 5), (7,)]), leaves([(6,), (4, 5), (7,)])
    both = AdamW([{"params": together[:2], "method": method, "lr": 0.5}, {"params": together[2:]}])
    apart: list[Any] = [kind(alone[:2], lr=0.5), AdamW(alone[2:])]
    for seed in range(4):
        for params in (together, alone):
            give_grads(params, seed)
        both.step()
        for optimizer in apart:
            optimizer.step()
    torch.testing.assert_close(together, alone, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (ADOPT, dict(clip_exp=-1.0), "clip_exp must be a number >= 0"),
        (AdEMAMix, dict(betas=(0.9, 0.999)), "betas must be 3 numbers"),
        (AdEMAMix, dict(betas=(0.9, 0.999, 1.0)), "betas[2] must be in [0, 1)"),
        (AdEMAMix, dict(alpha=-1.0), "alpha must be a number >= 0"),
        (AdEMAMix, dict(alpha_warmup=-1), "alpha_warmup must be a number >= 0"),
        (Adan, dict(betas=(0.9, 1.0, 0.9)), "betas[1] must be in [0, 1)"),
        (MARS, dict(gamma=-0.1), "gamma must be a number >= 0"),
        (LAMB, dict(clamp_value=-1), "clamp_value must be a number >= 0"),
        (Prodigy, dict(d0=0.0), "d0 must be > 0"),
        (Prodigy, dict(growth_rate=0.0), "growth_rate must be > 0"),
        (Prodigy, dict(beta3=1.0), "beta3 must be in [0, 1)"),
    ],
)
def test_options_out_of_range(kind: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        kind(leaves(), **options)


def test_trust_ratios_of_many_parameters_are_those_of_each() -> None:
    optimizer = LAMB([torch.zeros(1, requires_grad=True)], lr=0.5, clamp_value=3.0)
    [group] = optimizer.param_groups
    sums = np.array([[4.0, 16.0], [25.0, 1.0], [0.0, 1.0], [1.0, 0.0], [np.inf, np.inf], [np.nan, 1.0]])
    formed = optimizer.scalars_of_rows(group, sums, np.ones(6))
    np.testing.assert_array_equal(formed, [[0.25], [1.5], [0.5], [0.5], [0.0], [np.nan]])
    np.testing.assert_array_equal(
        optimizer.scalars_of_rows({**group, "lr": 0.0}, sums[:4], np.ones(4)), np.zeros((4, 1))
    )
