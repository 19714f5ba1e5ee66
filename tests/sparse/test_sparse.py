"""Sparse gradients in every optimizer: which rows move and how, whatever else comes beside them."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from cases import BACKENDS, EVERYWHERE, Case, Twins, leaves, params_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sparse_cases import (
    ADAMW,
    NESTEROV,
    SGD_CASES,
    TOUCHED,
    ByHand,
    Touched,
    coo,
    give_sparse_grads,
    one_thread,  # noqa: F401 a fixture
    random_sparse,
    table,
)
from torch import Tensor, nn
from torch.optim import lr_scheduler

from descend import SGD, AdamW, SparseAdam


@pytest.mark.parametrize("backend", EVERYWHERE)
@pytest.mark.parametrize("case", TOUCHED, ids=str)
def test_touched_rows_move_by_the_rule_and_others_stay(case: Touched, backend: str) -> None:
    param = table()
    optimizer = case.ours([param], **case.options, sparse="touched", backend=backend)
    expected = ByHand(param, case.theirs, case.options)
    for seed in range(12):
        param.grad = random_sparse(param.shape, (5, 0, 3)[seed % 3], seed)
        before = param.detach().clone(), {k: v.clone() for k, v in optimizer.state[param].items()}
        expected.step(param.grad)
        optimizer.step()
        others = [row for row in range(len(param)) if row not in set(param.grad._indices()[0].tolist())]
        assert torch.equal(param[others], before[0][others])
        for name, value in before[1].items():
            assert name == "step" or torch.equal(optimizer.state[param][name][others], value[others])
        expected.assert_equal(optimizer, param)
    assert [placement.backend for placement in optimizer.backends()] == [backend]


@pytest.mark.parametrize("backend", EVERYWHERE)
@pytest.mark.parametrize("case", TOUCHED, ids=str)
def test_gradients_come_dense_sparse_or_not_at_all(case: Touched, backend: str) -> None:
    """In one group, each parameter by itself, another way at each step."""
    params = leaves([(9, 4), (6, 3, 2), (7,), (5, 2)])
    optimizer = case.ours(params[:2], **case.options, sparse="touched", backend=backend)
    optimizer.add_param_group({"params": params[2:]})
    expected = [ByHand(param, case.theirs, case.options) for param in params]
    random = torch.Generator().manual_seed(0)
    for seed in range(12):
        for number, (param, hand) in enumerate(zip(params, expected, strict=True)):
            kind = (seed // 2 + number * (1 + seed // 5)) % 3
            param.grad = None
            if kind < 2:
                dense = torch.randn(param.shape, generator=random, dtype=torch.float64).to(param.device)
                grad = dense.to_sparse(1) if kind else random_sparse(param.shape, 4, 10 * seed + number)
                hand.step(grad)
                param.grad = dense if kind else grad
        optimizer.step()
    for param, hand in zip(params, expected, strict=True):
        hand.assert_equal(optimizer, param)


def changing_kinds(params: Sequence[Tensor], seed: int) -> None:
    """Dense, sparse and none; in torch's SGD a sparse gradient cannot follow a dense one with momentum."""
    give_sparse_grads(params, seed)
    params[seed % 3].grad = None


