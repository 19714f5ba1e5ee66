"""Coasting over many steps without a gradient, against taking them one after the other."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from descend import rules
from descend.sparse.missed_steps import BLOCK, Schedule

EPS = 1e-8
# Error allowed, in units of the largest lr of the steps missed; the worst gradients that there can be are tried.
BOUNDS = {(0.9, 0.999): 0.01, (0.9, 0.95): 0.01, (0.95, 0.99): 0.01, (0.0, 0.99): 0.01, (0.8, 0.9): 0.01}
HARD = {(0.9, 0.91): 0.12, (0.99, 0.995): 0.12, (0.99, 0.999): 0.04, (0.1, 0.999): 0.01, (1e-9, 0.5): 0.01}
Make = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]  # of learning rates and weight decays


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """A square root of a few numbers waits longer for other threads than it takes; ``conftest.py`` sets them back."""
    torch.set_num_threads(1)


def constant(steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.full(len(steps), 1e-3), np.full(len(steps), 0.01)


def warm_up(steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return 1e-3 * np.minimum(1, (steps - 1) / 700), np.full(len(steps), 0.1)


def cosine(steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return 0.5e-3 * (1 + np.cos(math.pi * steps / len(steps))), np.full(len(steps), 0.1)


def step_decay(steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return 0.1 ** (steps // 400 % 7), np.full(len(steps), 0.0)


def bursts(steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.where(steps % 37 < 2, 1.0, 1e-4), np.where(steps > 500, 0.01, 0.0)


def forgetting(steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Now and then, lr * weight_decay is 1: what the row was before no longer matters."""
    return np.full(len(steps), 0.5), np.where(steps % 97 == 0, 2.0, 0.1)


