"""What the rest of a torch program expects: schedulers, hooks, closures, groups, unusual tensors, differentiability."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from cases import BACKENDS, CASES, NONZERO_START, Case, Twins, WithOwnStep, complex_grads, give_grads, leaves, params_of
from torch import Tensor
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from descend import ASGD, LAMB, SGD, Adagrad, AdamW

SCHEDULERS: list[Callable[[Any], Any]] = [
    lambda o: lr_scheduler.StepLR(o, step_size=3),
    lambda o: lr_scheduler.ExponentialLR(o, gamma=0.9),
    lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.95**epoch),
    lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=10),
    lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=12),
    lambda o: lr_scheduler.CyclicLR(o, base_lr=0.01, max_lr=0.1, step_size_up=3, cycle_momentum=True),
    lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.ExponentialLR(o, 0.9)], milestones=[3]
    ),
]


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize(
    "schedule", SCHEDULERS, ids=["step", "exponential", "lambda", "cosine", "onecycle", "cyclic", "sequential"]
)
@pytest.mark.parametrize("case", [CASES[1], CASES[5], CASES[7]], ids=str)
def test_scheduler_acts_as_with_torch(case: Case, schedule: Callable[[Any], Any], tensor_lr: bool) -> None:
    lr = torch.tensor(0.05, dtype=torch.float64) if tensor_lr else 0.05
    twins = Twins(case._replace(options={**case.options, "lr": lr}))
    schedulers = [schedule(optimizer) for optimizer in twins.both]
    for seed in range(10):
        twins.step(seed)
        for scheduler in schedulers:
            scheduler.step()
    # Where lr is a tensor torch keeps decay's factor one too; float64 either way.
    twins.assert_equal()
    assert schedulers[0].get_last_lr() == schedulers[1].get_last_lr()
    assert isinstance(twins.ours.param_groups[0]["lr"], Tensor) == tensor_lr


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_tensor_lr_filled_in_place_acts_at_the_next_step(case: Case, shape: tuple[int, ...]) -> None:
    lr = torch.full(shape, 0.05, dtype=torch.float64)
    twins = Twins(case._replace(options={**case.options, "lr": lr}))
    for seed in range(4):
        twins.step(seed)
        twins.edit(lambda optimizer, seed=seed: optimizer.param_groups[0]["lr"].fill_(0.02 * (seed + 1)))
    twins.assert_equal()


def test_tensor_betas_act_as_in_torch() -> None:
    betas = (torch.tensor(0.8, dtype=torch.float64), torch.tensor(0.95, dtype=torch.float64))
    twins = Twins(CASES[3]._replace(options=dict(lr=0.01, betas=betas)))
    for seed in range(5):
        twins.step(seed)
    twins.assert_equal()


PAIRS = [
    (CASES[3], [0.8, 0.95]),
    (CASES[3], np.array([0.8, 0.95])),
    (CASES[3], torch.tensor([0.8, 0.95], dtype=torch.float64)),
    (CASES[7], (np.float32(0.75), np.float64(0.95))),
    (CASES[8], np.array([0.8, 0.95])),
    (CASES[9], np.array([0.8, 0.95])),
]


@pytest.mark.parametrize(("case", "betas"), PAIRS, ids=lambda value: str(value))
def test_any_pair_of_numbers_is_betas_as_in_torch(case: Case, betas: Any) -> None:
    twins = Twins(case._replace(options=dict(lr=0.01, betas=betas)))
    for seed in range(3):
        twins.step(seed)
    twins.assert_equal(rtol=1e-7, atol=1e-7)  # numpy's arithmetic with a float32 is in float32
    twins.ours.load_state_dict(twins.ours.state_dict())
    assert ("betas" in twins.ours.summary()[0].options) == isinstance(betas, torch.Tensor)  # which may be filled


@pytest.mark.parametrize("first", [False, True], ids=["fresh", "after the parent was used"])
@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, SGD, WithOwnStep], ids=lambda c: c.__qualname__)
def test_hooks_run_once_in_torchs_order(optimizer_class: Any, first: bool) -> None:
    params = leaves([(2,)])
    if first:
        SGD(params)
    optimizer = optimizer_class(params, lr=0.1)
    seen: list[tuple[str, bool, int, list[str]]] = []

    def note(name: str) -> Callable[..., None]:
        return lambda opt, args, kwargs: seen.append((name, args[0] is opt is optimizer, len(args), sorted(kwargs)))

    handles = [
        optimizer.register_step_pre_hook(note("pre")),
        optimizer.register_step_post_hook(note("post")),
        register_optimizer_step_pre_hook(note("global pre")),
        register_optimizer_step_post_hook(note("global post")),
    ]
    give_grads(params, 0)
    optimizer.step()
    optimizer.step(lambda: None)
    for handle in handles:
        handle.remove()
    optimizer.step()
    order = ("global pre", "pre", "post", "global post")
    assert seen == [(name, True, count, []) for count in (1, 2) for name in order]


def test_pre_hook_may_replace_the_arguments() -> None:
    params = leaves([(2,)])
    optimizer = SGD(params)
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: ((opt, lambda: "replaced"), {}))
    assert optimizer.step() == "replaced"


def test_profiler_shows_the_class() -> None:
    params = leaves([(2,)])
    optimizer = AdamW(params)
    give_grads(params, 0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
    assert "Optimizer.step#AdamW.step" in {event.name for event in profile.events()}


@pytest.mark.parametrize("backend", BACKENDS)
def test_closure_runs_first_with_gradients_on(backend: str) -> None:
    param = torch.ones(2, dtype=torch.float64, requires_grad=True)
    optimizer = SGD([param], lr=0.25, backend=backend)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        losses = [float(optimizer.step(closure)), float(optimizer.step(closure=closure))]
    assert losses == [2.0, 0.5]
    assert param.tolist() == [0.25, 0.25]
    assert optimizer.step(closure=None) is None


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_is_torchs(set_to_none: bool) -> None:
    twins = Twins(CASES[1])
    for seed in range(3):
        twins.step(seed)
        twins.edit(lambda optimizer: optimizer.zero_grad(set_to_none=set_to_none))
        twins.edit(lambda optimizer: optimizer.step())
    twins.assert_equal()


def test_repr_is_torchs() -> None:
    twins = Twins(CASES[5])
    assert repr(twins.ours) == repr(twins.theirs)
    assert isinstance(twins.ours, torch.optim.Optimizer)


@pytest.mark.parametrize(
    "flags", [dict(foreach=True), dict(foreach=False), dict(fused=True), dict(fused=False)], ids=str
)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_flags_of_torch_are_kept_in_the_groups(case: Case, flags: dict[str, bool]) -> None:
    flags = {name: flag for name, flag in flags.items() if case.takes(name)}
    twins = Twins(case._replace(options={**case.options, **flags}))
    twins.step(0)
    # Torch's foreach works out the next eta of ASGD in float32.
    twins.assert_equal(rtol=2e-7 if case.ours is ASGD and "foreach" in flags else 1e-12)
    assert twins.ours.state_dict()["param_groups"] == twins.theirs.state_dict()["param_groups"]


# Unusual tensors.


def overlapping() -> list[Tensor]:
    memory = torch.linspace(-1, 1, 40, dtype=torch.float64)
    views = memory[:20], memory[10:30].view(4, 5), memory[25:], torch.linspace(0, 1, 7, dtype=torch.float64)
    return [view.detach().requires_grad_() for view in views]


def not_dense() -> list[Tensor]:
    memory = torch.linspace(-1, 1, 60, dtype=torch.float64)
    views = memory[::3], memory.view(6, 10)[:, 2:5].clone(), torch.randn(4, 6, dtype=torch.float64)[:, ::2]
    return [view.detach().requires_grad_() for view in views]


def complex_numbers() -> list[Tensor]:
    values = torch.view_as_complex(torch.linspace(-1, 1, 24, dtype=torch.float64).view(3, 4, 2))
    return [values.clone().requires_grad_(), values.mT.clone()[0, 0].requires_grad_(), *leaves([(3,)])]


class Marked(torch.Tensor):
    """A tensor subclass without behaviour of its own."""


def subclasses() -> list[Tensor]:
    return [leaves([(4,)])[0].detach().as_subclass(Marked).requires_grad_(), *leaves([(3,)])]


@pytest.mark.parametrize("params", [overlapping, not_dense, complex_numbers, subclasses], ids=lambda f: f.__name__)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_unusual_parameters_are_torchs(case: Case, params: Callable[[], list[Tensor]]) -> None:
    if case.ours is LAMB and params is overlapping:
        return  # its norms are those before the step; the textbook's loop has moved a part of the memory already
    torch.manual_seed(1)
    twins = Twins(case, lambda: [torch.manual_seed(1), params()][1])
    for seed in range(4):
        twins.step(seed, complex_grads)
    twins.assert_equal()
    assert {type(param) for param in params_of(twins.ours)} == {type(param) for param in params_of(twins.theirs)}


@pytest.mark.parametrize("case", [CASES[3], CASES[5]], ids=str)
def test_parameter_listed_twice_warns_and_steps_as_in_torch(case: Case) -> None:
    def twice() -> list[Tensor]:
        return leaves([(3,)]) * 2

    with pytest.warns(UserWarning, match="a parameter group with duplicate parameters"):
        twins = Twins(case, twice)
    for seed in range(3):
        twins.step(seed)
    torch.testing.assert_close(params_of(twins.ours)[0], params_of(twins.theirs)[0], rtol=1e-12, atol=1e-12)


def test_parameter_in_two_groups_is_torchs_error() -> None:
    (param,) = leaves([(3,)])
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        SGD([{"params": [param]}, {"params": [param]}])


@pytest.mark.parametrize("options", [{}, dict(weight_decay=0.1), dict(momentum=0.9)], ids=str)
def test_sgd_takes_sparse_gradients(options: dict[str, float], capfd: pytest.CaptureFixture[str]) -> None:
    sparse, dense = leaves([(5, 2)]), leaves([(5, 2)])
    optimizers = SGD(sparse, lr=0.1, max_norm=1.0, **options), SGD(dense, lr=0.1, max_norm=1.0, **options)
    for seed in range(3):
        values = torch.randn(3, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        sparse[0].grad = torch.sparse_coo_tensor(torch.tensor([[1, 1, 4]]), values, (5, 2))
        dense[0].grad = sparse[0].grad.to_dense()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(sparse[0], dense[0], rtol=1e-12, atol=1e-12)  # norms of other sums
    assert optimizers[0].grad_norm == pytest.approx(optimizers[1].grad_norm, rel=1e-12)
    assert capfd.readouterr() == ("", "")  # torch's C interface reports errors on stderr


def sparse_rows(params: Sequence[Tensor], seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    for param in params:
        values = torch.randn(3, 2, generator=random, dtype=torch.float64)
        param.grad = torch.sparse_coo_tensor(torch.tensor([[1, 1, 4]]), values, (5, 2))


def test_adagrad_takes_sparse_gradients_as_torch_does() -> None:
    twins = Twins(CASES[10], lambda: leaves([(5, 2)]))
    for seed in range(4):
        twins.step(seed, sparse_rows)
    twins.assert_equal()
    for optimizer in (Adagrad, torch.optim.Adagrad):
        params = leaves([(5, 2)])
        decaying = optimizer(params, weight_decay=0.1)
        sparse_rows(params, 0)
        before = params[0].detach().clone()
        with pytest.raises(RuntimeError, match="weight_decay option is not compatible with sparse gradients"):
            decaying.step()
        assert torch.equal(params[0], before)


def test_group_of_adagrad_starts_where_it_says() -> None:
    params = leaves([(3,), (3,)])
    optimizer = Adagrad([{"params": params[:1], "initial_accumulator_value": 4.0}, {"params": params[1:]}])
    for param in params:
        param.grad = torch.ones(3, dtype=torch.float64)
    optimizer.step()
    assert [float(optimizer.state[param]["sum"][0]) for param in params] == [5.0, 1.0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", [*NONZERO_START, CASES[19]], ids=str)
def test_sparse_gradient_that_names_all_rows_is_a_dense_one(case: Case, backend: str) -> None:
    twins = Twins(case, lambda: leaves([(5, 2)]), backend=backend, sparse="touched")
    for seed in range(4):
        for optimizer in twins.both:
            give_grads(params_of(optimizer), seed)
        (param,) = params_of(twins.ours)
        param.grad = param.grad.to_sparse(1)
        twins.edit(lambda optimizer: optimizer.step())
    twins.assert_equal()
