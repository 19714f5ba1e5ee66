"""``cautious`` and ``decay_by``: the papers' algorithms around many rules, on every backend, beside other options."""

from __future__ import annotations

import copy
import pickle
from itertools import product
from typing import Any

import pytest
import textbook
import torch
from cases import (
    CASES,
    DENSE_BACKENDS,
    MATRICES,
    MATRIX_CASES,
    ON_GPU,
    SHAPES,
    Case,
    assert_same_state,
    give_grads,
    leaves,
    params_of,
    state_of,
)
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR

from descend import (
    ADOPT,
    ASGD,
    LAMB,
    MARS,
    SGD,
    Adam,
    AdamW,
    AdamWScheduleFree,
    Adan,
    AdEMAMix,
    FirstOrder,
    Lion,
    Muon,
    Prodigy,
    RowwiseAdagrad,
    Rprop,
    from_rule,
    in_backward,
)
from descend.ops import summing

# Their moves may be changed, and their rules need no sums; Adan's decay is decoupled if it is asked for.
FREE = [case for case in CASES if not case.ours.state_follows_param and case.ours not in (Adan, LAMB, MARS, Prodigy)]
FREE += [Case(Adan, textbook.Adan, dict(lr=0.01, weight_decay=0.1, no_prox=True))]
MARS_CASE = Case(MARS, textbook.MARS, dict(lr=0.01, weight_decay=0.1))
# Where decay is not decoupled, the first alone.
OPTIONS: list[dict[str, Any]] = [
    dict(cautious="update"),
    dict(cautious="decay"),
    dict(cautious="both", decay_by="lr_squared", ema=0.5),
    dict(decay_by="schedule", ema=0.75),
]


def decay_of(case: Case) -> str:
    if case.ours in (Adan, LAMB, Prodigy):
        return "their own"
    decoupled = issubclass(case.ours, AdamW | Muon) or case.options.get("decoupled_weight_decay", False)
    decoupled = decoupled or case.ours in (Lion, AdEMAMix, MARS)
    return "decoupled" if decoupled else "none" if case.ours is Rprop else "l2"


class Pair:
    """Our optimizer with options, and a naive version of them around torch's, on equal parameters."""

    def __init__(self, case: Case, options: dict[str, Any], backend: str = "auto", **more: Any) -> None:
        shapes = MATRICES if issubclass(case.ours, Muon) else SHAPES
        self.ours = case.ours(leaves(shapes), **case.options, **options, **more, backend=backend)
        decay = self.ours.param_groups[0].get("weight_decay", 0.0)
        theirs = case.theirs(leaves(shapes), **case.options | ({} if case.ours is Rprop else dict(weight_decay=0.0)))
        lr = float(theirs.param_groups[0]["lr"])
        self.theirs = textbook.Wrapped(theirs, decay_of(case), decay, lr, more.get("maximize", False), **options)

    def step(self, seed: int) -> None:
        for params in (params_of(self.ours), params_of(self.theirs)):  # type: ignore[arg-type]
            give_grads(params, seed)
        self.ours.step()
        self.theirs.step()

    def assert_equal(self, rtol: float = 1e-11) -> None:
        pairs = zip(params_of(self.ours), params_of(self.theirs), strict=True)  # type: ignore[arg-type]
        for i, (ours, theirs) in enumerate(pairs):
            torch.testing.assert_close(ours, theirs, rtol=rtol, atol=1e-12)
            if self.ours.ema is not None:
                torch.testing.assert_close(self.ours.state[ours]["ema"], self.theirs.averages[i], rtol=rtol, atol=1e-12)


ALLOWED = [
    (case, options)
    for case, options in product(FREE, OPTIONS)
    if (decay_of(case) == "decoupled" or options == dict(cautious="update"))
    and decay_of(case) != "their own"
    and not (case.needs_sums() and options.get("cautious") in ("update", "both"))
]
ALLOWED += [(MARS_CASE, options) for options in (dict(cautious="decay", ema=0.5), dict(decay_by="schedule"))]


@pytest.mark.parametrize("backend", [name for name in DENSE_BACKENDS if name != "cpu"])
@pytest.mark.parametrize(("case", "options"), ALLOWED, ids=str)
def test_steps_are_those_of_the_papers(case: Case, options: dict[str, Any], backend: str) -> None:
    pair = Pair(case, options, backend)
    for seed in range(6):
        pair.step(seed)
    pair.assert_equal()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("case", MATRIX_CASES[::2], ids=str)  # of each rule one
