"""LBFGS: torch's trajectory, state and checkpoints bit for bit, and what is better: groups, closures, NaN, copies."""

from __future__ import annotations

import copy
import io
import math
import pickle
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from descend.second_order.lbfgs import LBFGS
from descend.second_order.parameter_bounds import flat_bounds
from descend.second_order.parameters import FlatParameters

Loss = Callable[[int], Tensor]
Problem = Callable[[torch.dtype], tuple[list[Tensor], Loss]]
TORCH_KEYS = ["func_evals", "n_iter", "d", "t", "old_dirs", "old_stps", "ro", "H_diag", "prev_flat_grad", "prev_loss"]
SEARCHES = (None, "strong_wolfe")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Small matrices do not wait for a second core."""
    torch.set_num_threads(1)


# Problems: parameters, and the loss of the k-th call of ``step``.


def rosenbrock(dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Loss]:
    x = torch.tensor([-1.2, 1.0, -1.2, 1.0, 0.5], dtype=dtype, requires_grad=True)
    return [x], lambda k: (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def single(dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Loss]:
    x = torch.tensor(3.0, dtype=dtype, requires_grad=True)
    return [x], lambda k: (x - 1) ** 4 + torch.cos(3 * x)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def logistic(dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Loss]:
    """A new minibatch for each step."""
    data, noise = random(60, 7).to(dtype), random(60, seed=1).to(dtype)
    labels = (data[:, 0] + 0.5 * noise > 0).to(dtype)
    weight, bias = torch.zeros(7, dtype=dtype, requires_grad=True), torch.zeros(1, dtype=dtype, requires_grad=True)

    def loss(k: int) -> Tensor:
        rows = slice(10 * (k % 3), 10 * (k % 3) + 40)
        entropy = nn.functional.binary_cross_entropy_with_logits(data[rows] @ weight + bias, labels[rows])
        return entropy + 1e-3 * weight.square().sum()

    return [weight, bias], loss


def network(dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Loss]:
    """Four parameters, a new minibatch for each step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 3)).to(dtype)
    inputs, targets = random(40, 5).to(dtype), random(40, 3, seed=1).to(dtype)
    return list(model.parameters()), lambda k: (model(inputs[5 * k :]) - targets[5 * k :]).square().mean()


PROBLEMS: list[Problem] = [rosenbrock, single, logistic, network]


class Twin(NamedTuple):
    """An optimizer on a problem of its own."""

    optimizer: Any
    params: list[Tensor]
    loss: Loss
    points: list[Tensor]

    def closure(self, k: int = 0) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            self.optimizer.zero_grad()
            loss = self.loss(k)
            loss.backward()
            self.points.append(flat(self.params))
            return loss

        return closure

    def step(self, k: int = 0) -> Tensor:
        loss = self.optimizer.step(self.closure(k))
        self.points.append(flat(self.params))
        return loss

    @property
    def state(self) -> dict[str, Any]:
        return self.optimizer.state[self.params[0]]


def flat(params: list[Tensor]) -> Tensor:
    return torch.cat([param.detach().reshape(-1) for param in params]).clone()


def twin(cls: Any, problem: Problem, dtype: torch.dtype = torch.float64, **options: Any) -> Twin:
    params, loss = problem(dtype)
    if isinstance(options.get("lr"), Tensor):
        options["lr"] = options["lr"].clone()
    return Twin(cls(params, **options), params, loss, [])


def twins(problem: Problem, **options: Any) -> tuple[Twin, Twin]:
    return twin(LBFGS, problem, **options), twin(torch.optim.LBFGS, problem, **options)


def assert_same_points(ours: list[Tensor], theirs: list[Tensor]) -> None:
    """Every evaluation was at the same point, bit for bit."""
    assert len(ours) == len(theirs)
    assert [k for k, (a, b) in enumerate(zip(ours, theirs, strict=True)) if not torch.equal(a, b)] == []


