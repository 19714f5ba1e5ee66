"""SparseAdam is torch's: results, state, groups, checkpoints, errors."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from cases import (
    BACKENDS,
    Case,
    Twins,
    assert_same_bits,
    assert_unmoved,
    leaves,
    params_of,
    snapshot,
    state_of,
)
from edits import (
    replace_group,
    set_in_place,
    swap_for_strided,
    swap_for_transposed,
    swap_storage,
    write_params,
)
from sparse_cases import coo, one_thread, random_sparse  # noqa: F401 a fixture
from torch import Tensor, nn
from torch.optim import lr_scheduler

from descend import Adam, FirstOrder, SparseAdam, warmup
from descend.backends.cpu import library, object_files

SHAPES = [(9, 4), (6, 3, 2), (5,)]


def sparse_case(**options: Any) -> Case:
    return Case(SparseAdam, torch.optim.SparseAdam, options)  # type: ignore[arg-type]


PLAIN = sparse_case(lr=0.05)
CASES = [
    PLAIN,
    sparse_case(lr=0.05, betas=(0.5, 0.9), eps=1e-3),
    sparse_case(lr=0.05, betas=(0.0, 0.0)),
    sparse_case(lr=0.05, maximize=True),
    sparse_case(lr=torch.tensor([0.05], dtype=torch.float64)),
    sparse_case(),
]


def tables(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return leaves(SHAPES, dtype)


def sparse_grads(params: Sequence[Tensor], seed: int) -> None:
    """Rows named several times, others not at all; now and then no rows, or no gradient."""
    for number, param in enumerate(params):
        count = 0 if (seed + number) % 5 == 3 else 3 + len(param) // 2
        param.grad = random_sparse(param.shape, count, 10 * seed + number, param.dtype)
        if (seed + number) % 7 == 5:
            param.grad = param.grad.coalesce()
        if (seed + number) % 11 == 8:
            param.grad = None


def through_file(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# Results.


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_fifty_steps_are_torchs(case: Case, backend: str) -> None:
    twins = Twins(case, tables, backend=backend)
    for seed in range(50):
        twins.step(seed, sparse_grads)
    twins.assert_equal()  # float64's rounding over 50 steps; "step" an int, the names in torch's order
    assert {type(state["step"]) for state in twins.ours.state.values()} == {int}
    assert twins.ours.state_dict()["param_groups"] == twins.theirs.state_dict()["param_groups"]
    assert repr(twins.ours) == repr(twins.theirs)


def test_groups_have_options_of_their_own() -> None:
    def groups() -> list[dict[str, Any]]:
        a, b, c = tables()
        lr = torch.tensor(0.1, dtype=torch.float64)
        return [
            {"params": [a], "lr": 0.02, "betas": (0.8, 0.95)},
            {"params": [b], "eps": 1e-2, "maximize": True},
            {"params": c, "lr": lr},
        ]

    twins = Twins(PLAIN, groups)
    for seed in range(10):
        twins.step(seed, sparse_grads)
        twins.edit(lambda optimizer: optimizer.param_groups[2]["lr"].mul_(0.9))
    twins.assert_equal()


@pytest.mark.parametrize("params", [lambda: iter(tables()), lambda: list(zip("abc", tables(), strict=True))])
def test_iterators_and_named_parameters_are_taken(params: Callable[[], Any]) -> None:
    twins = Twins(PLAIN, params)
    twins.edit(lambda optimizer: optimizer.add_param_group({"params": _like(optimizer, leaves([(4, 4)]))}))
    for seed in range(3):
        twins.step(seed, sparse_grads)
    twins.assert_equal()
    assert twins.ours.state_dict()["param_groups"] == twins.theirs.state_dict()["param_groups"]


def _like(optimizer: Any, params: list[Tensor]) -> Any:
    return zip("xyz", params, strict=False) if "param_names" in optimizer.param_groups[0] else params


def test_float32_is_torchs_to_its_rounding() -> None:
    twins = Twins(PLAIN, lambda: tables(torch.float32))
    for seed in range(20):
        twins.step(seed, sparse_grads)
    twins.assert_equal(rtol=1e-5, atol=1e-6)  # float32, 20 steps of 0.05 on numbers around 1


def test_step_counts_gradients_without_entries() -> None:
    twins = Twins(PLAIN, tables)
    twins.step(0, sparse_grads)
    before = [param.detach().clone() for param in params_of(twins.ours)]

    def no_entries(params: Sequence[Tensor], seed: int) -> None:
        for param in params:
            param.grad = random_sparse(param.shape, 0, seed)

    for seed in range(3):
        twins.step(seed, no_entries)
    assert all(map(torch.equal, params_of(twins.ours), before))
    assert [state["step"] for state in state_of(twins.ours).values()] == [4, 4, 4]
    twins.step(1, sparse_grads)
    twins.assert_equal()


def test_first_gradient_without_entries_makes_torchs_state() -> None:
    twins = Twins(PLAIN, tables)
    for optimizer in twins.both:
        for param in params_of(optimizer):
            param.grad = random_sparse(param.shape, 0, 0)
        optimizer.step()
    twins.assert_equal()


def test_zeroed_gradients_have_no_entries() -> None:
    twins = Twins(PLAIN, tables)
    for seed in range(3):
        twins.step(seed, sparse_grads)
        twins.edit(lambda optimizer: optimizer.zero_grad(set_to_none=False))
        twins.edit(lambda optimizer: optimizer.step())
    twins.assert_equal()


def test_layouts_of_gradients_are_torchs() -> None:
    def layouts(params: Sequence[Tensor], seed: int) -> None:
        for number, param in enumerate(params):
            dims = 1 + (seed + number) % param.dim()
            param.grad = random_sparse(param.shape, 7, seed, sparse_dim=dims)

    twins = Twins(PLAIN, tables)
    for seed in range(6):
        twins.step(seed, layouts)
    twins.assert_equal()


def test_parameter_listed_twice_warns_and_steps_as_in_torch() -> None:
    with pytest.warns(UserWarning, match="a parameter group with duplicate parameters"):
        twins = Twins(PLAIN, lambda: leaves([(9, 4)]) * 2)
    for seed in range(4):
        for optimizer in twins.both:
            params_of(optimizer)[0].grad = random_sparse((9, 4), 6, seed)
            optimizer.step()
    ours, theirs = (optimizer.state[params_of(optimizer)[0]] for optimizer in twins.both)
    assert ours["step"] == theirs["step"] == 8
    twins.assert_equal()


def double_eps(optimizer: Any) -> None:
    for group in optimizer.param_groups:
        group.update(lr=group["lr"] * 0.3, eps=group["eps"] * 1e4, betas=(0.8, 0.95))


def set_step_back(optimizer: Any) -> None:
    for state in optimizer.state.values():
        if state:
            state["step"] = 1
            state["exp_avg"].mul_(0.25)


def replace_state(optimizer: Any) -> None:
    for param, state in list(optimizer.state.items()):
        optimizer.state[param] = {
            name: value.clone() if isinstance(value, Tensor) else value + 3 for name, value in state.items()
        }


def replace_state_dicts(optimizer: Any) -> None:
    for param in params_of(optimizer):
        optimizer.state[param] = dict(optimizer.state[param])


def clear_state(optimizer: Any) -> None:
    optimizer.state.clear()


def append_param(optimizer: Any) -> None:
    optimizer.param_groups[0]["params"].extend(leaves([(6, 2)], seed=5))


EDITS = [
    swap_storage,
    swap_for_transposed,
    swap_for_strided,
    set_in_place,
    write_params,
    replace_group,
    double_eps,
    set_step_back,
    replace_state,
    replace_state_dicts,
    clear_state,
    append_param,
]


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
@pytest.mark.usefixtures("either_probe")
def test_edit_acts_as_in_torch(edit: Callable[[Any], None]) -> None:
    twins = Twins(PLAIN, tables)
    for seed in range(6):
        twins.step(seed, sparse_grads)
        if seed in (1, 3):
            twins.edit(edit)
    twins.assert_equal()


def test_embedding_is_trained_as_by_torch() -> None:
    models, data = [], torch.Generator().manual_seed(1)
    words = [torch.randint(20, (8, 4), generator=data) for _ in range(10)]
    for kind in (SparseAdam, torch.optim.SparseAdam):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(20, 6, sparse=True, padding_idx=3), nn.Flatten(), nn.Linear(24, 1)).double()
        tables, dense = kind([model[0].weight], lr=0.1), torch.optim.SGD(model[2].parameters(), lr=0.1)
        for batch in words:
            model.zero_grad()
            model(batch).square().mean().backward()
            tables.step()
            dense.step()
        models.append(model)
    for ours, theirs in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)  # float64, 10 steps


def test_adam_that_touches_is_sparse_adam_without_eps() -> None:
    ours, adam = SparseAdam(tables(), lr=0.05, eps=1e-30), Adam(tables(), lr=0.05, eps=1e-30, sparse="touched")
    for seed in range(10):
        if seed == 5:
            adam = Adam([param.detach().clone().requires_grad_() for param in params_of(ours)], sparse="touched")
            adam.load_state_dict(through_file(ours.state_dict()), strict=False)  # with its steps in ints
        for optimizer in (ours, adam):
            sparse_grads(params_of(optimizer), seed)
            optimizer.step()
    for one, other in zip(params_of(ours), params_of(adam), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)  # where eps is added plays no part


# Schedulers, hooks, closures.


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: lr_scheduler.StepLR(o, step_size=3),
        lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=12),
        lambda o: lr_scheduler.SequentialLR(
            o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.ExponentialLR(o, 0.9)], milestones=[3]
        ),
    ],
    ids=["step", "onecycle", "sequential"],
)
def test_scheduler_acts_as_with_torch(schedule: Callable[[Any], Any], tensor_lr: bool) -> None:
    lr = torch.tensor(0.05, dtype=torch.float64) if tensor_lr else 0.05
    twins = Twins(sparse_case(lr=lr), tables)
    schedulers = [schedule(optimizer) for optimizer in twins.both]
    for seed in range(10):
        twins.step(seed, sparse_grads)
        for scheduler in schedulers:
            scheduler.step()
    twins.assert_equal()
    assert schedulers[0].get_last_lr() == schedulers[1].get_last_lr()


def test_hooks_and_closure_act_as_in_torch() -> None:
    for optimizer in Twins(PLAIN, tables).both:
        seen: list[str] = []
        optimizer.register_step_pre_hook(lambda *_, seen=seen: seen.append("pre"))
        optimizer.register_step_post_hook(lambda *_, seen=seen: seen.append("post"))

        def closure(optimizer: Any = optimizer, seen: list[str] = seen) -> str:
            seen.append(f"closure {torch.is_grad_enabled()}")
            sparse_grads(params_of(optimizer), 0)
            return "loss"

        with torch.no_grad():
            assert optimizer.step(closure) == "loss"
        assert optimizer.step(closure=None) is None
        assert seen == ["pre", "closure True", "post", "pre", "post"]
        assert optimizer.state[params_of(optimizer)[0]]["step"] == 2


@pytest.mark.parametrize("has_gradient", [True, False])
def test_warmup_leaves_nothing_to_compile_and_touches_nothing(
    has_gradient: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a gradient too: a sparse one will come."""
    monkeypatch.setattr(object_files, "_loaded", {})
    functions = (library.update, library.rows, library.sums_of_squares, library.scalar_state, library.sequence)
    for function in functions:
        function.cache_clear()
    optimizer = SparseAdam(tables(), max_norm=1.0)
    if has_gradient:
        sparse_grads(params_of(optimizer), 0)
    before = snapshot(optimizer)
    warmup(optimizer)
    assert_unmoved(optimizer, before)
    assert not optimizer.state
    known = set(object_files._loaded)
    for seed in range(2):
        sparse_grads(params_of(optimizer), seed)
        optimizer.step()
    assert set(object_files._loaded) == known