@pytest.mark.parametrize("backend", EVERYWHERE)
@pytest.mark.parametrize("case", SGD_CASES, ids=str)
def test_sgd_takes_sparse_gradients_as_torch_does(case: Case, backend: str) -> None:
    twins = Twins(case, lambda: leaves([(9, 4), (6, 3, 2), (7,)]), backend=backend)
    for seed in range(10):
        twins.step(seed, changing_kinds)
    for ours, theirs in zip(params_of(twins.ours), params_of(twins.theirs), strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-12, atol=1e-12)  # float64, 10 steps
        buffer = twins.theirs.state[theirs].get("momentum_buffer")
        if buffer is not None:
            dense = buffer.to_dense()  # torch's is sparse
            found = twins.ours.state[ours]["momentum_buffer"].cpu()
            torch.testing.assert_close(found, dense, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", EVERYWHERE)
@pytest.mark.parametrize("sparse_dim", [1, 2])
@pytest.mark.parametrize("case", [TOUCHED[0], TOUCHED[1], NESTEROV], ids=str)
def test_sgd_decays_rows_that_are_not_named(case: Touched, sparse_dim: int, backend: str) -> None:
    """Torch raises; here a row without a gradient has the gradient zero."""
    sparse, dense = table(), table()
    optimizers = SGD([sparse], **case.options, backend=backend), SGD([dense], **case.options)
    for seed in range(4):
        sparse.grad = random_sparse(sparse.shape, 5 if seed else 0, seed, sparse_dim=sparse_dim)
        dense.grad = sparse.grad.to_dense()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(sparse, dense, rtol=1e-14, atol=1e-14)  # sums in another order
    assert (sparse != table()).all() == ("weight_decay" in case.options)


@pytest.mark.parametrize("backend", EVERYWHERE)
@pytest.mark.parametrize("change", [dict(weight_decay=0.5), dict(momentum=0.9), dict(weight_decay=0.5, momentum=0.9)])
def test_sgd_notices_when_rows_that_are_not_named_begin_to_move(change: dict[str, float], backend: str) -> None:
    sparse, dense = table(), table()
    optimizers = SGD([sparse], lr=0.1, backend=backend), SGD([dense], lr=0.1, backend=backend)
    for seed in range(9):
        if seed in (3, 6):
            for optimizer in optimizers:
                optimizer.param_groups[0].update(change if seed == 3 else dict(weight_decay=0, momentum=0))
        sparse.grad = random_sparse(sparse.shape, 5, seed)
        dense.grad = sparse.grad.to_dense()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(sparse, dense, rtol=1e-14, atol=1e-14)


def test_large_table_of_sgd_is_updated_in_gaps() -> None:
    """Untouched rows between, before and after the touched ones, longer than a chunk."""
    sparse, dense = table(30_000, 3, torch.float32), table(30_000, 3, torch.float32)
    optimizers = [SGD([param], lr=0.1, momentum=0.9, weight_decay=0.1) for param in (sparse, dense)]
    random = torch.Generator().manual_seed(0)
    for rows in ([0, 1, 29_999], [7000, 7000, 20_000], list(range(1000, 2000)), []):
        values = torch.randn(len(rows), 3, generator=random)
        sparse.grad = coo(rows, values, sparse.shape)
        dense.grad = sparse.grad.to_dense()
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(sparse, dense)  # sums of two


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    case=st.sampled_from([ADAMW, TOUCHED[1], NESTEROV]),
    backend=st.sampled_from(BACKENDS),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    rows=st.integers(1, 7),
    dim=st.sampled_from([0, 1, 3, 17]),
    data=st.data(),
)
def test_any_pattern_of_touches_is_the_rule_by_hand(
    case: Touched, backend: str, dtype: torch.dtype, rows: int, dim: int, data: st.DataObject
) -> None:
    touches = data.draw(st.lists(st.lists(st.integers(0, rows - 1), max_size=9), min_size=1, max_size=6))
    param = table(rows, dim, dtype)
    optimizer = case.ours([param], **case.options, sparse="touched", backend=backend)
    expected = ByHand(param, case.theirs, case.options)
    for seed, touched in enumerate(touches):
        random = torch.Generator().manual_seed(seed)
        values = torch.randn(len(touched), dim, generator=random, dtype=torch.float64).to(dtype)
        param.grad = coo(touched, values, param.shape)
        expected.step(param.grad)
        optimizer.step()
    # Float64's rounding over 6 steps; float32's, and where sums nearly cancel Adam sees their rounding.
    tolerance = 1e-12 if dtype == torch.float64 else 1e-4
    expected.assert_equal(optimizer, param, rtol=tolerance, atol=tolerance)


def test_schedules_and_maximize_act_on_touched_rows() -> None:
    param = table()
    optimizer = AdamW([param], lr=0.1, maximize=True, sparse="touched")
    scheduler = lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=12)
    expected = ByHand(param, torch.optim.AdamW, {})
    for seed in range(10):
        group = {key: optimizer.param_groups[0][key] for key in ("lr", "betas", "maximize", "weight_decay")}
        expected._make = lambda rows, group=group: torch.optim.AdamW([rows], **group)
        param.grad = random_sparse(param.shape, 5, seed)
        expected.step(param.grad)
        optimizer.step()
        scheduler.step()
    expected.assert_equal(optimizer, param)


def test_closure_may_make_sparse_gradients() -> None:
    embedding = nn.Embedding(9, 4, sparse=True)
    optimizer = SparseAdam(embedding.parameters(), lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = embedding(torch.tensor([1, 1, 5])).square().sum()
        loss.backward()
        return loss.detach()

    losses = [float(optimizer.step(closure)) for _ in range(5)]
    assert losses == sorted(losses, reverse=True)


# Copies and checkpoints.


@pytest.mark.parametrize("meaning", [None, "touched"])
def test_meaning_survives_copies(meaning: str | None) -> None:
    param = table()
    optimizer = SGD([param], lr=0.1, momentum=0.9, sparse=meaning)
    param.grad = random_sparse(param.shape, 6, 0)
    optimizer.step()
    twin = copy.deepcopy(optimizer)
    assert twin.sparse == meaning
    assert "sparse" not in {*twin.defaults, *twin.param_groups[0], *twin.state_dict()}
    for one in (optimizer, twin):
        params_of(one)[0].grad = random_sparse(param.shape, 6, 1)
        one.step()
    assert torch.equal(param, params_of(twin)[0])


@pytest.mark.parametrize("meaning", [None, "touched"])
def test_sparse_momentum_of_torchs_checkpoints_is_loaded(meaning: str | None) -> None:
    """Where all its gradients have been sparse, torch's buffer is."""
    ours, theirs = table(), table()
    torchs = torch.optim.SGD([theirs], lr=0.1, momentum=0.9)
    for seed in range(2):
        theirs.grad = random_sparse(theirs.shape, 6, seed)
        torchs.step()
    assert torchs.state[theirs]["momentum_buffer"].is_sparse
    optimizer = SGD([ours], lr=0.1, momentum=0.9, sparse=meaning)
    optimizer.load_state_dict(copy.deepcopy(torchs.state_dict()))
    buffer = torchs.state[theirs]["momentum_buffer"].to_dense()
    torch.testing.assert_close(optimizer.state[ours]["momentum_buffer"], buffer, rtol=0, atol=0)
    ours.data.copy_(theirs.data)
    for param, one in ((ours, optimizer), (theirs, torchs)):
        param.grad = random_sparse(param.shape, 40, 5)  # all rows
        one.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