def numbers(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [numbers(entry) for entry in value]
    return value.double().tolist() if isinstance(value, Tensor) else value


# Torch's trajectory.


OPTIONS: list[dict[str, Any]] = [
    dict(),
    dict(lr=0.05, history_size=3),
    dict(lr=0.5, max_iter=1),
    dict(max_iter=7, history_size=1),
    dict(max_iter=40, max_eval=50, tolerance_grad=-1, tolerance_change=-1),
    dict(max_iter=15, max_eval=5),
    dict(tolerance_change=1e-3),
    dict(tolerance_grad=0.1),
    dict(lr=torch.tensor(0.3), max_iter=6),
    dict(lr=torch.tensor([0.7], dtype=torch.float64), history_size=4),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("line_search_fn", SEARCHES)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_trajectory_is_torchs_bit_for_bit(
    problem: Problem, line_search_fn: str | None, options: dict[str, Any]
) -> None:
    ours, theirs = twins(problem, line_search_fn=line_search_fn, **options)
    for k in range(4):
        loss = ours.step(k)
        assert torch.equal(loss, theirs.step(k))
    assert_same_points(ours.points, theirs.points)
    assert all(torch.isfinite(point).all() for point in theirs.points)
    assert set(ours.state) == set(theirs.state)
    for name in set(theirs.state) - {"al"}:
        assert numbers(ours.state[name]) == numbers(theirs.state[name]), name


@pytest.mark.parametrize("line_search_fn", SEARCHES)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_float32_is_torchs_within_rounding(problem: Problem, line_search_fn: str | None) -> None:
    ours, theirs = twins(problem, dtype=torch.float32, lr=0.5, max_iter=6, line_search_fn=line_search_fn)
    for k in range(2):
        torch.testing.assert_close(ours.step(k), theirs.step(k), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(ours.points, theirs.points, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("lr", [1, 0.05, torch.tensor(0.3)], ids=repr)
@pytest.mark.parametrize("line_search_fn", SEARCHES)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_state_has_torchs_types(problem: Problem, line_search_fn: str | None, lr: Any) -> None:
    ours, theirs = twins(problem, lr=lr, max_iter=4, line_search_fn=line_search_fn)
    for k in range(3):
        ours.step(k)
        theirs.step(k)
        for name in TORCH_KEYS:
            assert type(ours.state[name]) is type(theirs.state[name]), name
            if isinstance(ours.state[name], list):
                assert [type(entry) for entry in ours.state[name]] == [type(entry) for entry in theirs.state[name]]


def test_scheduled_tensor_lr_leaves_the_last_step_as_it_was() -> None:
    """Torch keeps the learning rate itself as ``t``."""
    ours, theirs = twins(network, lr=torch.tensor(0.5, dtype=torch.float64), max_iter=3)
    for k in range(3):
        ours.step(k)
        theirs.step(k)
        ours.optimizer.param_groups[0]["lr"].fill_(0.25)
        theirs.optimizer.param_groups[0]["lr"] = torch.tensor(0.25, dtype=torch.float64)
    assert_same_points(ours.points, theirs.points)


@pytest.mark.parametrize("line_search_fn", SEARCHES)
def test_closure_that_moves_parameters_is_followed_as_in_torch(line_search_fn: str | None) -> None:
    """Style transfer clamps the image in the closure."""

    def clamped(dtype: torch.dtype) -> tuple[list[Tensor], Loss]:
        x = torch.tensor([0.9, 0.2, 0.4], dtype=dtype, requires_grad=True)

        def loss(k: int) -> Tensor:
            x.data.clamp_(0, 1)
            return ((x - torch.tensor([2.0, -1.0, 0.5])) ** 4).sum()

        return [x], loss

    ours, theirs = twins(clamped, lr=0.5, max_iter=8, line_search_fn=line_search_fn)
    for k in range(3):
        ours.step(k)
        theirs.step(k)
    assert_same_points(ours.points, theirs.points)


# Checkpoints.


def moved(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Through a file."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("line_search_fn", SEARCHES)
@pytest.mark.parametrize(
    ("saver", "loader"),
    [(LBFGS, torch.optim.LBFGS), (torch.optim.LBFGS, LBFGS), (LBFGS, LBFGS)],
    ids=["to torch", "from torch", "ours"],
)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_checkpoint_continues_bit_for_bit(
    problem: Problem, saver: Any, loader: Any, line_search_fn: str | None
) -> None:
    options = dict(lr=0.5, max_iter=4, history_size=5, line_search_fn=line_search_fn)
    straight, first, second = (twin(cls, problem, **options) for cls in (torch.optim.LBFGS, saver, loader))
    for k in range(2):
        first.step(k)
    with torch.no_grad():
        for param, value in zip(second.params, first.params, strict=True):
            param.copy_(value)
    second.optimizer.load_state_dict(moved(first.optimizer.state_dict()))
    for k in range(4):
        straight.step(k)
        if k >= 2:
            second.step(k)
    assert_same_points([*first.points, *second.points], straight.points)


def test_loading_never_narrows() -> None:
    params = [
        torch.ones(2, dtype=torch.float32, requires_grad=True),
        torch.ones(3, dtype=torch.float64, requires_grad=True),
    ]
    optimizers = [LBFGS(copy.deepcopy(params), max_iter=3) for _ in range(2)]
    for _ in range(2):
        optimizers[0].step(lambda: sum((p.double() ** 4).sum() for p in optimizers[0].param_groups[0]["params"]))
    optimizers[1].load_state_dict(moved(optimizers[0].state_dict()))
    saved, loaded = (next(iter(optimizer.state.values())) for optimizer in optimizers)
    assert loaded["d"].dtype == torch.float64
    assert numbers(loaded["old_dirs"]) == numbers(saved["old_dirs"])


def test_loaded_state_shares_nothing_with_the_saved() -> None:
    ours, other = twin(LBFGS, network, max_iter=4), twin(LBFGS, network, max_iter=4)
    ours.step()
    saved = ours.optimizer.state_dict()
    before = numbers(list(saved["state"][0].values()))
    other.optimizer.load_state_dict(saved)
    for k in range(2):
        other.step(k)
    for name in ("d", "prev_flat_grad"):
        other.state[name].fill_(7)
    for entry in (*other.state["old_dirs"], *other.state["old_stps"], *other.state["ro"]):
        entry.fill_(7)
    assert numbers(list(saved["state"][0].values())) == before


DAMAGES: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda d: d.pop("state"), "lacks"),
    (lambda d: d["param_groups"].append(d["param_groups"][0]), "different number of parameter groups"),
    (lambda d: d["param_groups"][0]["params"].pop(), "doesn't match the size"),
    (lambda d: d["param_groups"][0].update(history_size=0), "history_size"),
    (lambda d: d["state"][0].update(d=torch.zeros(3)), r"loaded d has shape \(3,\)"),
    (lambda d: d["state"][0].update(old_dirs=[torch.zeros(1)]), "old_dirs"),
    (lambda d: d["state"][0].update(old_dirs=None), "one length"),
    (lambda d: d["state"][0]["ro"].pop(), "one length"),
    (lambda d: d["state"][0].pop("prev_flat_grad"), "prev_flat_grad"),
    (lambda d: d["state"][0].update(H_diag="1"), "H_diag must be a number"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES, ids=[message for _, message in DAMAGES])
def test_damaged_checkpoint_changes_nothing(damage: Callable[[dict[str, Any]], Any], message: str) -> None:
    ours, other = twin(LBFGS, network, max_iter=4), twin(LBFGS, network, lr=0.5, max_iter=3)
    ours.step()
    other.step()
    saved = copy.deepcopy(ours.optimizer.state_dict())
    damage(saved)
    before = copy.deepcopy(other.optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        other.optimizer.load_state_dict(saved)
    after = other.optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert numbers(list(after["state"][0].values())) == numbers(list(before["state"][0].values()))


def test_load_hooks_run() -> None:
    ours, other = twin(LBFGS, network, max_iter=2), twin(LBFGS, network)
    ours.step()
    seen: list[str] = []
    other.optimizer.register_load_state_dict_pre_hook(lambda opt, d: {**d, "state": {}})
    other.optimizer.register_load_state_dict_post_hook(lambda opt: seen.append("post"))
    other.optimizer.load_state_dict(ours.optimizer.state_dict())
    assert (dict(other.optimizer.state), seen) == ({}, ["post"])


COPIES: list[Callable[[Any], Any]] = [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))]


@pytest.mark.parametrize("duplicate", COPIES, ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("line_search_fn", SEARCHES)
def test_copy_continues(duplicate: Callable[[Any], Any], line_search_fn: str | None) -> None:
    x = torch.tensor([-1.2, 1.0], dtype=torch.float64, requires_grad=True)
    optimizer = LBFGS([x], max_iter=5, line_search_fn=line_search_fn, weight_decay=0.1, maximize=True)

    def step(optimizer: LBFGS) -> list[float]:
        (x,) = optimizer.param_groups[0]["params"]
        optimizer.step(lambda: -100 * (x[1] - x[0] ** 2) ** 2 - (1 - x[0]) ** 2)
        return x.tolist()

    step(optimizer)
    twin = duplicate(optimizer)
    assert [step(twin) for _ in range(3)] == [step(optimizer) for _ in range(3)]


def test_groups_have_torchs_keys() -> None:
    ours = LBFGS([torch.zeros(1, requires_grad=True)], weight_decay=0.1, maximize=True)
    theirs = torch.optim.LBFGS([torch.zeros(1, requires_grad=True)])
    assert ours.state_dict() == theirs.state_dict()
    assert repr(ours) == repr(theirs)
    assert {k: v for k, v in ours.defaults.items() if k != "differentiable"} == theirs.defaults


@pytest.mark.parametrize("n_params", [1, 2])
def test_distributed_checkpoint_gets_and_sets_the_state(n_params: int) -> None:
    def made() -> tuple[nn.Module, LBFGS]:
        torch.manual_seed(0)
        model = nn.Linear(3, 2, bias=n_params == 2)
        return model, LBFGS(model.parameters(), max_iter=3)

    def step(model: nn.Module, optimizer: LBFGS) -> list[float]:
        optimizer.step(lambda: model(torch.eye(3)).square().sum())
        return flat(list(model.parameters())).tolist()

    model, optimizer = made()
    optimizer.init_state()
    before = flat(list(model.parameters()))
    assert get_optimizer_state_dict(model, optimizer)["state"]["weight"]["n_iter"] == 0
    assert torch.equal(flat(list(model.parameters())), before)
    step(model, optimizer)
    other, loader = made()
    other.load_state_dict(model.state_dict())
    set_optimizer_state_dict(other, loader, get_optimizer_state_dict(model, optimizer))
    assert step(other, loader) == step(model, optimizer)


def test_distributed_checkpoint_makes_the_state_itself() -> None:
    model = nn.Linear(3, 2)
    optimizer = LBFGS(model.parameters())
    found = get_optimizer_state_dict(model, optimizer)
    assert set(found["state"]) == {"weight", "bias"}
    assert optimizer.param_groups[0]["lr"] == 1


def test_step_without_closure_makes_state_and_changes_nothing() -> None:
    ours, untouched = twin(LBFGS, network, max_iter=3), twin(LBFGS, network, max_iter=3)
    assert ours.optimizer.step() is None
    assert list(ours.state) == TORCH_KEYS
    for k in range(3):
        ours.step(k)
        untouched.step(k)
        before = numbers(list(ours.state.values()))
        assert ours.optimizer.step() is None
        assert numbers(list(ours.state.values())) == before
    assert_same_points(ours.points, untouched.points)


# Parameters.


def strided(dtype: torch.dtype) -> tuple[list[Tensor], Loss]:
    memory = torch.linspace(-1, 1, 60, dtype=dtype)
    params = [memory[:20:2].detach().requires_grad_(), memory[20:50].view(5, 6).t().detach().requires_grad_()]
    scale = torch.linspace(1, 3, 30, dtype=dtype).view(6, 5)
    return params, lambda k: ((params[0] - 0.3) ** 4).sum() + (params[1].t() @ scale).square().sum()


def with_unused(dtype: torch.dtype) -> tuple[list[Tensor], Loss]:
    params, loss = network(dtype)
    unused, empty = torch.ones(3, dtype=dtype, requires_grad=True), torch.ones(0, 4, dtype=dtype, requires_grad=True)
    frozen = torch.ones(2, dtype=dtype)
    return [unused, *params[:2], empty, frozen, *params[2:]], loss


def complex_numbers(dtype: torch.dtype) -> tuple[list[Tensor], Loss]:
    z = torch.complex(torch.linspace(-1, 1, 3), torch.linspace(0, 2, 3)).to(torch.complex128).requires_grad_()
    x = torch.ones(1, dtype=dtype, requires_grad=True)
    return [x, z], lambda k: ((z - x - 1j).abs() ** 2 + 0.1 * z.real**4).sum() + (x**2).sum()


@pytest.mark.parametrize("line_search_fn", SEARCHES)
@pytest.mark.parametrize("problem", [with_unused, complex_numbers], ids=["without gradient", "complex"])
def test_unusual_parameters_move_as_in_torch(problem: Problem, line_search_fn: str | None) -> None:
    ours, theirs = twins(problem, lr=0.5, max_iter=6, line_search_fn=line_search_fn)
    for k in range(2):
        ours.step(k)
        theirs.step(k)
    assert_same_points(ours.points, theirs.points)


@pytest.mark.parametrize("line_search_fn", SEARCHES)
def test_non_contiguous_parameters_and_gradients_move_as_contiguous_ones(line_search_fn: str | None) -> None:
    def dense(dtype: torch.dtype) -> tuple[list[Tensor], Loss]:
        params = [
            param.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for param in strided(dtype)[0]
        ]
        scale = torch.linspace(1, 3, 30, dtype=dtype).view(6, 5)
        return params, lambda k: ((params[0] - 0.3) ** 4).sum() + (params[1].t() @ scale).square().sum()

    first = twin(LBFGS, strided, lr=0.5, max_iter=6, line_search_fn=line_search_fn)
    second = twin(LBFGS, dense, lr=0.5, max_iter=6, line_search_fn=line_search_fn)
    first.step()
    second.step()
    torch.testing.assert_close(first.params, second.params, rtol=1e-12, atol=1e-12)


def test_sparse_gradient_acts_as_dense() -> None:
    found = []
    for sparse in (True, False):
        table = nn.Embedding.from_pretrained(random(5, 2), freeze=False, sparse=sparse)
        optimizer = LBFGS(table.parameters(), max_iter=4)
        optimizer.step(lambda table=table: table(torch.tensor([1, 3, 3])).pow(4).sum())
        found.append(table.weight.detach())
    assert torch.equal(*found)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.bfloat16, torch.float16)], ids=str)
def test_mixed_dtypes_share_one_problem(dtypes: tuple[torch.dtype, ...]) -> None:
    params = [torch.full((3,), 2.0, dtype=dtype, requires_grad=True) for dtype in dtypes]
    optimizer = LBFGS(params, line_search_fn="strong_wolfe")
    optimizer.step(lambda: sum((param.double() - 1).square().sum() for param in params))
    assert optimizer.state[params[0]]["d"].dtype == (torch.float64 if torch.float64 in dtypes else torch.float32)
    assert all(torch.allclose(param.double(), torch.ones(3, dtype=torch.float64), atol=1e-2) for param in params)


def test_only_empty_parameters_converge_at_once() -> None:
    param = torch.zeros(0, 3, requires_grad=True)
    optimizer = LBFGS([param])
    assert optimizer.step(lambda: param.sum()) == 0
    assert optimizer.result.status == "converged"


def test_parameters_change_in_place_and_visibly() -> None:
    ours = twin(LBFGS, network)
    before = [(id(param), param._version) for param in ours.params]
    ours.step()
    assert all(id(p) == i and p._version > version for p, (i, version) in zip(ours.params, before, strict=True))


@pytest.mark.parametrize(
    "edit",
    [
        lambda o: o.add_param_group({"params": [torch.ones(2, dtype=torch.float64, requires_grad=True)]}),
        lambda o: o.param_groups[0]["params"].pop(),
        lambda o: o.state.clear(),
        lambda o: o.param_groups[0].update(history_size=2),
    ],
    ids=["add group", "remove parameter", "clear state", "shorter history"],
)
@pytest.mark.parametrize("line_search_fn", SEARCHES)
def test_edits_act_at_the_next_step(line_search_fn: str | None, edit: Callable[[Any], Any]) -> None:
    params = [random(3, seed=k).requires_grad_() for k in range(3)]
    optimizer = LBFGS(params, lr=0.3, max_iter=4, line_search_fn=line_search_fn)

    def closure() -> Any:
        return sum(((p - 1) ** 4 + p**2).sum() for group in optimizer.param_groups for p in group["params"])

    first = float(optimizer.step(closure).detach())
    edit(optimizer)
    mid = float(closure().detach())
    optimizer.step(closure)
    optimizer.step(closure)
    assert float(closure().detach()) < mid
    assert first > 0
    assert len(optimizer.state[params[0]]["d"]) == sum(p.numel() for g in optimizer.param_groups for p in g["params"])


def test_model_may_change_its_dtype_between_steps() -> None:
    model = nn.Linear(3, 2)
    optimizer = LBFGS(model.parameters(), max_iter=3)
    for dtype in (torch.float32, torch.float64, torch.float32):
        model.to(dtype)
        optimizer.step(lambda dtype=dtype: model(torch.eye(3, dtype=dtype)).square().sum())
        assert optimizer.state[model.weight]["d"].dtype == dtype


# Groups.


@pytest.mark.parametrize("line_search_fn", SEARCHES)
def test_groups_are_one_problem(line_search_fn: str | None) -> None:
    def grouped(params: list[Tensor], **options: Any) -> LBFGS:
        return LBFGS([{"params": params[:1]}, {"params": params[1:]}], **options)

    ours = twin(grouped, network, max_iter=5, line_search_fn=line_search_fn)
    theirs = twin(torch.optim.LBFGS, network, max_iter=5, line_search_fn=line_search_fn)
    for k in range(2):
        ours.step(k)
        theirs.step(k)
    assert_same_points(ours.points, theirs.points)


def test_weight_decay_is_a_penalty_on_loss_and_gradient() -> None:
    def penalised(dtype: torch.dtype) -> tuple[list[Tensor], Loss]:
        params, loss = network(dtype)
        return params, lambda k: loss(k) + 0.1 * params[0].square().sum() + 0.2 * params[2].square().sum()

    def grouped(params: list[Tensor], **options: Any) -> LBFGS:
        groups = [
            {"params": [param], "weight_decay": decay} for param, decay in zip(params, (0.2, 0, 0.4, 0), strict=True)
        ]
        return LBFGS(groups, weight_decay=5.0, **options)

    ours = twin(grouped, network, max_iter=5, line_search_fn="strong_wolfe")
    explicit = twin(LBFGS, penalised, max_iter=5, line_search_fn="strong_wolfe")
    ours.step()
    explicit.step()
    torch.testing.assert_close(ours.params, explicit.params, rtol=1e-9, atol=1e-9)
    assert ours.optimizer.result.fun == pytest.approx(explicit.optimizer.result.fun)


def test_weight_decay_of_the_constructor_is_for_all_groups() -> None:
    params = [torch.full((2,), 4.0, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    optimizer = LBFGS([{"params": params[:1]}, {"params": params[1:]}], weight_decay=1, line_search_fn="strong_wolfe")
    optimizer.step(lambda: -sum(param.sum() for param in params))
    torch.testing.assert_close(params, [torch.ones(2, dtype=torch.float64)] * 2)


@pytest.mark.parametrize("line_search_fn", SEARCHES)
def test_maximize_is_minimize_of_the_negative(line_search_fn: str | None) -> None:
    def negative(dtype: torch.dtype) -> tuple[list[Tensor], Loss]:
        params, loss = network(dtype)
        return params, lambda k: -loss(k)

    up = twin(LBFGS, negative, maximize=True, max_iter=5, line_search_fn=line_search_fn)
    down = twin(LBFGS, network, max_iter=5, line_search_fn=line_search_fn)
    for k in range(2):
        assert up.step(k) == -down.step(k)
    assert_same_points(up.points, down.points)
    assert up.optimizer.result.fun == -down.optimizer.result.fun


def test_new_group_takes_the_first_ones_options() -> None:
    x, y = (torch.zeros(1, requires_grad=True) for _ in range(2))
    optimizer = LBFGS([{"params": [x], "lr": 0.5}])
    optimizer.add_param_group({"params": [y]})
    assert optimizer.param_groups[1]["lr"] == 0.5


WRONG: list[tuple[dict[str, Any], str]] = [
    (dict(lr=-1), "Invalid learning rate: -1"),
    (dict(lr=math.nan), "Invalid learning rate"),
    (dict(lr=torch.ones(2)), "Tensor lr must be 1-element"),
    (dict(max_iter=-1), "max_iter must be a number >= 0"),
    (dict(max_eval=-1), "max_eval must be a number >= 0"),
    (dict(history_size=0), "history_size must be an integer >= 1, got 0"),
    (dict(tolerance_grad=math.nan), "tolerance_grad must be a number, got nan"),
    (dict(tolerance_change="x"), "tolerance_change must be a number, got 'x'"),
    (dict(line_search_fn="wolfe"), "line_search_fn must be one of .* got 'wolfe'"),
    (dict(weight_decay=-1), "weight_decay must be a number >= 0"),
    (dict(bounds=(0, 1)), "bounds need line_search_fn='hager_zhang', got None"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=[str(options) for options, _ in WRONG])
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LBFGS([torch.zeros(1, requires_grad=True)], **options)


@pytest.mark.parametrize("option", [dict(lr=0.5), dict(max_iter=3), dict(line_search_fn="strong_wolfe")], ids=str)
def test_groups_must_agree(option: dict[str, Any]) -> None:
    x, y = (torch.zeros(1, requires_grad=True) for _ in range(2))
    with pytest.raises(ValueError, match="all groups are one problem with one"):
        LBFGS([{"params": [x]}, {"params": [y], **option}])


def test_group_that_does_not_fit_is_not_added() -> None:
    x, y = (torch.zeros(1, requires_grad=True) for _ in range(2))
    optimizer = LBFGS([x])
    with pytest.raises(ValueError, match="bounds need line_search_fn='hager_zhang'"):
        optimizer.add_param_group({"params": [y], "bounds": (0, 1)})
    assert len(optimizer.param_groups) == 1


def test_integer_parameter_is_an_error() -> None:
    optimizer = LBFGS([torch.zeros(1, dtype=torch.int64)])
    with pytest.raises(TypeError, match=r"parameters must be floating point or complex, got torch\.int64"):
        optimizer.step(lambda: 0.0)


# Bounds.


def bounded(bounds: Any = None, **own: Any) -> tuple[list[float], list[float]] | None:
    named = {"scale": torch.zeros(2, requires_grad=True), "sigma": torch.zeros(1, 2, requires_grad=True)}
    groups = [{"params": [pair], **({"bounds": own[pair[0]]} if pair[0] in own else {})} for pair in named.items()]
    optimizer = torch.optim.SGD(groups, lr=1)
    point = FlatParameters(optimizer.param_groups, "LBFGS")
    found = flat_bounds(point, optimizer.param_groups, bounds, "LBFGS")
    return None if found is None else (found[0].tolist(), found[1].tolist())


INF = math.inf
PAIRS: list[tuple[Any, dict[str, Any], Any]] = [
    (None, {}, None),
    ({}, {}, None),
    ((None, None), {}, ([-INF] * 4, [INF] * 4)),
    ((0, 1.5), {}, ([0.0] * 4, [1.5] * 4)),
    ([-INF, torch.tensor([1.0, 2.0])], {}, ([-INF] * 4, [1.0, 2.0, 1.0, 2.0])),
    ({"sigma": (0, None)}, {}, ([-INF, -INF, 0.0, 0.0], [INF] * 4)),
    (None, {"scale": (0, 1)}, ([0.0, 0.0, -INF, -INF], [1.0, 1.0, INF, INF])),
    ((-1, 1), {"sigma": (0, [[2.0, 3.0]])}, ([-1.0, -1.0, 0.0, 0.0], [1.0, 1.0, 2.0, 3.0])),
    ({"scale": (0, 1)}, {"sigma": {"sigma": (2, 3)}}, ([0.0, 0.0, 2.0, 2.0], [1.0, 1.0, 3.0, 3.0])),
]


@pytest.mark.parametrize(("bounds", "own", "expected"), PAIRS, ids=str)
def test_bounds_become_flat(bounds: Any, own: dict[str, Any], expected: Any) -> None:
    assert bounded(bounds, **own) == expected


WRONG_BOUNDS: list[tuple[Any, str]] = [
    (1, r"must be \(lower, upper\).* got 1"),
    ((0, 1, 2), r"must be \(lower, upper\)"),
    ((1, 0), "the lower bound of scale is above its upper bound"),
    ((math.nan, 1), "the lower bound of scale must be neither NaN"),
    ((INF, None), "the lower bound of scale must be neither NaN nor inf"),
    ((None, -INF), "the upper bound of scale must be neither NaN nor -inf"),
    (("a", 1), "the lower bound of scale must be a number or a tensor"),
    ((torch.zeros(3), None), r"the lower bound of scale .* shape \(2,\)"),
    ({"sigmo": (0, 1)}, "bounds name 'sigmo', which is no parameter's name. Near: sigma"),
]


@pytest.mark.parametrize(("bounds", "message"), WRONG_BOUNDS, ids=[message for _, message in WRONG_BOUNDS])
def test_wrong_bounds_are_named(bounds: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bounded(bounds)


def test_bounds_by_name_need_names() -> None:
    with pytest.raises(ValueError, match="need named parameters"):
        LBFGS([torch.zeros(1, requires_grad=True)], line_search_fn="hager_zhang", bounds={"x": (0, 1)})


def test_complex_parameter_has_no_bounds() -> None:
    with pytest.raises(ValueError, match="complex numbers have no order"):
        LBFGS([torch.zeros(1, dtype=torch.cfloat, requires_grad=True)], line_search_fn="hager_zhang", bounds=(0, 1))


# Closures.


def silent(twin: Twin) -> Callable[[], Any]:
    return lambda: twin.loss(0)


def zeroing(twin: Twin) -> Callable[[], Any]:
    def closure() -> Tensor:
        twin.optimizer.zero_grad(set_to_none=False)
        return twin.loss(0)

    return closure


def by_autograd(twin: Twin) -> Callable[[], Any]:
    def closure() -> Tensor:
        loss = twin.loss(0)
        for param, grad in zip(twin.params, torch.autograd.grad(loss, twin.params), strict=True):
            param.grad = grad
        return loss

    return closure


def of_numbers(twin: Twin) -> Callable[[], Any]:
    """Gradients written past autograd, the loss a number."""

    def closure() -> float:
        loss = twin.loss(0)
        for param, grad in zip(twin.params, torch.autograd.grad(loss, twin.params), strict=True):
            if param.grad is None:
                param.grad = torch.zeros_like(param)
            param.grad.numpy()[...] = grad.numpy()
        return loss.item()

    return closure


@pytest.mark.parametrize("context", [nullcontext, torch.no_grad, torch.inference_mode], ids=lambda c: c.__name__)
@pytest.mark.parametrize("line_search_fn", SEARCHES)
@pytest.mark.parametrize("kind", [silent, zeroing, by_autograd, of_numbers], ids=lambda f: f.__name__)
def test_closure_of_any_kind_gives_the_same_steps(
    kind: Callable[[Twin], Any], line_search_fn: str | None, context: Callable[[], Any]
) -> None:
    options = dict(max_iter=6, line_search_fn=line_search_fn)
    ours, usual = twin(LBFGS, network, **options), twin(LBFGS, network, **options)
    for _ in range(3):
        with context():
            loss = ours.optimizer.step(kind(ours))
        assert torch.as_tensor(loss, dtype=torch.float64).item() == usual.step().item()
    assert torch.equal(flat(ours.params), flat(usual.params))
    if line_search_fn is None:
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(ours.params, usual.params, strict=True))


def test_zero_gradient_after_backward_is_believed() -> None:
    x = torch.zeros(2, requires_grad=True)
    optimizer = LBFGS([x])

    def closure() -> Tensor:
        optimizer.zero_grad(set_to_none=False)
        loss = x.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 0
    assert optimizer.result.status == "converged"


@pytest.mark.parametrize("loss", [2, 2.0, torch.tensor(2), torch.tensor([[2.0]])], ids=repr)
def test_loss_may_be_any_real_scalar(loss: Any) -> None:
    x = torch.ones(1, requires_grad=True)

    def closure() -> Any:
        x.grad = torch.zeros(1)
        return loss

    optimizer = LBFGS([x])
    assert optimizer.step(closure) is loss
    assert optimizer.result.fun == 2.0


def stale(optimizer: LBFGS, x: Tensor) -> Any:
    x.grad = torch.ones_like(x)
    return lambda: float(x.detach().sum())


def used_up(optimizer: LBFGS, x: Tensor) -> Any:
    loss = x.square().sum()
    loss.backward()
    return lambda: loss


HOSTILE: list[tuple[str, Callable[[LBFGS, Tensor], Any], type[Exception], str]] = [
    ("none", lambda o, x: lambda: None, TypeError, "got None"),
    ("string", lambda o, x: lambda: "1.0", TypeError, "got str"),
    ("tuple", lambda o, x: lambda: (x.sum(), 1), TypeError, "got tuple"),
    ("complex number", lambda o, x: lambda: 1j, TypeError, "got complex"),
    ("complex tensor", lambda o, x: lambda: x.sum() * 1j, TypeError, "complex64 tensor"),
    ("vector", lambda o, x: lambda: x * 2, ValueError, r"shape \(3,\). Reduce it"),
    ("empty", lambda o, x: lambda: x[:0], ValueError, r"shape \(0,\)"),
    ("detached", lambda o, x: lambda: x.detach().sum(), RuntimeError, "gave no gradient"),
    ("number", lambda o, x: lambda: 1.0, RuntimeError, "gave no gradient"),
    ("unrelated", lambda o, x: lambda: torch.ones(2, requires_grad=True).sum(), RuntimeError, "does not depend"),
    ("stale gradient", stale, RuntimeError, "did not compute the gradient at the new parameters"),
    ("graph used up", used_up, RuntimeError, "compute the loss anew"),
    ("no function", lambda o, x: 1.0, TypeError, "closure must be a function"),
]


@pytest.mark.parametrize("line_search_fn", SEARCHES)
@pytest.mark.parametrize(("hostile", "kind", "message"), [row[1:] for row in HOSTILE], ids=[row[0] for row in HOSTILE])
def test_hostile_closure_gets_a_clear_error_and_moves_nothing(
    hostile: Callable[[LBFGS, Tensor], Any], kind: type[Exception], message: str, line_search_fn: str | None
) -> None:
    x = torch.full((3,), 2.0, requires_grad=True)
    optimizer = LBFGS([x], line_search_fn=line_search_fn)
    with pytest.raises(kind, match=message):
        optimizer.step(hostile(optimizer, x))
    assert x.tolist() == [2.0] * 3
    x.grad = None
    optimizer.step(lambda: ((x - 1) ** 2).sum())
    optimizer.step(lambda: ((x - 1) ** 2).sum())
    torch.testing.assert_close(x.detach(), torch.ones(3))


def failing(closure: Callable[[], Any], call: int, error: BaseException) -> Callable[[], Any]:
    """The closure, but the ``call``-th time it raises."""
    calls = 0

    def closure_that_fails() -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise error
        return closure()

    return closure_that_fails


@pytest.mark.parametrize("call", range(1, 14))
@pytest.mark.parametrize("line_search_fn", SEARCHES)
@pytest.mark.parametrize("error", [ValueError("here"), KeyboardInterrupt("here")], ids=repr)
def test_after_a_closure_that_raises_the_next_step_goes_on(
    error: BaseException, line_search_fn: str | None, call: int
) -> None:
    options = dict(lr=0.5, max_iter=40, max_eval=100, line_search_fn=line_search_fn)
    ours, usual = twin(LBFGS, rosenbrock, **options), twin(LBFGS, rosenbrock, **options)
    usual.step()
    start = flat(ours.params)
    with pytest.raises(type(error), match="here"):
        ours.optimizer.step(failing(ours.closure(), call, error))
    stayed, before = flat(ours.params), list(ours.points)
    assert stayed.tolist() in [point.tolist() for point in (start, *before)]
    if line_search_fn is None and before:
        assert torch.equal(stayed, before[-1])
    ours.points.clear()
    ours.step()
    assert torch.equal(ours.points[0], stayed)
    # From here on the same points as if nothing had happened.
    place = next(k for k, point in enumerate(usual.points) if torch.equal(point, ours.points[1]))
    assert place <= max(call - 1, 1)
    common = min(len(usual.points) - place, len(ours.points) - 1) - 1
    assert common > 10
    assert_same_points(ours.points[1:][:common], usual.points[place:][:common])


# Walls: NaN and infinity.


def logarithm(x: Tensor) -> Tensor:
    return (x - 3 * torch.log(x)).sum()


def root(x: Tensor) -> Tensor:
    return (torch.sqrt(x) + 0.5 / torch.sqrt(x)).sum()


def cliff(x: Tensor) -> Tensor:
    return torch.where(x > 0.1, 1 / x + x, torch.full_like(x, math.inf)).sum()


def overflow(x: Tensor) -> Tensor:
    return torch.exp(30 * (x - 2) ** 2).sum()


def below(x: Tensor) -> Tensor:
    return torch.where(x > -50, x.square(), -torch.full_like(x, math.inf)).sum() - 1000 * x.sum()


def unbounded(x: Tensor) -> Tensor:
    return -(x**3).sum()


def saturated(x: Tensor) -> Tensor:
    return torch.sigmoid(-x).sum()


WALLS = [logarithm, root, cliff, overflow, below, unbounded, saturated]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("lr", [1, 1e30])
@pytest.mark.parametrize("max_iter", [1, 20])
@pytest.mark.parametrize("line_search_fn", SEARCHES)
@pytest.mark.parametrize("fun", WALLS, ids=lambda f: f.__name__)
def test_parameters_stay_finite(
    fun: Callable[[Tensor], Tensor], line_search_fn: str | None, max_iter: int, lr: float, dtype: torch.dtype
) -> None:
    x = torch.tensor([0.9, 2.0, 4.0], dtype=dtype, requires_grad=True)
    optimizer = LBFGS([x], lr=lr, max_iter=max_iter, line_search_fn=line_search_fn)
    for _ in range(6):
        optimizer.step(lambda: fun(x))
        assert torch.isfinite(x).all()
        assert optimizer.result.status in list(type(optimizer.result.status))


@pytest.mark.parametrize("fun", [logarithm, root, cliff], ids=lambda f: f.__name__)
@pytest.mark.parametrize("line_search_fn", SEARCHES)
def test_steps_into_a_wall_are_cut_and_the_minimum_is_found(
    fun: Callable[[Tensor], Tensor], line_search_fn: str | None
) -> None:
    x = torch.tensor([0.9, 2.0, 4.0], dtype=torch.float64, requires_grad=True)
    optimizer = LBFGS([x], lr=8, max_iter=5, line_search_fn=line_search_fn)
    optimizer.step(lambda: fun(x))
    optimizer.param_groups[0].update(lr=1, max_iter=100, max_eval=200)
    optimizer.step(lambda: fun(x))
    minimum = {logarithm: 3.0, root: 0.5, cliff: 1.0}[fun]
    torch.testing.assert_close(x.detach(), torch.full((3,), minimum, dtype=torch.float64), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("line_search_fn", SEARCHES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_start_that_is_not_finite_moves_nothing(bad: float, line_search_fn: str | None) -> None:
    x = torch.ones(2, requires_grad=True)
    optimizer = LBFGS([x], line_search_fn=line_search_fn)
    loss = optimizer.step(lambda: x.sum() * bad)
    assert x.tolist() == [1.0, 1.0]
    assert not torch.isfinite(loss)
    assert optimizer.result.status == "non_finite"
    optimizer.step(lambda: (x - 3).square().sum())
    optimizer.step(lambda: (x - 3).square().sum())
    torch.testing.assert_close(x.detach(), torch.full((2,), 3.0))


def test_infinite_trial_from_which_torch_recovers_is_torchs() -> None:
    def walled(dtype: torch.dtype) -> tuple[list[Tensor], Loss]:
        x = torch.tensor([0.3, 0.2], dtype=dtype, requires_grad=True)
        return [x], lambda k: torch.where(x > 0.1, 1 / x - 2 * x, x * math.inf - x * math.inf + math.inf).sum()

    def nan_slope(dtype: torch.dtype) -> tuple[list[Tensor], Loss]:
        x = torch.tensor([4.0, 2.0], dtype=dtype, requires_grad=True)
        return [x], lambda k: (x.exp() + (x - 6).exp().exp().exp()).sum()

    for problem in (walled, nan_slope):
        ours, theirs = twins(problem, lr=3, max_iter=4, line_search_fn="strong_wolfe")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for k in range(2):
                ours.step(k)
                theirs.step(k)
        if torch.isfinite(theirs.points[-1]).all() and theirs.loss(0).isfinite():
            assert_same_points(ours.points, theirs.points)


# Random closures.


def noisy_steps(line_search_fn: str | None, closure_of: Callable[[Tensor, Tensor], Any]) -> None:
    x, batch = torch.full((20,), 2.0, requires_grad=True), torch.ones(20)
    optimizer = LBFGS([x], lr=0.1, max_iter=2, line_search_fn=line_search_fn)
    for _ in range(6):
        batch.copy_(torch.rand(20))
        optimizer.step(lambda: closure_of(x, batch))


def test_dropout_warns_once() -> None:
    with pytest.warns(UserWarning, match="draws random numbers") as record:
        noisy_steps("strong_wolfe", lambda x, batch: nn.functional.dropout(x - 1, 0.5).square().sum())
    assert len(record) == 1
    assert record[0].filename == __file__


def seeded(x: Tensor, batch: Tensor) -> Tensor:
    torch.manual_seed(0)
    return nn.functional.dropout(x - 1, 0.5).square().sum()


def loader(x: Tensor, batch: Tensor) -> Tensor:
    rows = torch.utils.data.DataLoader(range(20), batch_size=5, shuffle=True)
    return sum((x[row] - 1).square().sum() for row in rows)


@pytest.mark.parametrize(
    "closure_of", [lambda x, batch: (x - batch).square().sum(), seeded, loader], ids=["minibatch", "seeded", "loader"]
)
@pytest.mark.parametrize("line_search_fn", SEARCHES)
def test_closures_that_are_functions_do_not_warn(line_search_fn: str | None, closure_of: Any) -> None:
    noisy_steps(line_search_fn, closure_of)


# Result.


@pytest.mark.parametrize(
    ("options", "status"),
    [
        (dict(max_iter=100, max_eval=1000, tolerance_change=0), "converged"),
        (dict(max_iter=3, max_eval=20), "max_iter"),
        (dict(max_iter=30, max_eval=4), "max_eval"),
        (dict(max_iter=100, max_eval=1000, tolerance_change=0.1), "precision_limit"),
    ],
    ids=str,
)
def test_result_says_why_it_stopped(options: dict[str, Any], status: str) -> None:
    ours = twin(LBFGS, rosenbrock, line_search_fn="strong_wolfe", **options)
    assert ours.optimizer.result is None
    ours.step()
    result = ours.optimizer.result
    assert result.status == status
    assert result.success == (status == "converged")
    assert result.message
    assert result.fun == ours.loss(0).item()
    assert result.x[0] is ours.params[0]
    assert result.grad_norm == result.grad[0].abs().max()
    assert (result.n_iter, result.n_eval) == (ours.state["n_iter"], ours.state["func_evals"])
    assert len(result.history) == result.n_iter + 1
    assert (result.history[-1].fun, result.history[-1].grad_norm) == (result.fun, result.grad_norm)


# The rest of a torch program.


@pytest.mark.parametrize("line_search_fn", SEARCHES)
def test_scheduler_acts_as_with_torch(line_search_fn: str | None) -> None:
    ours, theirs = twins(network, max_iter=2, line_search_fn=line_search_fn)
    schedulers = [lr_scheduler.ExponentialLR(both.optimizer, gamma=0.7) for both in (ours, theirs)]
    for k in range(4):
        ours.step(k)
        theirs.step(k)
        for scheduler in schedulers:
            scheduler.step()
    assert_same_points(ours.points, theirs.points)


class Tampering(LBFGS):
    """A subclass with a step of its own."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


@pytest.mark.parametrize("cls", [LBFGS, Tampering])
def test_hooks_run_once_in_torchs_order(cls: Any) -> None:
    ours = twin(cls, single)
    seen: list[tuple[str, bool, int]] = []

    def note(name: str) -> Callable[..., None]:
        return lambda opt, args, kwargs: seen.append((name, args[0] is opt is ours.optimizer, len(args)))

    handles = [
        ours.optimizer.register_step_pre_hook(note("pre")),
        ours.optimizer.register_step_post_hook(note("post")),
        register_optimizer_step_pre_hook(note("global pre")),
        register_optimizer_step_post_hook(note("global post")),
    ]
    ours.step()
    for handle in handles:
        handle.remove()
    ours.step()
    assert seen == [(name, True, 2) for name in ("global pre", "pre", "post", "global post")]


def test_profiler_shows_the_class() -> None:
    ours = twin(LBFGS, single)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        ours.step()
    assert "Optimizer.step#LBFGS.step" in {event.name for event in profile.events()}


def test_grad_scaler_is_refused() -> None:
    ours, scaler = twin(LBFGS, single), torch.amp.GradScaler("cpu")
    scaler.scale(ours.loss(0)).backward()
    with pytest.raises(RuntimeError, match="LBFGS does not work with GradScaler"):
        scaler.step(ours.optimizer)
    assert getattr(ours.optimizer, "_step_supports_amp_scaling", False) is False


def test_grad_scaler_that_is_off_is_let_through() -> None:
    ours = twin(LBFGS, single)
    torch.amp.GradScaler("cpu", enabled=False).step(ours.optimizer, ours.closure())
    assert ours.optimizer.result is not None


def test_compiled_program_calls_the_step() -> None:
    ours, usual = twin(LBFGS, rosenbrock, max_iter=3), twin(LBFGS, rosenbrock, max_iter=3)
    closure = ours.closure()
    program = torch.compile(lambda: ours.optimizer.step(closure), backend="eager")
    program()
    usual.step()
    assert torch.equal(flat(ours.params), flat(usual.params))
