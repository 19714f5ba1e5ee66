"""Adafactor beside torch's: parameters, state, dictionaries; what depends on shapes and dtypes; hostile gradients."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable, Sequence

import pytest
import torch
from cases import ADAFACTOR_CASES, Case, Twins, assert_unmoved, give_grads, leaves, params_of, snapshot
from torch import Tensor

from descend import Adafactor

# Without a tensor of no elements, by whose number torch's divides.
SHAPES = ((), (7, 5), (129,), (4, 3, 2), (1, 6), (6, 1), (300, 40))


def of_shapes(dtype: torch.dtype = torch.float64) -> Callable[[], list[Tensor]]:
    return lambda: leaves(SHAPES, dtype=dtype)


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("case", ADAFACTOR_CASES, ids=str)
def test_float64_trajectory_is_torchs(case: Case, foreach: bool) -> None:
    twins = Twins(case._replace(options={**case.options, "foreach": foreach}), of_shapes())
    for seed in range(30):
        twins.step(seed)
    twins.assert_equal()
    ours, theirs = (optimizer.state_dict() for optimizer in twins.both)
    assert ours["param_groups"] == theirs["param_groups"]
    assert list(ours["param_groups"][0]) == list(theirs["param_groups"][0])
    assert twins.ours.defaults == twins.theirs.defaults


@pytest.mark.parametrize("case", ADAFACTOR_CASES, ids=str)
def test_float32_trajectory_is_torchs(case: Case) -> None:
    twins = Twins(case, of_shapes(torch.float32))
    for seed in range(30):
        twins.step(seed)
    twins.assert_equal(rtol=2e-5, atol=2e-6)  # float32 rounds at 1e-7 in another order than torch


def test_bfloat16_rounds_once_a_step_and_has_torchs_state() -> None:
    twins = Twins(ADAFACTOR_CASES[0], of_shapes(torch.bfloat16))
    twins.step(0)
    twins.assert_equal(rtol=2**-6, atol=2**-6)  # torch rounds each intermediate to 8 bits


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=str)
@pytest.mark.parametrize("first_has_grad", [True, False])
def test_eps_is_that_of_the_groups_first_gradient_as_in_torch(
    dtypes: Sequence[torch.dtype], first_has_grad: bool
) -> None:
    def grads(params: Sequence[Tensor], seed: int) -> None:
        give_grads(params, seed)
        for param in params:
            param.grad *= 1e-4  # so small that eps decides
        if not first_has_grad:
            params[0].grad = None

    twins = Twins(ADAFACTOR_CASES[0], lambda: [param for dtype in dtypes for param in leaves([(6, 5)], dtype=dtype)])
    for seed in range(3):
        twins.step(seed, grads)
    twins.assert_equal(rtol=2**-5, atol=2**-6)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_tensor_lr_filled_in_place_acts_at_the_next_step(shape: tuple[int, ...]) -> None:
    twins = Twins(Case(Adafactor, torch.optim.Adafactor, dict(lr=torch.full(shape, 0.05))), of_shapes())
    for seed in range(4):
        twins.step(seed)
        twins.edit(lambda optimizer, seed=seed: optimizer.param_groups[0]["lr"].fill_(0.02 * (seed + 1)))
    twins.assert_equal(rtol=1e-7, atol=1e-7)  # torch's scalars are float32 where lr is


def test_layouts_do_not_matter() -> None:
    def groups() -> list[Tensor]:
        strided = torch.stack([leaves([(4, 5)])[0].detach()] * 2, -1)[..., 0]
        channels_last = leaves([(2, 3, 4, 5)])[0].detach().to(memory_format=torch.channels_last)
        return [
            leaves([(5, 3)])[0].detach().t().requires_grad_(),
            strided.requires_grad_(),
            channels_last.requires_grad_(),
        ]

    def grads(params: Sequence[Tensor], seed: int) -> None:
        give_grads(params, seed)
        params[1].grad = params[1].grad.t().contiguous().t()

    twins = Twins(ADAFACTOR_CASES[1], groups)
    for seed in range(5):
        twins.step(seed, grads)
    twins.assert_equal()


def test_checkpoints_go_both_ways() -> None:
    twins = Twins(ADAFACTOR_CASES[1], of_shapes())
    for seed in range(3):
        twins.step(seed)
    ours, theirs = (copy.deepcopy(optimizer.state_dict()) for optimizer in twins.both)
    twins.ours.load_state_dict(theirs)
    twins.theirs.load_state_dict(ours)
    for seed in range(3, 6):
        twins.step(seed)
    twins.assert_equal()


@pytest.mark.parametrize("way", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_copies_go_on_with_the_same_bits(way: Callable[[Adafactor], Adafactor]) -> None:
    optimizer = Adafactor(of_shapes(torch.float32)(), weight_decay=0.1)
    give_grads(params_of(optimizer), 0)
    optimizer.step()
    twin = way(optimizer)
    for each in (optimizer, twin):
        give_grads(params_of(each), 1)
        each.step()
    assert all(map(torch.equal, params_of(optimizer), params_of(twin)))


@pytest.mark.parametrize(("index", "name"), [(0, "row_var"), (0, "col_var"), (1, "variance")])
def test_damaged_checkpoints_are_refused(index: int, name: str) -> None:
    optimizer = Adafactor([("weight", leaves([(4, 3)])[0]), ("bias", leaves([(4,)])[0])])
    give_grads(params_of(optimizer), 0)
    optimizer.step()
    before = snapshot(optimizer)
    who = ("weight", "bias")[index]
    for damage, message in (
        (lambda value: value.repeat(2, *[1] * (value.dim() - 1)), rf"the loaded {name} of {who} has shape"),
        (lambda value: -value, rf"the loaded {name} of {who} must be >= 0"),
        (lambda value: None, rf"the loaded state of {who} lacks '{name}'"),
    ):
        damaged = optimizer.state_dict()
        damaged["state"][index][name] = damage(damaged["state"][index][name])
        with pytest.raises(ValueError, match=f"Adafactor: {message}"):
            optimizer.load_state_dict(damaged)
        assert_unmoved(optimizer, before)


def test_state_is_made_for_each_shape_before_the_first_step_too() -> None:
    optimizer = Adafactor(leaves([(4, 3), (5,)]))
    optimizer.init_state()
    states = list(optimizer.state.values())
    assert [list(state) for state in states] == [["step", "row_var", "col_var"], ["step", "variance"]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("factor", [0.0, 1e4, 1e-7])
def test_extreme_gradients_leave_everything_finite(factor: float, dtype: torch.dtype) -> None:
    params = leaves([*SHAPES, (0,), (0, 5), (5, 0)], dtype=dtype)
    optimizer = Adafactor(params)
    for seed in range(3):
        give_grads(params, seed)
        for param in params:
            param.grad *= factor
        optimizer.step()
    for param in params:
        assert param.isfinite().all()
        assert all(tensor.isfinite().all() for tensor in optimizer.state[param].values() if param.numel())


def test_nan_spreads_or_is_skipped() -> None:
    for nonfinite in ("step", "skip"):
        (param,) = leaves([(4, 3)])
        optimizer = Adafactor([param], nonfinite=nonfinite)
        before = snapshot(optimizer)
        param.grad = torch.full_like(param, math.nan)
        optimizer.step()
        if nonfinite == "skip":
            assert_unmoved(optimizer, before)
        else:
            assert param.isnan().all()


def test_bits_do_not_depend_on_threads() -> None:
    ends = []
    threads = torch.get_num_threads()
    for count in (1, 2):
        torch.set_num_threads(count)
        params = leaves([(300, 301), (70_001,)], dtype=torch.float32)
        optimizer = Adafactor(params)
        for seed in range(2):
            give_grads(params, seed)
            optimizer.step()
        ends.append(params)
    torch.set_num_threads(threads)
    assert all(map(torch.equal, *ends))


def test_parameters_and_gradients_torch_refuses_are_refused() -> None:
    for param, grad, message in (
        (torch.zeros(2, 2, dtype=torch.complex64), torch.ones(2, 2, dtype=torch.complex64), "complex parameters"),
        (torch.zeros(2, 2), torch.eye(2).to_sparse(), "sparse gradients"),
    ):
        param.requires_grad_().grad = grad
        for optimizer in (Adafactor([param]), torch.optim.Adafactor([param])):
            with pytest.raises(RuntimeError, match=f"Adafactor does not support {message}"):
                optimizer.step()
        assert not param.any()
