"""``RowwiseAdagrad``, and what the engine does with rules of rows."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import textbook
import torch
from cases import BACKENDS, EVERYWHERE, device
from sparse_cases import coo, random_sparse
from torch import Tensor, nn

from descend import AdamW, FirstOrder, Monitor, RowwiseAdagrad, from_rule, in_backward
from descend.backends.cpu.launch import CHUNK
from descend.core.method import Method
from descend.core.signature import signature
from descend.ops import of_rows

SINGLE, DOUBLE, BRAIN, HALF = torch.float32, torch.float64, torch.bfloat16, torch.float16
SHAPES = ((7, 5), (300, 129), (2, 3, 4), (6,), (1, CHUNK), (0, 4), (4, 0), (5, 1))
OPTIONS: list[dict[str, Any]] = [
    {},
    dict(lr=0.5, eps=0.1, maximize=True),
    dict(lr=0.1, weight_decay=0.3),
    dict(lr=torch.tensor(0.1), weight_decay=0.3, decoupled_weight_decay=True),
]


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)


def leaves(shapes: Any = SHAPES, dtype: torch.dtype = DOUBLE, seed: int = 0) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=random, dtype=DOUBLE).to(dtype).requires_grad_() for shape in shapes]


def give(params: list[Tensor], seed: int) -> None:
    for param, value in zip(
        params, leaves([param.shape for param in params], param_dtype(params), 1 + seed), strict=True
    ):
        param.grad = value.detach().to(param.device)


def param_dtype(params: list[Tensor]) -> torch.dtype:
    return params[0].dtype


def bits(optimizer: FirstOrder) -> list[Tensor]:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    return [tensor.detach().clone() for param in params for tensor in (param, *optimizer.state[param].values())]


def assert_same_bits(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def assert_equal(ours: FirstOrder, theirs: torch.optim.Optimizer, tolerance: float = 1e-14) -> None:
    for a, b in zip(ours.param_groups[0]["params"], theirs.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(a.detach().cpu().to(b.dtype), b.detach(), rtol=tolerance, atol=tolerance)
        state = ours.state[a]
        assert list(state) == ["sum"]
        expected = theirs.state[b]["sum"]
        assert state["sum"].shape == (len(a), 1)
        torch.testing.assert_close(state["sum"].cpu().to(expected.dtype), expected, rtol=tolerance, atol=tolerance)


# What a step computes.


@pytest.mark.parametrize("backend", EVERYWHERE)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_steps_are_those_of_the_textbook(options: dict[str, Any], backend: str) -> None:
    params, same = [each.detach().to(device()).requires_grad_() for each in leaves()], leaves()
    ours = RowwiseAdagrad(params, **options, backend=backend if backend in BACKENDS else "auto")
    theirs = textbook.RowwiseAdagrad(same, **options)
    for seed in range(3):
        give(params, seed)
        give(same, seed)
        ours.step()
        theirs.step()
    assert_equal(ours, theirs, 1e-12)


def test_a_step_of_two_rows_by_hand() -> None:
    param = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=DOUBLE, requires_grad=True)
    optimizer = RowwiseAdagrad([param], lr=0.5, eps=0.0, weight_decay=1.0)
    param.grad = torch.tensor([[2.0, 2.0], [-3.0, -4.0]], dtype=DOUBLE)  # with decay: (3, 4) and (0, 0)
    optimizer.param_groups[0]["eps"] = 1e-300
    optimizer.step()
    assert optimizer.state[param]["sum"].tolist() == [[12.5], [0.0]]
    torch.testing.assert_close(
        param.detach()[0], torch.tensor([1 - 1.5 / 12.5**0.5, 2 - 2 / 12.5**0.5], dtype=DOUBLE), rtol=1e-15, atol=0
    )
    assert param[1].tolist() == [3.0, 4.0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("dtype", "grad_dtype", "tolerance"),
    [(SINGLE, SINGLE, 1e-5), (BRAIN, BRAIN, 2e-2), (HALF, HALF, 3e-3), (SINGLE, BRAIN, 1e-5)],
    ids=str,
)
def test_sums_are_float32_or_wider(dtype: torch.dtype, grad_dtype: torch.dtype, tolerance: float, backend: str) -> None:
    (param,), (wide,) = leaves([(9, 33)], dtype), leaves([(9, 33)], dtype)
    wide = wide.detach().double().requires_grad_()
    param.grad_dtype = grad_dtype
    ours, theirs = RowwiseAdagrad([param], lr=0.1, backend=backend), textbook.RowwiseAdagrad([wide], lr=0.1)
    for seed in range(2):
        param.grad = leaves([(9, 33)], grad_dtype, 1 + seed)[0].detach()
        wide.grad = param.grad.double()
        ours.step()
        theirs.step()
    assert ours.state[param]["sum"].dtype == SINGLE
    torch.testing.assert_close(param.detach().double(), wide.detach(), rtol=tolerance, atol=tolerance / 10)
    torch.testing.assert_close(ours.state[param]["sum"].double(), theirs.state[wide]["sum"], rtol=1e-5, atol=0)


def test_sums_may_be_of_any_dtype() -> None:
    (param,) = leaves([(9, 33)], BRAIN)
    optimizer = RowwiseAdagrad([param], state_dtype=BRAIN)
    give([param], 0)
    optimizer.step()
    assert optimizer.state[param]["sum"].dtype == BRAIN


def test_complex_numbers_are_pairs_of_real_ones() -> None:
    values = leaves([(5, 3, 2)])[0].detach()
    param, pairs = torch.view_as_complex(values.clone()).requires_grad_(), values.clone().requires_grad_()
    scalar = torch.zeros((), dtype=torch.complex128, requires_grad=True)
    ours, theirs = RowwiseAdagrad([param, scalar], lr=0.1), RowwiseAdagrad([pairs], lr=0.1)
    pairs.grad = leaves([(5, 3, 2)], seed=1)[0].detach()
    param.grad, scalar.grad = torch.view_as_complex(pairs.grad), torch.tensor(3 + 4j, dtype=torch.complex128)
    ours.step()
    theirs.step()
    torch.testing.assert_close(torch.view_as_real(param.detach()), pairs.detach(), rtol=1e-14, atol=0)
    assert ours.state[param]["sum"].dtype == DOUBLE
    torch.testing.assert_close(ours.state[scalar]["sum"], torch.tensor([[12.5]], dtype=DOUBLE), rtol=1e-15, atol=0)


@pytest.mark.parametrize("sparse", [False, True])
def test_bits_do_not_depend_on_the_number_of_threads(sparse: bool) -> None:
    results = []
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        params = leaves([(3000, 67), (5, 9000)], SINGLE)
        optimizer = RowwiseAdagrad(params, lr=0.1, max_norm=1.0)
        for seed in range(2):
            give(params, seed)
            if sparse:
                params[0].grad = random_sparse((3000, 67), 4000, seed, SINGLE)
            optimizer.step()
        results.append(bits(optimizer))
    for other in results[1:]:
        assert_same_bits(results[0], other)


# Sparse gradients.


@pytest.mark.parametrize("backend", EVERYWHERE)
@pytest.mark.parametrize("shape", [(40, 1), (40, 3), (40, 64), (9, 129), (12, 2, 5), (30,)], ids=str)
@pytest.mark.parametrize("decay", [{}, dict(weight_decay=0.3), dict(weight_decay=0.3, decoupled_weight_decay=True)])
def test_sparse_gradients_move_the_rows_they_name(shape: Any, decay: dict[str, Any], backend: str) -> None:
    (param,), (same,) = leaves([shape]), leaves([shape])
    param = param.detach().to(device()).requires_grad_()
    ours = RowwiseAdagrad([param], lr=0.1, **decay, backend=backend if backend in BACKENDS else "auto")
    theirs = textbook.RowwiseAdagrad([same], lr=0.1, **decay)
    for seed, count in enumerate((shape[0] // 2, 3 * shape[0], 0, 1)):
        param.grad = random_sparse(shape, count, seed)
        same.grad = param.grad.cpu()
        named = set(same.grad.coalesce().indices()[0].tolist())
        before = param.detach().clone()
        ours.step()
        theirs.step()
        others = [row for row in range(shape[0]) if row not in named]
        assert torch.equal(param.detach()[others], before[others])
    assert_equal(ours, theirs)


class AllRows(RowwiseAdagrad):
    """A row without a gradient has one of zero: with decay it moves."""

    takes_sparse = True
    meaning_of_sparse = Method.meaning_of_sparse


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(9, 4), (500, 129), (4, CHUNK)], ids=str)
def test_rows_without_a_gradient_may_have_one_of_zero(shape: Any, backend: str) -> None:
    (param,), (same,) = leaves([shape]), leaves([shape])
    options = dict(lr=0.1, weight_decay=0.3)
    sparse, dense = AllRows([param], **options, backend=backend), RowwiseAdagrad([same], **options, backend=backend)
    for seed, count in enumerate((2, 0, 600)):
        param.grad = random_sparse(shape, count, seed)
        same.grad = param.grad.to_dense()
        sparse.step()
        dense.step()
    torch.testing.assert_close(param.detach(), same.detach(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(sparse.state[param]["sum"], dense.state[same]["sum"], rtol=1e-12, atol=1e-14)


def test_embeddings_train() -> None:
    table = nn.EmbeddingBag(1000, 8, sparse=True, mode="sum")
    optimizer = RowwiseAdagrad(table.parameters(), lr=0.1)
    words = torch.arange(12).reshape(4, 3)
    losses = []
    for _ in range(30):
        loss = (table(words) - 1).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.1 * losses[0]
    assert int((optimizer.state[table.weight]["sum"] > 0).sum()) == 12


def test_what_sparse_gradients_cannot_be() -> None:
    (param,) = leaves([(6, 4)])
    with pytest.raises(ValueError, match="RowwiseAdagrad: sparse='exact' is for Adam and AdamW"):
        RowwiseAdagrad([param], sparse="exact")
    optimizer = RowwiseAdagrad([param])
    before = param.detach().clone()
    bad = [
        (coo([[1], [2]], torch.ones(1, dtype=DOUBLE), (6, 4)), "has one of 2 sparse dimensions: make it dense"),
        (coo(torch.zeros(0, 1), torch.ones(1, 6, 4, dtype=DOUBLE), (6, 4)), "has one of 0 sparse dimensions"),
    ]
    for grad, match in bad:
        param.grad = grad
        with pytest.raises(RuntimeError, match=match):
            optimizer.step()
    param.grad = coo([6], torch.ones(1, 4, dtype=DOUBLE), (6, 4))
    with pytest.raises(IndexError, match=r"index \(6,\) is out of range"):
        optimizer.step()
    assert torch.equal(param.detach(), before)


def test_in_a_group_of_another_optimizer_whatever_its_sparse_option() -> None:
    for sparse in (None, "touched", "exact"):
        table, (same,) = nn.Embedding(20, 4, sparse=True, dtype=DOUBLE), leaves([(20, 4)])
        with torch.no_grad():
            table.weight.copy_(same)
        model = nn.ModuleDict({"table": table, "head": nn.Linear(4, 2, dtype=DOUBLE)})
        groups = [("table.*", dict(method="rowwiseadagrad", lr=0.1, weight_decay=0.2))]
        ours = AdamW(model, groups=groups, sparse=sparse)
        theirs = textbook.RowwiseAdagrad([same], lr=0.1, weight_decay=0.2)
        for _ in range(2):
            ours.zero_grad()
            model["head"](table(torch.tensor([1, 5, 1]))).square().sum().backward()
            same.grad = table.weight.grad.clone()
            ours.step()
            theirs.step()
        torch.testing.assert_close(table.weight.detach(), same.detach(), rtol=1e-13, atol=1e-14)
        assert list(ours.state[table.weight]) == ["sum"]


# Together with what else a step may do.


@pytest.mark.parametrize("backend", BACKENDS)
def test_clipping_multiplies_what_is_squared(backend: str) -> None:
    params, same = leaves([(7, 5), (300, 3)]), leaves([(7, 5), (300, 3)])
    ours, theirs = RowwiseAdagrad(params, max_norm=0.5, backend=backend), textbook.RowwiseAdagrad(same)
    for seed in range(2):
        give(params, seed)
        give(same, seed)
        params[1].grad = random_sparse((300, 3), 50, seed)
        same[1].grad = params[1].grad.coalesce()
        norm = sum(
            (grad.coalesce().values() if grad.is_sparse else grad).square().sum()
            for grad in (same[0].grad, same[1].grad)
        ).sqrt()
        for param in same:
            param.grad = param.grad * (0.5 / (norm + 1e-6))
        ours.step()
        theirs.step()
        assert ours.grad_norm == pytest.approx(float(norm), rel=1e-12)
    assert_equal(ours, theirs, 1e-6)  # torch's 1e-6 in the denominator


@pytest.mark.parametrize("sparse", [False, True])
def test_bad_gradients_are_skipped_or_raise(sparse: bool) -> None:
    (param,) = leaves([(6, 4)])
    before = param.detach().clone()
    grad = random_sparse((6, 4), 5, 0)
    grad._values()[2, 1] = torch.nan
    param.grad = grad if sparse else grad.to_dense()
    optimizer = RowwiseAdagrad([param], nonfinite="skip")
    optimizer.step()
    assert optimizer.skipped_steps == 1
    with pytest.raises(FloatingPointError):
        RowwiseAdagrad([param], nonfinite="raise").step()
    assert torch.equal(param.detach(), before)
    RowwiseAdagrad([param]).step()  # the row of the NaN alone
    assert param.isnan().all(1).sum() == 1
    assert param.isnan().any(1).sum() == 1


def test_steps_inside_backward_are_the_same() -> None:
    results = []
    for inside in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(50, 8, sparse=True), nn.Linear(8, 3))
        optimizer = RowwiseAdagrad(model, lr=0.1)
        if inside:
            in_backward(optimizer)
        for step in range(3):
            optimizer.zero_grad()
            model(torch.arange(step, step + 9)).square().sum().backward()
            optimizer.step()
        results.append([param.detach() for param in model.parameters()])
    assert_same_bits(*results)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_monitored_step_moves_the_same_bits(backend: str) -> None:
    results = []
    for watched in (False, True):
        params = leaves([(700, 67), (3, CHUNK), (40, 5)], SINGLE)
        before = [param.detach().clone() for param in params]
        optimizer = RowwiseAdagrad(params, lr=0.1, backend=backend)
        monitor = Monitor(optimizer, every=1) if watched else None
        give(params, 0)
        params[2].grad = random_sparse((40, 5), 30, 0, SINGLE)
        optimizer.step()
        results.append(bits(optimizer))
    assert_same_bits(*results)
    moved = sum(
        (new.detach().double() - old.double()).square().sum() for new, old in zip(params, before, strict=True)
    ).sqrt()
    assert monitor is not None
    sample = monitor.read()
    assert sample["update_norm"] == pytest.approx(float(moved), rel=1e-6)


def test_loss_scaling_undone_inside_the_step() -> None:
    (param,), (same,) = leaves([(6, 4)], SINGLE), leaves([(6, 4)], SINGLE)
    ours, theirs = RowwiseAdagrad([param], amp="fused"), RowwiseAdagrad([same])
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale((param * param).sum()).backward()
    (same * same).sum().backward()
    scaler.step(ours)
    theirs.step()
    assert_same_bits(bits(ours), bits(theirs))


def test_differentiable_steps() -> None:
    def after(start: Tensor, grad: Tensor) -> Tensor:
        param = start.clone()
        optimizer = RowwiseAdagrad([param], lr=0.1, weight_decay=0.1, differentiable=True)
        param.grad = grad.clone()
        optimizer.step()
        return param

    assert torch.autograd.gradcheck(after, leaves([(3, 2), (3, 2)]))


# Where it runs, and what it refuses.


def test_backends_say_why() -> None:
    def placed(param: Tensor) -> tuple[str, str]:
        _, backend, reason = RowwiseAdagrad([param.requires_grad_()]).backends()[0]
        return backend, reason

    assert placed(torch.zeros(3, 4)) == ("cpu", "float32")
    assert placed(torch.zeros(2, CHUNK + 1)) == ("eager", "rows of 16,385 elements, more than 16,384")
    assert placed(torch.zeros(4, 3).t()) == ("eager", "rows: not contiguous (stride (1, 3))")
    assert placed(torch.zeros(3, 4, dtype=torch.complex64)) == ("eager", "dtype torch.complex64")
    (param,) = leaves([(3, 4)])
    give([param], 0)
    on_lists = RowwiseAdagrad([param], backend="foreach")
    with pytest.raises(RuntimeError, match=r"backend='foreach' cannot run .*: a rule of rows"):
        on_lists.step()


def test_layouts_that_are_not_compiled_equal_those_that_are() -> None:
    (param,) = leaves([(6, 4)])
    strided = param.detach().t().contiguous().t().requires_grad_()
    optimizers = [RowwiseAdagrad([each], lr=0.1) for each in (param, strided)]
    for seed in range(2):
        give([param], seed)
        strided.grad = param.grad.t().contiguous().t()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(strided.detach(), param.detach(), rtol=1e-14, atol=1e-15)


def test_bad_options_raise() -> None:
    for options, match in (
        (dict(lr=-1.0), "Invalid learning rate"),
        (dict(eps=-1.0), "Invalid epsilon"),
        (dict(weight_decay=-1.0), "weight_decay"),
    ):
        with pytest.raises(ValueError, match=match):
            RowwiseAdagrad(leaves([(2, 2)]), **options)  # type: ignore[arg-type]


def weighted(param, grad, level, lr, weight):
    return weight * grad


@of_rows(weighted)
def leveled(param, grad, level, lr, weight, mean):
    return param - lr * (grad - level), 0.5 * level + mean


def centered_part(param, grad, lr):
    return grad


@of_rows(centered_part)
def centered(param, grad, lr, mean):
    return param - lr * (grad - mean)


Leveled, Centered = (
    from_rule(leveled, "Leveled", lr=0.1, weight=2.0),
    from_rule(centered, "Centered", lr=0.1),
)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rules_of_users_may_be_of_rows(backend: str) -> None:
    assert signature(leveled).state == ("level",)
    assert signature(leveled).given == ("lr", "weight")
    (param,) = leaves([(5, 7)])
    optimizer, expected, level = Leveled([param], backend=backend), param.detach().clone(), torch.zeros(5, 1)
    for seed in range(3):
        give([param], seed)
        expected, level = expected - 0.1 * (param.grad - level), 0.5 * level + 2 * param.grad.mean(1, keepdim=True)
        optimizer.step()
    torch.testing.assert_close(param.detach(), expected, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(optimizer.state[param]["level"], level, rtol=1e-13, atol=1e-14)


def test_a_rule_of_rows_may_have_no_state() -> None:
    (param,) = leaves([(5, 7)])
    before, optimizer = param.detach().clone(), Centered([param])
    give([param], 0)
    optimizer.step()
    expected = before - 0.1 * (param.grad - param.grad.mean(1, keepdim=True))
    torch.testing.assert_close(param.detach(), expected, rtol=1e-14, atol=1e-15)
    assert optimizer.backends()[0][1:] == ("eager", "a rule of rows without state")


def test_a_part_takes_the_arguments_of_its_rule() -> None:
    @of_rows(lambda param, grad, rate: grad)
    def wrong(param, grad, lr, mean):
        return param - lr * mean

    with pytest.raises(TypeError, match=r"must take the arguments of that, .* param, grad, lr; got param, grad, rate"):
        signature(wrong)


# Checkpoints.


def trained(model: nn.Module, steps: int = 2) -> RowwiseAdagrad:
    optimizer = RowwiseAdagrad(model, lr=0.1, weight_decay=0.1)
    go_on(model, optimizer, range(steps))
    return optimizer


def go_on(model: nn.Module, optimizer: FirstOrder, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        model(torch.arange(step, step + 9)).square().sum().backward()
        optimizer.step()


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(50, 8, sparse=True), nn.Linear(8, 3))


@pytest.mark.parametrize("through", [lambda saved: saved, lambda saved: pickle.loads(pickle.dumps(saved))])
def test_checkpoints_go_on(through: Callable[[Any], Any]) -> None:
    model = network()
    optimizer = trained(model)
    twin = copy.deepcopy(model)
    reloaded = RowwiseAdagrad(twin, lr=3.0)
    reloaded.load_state_dict(through(optimizer.state_dict()))
    assert_same_bits(bits(optimizer), bits(reloaded))
    for net, each in ((model, optimizer), (twin, reloaded)):
        go_on(net, each, range(2, 4))
    assert_same_bits(bits(optimizer), bits(reloaded))


def test_copies_go_on() -> None:
    model = network()
    optimizer = trained(model)
    twin, copied = copy.deepcopy((model, optimizer))
    for net, each in ((model, optimizer), (twin, copied)):
        go_on(net, each, range(2, 4))
    assert_same_bits(bits(optimizer), bits(copied))


def test_state_may_be_made_before_the_first_step() -> None:
    model, other = network(), network()
    optimizer, early = RowwiseAdagrad(model), RowwiseAdagrad(other)
    early.init_state()
    assert early.state[other[0].weight]["sum"].shape == (50, 1)
    for net, each in ((model, optimizer), (other, early)):
        go_on(net, each, range(2))
    assert_same_bits(bits(optimizer), bits(early))


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda sums: sums[:-1], r"sum of 0.weight has shape \(49, 1\), expected \(50, 1\)"),
        (lambda sums: sums.expand(50, 8), r"shape \(50, 8\), expected \(50, 1\)"),
        (lambda sums: sums[:, 0], r"shape \(50,\), expected"),
        (lambda sums: sums - 1e6, "sum of 0.weight must be >= 0"),
        (lambda sums: sums.int(), "must hold numbers as the parameter does"),
    ],
)
def test_damaged_sums_are_refused(damage: Callable[[Tensor], Tensor], match: str) -> None:
    model = network()
    optimizer = trained(model)
    before, saved = bits(optimizer), copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["sum"] = damage(saved["state"][0]["sum"])
    with pytest.raises(ValueError, match=match):
        optimizer.load_state_dict(saved)
    assert_same_bits(bits(optimizer), before)
    optimizer.state[model[0].weight]["sum"] = torch.zeros(50, 8)
    with pytest.raises(
        RuntimeError, match=r"sum of 0.weight has shape \(50, 8\), expected \(50, 1\). Nothing has moved"
    ):
        go_on(model, optimizer, range(1))


# Options that wrap a rule.


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sparse", [False, True])
def test_decay_may_be_cautious(sparse: bool, backend: str) -> None:
    (param,) = leaves([(40, 7)])
    expected, sums = param.detach().clone(), torch.zeros(40, 1, dtype=DOUBLE)
    optimizer = RowwiseAdagrad(
        [param], lr=0.1, weight_decay=0.5, decoupled_weight_decay=True, cautious="decay", backend=backend
    )
    for seed in range(3):
        param.grad = random_sparse((40, 7), 30, seed)
        grad = param.grad.to_dense()
        named = param.grad.coalesce().indices()[0] if sparse else torch.arange(40)
        param.grad = param.grad if sparse else grad
        optimizer.step()
        sums[named] += grad[named].square().mean(1, keepdim=True)
        update = -0.1 * grad[named] / (sums[named].sqrt() + 1e-8)
        rows = expected[named]
        expected[named] = rows + update - torch.where(update * rows > 0, 0.0, 0.05 * rows)
    torch.testing.assert_close(param.detach(), expected, rtol=1e-13, atol=1e-14)
    assert list(optimizer.state[param]) == ["sum"]


def test_decay_may_follow_the_schedule() -> None:
    (param,), (same,) = leaves([(9, 4)]), leaves([(9, 4)])
    options = dict(lr=0.1, decoupled_weight_decay=True)
    ours = RowwiseAdagrad([param], **options, weight_decay=0.2, decay_by="schedule")  # type: ignore[arg-type]
    theirs = RowwiseAdagrad([same], **options, weight_decay=2.0)  # type: ignore[arg-type]
    give([param], 0)
    give([same], 0)
    ours.step()
    theirs.step()
    torch.testing.assert_close(param.detach(), same.detach(), rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("options", [dict(ema=0.9), dict(cautious="update"), dict(cautious="both")])
def test_what_rows_have_no_numbers_for(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"RowwiseAdagrad: (ema|cautious)=.*(keeps one a row|needs sums of its own)"):
        RowwiseAdagrad(leaves([(3, 4)]), decoupled_weight_decay=True, **options)