def test_steps_of_matrices_are_those_of_the_papers(case: Case, options: dict[str, Any]) -> None:
    pair = Pair(case, options)
    for seed in range(3):
        pair.step(seed)
    pair.assert_equal(1e-8)  # of an orthogonal matrix that rounding has passed through five products


@pytest.mark.parametrize("backend", [DENSE_BACKENDS[0], ON_GPU])
@pytest.mark.parametrize("options", OPTIONS[:3], ids=str)
def test_compiled_steps_are_those_of_the_papers(options: dict[str, Any], backend: str) -> None:
    pair = Pair(Case(AdamW, torch.optim.AdamW, dict(lr=0.01, weight_decay=0.1)), options, backend)
    for seed in range(6):
        pair.step(seed)
    pair.assert_equal()


def test_compiled_l2_regularization_is_part_of_the_gradient() -> None:
    pair = Pair(CASES[0], dict(cautious="update"), DENSE_BACKENDS[0])
    for seed in range(6):
        pair.step(seed)
    pair.assert_equal()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_maximize_reverses_the_gradient_first(options: dict[str, Any]) -> None:
    pair = Pair(Case(AdamW, torch.optim.AdamW, dict(lr=0.01, weight_decay=0.1)), options, "eager", maximize=True)
    for seed in range(3):
        pair.step(seed)
    pair.assert_equal()


def rule(param: Any, grad: Any, buffer: Any, lr: Any, shrink: Any) -> Any:
    buffer = 0.5 * buffer + grad
    return param - lr * (buffer + shrink * param), buffer


def test_a_rule_that_decays_as_it_likes_is_asked_for_its_whole_update() -> None:
    kind = from_rule(rule, "Own", lr=0.1, shrink=0.2)
    (param,) = leaves([(33,)])
    optimizer = kind([param], cautious="update", backend="eager")
    buffer = torch.zeros_like(param)
    for seed in range(3):
        give_grads([param], seed)
        old, grad = param.detach().clone(), param.grad
        assert grad is not None
        new, buffer = rule(old, grad, buffer, 0.1, 0.2)
        mask = ((old - new) * grad > 0).double()
        optimizer.step()
        torch.testing.assert_close(param.detach(), old - (old - new) * mask / mask.mean(), rtol=1e-10, atol=1e-14)


def test_an_update_of_which_little_is_left_is_at_most_a_thousand_times_as_long() -> None:
    param = torch.zeros(4000, dtype=torch.float64, requires_grad=True)
    optimizer = SGD([param], lr=1.0, momentum=1.0, cautious="update", backend="eager")
    param.grad = torch.ones_like(param)
    optimizer.step()
    param.grad[1:] = -1e-3  # against the momentum
    before = param.detach().clone()
    optimizer.step()
    moved = param.detach() - before
    assert moved[0] == -2000.0
    assert not moved[1:].any()


