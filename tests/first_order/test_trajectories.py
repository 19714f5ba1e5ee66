"""Fifty steps beside torch: equal parameters, state, keys, types and dictionaries."""

from __future__ import annotations

import pytest
import torch
from cases import BACKENDS, CASES, EVERY_CASE, EVERYWHERE, SHAPES, Case, Twins, give_grads, leaves
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from descend import Adagrad

# Float32 rounds at 1e-7 in another order than torch; L2 decay and momentum carry it through fifty steps.
FLOAT32 = dict(rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("backend", EVERYWHERE)
@pytest.mark.parametrize("case", EVERY_CASE, ids=str)
def test_float64_trajectory_is_torchs(case: Case, backend: str) -> None:
    twins = Twins(case, backend=backend)
    for seed in range(50):
        twins.step(seed)
    twins.assert_equal()


@pytest.mark.parametrize("backend", EVERYWHERE)
@pytest.mark.parametrize(
    "case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in EVERY_CASE)], ids=str
)
def test_float32_trajectory_is_torchs(case: Case, backend: str) -> None:
    twins = Twins(case, lambda: leaves(dtype=torch.float32), backend=backend)
    for seed in range(50):
        twins.step(seed)
    twins.assert_equal(**FLOAT32)


@pytest.mark.parametrize("case", EVERY_CASE, ids=str)
def test_state_dict_is_torchs(case: Case) -> None:
    twins = Twins(case)
    fresh = twins.theirs.state_dict()
    if case.ours is Adagrad:
        fresh["state"] = {}  # torch's makes its state in the constructor
    assert twins.ours.state_dict() == fresh
    twins.step(0)
    ours, theirs = twins.ours.state_dict(), twins.theirs.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    assert list(ours["param_groups"][0]) == list(theirs["param_groups"][0])
    assert ours.keys() == theirs.keys()
    assert twins.ours.defaults == twins.theirs.defaults
    twins.assert_equal()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_state_has_torchs_dtypes_and_layout(case: Case) -> None:
    def groups() -> list[Tensor]:
        transposed = torch.randn(5, 3).t().requires_grad_()
        channels_last = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last).requires_grad_()
        return [*leaves(dtype=torch.float32), *leaves(dtype=torch.bfloat16), transposed, channels_last]

    twins = Twins(case, groups)
    twins.step(0)
    for ours, theirs in zip(twins.ours.state.values(), twins.theirs.state.values(), strict=True):
        assert {name: (type(t), t.dtype, t.shape, t.device) for name, t in ours.items()} == {
            name: (type(t), t.dtype, t.shape, t.device) for name, t in theirs.items()
        }
    for param, state in twins.ours.state.items():
        numbers = ("step", *twins.ours.scalar_state)
        assert {t.stride() for name, t in state.items() if name not in numbers} <= {param.stride()}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_default_dtype_float64_is_torchs(case: Case) -> None:
    torch.set_default_dtype(torch.float64)
    twins = Twins(case)
    for seed in range(3):
        twins.step(seed)
    twins.assert_equal()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_named_parameters_are_torchs(case: Case) -> None:
    twins = Twins(case, lambda: [(f"layer{i}", param) for i, param in enumerate(leaves())])
    twins.step(0)
    twins.assert_equal()
    assert twins.ours.state_dict()["param_groups"] == twins.theirs.state_dict()["param_groups"]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_many_tensors_of_all_sizes_are_torchs(case: Case) -> None:
    sizes = [(n,) for n in (1, 15, 16, 17, 1000, 16_383, 16_384, 16_385, 70_001)]
    twins = Twins(case, lambda: leaves(sizes))
    for seed in range(3):
        twins.step(seed)
    twins.assert_equal()


@st.composite
def layouts(draw: st.DrawFn) -> tuple[list[int], list[int], int]:
    """A shape, an order of its dimensions in memory, and a spacing of the elements."""
    shape = draw(st.lists(st.integers(0, 5), max_size=4))
    return shape, draw(st.permutations(range(len(shape)))), draw(st.integers(1, 2))


def laid_out(layout: tuple[list[int], list[int], int], seed: int) -> Tensor:
    shape, order, spacing = layout
    random = torch.Generator().manual_seed(seed)
    memory = torch.randn([shape[dim] for dim in order] + [spacing], generator=random, dtype=torch.float64)[..., 0]
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return memory.permute(inverse)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    case=st.sampled_from(CASES),
    backend=st.sampled_from(["auto", "eager"]),
    sizes=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    data=st.data(),
)
def test_any_layout_and_any_coming_and_going_is_torchs(
    case: Case, backend: str, sizes: list[int], data: st.DataObject
) -> None:
    count = sum(sizes)
    param_layouts = data.draw(st.lists(layouts(), min_size=count, max_size=count))
    grad_layouts = [
        (shape, data.draw(st.permutations(range(len(shape)))), data.draw(st.integers(1, 2)))
        for shape, _, _ in param_layouts
    ]
    present = data.draw(st.lists(st.lists(st.booleans(), min_size=count, max_size=count), min_size=1, max_size=5))

    def groups() -> list[dict[str, object]]:
        tensors = iter([laid_out(layout, seed).requires_grad_() for seed, layout in enumerate(param_layouts)])
        return [{"params": [next(tensors) for _ in range(size)], "lr": 0.01 * (i + 1)} for i, size in enumerate(sizes)]

    twins = Twins(case, groups, backend=backend)
    for seed, here in enumerate(present):

        def grads(params: list[Tensor], seed: int, here: list[bool] = here) -> None:
            for i, param in enumerate(params):
                param.grad = laid_out(grad_layouts[i], 100 * seed + i) if here[i] else None

        twins.step(seed, grads)
        twins.assert_equal()


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(case=st.sampled_from(CASES), presence=st.lists(st.tuples(*[st.booleans()] * len(SHAPES)), max_size=8))
def test_fused_steps_survive_gradients_that_come_and_go(case: Case, presence: list[tuple[bool, ...]]) -> None:
    twins = Twins(case, backend=BACKENDS[0])
    for seed, here in enumerate(presence):

        def grads(params: list[Tensor], seed: int, here: tuple[bool, ...] = here) -> None:
            give_grads(params, seed)
            for param, stays in zip(params, here, strict=True):
                param.grad = param.grad if stays else None

        twins.step(seed, grads)
    twins.assert_equal()
