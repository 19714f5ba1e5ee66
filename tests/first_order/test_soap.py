"""SOAP beside its authors' algorithm, in float64; what its bases are made of; hostile gradients; checkpoints."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import textbook
import torch
from cases import assert_unmoved, give_grads, leaves, params_of, snapshot
from torch import Tensor

from descend import SOAP, AdamW, matrix_rules
from descend.backends import matrix

# So short that after a few gradients no factor has a null space, in which eigenvectors are a matter of rounding.
SHAPES = ((7, 5), (5, 7), (1, 3), (3, 1), (4,), (), (4, 3, 2), (5, 2, 3, 3), (1, 1), (0, 5))
OPTIONS = dict(lr=0.01, betas=(0.9, 0.8), weight_decay=0.1)


def whole_grads(params: Sequence[Tensor], seed: int) -> None:
    """Gradients of whole numbers at first: their Gram matrices are exact, so equal eigenvectors span the null space."""
    give_grads(params, seed)
    if seed == 0:
        for param in params:
            param.grad = (3 * param.grad).round()


def run(optimizer: torch.optim.Optimizer, seeds: range, grads: Callable[..., None] = whole_grads) -> None:
    for seed in seeds:
        grads(params_of(optimizer), seed)
        optimizer.step()


def assert_close(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)  # float64, through power iteration


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (dict(precondition_frequency=3), dict(frequency=3)),
        (dict(precondition_frequency=2, shampoo_beta=0.5, eps=1e-3), dict(frequency=2, shampoo_beta=0.5, eps=1e-3)),
        (dict(precondition_frequency=4, max_precond_dim=5), dict(frequency=4, max_dim=5)),
        (dict(precondition_frequency=5, precondition_1d=True), dict(frequency=5, vectors=True)),
        (dict(precondition_frequency=3, flatten=True), dict(frequency=3, flatten=True)),
    ],
    ids=["each dimension", "another beta", "long dimensions", "vectors", "flatten"],
)
def test_trajectory_is_the_authors(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    options = {**OPTIONS, "betas": (0.9, 0.75)}  # 1 - beta is exact: so is the first average of whole numbers
    shapes = [shape for shape in SHAPES if 0 not in shape]
    one = SOAP(leaves(shapes), **options, **ours)
    other = textbook.SOAP(leaves(shapes), **options, **theirs)
    for seed in range(14):
        run(one, range(seed, seed + 1))
        run(other, range(seed, seed + 1))
        assert_close(params_of(one), params_of(other))


def test_factors_of_several_blocks_are_whole_gram_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix_rules, "BLOCK", 4)
    monkeypatch.setattr(matrix, "PIECE", 16)  # and elements of several pieces
    shapes = [(10, 7), (4, 9), (3, 8, 5)]
    options = {**OPTIONS, "betas": (0.9, 0.75)}
    one = SOAP(leaves(shapes), precondition_frequency=3, **options)
    other = textbook.SOAP(leaves(shapes), frequency=3, **options)
    run(one, range(10))
    run(other, range(10))
    assert_close(params_of(one), params_of(other))
    # 10 rows: 5 x 5 beside the diagonal, then twice 2 x 3 beside it, 2 x 2 and 3 x 3 on it. 7 rows: 3 x 4 beside it.
    assert one.state[params_of(one)[0]]["factors"].numel() == 25 + 2 * (6 + 4 + 9) + 12 + 9 + 16


def test_first_step_moves_nothing_and_begins_the_bases() -> None:
    (param,) = leaves([(6, 4)])
    start = param.detach().clone()
    optimizer = SOAP([param], weight_decay=0.5)
    run(optimizer, range(1))
    state = optimizer.state[param]
    assert torch.equal(param, start)
    assert not torch.cat([state["exp_avg"], state["exp_avg_sq"]]).any()
    gram = param.grad.T @ param.grad * 0.05
    basis = state["bases"][36:].view(4, 4)
    torch.testing.assert_close(basis.T @ gram @ basis, torch.linalg.eigvalsh(gram).flip(0).diag(), atol=1e-12, rtol=0)


def test_bases_stay_orthonormal_and_turn_only_when_it_is_time() -> None:
    (param,) = leaves([(33, 17)], dtype=torch.float32)
    optimizer = SOAP([param], precondition_frequency=4)
    run(optimizer, range(1))
    last = optimizer.state[param]["bases"].clone()
    for t in range(1, 14):
        run(optimizer, range(t, t + 1))
        bases = optimizer.state[param]["bases"]
        assert torch.equal(bases, last) == (t % 4 != 0)
        last = bases.clone()
        for basis in (bases[: 33 * 33].view(33, 33), bases[33 * 33 :].view(17, 17)):
            torch.testing.assert_close(basis.T @ basis, torch.eye(len(basis)), rtol=0, atol=2e-6)  # 16 eps


def test_without_factors_it_is_adam_with_eps_inside_the_bias_correction() -> None:
    ours, theirs = (leaves([(5, 3), (4,)]) for _ in range(2))
    run(optimizer := SOAP(ours, lr=0.01, max_precond_dim=0, eps=0, weight_decay=0), range(6))
    assert optimizer.state[ours[0]]["factors"].numel() == 0
    adam = AdamW(theirs, lr=0.01, betas=(0.95, 0.95), eps=0, weight_decay=0)
    run(adam, range(1, 6))
    assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["zeros", "one row", "rank one", "huge", "tiny"])
def test_hostile_gradients_leave_everything_finite(kind: str, dtype: torch.dtype) -> None:
    params = leaves(SHAPES, dtype=dtype)

    def grads(params: Sequence[Tensor], seed: int) -> None:
        give_grads(params, seed)
        for param in params:
            if kind == "zeros":
                param.grad.zero_()
            elif kind == "one row" and param.dim():
                param.grad[1:] = 0
            elif kind == "rank one" and param.dim() > 1:
                param.grad = param.grad[..., :1] * torch.ones_like(param.grad)
            elif kind == "huge":
                param.grad *= 1e4
            elif kind == "tiny":
                param.grad *= 1e-7 if dtype == torch.float16 else 1e-25

    optimizer = SOAP(params, precondition_frequency=2, precondition_1d=True)
    run(optimizer, range(7), grads)
    for param in params:
        state = optimizer.state[param]
        assert all(tensor.isfinite().all() for tensor in (param, *state.values()))
        assert all(state[name].dtype == torch.float32 for name in ("exp_avg", "exp_avg_sq", "factors", "bases"))
        shape, dims = matrix_rules.preconditioned(param.shape, 10000, True, False)
        for basis in matrix_rules._split(state["bases"], shape, dims).values():
            torch.testing.assert_close(basis.T @ basis, torch.eye(len(basis)), rtol=0, atol=2e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("when", [0, 2, 4])
def test_nonfinite_gradients_spread_without_an_error(value: float, when: int) -> None:
    params = leaves([(5, 5), (40, 30)], dtype=torch.float32)  # LAPACK raises for the first, and hangs for neither

    def grads(params: Sequence[Tensor], seed: int) -> None:
        give_grads(params, seed)
        if seed == when:
            params[0].grad[1, 1] = params[1].grad[1, 1] = value

    optimizer = SOAP(params, precondition_frequency=2)
    run(optimizer, range(6), grads)
    assert not any(param.isfinite().any() for param in params)
    skipping = SOAP(
        twins := leaves([(5, 5), (40, 30)], dtype=torch.float32), precondition_frequency=2, nonfinite="skip"
    )
    run(skipping, range(6), grads)
    assert skipping.skipped_steps == 1
    assert all(param.isfinite().all() for param in twins)


def test_where_eigenvectors_do_not_converge_the_basis_is_the_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(matrix: Tensor) -> Tensor:
        raise torch.linalg.LinAlgError("it did not converge")

    monkeypatch.setattr(torch.linalg, "eigh", never)
    (param,) = leaves([(3, 2)])
    run(optimizer := SOAP([param]), range(2))
    assert torch.equal(
        optimizer.state[param]["bases"],
        torch.cat([torch.eye(3).flip(1).ravel(), torch.eye(2).flip(1).ravel()]).double(),
    )


def test_layouts_do_not_matter() -> None:
    shapes = [(6, 9), (6, 4), (3, 4, 2, 5)]
    plain = leaves(shapes)
    odd = [
        plain[0].detach().t().contiguous().t().requires_grad_(),
        torch.stack([plain[1].detach()] * 2, -1)[..., 0].requires_grad_(),
        plain[2].detach().to(memory_format=torch.channels_last).requires_grad_(),
    ]

    def odd_grads(params: Sequence[Tensor], seed: int) -> None:
        whole_grads(params, seed)
        params[0].grad = torch.stack([params[0].grad] * 3, 1)[:, 0]
        params[1].grad = params[1].grad.t().contiguous().t()

    for flatten in (False, True):
        one, other = (
            SOAP(
                [p.detach().clone(memory_format=torch.preserve_format).requires_grad_() for p in params],
                precondition_frequency=2,
                flatten=flatten,
                betas=(0.9, 0.75),
            )
            for params in (plain, odd)
        )
        run(one, range(6))
        run(other, range(6), odd_grads)
        assert_close(params_of(one), params_of(other))


def through_file(optimizer: SOAP) -> SOAP:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    fresh = SOAP([param.detach().clone().requires_grad_() for param in params_of(optimizer)])
    fresh.load_state_dict(torch.load(file, weights_only=True))
    return fresh


@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o)), through_file], ids=["deepcopy", "pickle", "file"]
)
def test_copies_and_checkpoints_go_on_with_the_same_bits(way: Callable[[SOAP], SOAP]) -> None:
    for steps in (1, 4, 6):  # right after the first, before and after the bases turn
        optimizer = SOAP(leaves(SHAPES, dtype=torch.bfloat16), precondition_frequency=5)
        run(optimizer, range(steps), give_grads)
        twin = way(optimizer)
        run(optimizer, range(steps, 12), give_grads)
        run(twin, range(steps, 12), give_grads)
        for a, b in zip(params_of(optimizer), params_of(twin), strict=True):
            assert torch.equal(a, b)
            assert all(torch.equal(value, twin.state[b][name]) for name, value in optimizer.state[a].items())


@pytest.mark.parametrize("name", ["exp_avg", "factors", "bases"])
def test_damaged_checkpoints_are_refused(name: str) -> None:
    optimizer = SOAP([("weight", leaves([(4, 3)])[0])])
    run(optimizer, range(3))
    before = snapshot(optimizer)
    damaged = optimizer.state_dict()
    damaged["state"][0][name] = damaged["state"][0][name][..., :-1]
    with pytest.raises(ValueError, match=rf"SOAP: the loaded {name} of weight has shape .*, expected"):
        optimizer.load_state_dict(damaged)
    damaged["state"][0].pop(name)
    with pytest.raises(ValueError, match=rf"SOAP: the loaded state of weight lacks '{name}'"):
        optimizer.load_state_dict(damaged)
    assert_unmoved(optimizer, before)


def test_options_that_change_the_factors_need_new_state() -> None:
    (param,) = leaves([(4, 3)])
    optimizer = SOAP([param])
    run(optimizer, range(2))
    optimizer.param_groups[0]["max_precond_dim"] = 3
    before = snapshot(optimizer)
    with pytest.raises(
        RuntimeError, match=r"SOAP: factors of .* has shape \(25,\), expected \(9,\). Nothing has moved"
    ):
        optimizer.step()
    assert_unmoved(optimizer, before)
    del optimizer.state[param]
    optimizer.step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(lr=-1), "Invalid learning rate: -1"),
        (dict(betas=(0.9, 1.0)), "Invalid beta parameter at index 1"),
        (dict(shampoo_beta=1.0), r"shampoo_beta must be None or in \[0, 1\), got 1.0"),
        (dict(precondition_frequency=0), "precondition_frequency must be a whole number >= 1, got 0"),
        (dict(precondition_frequency=2.5), "precondition_frequency must be a whole number >= 1, got 2.5"),
        (dict(max_precond_dim=-1), "max_precond_dim must be a whole number >= 0, got -1"),
        (dict(weight_decay=-1), "Invalid weight_decay value: -1"),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SOAP(leaves(), **options)


def test_parameters_and_gradients_it_cannot_take_are_refused() -> None:
    for param, grad, message in (
        (torch.zeros(2, 2, dtype=torch.complex64), torch.ones(2, 2, dtype=torch.complex64), "complex parameters"),
        (torch.zeros(2, 2), torch.eye(2).to_sparse(), "sparse gradients"),
    ):
        param.requires_grad_().grad = grad
        with pytest.raises(RuntimeError, match=f"SOAP does not support {message}"):
            SOAP([param]).step()
        assert not param.any()


def test_state_dtype_is_that_of_the_moments_alone() -> None:
    (param,) = leaves([(4, 3)], dtype=torch.float32)
    optimizer = SOAP([param], state_dtype=torch.bfloat16, precondition_frequency=2)
    run(optimizer, range(6))
    dtypes = {name: tensor.dtype for name, tensor in optimizer.state[param].items()}
    assert dtypes["exp_avg"] == dtypes["exp_avg_sq"] == torch.bfloat16
    assert dtypes["factors"] == dtypes["bases"] == torch.float32


def test_it_is_a_method_of_groups_and_takes_what_every_optimizer_takes() -> None:
    params, twins = leaves([(6, 4), (5,)]), leaves([(6, 4), (5,)])
    mixed = AdamW([{"params": params[:1], "method": "soap", "maximize": True}, {"params": params[1:]}], max_norm=1.0)
    alone = SOAP(twins[:1], lr=3e-3, maximize=True)
    for seed in range(12):
        for each in (params, twins):
            whole_grads(each, seed)
            if each is twins:
                torch.nn.utils.clip_grad_norm_(each, 1.0)
        mixed.step()
        alone.step()
    torch.testing.assert_close(params[0], twins[0], rtol=1e-5, atol=1e-5)  # torch's clipping adds 1e-6 to the norm