# Whom the options are for.


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (SGD, dict(cautious="decay"), "SGD: cautious='decay' is about decoupled weight decay.*is L2 regularization"),
        (Adam, dict(cautious="both"), "Adam: cautious='both' is about decoupled weight decay"),
        (Adam, dict(decay_by="schedule"), "Adam: decay_by='schedule' is about decoupled weight decay"),
        (Rprop, dict(decay_by="lr_squared"), "Rprop: decay_by='lr_squared' .* weight decay does not exist"),
        (from_rule(rule, "Own", shrink=0.1), dict(cautious="decay"), "Own: .* weight decay is its rule's own"),
        (ASGD, dict(cautious="update"), "the state of ASGD follows them"),
        (LAMB, dict(cautious="update"), "the rule of LAMB needs sums or means of its own"),
        (LAMB, dict(cautious="decay"), "LAMB: .* weight decay is its rule's own"),
        (RowwiseAdagrad, dict(cautious="update"), "the rule of RowwiseAdagrad needs sums or means of its own"),
        (RowwiseAdagrad, dict(ema=0.9), "RowwiseAdagrad: ema=0.9 needs a number for each weight"),
        (Adan, dict(cautious="decay"), "Adan: .* weight decay is its rule's own"),
        (AdamWScheduleFree, dict(cautious="decay"), "the state of AdamWScheduleFree follows them"),
        (AdamW, dict(cautious="yes"), "AdamW: cautious must be one of"),
        (AdamW, dict(decay_by="step"), "AdamW: decay_by must be one of"),
        (AdamW, dict(lr=0.0, decay_by="schedule"), r"group\['max_lr'\] must be a number > 0, got 0.0"),
        (AdamW, dict(sparse="exact", cautious="decay"), "sparse='exact' cannot catch up with cautious='decay'"),
        (AdamW, dict(sparse="exact", decay_by="schedule"), "sparse='exact' cannot catch up with decay_by='schedule'"),
    ],
    ids=str,
)
def test_what_cannot_be_is_an_error_when_the_optimizer_is_made(kind: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind([torch.zeros(1, requires_grad=True)], **options)


def test_the_first_step_of_adopt_decays_nothing_either() -> None:
    (param,) = leaves([(33,)])
    optimizer = ADOPT([param], lr=0.1, weight_decay=0.1, decoupled_weight_decay=True, cautious="decay")
    before = param.detach().clone()
    give_grads([param], 0)
    optimizer.step()
    assert torch.equal(param, before)
    optimizer.step()
    assert not torch.equal(param, before)


def squares(param: Any, grad: Any, lr: Any) -> Any:
    return grad * grad


@summing(squares)
def normalized(param: Any, grad: Any, lr: Any, total: Any) -> Any:
    return param - lr * grad / total


class Normalized(FirstOrder):
    rule = staticmethod(normalized)
    counts_steps = False

    def __init__(self, params: Any, lr: float = 0.1, **options: Any) -> None:
        super().__init__(params, {"lr": lr}, **options)


def test_methods_with_sums_of_their_own_can_be_averaged_and_not_cautious() -> None:
    with pytest.raises(ValueError, match="the rule of Normalized needs sums or means of its own"):
        Normalized([torch.zeros(1)], cautious="update")
    (param,) = leaves([(5,)])
    optimizer, old = Normalized([param], ema=0.5, backend="eager"), param.detach().clone()
    give_grads([param], 0)
    assert param.grad is not None
    optimizer.step()
    torch.testing.assert_close(param.detach(), old - 0.1 * param.grad / param.grad.square().sum())
    torch.testing.assert_close(optimizer.state[param]["ema"], (old + param.detach()) / 2)


def test_options_set_later_are_checked_before_anything_moves() -> None:
    (param,) = leaves([(5,)])
    optimizer = Adam([param], lr=0.1)
    give_grads([param], 0)
    optimizer.step()
    before = param.detach().clone()
    optimizer.cautious = "decay"
    with pytest.raises(ValueError, match="Adam: cautious='decay'"):
        optimizer.step()
    assert torch.equal(param, before)
    optimizer.param_groups[0]["decoupled_weight_decay"] = True
    optimizer.step()
    optimizer.decay_by = "schedule"  # and no max_lr was noted
    with pytest.raises(ValueError, match=r"group\['max_lr'\] must be a number > 0, got None"):
        optimizer.step()
    optimizer.cautious = None
    with pytest.raises(ValueError, match=r"group\['max_lr'\] must be a number > 0, got None"):
        optimizer.step()
    optimizer.param_groups[0]["max_lr"] = 0.2
    optimizer.step()


SMALL = [(AdamW, dict(lr=1e20, eps=1.0), backend) for backend in DENSE_BACKENDS] + [(SGD, dict(lr=1.0), "eager")]


@pytest.mark.parametrize(("kind", "options", "backend"), SMALL, ids=str)
def test_agreement_does_not_depend_on_how_small_gradients_are(kind: Any, options: Any, backend: str) -> None:
    params = [torch.zeros(5, requires_grad=True) for _ in range(2)]
    for param, cautious, runs in zip(params, ("update", None), (backend, "eager"), strict=True):
        param.grad = torch.tensor([1e-24, -1e-24, 2e-24, 1e-24, -3e-24])  # products of two are 0
        kind([param], **options, cautious=cautious, backend=runs).step()
    assert bool(params[1].all())
    torch.testing.assert_close(params[0], params[1], rtol=1e-6, atol=0)


def test_sparse_gradients_have_no_share_that_agrees() -> None:
    table = torch.nn.Embedding(10, 2, sparse=True)
    optimizer = SGD(table.parameters(), cautious="update")
    table(torch.tensor([1, 3])).sum().backward()
    with pytest.raises(RuntimeError, match="SGD: cautious='update' counts in the whole tensor"):
        optimizer.step()


def test_rows_decay_where_their_update_agrees() -> None:
    table = torch.nn.Embedding(10, 2, sparse=True, dtype=torch.float64)
    weight = table.weight
    optimizer = AdamW([weight], lr=0.1, weight_decay=0.5, sparse="touched", cautious="decay")
    old = weight.detach().clone()
    table(torch.tensor([1, 3])).sum().backward()  # the update is 0.1, to below zero
    optimizer.step()
    rows = [1, 3]
    expected = old.clone()
    expected[rows] -= 0.1 + 0.05 * old[rows] * (old[rows] >= 0)
    torch.testing.assert_close(weight.detach(), expected)


@pytest.mark.parametrize("sparse", [False, True])
def test_a_rule_of_rows_decays_where_its_update_agrees(sparse: bool) -> None:
    table = torch.nn.Embedding(10, 3, sparse=sparse, dtype=torch.float64)
    optimizer = RowwiseAdagrad([table.weight], lr=0.1, weight_decay=0.5, decoupled_weight_decay=True, cautious="decay")
    old = table.weight.detach().clone()
    table(torch.tensor([1, 3])).sum().backward()  # the update is 0.1, to below zero, where there is a gradient
    optimizer.step()
    named = torch.zeros(10, 1, dtype=torch.bool)
    named[[1, 3]] = True
    decays = (named & (old >= 0)) if sparse else (~named | (old >= 0))
    expected = old - 0.1 * named - 0.05 * old * decays
    torch.testing.assert_close(table.weight.detach(), expected, rtol=1e-7, atol=0.0)  # eps is 1e-8


# Decay by the schedule.


def decayed(optimizer: AdamW, param: Tensor) -> float:
    """What a step without gradient leaves of a weight of 1."""
    with torch.no_grad():
        param.fill_(1.0)
    param.grad = torch.zeros_like(param)
    optimizer.step()
    return float(param.detach())


@pytest.mark.parametrize(("decay_by", "factor"), [("lr", 1e-2), ("schedule", 1 / 4), ("lr_squared", 1e-2 / 4)])
def test_decay_is_lr_by_its_largest_value(decay_by: Any, factor: float) -> None:
    param = torch.ones((), dtype=torch.float64, requires_grad=True)
    optimizer = AdamW([param], lr=4e-2, weight_decay=0.1, decay_by=decay_by)
    optimizer.param_groups[0]["lr"] = 1e-2
    assert decayed(optimizer, param) == pytest.approx(1 - 0.1 * factor, abs=1e-12)


def test_the_largest_lr_is_noted_when_a_group_is_made_and_survives_checkpoints() -> None:
    first, second = leaves([(), ()])
    optimizer = AdamW([dict(params=[first], lr=0.2), dict(params=[second], max_lr=0.8)], lr=0.1, decay_by="schedule")
    assert [group["max_lr"] for group in optimizer.param_groups] == [0.2, 0.8]
    optimizer.param_groups[0]["lr"] = 0.1
    again = AdamW([dict(params=[leaves([()])[0]]), dict(params=[leaves([()])[0]])], decay_by="schedule")
    again.load_state_dict(optimizer.state_dict())
    assert [group["max_lr"] for group in again.param_groups] == [0.2, 0.8]
    assert decayed(again, again.param_groups[0]["params"][0]) == pytest.approx(1 - 0.01 / 2)
    assert "max_lr" not in AdamW([first]).param_groups[0]
    plain = AdamW([first], lr=0.1).state_dict()
    fresh = AdamW([first], lr=0.4, decay_by="schedule")
    fresh.load_state_dict(plain)  # which knows of no largest lr
    assert fresh.param_groups[0]["max_lr"] == 0.4


def test_schedulers_of_torch_act_on_decay() -> None:
    param = torch.ones((), dtype=torch.float64, requires_grad=True)
    optimizer = AdamW([param], lr=0.4, weight_decay=0.1, decay_by="schedule")
    scheduler = CosineAnnealingLR(optimizer, 2)
    assert decayed(optimizer, param) == pytest.approx(0.9)
    scheduler.step()  # half of the way
    assert decayed(optimizer, param) == pytest.approx(0.95)
    optimizer = AdamW([param], lr=123.0, weight_decay=0.1, decay_by="schedule")
    OneCycleLR(optimizer, max_lr=0.5, total_steps=10, div_factor=10.0)  # writes the group's max_lr
    assert decayed(optimizer, param) == pytest.approx(0.99)


# With other options.


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_inside_backward_the_steps_are_the_same(options: dict[str, Any]) -> None:
    found = []
    for inside in (False, True):
        param, other = leaves([(7, 5), (5,)])
        optimizer = AdamW([param, other], lr=0.1, weight_decay=0.1, max_norm=None, **options)
        if inside:
            in_backward(optimizer)
        for seed in range(3):
            random = torch.Generator().manual_seed(seed)
            inputs = torch.randn(4, 7, generator=random, dtype=torch.float64)
            (inputs @ param + other).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append([param.detach(), other.detach()])
    assert all(map(torch.equal, *found))


def test_clipping_comes_first_and_a_skipped_step_leaves_averages_alone() -> None:
    (param,) = leaves([(129,)])
    optimizer = AdamW([param], lr=0.1, cautious="both", ema=0.5, max_norm=0.1, nonfinite="skip")
    (twin,) = leaves([(129,)])
    other = AdamW([twin], lr=0.1, cautious="both", ema=0.5)
    for seed in range(3):
        give_grads([param], seed)
        give_grads([twin], seed)
        twin.grad *= min(1.0, 0.1 / float(twin.grad.norm()))
        optimizer.step()
        other.step()
    torch.testing.assert_close(param, twin, rtol=1e-6, atol=0.0)  # torch adds 1e-6 to the norm
    before = param.detach().clone(), optimizer.state[param]["ema"].clone()
    give_grads([param], 9)
    assert param.grad is not None
    param.grad[3] = float("nan")
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert torch.equal(param, before[0])
    assert torch.equal(optimizer.state[param]["ema"], before[1])


def test_nan_in_a_gradient_spreads_as_in_torch() -> None:
    (param,) = leaves([(33,)])
    optimizer = AdamW([param], cautious="update")
    give_grads([param], 0)
    assert param.grad is not None
    param.grad[3] = float("nan")
    optimizer.step()
    assert param.isnan().nonzero().tolist() == [[3]]


def test_a_step_can_be_differentiated_unless_it_counts() -> None:
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    leaf = leaves([(5,)])[0]
    param = leaf.clone()
    optimizer = AdamW([param], lr=lr, weight_decay=0.5, differentiable=True, cautious="decay", ema=0.5)
    param.grad = torch.ones(5, dtype=torch.float64)
    optimizer.step()
    param.sum().backward()
    assert lr.grad is not None
    agrees = leaf.detach() >= 0
    torch.testing.assert_close(float(lr.grad), -5.0 - float((0.5 * leaf.detach() * agrees).sum()), rtol=1e-6, atol=0.0)
    counting = AdamW([leaf.clone()], differentiable=True, cautious="update")
    params_of(counting)[0].grad = torch.ones(5, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"a step with sums over .* cannot be differentiated"):
        counting.step()


def test_groups_may_have_other_methods() -> None:
    first, second = leaves([(7,), (7,)])
    groups = [dict(params=[first]), dict(params=[second], method="lion", lr=0.1, weight_decay=0.1)]
    options: dict[str, Any] = dict(cautious="decay", ema=0.5, decay_by="schedule", backend="eager")
    optimizer = AdamW(groups, **options)
    (twin,) = leaves([(7,), (7,)])[1:]
    other = Lion([twin], lr=0.1, weight_decay=0.1, **options)
    for seed in range(3):
        for each in (first, second, twin):
            give_grads([each], seed)
        optimizer.step()
        other.step()
    assert torch.equal(second, twin)
    assert torch.equal(optimizer.state[second]["ema"], other.state[twin]["ema"])
    with pytest.raises(ValueError, match="SGD: cautious='decay'"):
        optimizer.add_param_group(dict(params=leaves([(1,)]), method="sgd"))


def test_copies_and_pickles_go_on_alike() -> None:
    (param,) = leaves([(33,)])
    optimizer = AdamW([param], lr=0.1, cautious="both", decay_by="lr_squared", ema=0.5)
    give_grads([param], 0)
    optimizer.step()
    others = [copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
    for each in (optimizer, *others):
        give_grads(params_of(each), 1)
        each.step()
    for each in others:
        assert torch.equal(params_of(each)[0], param)
        assert_same_state(state_of(each), state_of(optimizer), 0, 0)
        assert each.options == optimizer.options


def test_decisions_on_a_device_wait_for_counts_alone() -> None:
    from descend.core.wrapping import wrapped

    group = AdamW([torch.zeros(1)]).param_groups[0]
    for cautious, waits in ((None, False), ("decay", False), ("update", True)):
        optimizer = AdamW([torch.zeros(1)], cautious=cautious, ema=0.5)
        assert wrapped(optimizer).may_decide_on_device(group) is not waits