# Checkpoints.


def through_state_dict(optimizer: FirstOrder) -> FirstOrder:
    new = SparseAdam([param.detach().clone().requires_grad_() for param in params_of(optimizer)])
    new.load_state_dict(through_file(optimizer.state_dict()))
    return new


WAYS = [through_state_dict, copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", WAYS, ids=["state_dict", "deepcopy", "pickle"])
def test_going_on_equals_not_stopping_bit_for_bit(way: Callable[[Any], Any], dtype: torch.dtype) -> None:
    straight, other = (SparseAdam(tables(dtype), lr=0.05) for _ in range(2))
    for seed in range(8):
        if seed == 4:
            stopped, other = other, way(other)
            before = snapshot(stopped)
        for optimizer in (straight, other):
            sparse_grads(params_of(optimizer), seed)
            optimizer.step()
    assert type(other) is SparseAdam
    assert_unmoved(stopped, before)
    assert all(map(torch.equal, params_of(straight), params_of(other)))
    assert_same_bits(state_of(other), state_of(straight))


@pytest.mark.parametrize("from_torch", [True, False])
def test_checkpoints_go_both_ways_between_torch_and_us(from_torch: bool) -> None:
    twins = Twins(CASES[1], tables)
    for seed in range(3):
        twins.step(seed, sparse_grads)
    source = twins.theirs if from_torch else twins.ours
    saved = through_file(source.state_dict())
    fresh = Twins(PLAIN, lambda: [param.detach().clone().requires_grad_() for param in params_of(source)])
    fresh.edit(lambda optimizer: optimizer.load_state_dict(copy.deepcopy(saved)))
    for seed in range(3, 8):
        fresh.step(seed, sparse_grads)
        twins.step(seed, sparse_grads)
    fresh.assert_equal()
    for ours, theirs in zip(params_of(fresh.ours), params_of(twins.theirs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)  # float64, 8 steps
    assert fresh.ours.state_dict()["param_groups"] == fresh.theirs.state_dict()["param_groups"]


def test_half_precision_state_is_float32_and_stays_so() -> None:
    optimizer = SparseAdam(tables(torch.float16), lr=0.1)
    sparse_grads(params_of(optimizer), 0)
    optimizer.step()
    loaded = through_state_dict(optimizer)
    for one in (optimizer, loaded):
        assert {state["exp_avg_sq"].dtype for state in one.state.values() if "exp_avg_sq" in state} == {torch.float32}


# Errors.


BAD_OPTIONS = [
    (dict(lr=0), "Invalid learning rate: 0"),
    (dict(lr=-1.0), "Invalid learning rate: -1.0"),
    (dict(lr=float("nan")), "Invalid learning rate: nan"),
    (dict(lr=torch.tensor(-0.5)), "Invalid learning rate: -0.5"),
    (dict(lr=torch.ones(2)), "Tensor lr must be 1-element"),
    (dict(eps=0), "Invalid epsilon value: 0"),
    (dict(eps=-1e-8), "Invalid epsilon value: -1e-08"),
    (dict(eps=float("nan")), "Invalid epsilon value: nan"),
    (dict(betas=(1.0, 0.9)), "Invalid beta parameter at index 0: 1.0"),
    (dict(betas=(-0.1, 0.9)), "Invalid beta parameter at index 0: -0.1"),
    (dict(betas=(0.9, 1.0)), "Invalid beta parameter at index 1: 1.0"),
    (dict(betas=(0.9, float("nan"))), "Invalid beta parameter at index 1: nan"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS, ids=str)
def test_bad_option_is_refused_in_torchs_words(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as theirs:  # noqa: PT011 what torch says is compared
        torch.optim.SparseAdam(tables(), **options)
    assert str(theirs.value).startswith(message)
    optimizer = SparseAdam(tables())
    before = snapshot(optimizer)
    for attempt in (
        lambda: SparseAdam(tables(), **options),
        lambda: SparseAdam([{"params": tables(), **options}]),
        lambda: optimizer.add_param_group({"params": leaves([(2, 2)]), **options}),
    ):
        with pytest.raises(ValueError) as ours:  # noqa: PT011
            attempt()
        assert str(ours.value).startswith(message)
        assert "SparseAdam" in str(ours.value)
    assert len(optimizer.param_groups) == 1
    assert_unmoved(optimizer, before)


@pytest.mark.parametrize("options", [dict(lr="fast"), dict(betas=0.9), dict(betas=(0.9,)), dict(eps="small")], ids=str)
def test_nonsense_is_a_value_error(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="SparseAdam"):
        SparseAdam(tables(), **options)


def complex_table() -> Tensor:
    return torch.zeros(3, 2, dtype=torch.complex64, requires_grad=True)


def sparse_table() -> Tensor:
    return torch.zeros(3, 2).to_sparse().requires_grad_()


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (sparse_table, "SparseAdam requires dense parameter tensors"),
        (complex_table, "SparseAdam does not support complex parameters"),
    ],
    ids=["sparse", "complex"],
)
def test_unfit_parameter_is_refused_in_torchs_words(table: Callable[[], Tensor], message: str) -> None:
    optimizer = SparseAdam(tables())
    for params in ([*tables(), table()], [("a", table())], [{"params": tables()}, {"params": table()}]):
        for kind in (SparseAdam, torch.optim.SparseAdam):
            with pytest.raises(ValueError, match=message):
                kind(params)
    for params in (table(), [*tables(), table()], (t for t in [table()])):
        with pytest.raises(ValueError, match=message):
            optimizer.add_param_group({"params": params})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    "params",
    [
        list,
        lambda: tables()[0],
        lambda: [1.0, 2.0],
        lambda: [tables()[0] * 2],
        lambda: [{"params": set(tables())}],
        lambda: [{"params": (same := tables())}, {"params": same}],
        lambda: [("a", tables()[0]), tables()[1]],
        lambda: "params",
        lambda: [{"lr": 0.1}],
        lambda: [{"params": 3}],
    ],
    ids=["empty", "tensor", "floats", "no leaf", "set", "two groups", "some names", "string", "no params", "int"],
)
def test_bad_parameters_are_refused_as_by_torch(params: Callable[[], Any]) -> None:
    with pytest.raises(Exception) as theirs:  # noqa: PT011 what torch raises is what this test asks
        torch.optim.SparseAdam(params())
    with pytest.raises(theirs.type) as ours:
        SparseAdam(params())
    assert str(theirs.value)[:40] in str(ours.value)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_dense_gradient_is_refused_before_anything_moves(backend: str, first: bool) -> None:
    params = tables()
    groups = [{"params": [("first", params[0])]}, {"params": [("last", params[2])], "lr": 0.5}]
    optimizer = SparseAdam(groups, backend=backend)
    if not first:
        sparse_grads(params, 0)
        optimizer.step()
    before, versions = snapshot(optimizer), [param._version for param in params]
    sparse_grads(params, 1)
    params[2].grad = torch.ones(5, dtype=torch.float64)
    message = "SparseAdam does not support dense gradients, please consider Adam instead"
    with pytest.raises(RuntimeError, match=f"{message}.*last"):
        optimizer.step()
    assert_unmoved(optimizer, before)
    assert [param._version for param in params] == versions
    assert not first or not optimizer.state
    theirs = torch.optim.SparseAdam(params)
    with pytest.raises(RuntimeError, match=message):
        theirs.step()


@pytest.mark.parametrize("meaning", [None, "exact", "rows"])
def test_sparse_is_always_touched(meaning: Any) -> None:
    assert SparseAdam(tables(), sparse="touched").sparse == "touched"
    with pytest.raises(ValueError, match="SparseAdam: sparse is always 'touched'"):
        SparseAdam(tables(), sparse=meaning)


def test_our_own_options_are_keywords_outside_the_groups() -> None:
    options = dict(max_norm=1.0, nonfinite="skip", backend="cpu", state_dtype=torch.float64)
    optimizer = SparseAdam(tables(), **options)
    assert optimizer.defaults.keys() == torch.optim.SparseAdam(tables()).defaults.keys()
    assert optimizer.param_groups[0].keys() == torch.optim.SparseAdam(tables()).param_groups[0].keys()
    twin = copy.deepcopy(optimizer)
    assert {name: getattr(twin, name) for name in options} == options
    assert twin.sparse == "touched"
    assert twin.param_groups[0].keys() == optimizer.param_groups[0].keys()
    with pytest.raises(TypeError):
        SparseAdam(tables(), 1e-3, (0.9, 0.999), 1e-8, False, 1.0)  # type: ignore[misc]
    with pytest.raises(TypeError, match="weight_decay"):
        SparseAdam(tables(), weight_decay=0.1)  # type: ignore[call-arg]


def test_nan_in_one_of_many_rows_skips_the_step() -> None:
    params = tables()
    optimizer = SparseAdam(params, nonfinite="skip", max_norm=1.0)
    sparse_grads(params, 0)
    optimizer.step()
    before = snapshot(optimizer)
    params[0].grad = coo([4, 4, 1], torch.tensor([[1.0], [torch.nan], [2.0]]).double().expand(3, 4), (9, 4))
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert_unmoved(optimizer, before)