def flipping(steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """lr * weight_decay above 1, sometimes for long: 1 - lr * weight_decay changes the sign, not always the size."""
    product = np.where(steps % 1000 < 300, 2.0, np.where(steps % 50 == 7, 1.5, 0.01))
    return np.full(len(steps), 0.1), 10 * product


def random(steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    return 10 ** generator.uniform(-4, 0, len(steps)), 10 ** generator.uniform(-4, -1, len(steps))


SCHEDULES = (constant, warm_up, cosine, step_decay, bursts, forgetting, flipping, random)


def recorded(betas: tuple[float, float], lr: np.ndarray, weight_decay: np.ndarray, start: int = 0) -> Schedule:
    schedule = Schedule(*betas, EPS, start)
    for step in zip(lr.tolist(), weight_decay.tolist(), strict=True):
        schedule.append(*step)
    return schedule


def furthest(betas: tuple[float, float], step: int) -> float:
    """The largest possible exp_avg / sqrt(exp_avg_sq) after ``step`` steps, by Cauchy and Schwarz.

    Gradients that grow by beta2 / beta1 a step reach it.
    """
    beta1, beta2 = betas
    return (1 - beta1) / math.sqrt(1 - beta2) * math.sqrt(((beta1**2 / beta2) ** np.arange(step)).sum())


def averages(betas: tuple[float, float], since: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of elements for which eps matters a little, much, not at all; as far as gradients can bring them."""
    scales = EPS * np.concatenate([[0.0, 1e-12, 1e12], np.logspace(-4, 4, 49)])
    ratios = np.array([furthest(betas, step) for step in since.tolist()])
    signs = np.where(np.arange(len(scales)) % 2, 1.0, -1.0)
    return ratios[:, None] * scales * signs, np.broadcast_to(scales**2, (len(since), len(scales))).copy()


def coasted(schedule: Schedule, since: np.ndarray, *tensors: np.ndarray) -> list[np.ndarray]:
    """Param and averages, brought up to date."""
    values = [torch.from_numpy(tensor) for tensor in tensors]
    for numbers in schedule.missed(since):
        columns = torch.from_numpy(numbers).T[:, :, None]
        values = list(rules.coast(values[0], torch.tensor(math.nan), *values[1:], *columns))
    return [value.numpy() for value in values]


class Dense:
    """AdamW as torch writes it, for rows that have had their last gradient."""

    def __init__(self, betas: tuple[float, float], param: np.ndarray, exp_avg: np.ndarray, exp_avg_sq: np.ndarray):
        self.betas = betas
        self.values = param.copy(), exp_avg.copy(), exp_avg_sq.copy()

    def step(self, rows: int, step: int, lr: float, weight_decay: float) -> None:
        """One step, numbered from 1, of the first ``rows`` rows."""
        beta1, beta2 = self.betas
        param, exp_avg, exp_avg_sq = (value[:rows] for value in self.values)
        param *= 1 - lr * weight_decay
        exp_avg *= beta1
        exp_avg_sq *= beta2
        denom = np.sqrt(exp_avg_sq) / math.sqrt(1 - beta2**step) + EPS
        param -= lr / (1 - beta1**step) * exp_avg / denom


@pytest.mark.parametrize("betas", [*BOUNDS, *HARD], ids=str)
@pytest.mark.parametrize("make", SCHEDULES, ids=lambda make: make.__name__)
@pytest.mark.parametrize(("start", "length"), [(0, 1500), (1000, 600), pytest.param(0, 15_000, marks=pytest.mark.slow)])
def test_coasting_is_taking_every_step(make: Make, betas: tuple[float, float], start: int, length: int) -> None:
    since = start + np.array(sorted([0, 1, 2, 3, 5, 8, 20, 50, 127, BLOCK - 1, BLOCK, 400, 1000, 5000]))
    since = since[since < start + length]
    lr, weight_decay = make(np.arange(1, length + 1))
    asked = {*range(1, 12), *np.geomspace(12, length, 40).astype(int).tolist()}
    asked |= {boundary + shift for boundary in (BLOCK, 2 * BLOCK, 3 * BLOCK, 5001) for shift in (-1, 0, 1)}
    param = np.random.default_rng(0).normal(size=(len(since), 52))
    state = averages(betas, since)
    dense, schedule = Dense(betas, param, *state), Schedule(*betas, EPS, start)
    # Rounding of many steps, beside what two nodes cannot tell.
    bound = {**BOUNDS, **HARD}[betas] + 1e-9
    largest = np.zeros(len(since))
    for count, now in enumerate(zip(lr.tolist(), weight_decay.tolist(), strict=True), start=1):
        rows = int(np.searchsorted(since, start + count))
        dense.step(rows, start + count, *now)
        schedule.append(*now)
        largest[:rows] = np.maximum(largest[:rows], now[0])
        if count in asked:
            found = coasted(schedule, since[:rows], param[:rows], *(average[:rows] for average in state))
            error = np.abs(found[0] - dense.values[0][:rows])
            assert (error <= bound * largest[:rows, None] + 1e-12).all()
            for ours, theirs in zip(found[1:], dense.values[1:], strict=True):
                np.testing.assert_allclose(ours, theirs[:rows], rtol=1e-9, atol=1e-28)  # fades do not underflow
            np.testing.assert_array_equal(schedule.shrinkage(since[:rows]), schedule.missed(since[:rows])[0, :, 0])


@pytest.mark.parametrize("betas", [*BOUNDS, *HARD], ids=str)
def test_usual_gradients_err_no_more(betas: tuple[float, float]) -> None:
    """Gradients that are noise, constant, or rare: where eps matters, and where it does not."""
    generator = np.random.default_rng(0)
    scales = np.logspace(-13, 0, 27)
    for steps in (1, 2, 5, 30, 300):
        grads = scales * np.stack(
            [generator.normal(size=(steps, 27)), np.ones((steps, 27)), generator.normal(size=(steps, 27)) ** 5]
        ).swapaxes(0, 1)
        exp_avg, exp_avg_sq = np.zeros((3, 27)), np.zeros((3, 27))
        for grad in grads:
            exp_avg += (1 - betas[0]) * (grad - exp_avg)
            exp_avg_sq += (1 - betas[1]) * (grad**2 - exp_avg_sq)
        dense, schedule = Dense(betas, np.zeros((3, 27)), exp_avg, exp_avg_sq), Schedule(*betas, EPS, steps)
        for count in range(1, 1000):
            dense.step(3, steps + count, 1.0, 0.0)
            schedule.append(1.0, 0.0)
        found = coasted(schedule, np.full(3, steps), np.zeros((3, 27)), exp_avg, exp_avg_sq)
        assert np.abs(found[0] - dense.values[0]).max() < {**BOUNDS, **HARD}[betas]


STRETCHES = st.lists(
    st.tuples(
        st.integers(1, 200),  # steps
        st.sampled_from([0.0, 1e-12, 1e-3, 1.0]) | st.floats(1e-6, 1.0),  # lr
        st.sampled_from([0.0, 0.1, 1.0, 1.7, 2.0]) | st.floats(0.0, 1e-2),  # lr * weight_decay
    ),
    min_size=1,
    max_size=8,
)


@given(STRETCHES, st.sampled_from(list(BOUNDS)), st.integers(0, 1000), st.floats(0, 1))
@settings(max_examples=300, deadline=None)
def test_coasting_is_the_sum(
    stretches: list[tuple[int, float, float]], betas: tuple[float, float], start: int, part: float
) -> None:
    beta1, beta2 = betas
    lr = np.concatenate([np.full(steps, lr) for steps, lr, _ in stretches])
    product = np.concatenate([np.full(steps, product if lr else 0.0) for steps, lr, product in stretches])
    weight_decay = np.divide(product, lr, out=np.zeros_like(lr), where=lr > 0)
    schedule = recorded(betas, lr, weight_decay, start)
    first = int(part * (len(lr) - 1))
    k = start + first
    exp_avg, exp_avg_sq = averages(betas, np.array([k]))
    factors = 1 - lr * weight_decay
    expected = np.zeros_like(exp_avg)
    for j in range(k + 1, schedule.steps + 1):
        w = lr[j - start - 1] * math.sqrt(1 - beta2**j) / (1 - beta1**j) * (beta1 / math.sqrt(beta2)) ** (j - k)
        e = math.sqrt(1 - beta2**j) * beta2 ** (-(j - k) / 2)
        expected -= w * factors[j - start :].prod() * exp_avg / (np.sqrt(exp_avg_sq) + e * EPS)
    found = coasted(schedule, np.array([k]), np.zeros_like(exp_avg), exp_avg, exp_avg_sq)[0]
    assert np.abs(found - expected).max() <= 0.01 * lr[first:].max()
    tiny = np.finfo(float).tiny  # below it numbers have fewer digits, and the order of a product shows
    np.testing.assert_allclose(schedule.shrinkage(np.array([k])), factors[first:].prod(), rtol=1e-12, atol=tiny)


def test_coasting_is_torch() -> None:
    param = torch.randn(40, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.AdamW([param], lr=0.1, weight_decay=0.3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)
    schedule = Schedule(0.9, 0.999, EPS, start=3)
    saved = []
    for step in range(300):
        if step == 3:
            saved = [
                param.detach().clone(),
                *(optimizer.state[param][name].clone() for name in ("exp_avg", "exp_avg_sq")),
            ]
        if step >= 3:
            schedule.append(optimizer.param_groups[0]["lr"], 0.3)
        param.grad = 1e-9 * torch.randn_like(param) if step < 3 else torch.zeros_like(param)
        optimizer.step()
        scheduler.step()
    found = coasted(schedule, np.array([3]), *(tensor.numpy()[None] for tensor in saved))
    assert np.abs(found[0][0] - param.detach().numpy()).max() < 0.01 * 0.1
    assert np.abs(saved[0].numpy() - param.detach().numpy()).max() > 0.1  # there was something to catch up with


@pytest.mark.parametrize("betas", list(BOUNDS), ids=str)
@pytest.mark.parametrize("make", SCHEDULES, ids=lambda make: make.__name__)
def test_coasting_twice_is_coasting_once(make: Make, betas: tuple[float, float]) -> None:
    lr, weight_decay = make(np.arange(1, 901))
    since = np.arange(0, 300, 7)
    param, state = np.ones((len(since), 52)), averages(betas, since)
    once = coasted(recorded(betas, lr, weight_decay), since, param, *state)
    for middle in (300, 301, 511, 513, 899):
        half = coasted(recorded(betas, lr[:middle], weight_decay[:middle]), since, param, *state)
        twice = coasted(recorded(betas, lr, weight_decay), np.full(len(since), middle), *half)
        assert np.abs(twice[0] - once[0]).max() <= 0.02 * lr.max()
        for ours, theirs in zip(twice[1:], once[1:], strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-28)


@pytest.mark.parametrize("betas", [*BOUNDS, *HARD], ids=str)
@pytest.mark.parametrize("make", SCHEDULES, ids=lambda make: make.__name__)
def test_restored_and_copied_are_the_same(make: Make, betas: tuple[float, float]) -> None:
    lr, weight_decay = make(np.arange(1, 3001))
    schedule = recorded(betas, lr[:2900], weight_decay[:2900], 5)
    schedule.missed(np.array([5]))  # what has been settled already makes no difference
    others = [
        Schedule.restored(*betas, EPS, 5, schedule.history()),
        pickle.loads(pickle.dumps(schedule)),
        copy.deepcopy(schedule),
    ]
    since = np.arange(5, 3005)
    for one in (schedule, *others):
        for step in zip(lr[2900:].tolist(), weight_decay[2900:].tolist(), strict=True):
            one.append(*step)
        assert (one.steps, one.start) == (3005, 5)
        np.testing.assert_array_equal(one.history(), np.stack([lr, weight_decay], 1))
        np.testing.assert_array_equal(one.missed(since), schedule.missed(since))
        np.testing.assert_array_equal(one.shrinkage(since), schedule.shrinkage(since))


def test_reading_a_schedule_changes_nothing() -> None:
    lr, weight_decay = random(np.arange(1, 2001))
    asked, unasked = Schedule(0.9, 0.99, EPS), recorded((0.9, 0.99), lr, weight_decay)
    for count, step in enumerate(zip(lr.tolist(), weight_decay.tolist(), strict=True), start=1):
        asked.append(*step)
        if count % 13 == 0:
            asked.missed(np.array([0, count - 1]))
    np.testing.assert_array_equal(asked.missed(np.arange(2000)), unasked.missed(np.arange(2000)))


def test_rows_may_repeat_and_come_in_any_order() -> None:
    schedule = recorded((0.9, 0.999), *cosine(np.arange(1, 1001)))
    every = schedule.missed(np.arange(1000))
    since = np.random.default_rng(0).integers(0, 1000, 3000)
    np.testing.assert_array_equal(schedule.missed(since), every[:, since])
    np.testing.assert_array_equal(schedule.shrinkage(since), every[0, since, 0])
    assert schedule.missed(np.empty(0, np.int64)).shape == (1, 0, 7)
    assert schedule.shrinkage(np.empty(0, np.int64)).shape == (0,)


@pytest.mark.parametrize("make", SCHEDULES, ids=lambda make: make.__name__)
def test_one_application_unless_signs_change(make: Make) -> None:
    schedule = recorded((0.9, 0.999), *make(np.arange(1, 2001)))
    assert len(schedule.missed(np.arange(2000))) == (2 if make is flipping else 1)


@pytest.mark.parametrize("zero", [None, 310, 1500])
def test_signs_that_change_are_not_remembered_too_long(zero: int | None) -> None:
    lr, weight_decay = np.full(3000, 0.5), np.full(3000, 0.01)
    weight_decay[300] = 3.0
    if zero:
        weight_decay[zero] = 2.0  # no weight before this one is below zero any more, nor above
    schedule, since = Schedule(0.9, 0.99, EPS), np.array([1, 250, 299, 305, 1000, 2990])
    param, state = np.ones((6, 52)), averages((0.9, 0.99), since)
    dense = Dense((0.9, 0.99), param, *state)
    for count, step in enumerate(zip(lr.tolist(), weight_decay.tolist(), strict=True), start=1):
        rows = int(np.searchsorted(since, count))
        dense.step(rows, count, *step)
        schedule.append(*step)
        if count % 100 in (0, 1, 11):
            found = coasted(schedule, since[:rows], param[:rows], *(average[:rows] for average in state))
            assert np.abs(found[0] - dense.values[0][:rows]).max(initial=0) < 0.01 * 0.5
    found = Schedule.restored(0.9, 0.99, EPS, 0, schedule.history())
    np.testing.assert_array_equal(found.missed(np.arange(3000)), schedule.missed(np.arange(3000)))


@pytest.mark.parametrize("at", [0, 100, BLOCK - 1, BLOCK, 700, 1999])
def test_a_factor_of_zero_is_zero_for_ever(at: int) -> None:
    lr, weight_decay = np.full(2000, 0.5), np.full(2000, 0.1)
    weight_decay[at] = 2.0
    schedule = recorded((0.9, 0.999), lr, weight_decay)
    since = np.arange(2000)
    assert np.array_equal(schedule.shrinkage(since) == 0, since <= at)
    expected = np.cumprod((1 - lr * weight_decay)[::-1])[::-1]
    np.testing.assert_allclose(schedule.shrinkage(since), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("start", [0, 1, 10**6, 10**9])
@pytest.mark.parametrize(
    "betas",
    [*BOUNDS, *HARD, (0.0, 1e-3), (1e-200, 0.5), (0.1, 0.11), (0.999, 0.9999), (0.0, 1 - 2**-53), (0.9, 1 - 1e-12)],
)
def test_scalars_are_finite(betas: tuple[float, float], start: int) -> None:
    for lr, decay in itertools.product([0.0, 1e-30, 1e-3, 10.0], [0.0, 0.1]):
        schedule = recorded(betas, np.full(1000, lr), np.full(1000, decay), start)
        since = start + np.arange(1000)
        with np.errstate(all="raise", under="ignore"):  # also when kernels round them to float32
            numbers = schedule.missed(since).astype(np.float32)
        assert np.isfinite(numbers).all()
        assert (numbers[:, :, 1:5] >= 0).all()
        zeros = np.zeros((1000, 1))
        assert all(np.array_equal(value, zeros) for value in coasted(schedule, since, zeros, zeros, zeros))


def test_without_a_first_average_nothing_moves() -> None:
    schedule = recorded((0.0, 0.99), *constant(np.arange(1, 1001)))
    numbers = schedule.missed(np.arange(1000))[0]
    assert not numbers[:, [1, 3, 5]].any()  # neither weights, nor anything left of exp_avg
    assert (numbers[:, 0] > 0.98).all()
