"""Parameters, groups, options and bounds that LBFGS takes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lbfgs_cases import (
    SEARCHES,
    Loss,
    Problem,
    assert_same_points,
    network,
    random,
    twin,
    twins,
)
from torch import Tensor, nn

from descend.second_order.lbfgs import LBFGS
from descend.second_order.problem.parameter_bounds import flat_bounds
from descend.second_order.problem.parameters import FlatParameters

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
    def penalized(dtype: torch.dtype) -> tuple[list[Tensor], Loss]:
        params, loss = network(dtype)
        return params, lambda k: loss(k) + 0.1 * params[0].square().sum() + 0.2 * params[2].square().sum()

    def grouped(params: list[Tensor], **options: Any) -> LBFGS:
        groups = [
            {"params": [param], "weight_decay": decay} for param, decay in zip(params, (0.2, 0, 0.4, 0), strict=True)
        ]
        return LBFGS(groups, weight_decay=5.0, **options)

    ours = twin(grouped, network, max_iter=5, line_search_fn="strong_wolfe")
    explicit = twin(LBFGS, penalized, max_iter=5, line_search_fn="strong_wolfe")
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


WRONG: list[tuple[dict[str, Any], str]] = [
    (dict(lr=-1), "Invalid learning rate: -1"),
    (dict(lr=math.nan), "Invalid learning rate"),
    (dict(lr=torch.ones(2)), "Tensor lr must be 1-element"),
    (dict(max_iter=-1), "max_iter must be a number >= 0"),
    (dict(max_iter=None), "max_iter must be a number >= 0"),
    (dict(max_iter="many"), "max_iter must be a number >= 0"),
    (dict(max_eval=-1), "max_eval must be a number >= 0"),
    (dict(lr=math.inf), "Invalid learning rate: inf"),
    (dict(lr=torch.tensor([math.inf])), "Invalid learning rate: tensor"),
    (dict(lr=torch.tensor(True)), "Invalid learning rate: True"),
    (dict(history_size=0), "history_size must be an integer >= 1, got 0"),
    (dict(history_size=True), "history_size must be an integer >= 1, got True"),
    (dict(history_size=2.0), "history_size must be an integer >= 1, got 2.0"),
    (dict(tolerance_grad=math.nan), "tolerance_grad must be a number, got nan"),
    (dict(tolerance_change="x"), "tolerance_change must be a number, got 'x'"),
    (dict(line_search_fn="wolfe"), "line_search_fn must be one of .* got 'wolfe'"),
    (dict(weight_decay=-1), "weight_decay must be a number >= 0"),
    (dict(maximize="no"), "maximize must be True or False, got 'no'"),
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
