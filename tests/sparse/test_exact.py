"""``sparse="exact"``: the parameters and the averages that a dense optimizer would have."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from cases import BACKENDS
from exact_cases import ALLOWED, BETAS, ExactTwins, Grad, assert_unmoved, embedding, random_tables, snapshot
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_cases import coo
from torch import Tensor, nn

from descend import SGD, Adam, AdamW, SparseAdam

NEVER = 16  # a row without gradients, behind the others


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Torch wakes all threads for a handful of numbers: minutes on a busy machine."""
    torch.set_num_threads(1)


# How the learning rate and the weight decay go.


def warm_up(step: int) -> tuple[float, float]:
    return 1e-2 * min(1.0, (step - 1) / 60), 0.1


def cosine(step: int) -> tuple[float, float]:
    return 0.5e-2 * (1 + math.cos(math.pi * step / 700)), 0.0


def step_decay(step: int) -> tuple[float, float]:
    return 0.1 ** (step // 60 % 4), 0.01


def bursts(step: int) -> tuple[float, float]:
    return 1.0 if step % 37 < 2 else 1e-4, 0.01 if step > 50 else 0.0


def forgetting(step: int) -> tuple[float, float]:
    """Now and then lr * weight_decay is 1, and nothing is left of what the row was."""
    return 0.5, 2.0 if step % 97 == 0 else 0.1


def flipping(step: int) -> tuple[float, float]:
    """Now and then lr * weight_decay is above 1, and the row changes its sign."""
    return 0.1, 15.0 if step % 50 == 7 else 0.1


SCHEDULES = (warm_up, cosine, step_decay, bursts, forgetting, flipping)


def set_options(twins: ExactTwins, schedule: Callable[[int], tuple[float, float]], step: int) -> None:
    lr, weight_decay = schedule(step)
    twins.edit(lambda optimizer: [group.update(lr=lr, weight_decay=weight_decay) for group in optimizer.param_groups])


def bursty_grads(betas: tuple[float, float], eps: float, busy: range, seed: int = 0) -> Iterator[Grad]:
    """Gradients of 16 rows, for ever: many in the steps ``busy`` of every 150, then none.

    In groups of four, a row's gradients are far below, about, above and far above where eps matters. Of each group,
    the first grow as fast as leads furthest, the others come at random, always or every 3rd or 11th step.
    """
    random = torch.Generator().manual_seed(seed)
    sizes = (
        torch.tensor([0.1, 1.0, 30.0, 1e8], dtype=torch.float64).repeat_interleave(4) * eps / math.sqrt(1 - betas[1])
    )
    growth, step = betas[1] / betas[0] if betas[0] else 10.0, 0
    while True:
        step += 1
        rows = torch.tensor([row for row in range(16) if step % 150 in busy and step % (1, 1, 3, 11)[row % 4] == 0])
        values = 1 + 0.5 * torch.randn((len(rows), 2), generator=random, dtype=torch.float64)
        rows = rows.long()
        values[rows % 4 == 0] = growth ** (step % 150 - busy.stop)
        yield rows, sizes[rows][:, None] * values


@pytest.mark.parametrize(
    ("schedule", "backend"), [*((schedule, "cpu") for schedule in SCHEDULES), (warm_up, "eager"), (flipping, "eager")]
)
def test_tables_follow_a_dense_optimizer(schedule: Callable[[int], tuple[float, float]], backend: str) -> None:
    groups = [{"betas": betas, "eps": eps} for betas, eps in zip((*BETAS, BETAS[0]), (*[1e-8] * 4, 1e-3), strict=True)]
    twins = ExactTwins(random_tables(*[(17, 2)] * 5), AdamW, groups, backend=backend)
    grads = [bursty_grads(group["betas"], group["eps"], range(1, 14), seed) for seed, group in enumerate(groups)]
    for step in range(1, 330):
        set_options(twins, schedule, step)
        twins.step(*map(next, grads))
    twins.assert_close()


def test_a_row_may_miss_ten_thousand_steps() -> None:
    groups = [{"betas": (0.9, 0.999)}, {"betas": (0.95, 0.99)}]
    tables = [*random_tables((17, 2)), *random_tables((17, 2), dtype=torch.float32)]
    twins = ExactTwins(tables, AdamW, groups)
    grads = [bursty_grads(group["betas"], 1e-8, range(1, 30)) for group in groups]
    nothing: Grad = (torch.empty(0, dtype=torch.int64), torch.empty(0, 2, dtype=torch.float64))
    for step in range(1, 10_140):
        set_options(twins, cosine if step < 5000 else warm_up, step)
        is_busy = step < 100 or step > 10_100
        twins.step(*[next(grad) if is_busy else nothing for grad in grads])
    twins.assert_close()


HISTORIES = [
    *((betas, steps) for betas in BETAS[:3] for steps in (1, 5, 40)),  # the first step leads furthest
    ((0.0, 0.99), 2),
    ((0.8, 0.9), 1),
]


@pytest.mark.parametrize(("betas", "steps"), HISTORIES, ids=str)
def test_the_worst_gradients_stay_within_the_bound(betas: tuple[float, float], steps: int) -> None:
    """Of every size from where eps is all to where it is nothing, and growing as fast as leads furthest."""
    count = 61
    twins = ExactTwins(random_tables((count, 1)), AdamW, betas=betas, weight_decay=0.1)
    sizes = torch.logspace(-1.5, 4.5, count, dtype=torch.float64)[:, None] * 1e-8 / math.sqrt(1 - betas[1])
    growth = betas[1] / betas[0] if betas[0] else 10.0
    for step in range(1, steps + 1):
        twins.step((torch.arange(count), sizes * growth ** (step - steps)))
    for _ in range(150):
        twins.step((torch.empty(0, dtype=torch.int64), torch.empty(0, 1, dtype=torch.float64)))
    worst = twins.assert_close()
    assert worst > 5e-4 or betas[0] == 0  # there is an error to be seen


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(70_000, 1), (3, 20_000)], ids=str)
def test_tables_of_many_rows_and_rows_of_many_numbers(shape: tuple[int, int], backend: str) -> None:
    """All rows are settled in pieces, long rows in chunks, on several threads."""
    torch.set_num_threads(2)
    twins = ExactTwins(random_tables(shape), AdamW, backend=backend, lr=0.1)
    rows = torch.tensor([0, 1, shape[0] // 2, shape[0] - 1, 65_535, 65_536]) % shape[0]
    for step in range(16):
        twins.edit(
            lambda optimizer, step=step: optimizer.param_groups[0].update(weight_decay=15.0 if step == 9 else 0.1)
        )
        touched = rows[: 6 if step < 3 else 0].unique()
        twins.step((touched, torch.full((len(touched), shape[1]), 1e-7 * step - 1e-7, dtype=torch.float64)))
    twins.assert_close()


ONE_BY_ONE = [
    dict(),
    dict(weight_decay=0.0),
    dict(weight_decay=0.1, eps=1e-3),
    dict(lr=0.1, weight_decay=10.0),
    dict(lr=0.1, weight_decay=15.0, betas=(0.9, 0.95)),
    dict(maximize=True),
    dict(max_norm=0.1),
    dict(max_norm=0.1, maximize=True, betas=(0.0, 0.99)),
    dict(lr=torch.tensor(0.01, dtype=torch.float64)),
]


@pytest.mark.parametrize(
    ("dtype", "backend"), [(torch.float64, "cpu"), (torch.float64, "eager"), (torch.float32, "cpu")], ids=str
)
@pytest.mark.parametrize("options", ONE_BY_ONE, ids=str)
def test_tables_of_many_sizes_follow_torch(options: dict[str, Any], dtype: torch.dtype, backend: str) -> None:
    """Rows touched at every step, now and then, never; named twice; steps without rows or without a gradient."""
    tables = random_tables((5, 3), (1, 4), (40, 1), (0, 2), dtype=dtype)
    twins = ExactTwins(tables, groups=[{}, {"lr": 0.03}, {"lr": 0.1}, {}], backend=backend, **options)
    random = torch.Generator().manual_seed(3)
    for step in range(60):
        grads: list[Grad] = []
        for number, table in enumerate(tables):
            rows = torch.randint(0, max(1, len(table) * 3 // 4), (step * (number + 1) % 4,), generator=random)
            rows = torch.cat([rows, torch.zeros(1, dtype=torch.int64)]) if number == 0 else rows[: 4 * len(table)]
            values = torch.randn((len(rows), table.shape[1]), generator=random, dtype=torch.float64)
            grads.append(None if (step + number) % 7 == 6 else (rows, values))
        twins.step(*grads)
    twins.assert_close()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("dtype", "state_dtype"),
    [(torch.float16, None), (torch.bfloat16, None), (torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)],
    ids=str,
)
def test_short_numbers_stay_finite_and_near(dtype: torch.dtype, state_dtype: torch.dtype | None, backend: str) -> None:
    (table,) = random_tables((17, 2), dtype=dtype)
    twins = ExactTwins([table], torch.optim.AdamW, backend=backend, lr=1e-2, weight_decay=0.1)
    twins.ours.state_dtype = state_dtype
    random = torch.Generator().manual_seed(0)
    for step in range(1, 200):
        rows = torch.randint(0, 16, (3 if step % 50 < 20 else 0,), generator=random)
        twins.step((rows, torch.randn((len(rows), 2), generator=random, dtype=torch.float64)))
    twins.settle()
    assert twins.weights[0].isfinite().all()
    # Each of up to 60 writes of a row rounds it, and its averages: half a unit in the last place of up to 4.
    eps = max(torch.finfo(each).eps for each in (dtype, state_dtype or dtype))
    torch.testing.assert_close(twins.weights[0].double(), twins.dense_weights[0], rtol=0, atol=60 * 2 * eps)
    assert not twins.ours.state[twins.weights[0]]["exp_avg_sq"][NEVER].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [1e25, 1e-25, torch.inf])
def test_overflow_does_what_it_does_to_a_dense_optimizer(size: float, backend: str) -> None:
    """A square that overflows stays so for ever, however long the row coasts, and the row stays where it is."""
    (table,) = random_tables((3, 2), dtype=torch.float32)
    layer, dense = embedding(table), table.clone().requires_grad_()
    ours = AdamW(layer.parameters(), betas=(0.9, 0.95), sparse="exact", backend=backend)
    ours.attach(layer)
    theirs = AdamW([dense], betas=(0.9, 0.95))
    for step in range(2400):
        count = 1 if step == 0 else 0
        layer.weight.grad = coo([0] * count, torch.full((count, 2), size), layer.weight.shape)
        dense.grad = layer.weight.grad.to_dense()
        ours.step()
        theirs.step()
    layer(torch.tensor([0]))
    torch.testing.assert_close(layer.weight[0], dense[0], rtol=1e-4, atol=1e-5, equal_nan=True)  # 0.01 of lr
    if size < torch.inf:  # else the row is lost
        for name in ("exp_avg", "exp_avg_sq"):
            found, expected = ours.state[layer.weight][name], theirs.state[dense][name]
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-37)


ROWS = 4
OPERATIONS = st.one_of(
    st.tuples(st.just("touch"), st.lists(st.integers(0, ROWS - 2), max_size=3), st.integers(-9, 9)),
    st.tuples(st.just("miss"), st.integers(1, 300)),
    st.tuples(st.just("read"), st.lists(st.integers(0, ROWS - 1), max_size=3)),
    st.tuples(st.just("settle")),
    st.tuples(st.just("no gradient")),
    st.tuples(st.just("edit"), st.sampled_from(["lr", "weight_decay"]), st.sampled_from([0.0, 1e-3, 0.1, 1.0, 1.5])),
    st.tuples(st.just("edit"), st.just("eps"), st.sampled_from([1e-8, 1e-3])),
    st.tuples(st.just("edit"), st.just("betas"), st.sampled_from(BETAS)),
    st.tuples(st.just("checkpoint")),
)


@settings(max_examples=25, deadline=None)
@given(operations=st.lists(OPERATIONS, max_size=25), backend=st.sampled_from(BACKENDS))
def test_whatever_happens_tables_follow_a_dense_optimizer(operations: list[Any], backend: str) -> None:
    twins = ExactTwins(random_tables((ROWS, 2)), AdamW, backend=backend)
    none: Grad = (torch.empty(0, dtype=torch.int64), torch.empty(0, 2, dtype=torch.float64))
    for name, *what in operations:
        if name == "touch":
            rows, power = what
            twins.step((rows, torch.tensor([[1.0, -2.0]], dtype=torch.float64).repeat(len(rows), 1) * 10.0**power))
        elif name == "miss":
            for _ in range(what[0]):
                twins.step(none)
        elif name == "read":
            twins.read(0, what[0])
        elif name == "settle":
            twins.settle()
        elif name == "no gradient":
            twins.step(None)
        elif name == "edit":
            option, value = what
            if option in ("betas", "eps"):
                twins.settle()  # the optimizer does so by itself; here it is counted in the bounds
                # ALLOWED holds for averages made with the same betas; others may be further apart.
                twins.allowed = 8 * ALLOWED
            twins.edit(lambda optimizer, new={option: value}: optimizer.param_groups[0].update(new))
        else:
            twins.edit(lambda optimizer: optimizer.load_state_dict(optimizer.state_dict()))
    twins.assert_close()


# Options that change while training.


@pytest.mark.parametrize("backend", BACKENDS)
def test_betas_and_eps_may_change(backend: str) -> None:
    """Rows that are behind are brought up to date first, with the old ones."""
    twins = ExactTwins(random_tables((9, 2)), torch.optim.AdamW, backend=backend, lr=0.1)
    for step, edit in enumerate([dict(betas=(0.9, 0.95)), dict(eps=1e-3), dict(betas=(0.0, 0.99), eps=1e-8), {}]):
        for count in (4, 0, 0, 0, 0, 1):
            rows = torch.arange(count) + step
            twins.step((rows, torch.full((count, 2), 1e-3 + step, dtype=torch.float64)))
        for optimizer in twins.both:
            optimizer.param_groups[0].update(edit)
    twins.assert_close()


def test_momentum_that_cycles_is_followed() -> None:
    """OneCycleLR changes betas[0] at every step."""
    twins = ExactTwins(random_tables((9, 2)), torch.optim.AdamW)
    schedulers = [torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=60) for optimizer in twins.both]
    for step in range(50):
        rows = torch.tensor([step % 7, 7 * (step % 2)])
        twins.step((rows, torch.tensor([[1.0, 2.0], [0.5, -3.0]], dtype=torch.float64)))
        for scheduler in schedulers:
            scheduler.step()
    twins.assert_close()


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, 1e-3, total_iters=20),
        lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 10, 0.3),
        lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 15),
    ],
    ids=["warm-up", "steps", "restarts"],
)
@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1, dtype=torch.float64)], ids=["float", "tensor"])
def test_schedulers_are_followed(scheduler: Callable[..., Any], lr: Any) -> None:
    twins = ExactTwins(random_tables((9, 2)), torch.optim.AdamW, lr=lr)
    twins.ours.param_groups[0]["lr"] = lr.clone() if isinstance(lr, Tensor) else lr
    schedulers = [scheduler(optimizer) for optimizer in twins.both]
    for step in range(40):
        rows = torch.tensor([step // 4 % 8])
        twins.step((rows, torch.full((1, 2), 1.0 + step, dtype=torch.float64)))
        for each in schedulers:
            each.step()
    twins.assert_close()


# Where there is no closed form.

IMPOSSIBLE = [
    (Adam, dict(weight_decay=0.1), "L2"),
    (Adam, dict(betas=(0.9, 0.9)), "betas"),
    (AdamW, dict(betas=(0.95, 0.9)), "betas"),
    (AdamW, dict(betas=(0.0, 0.0)), "betas"),
    (AdamW, dict(eps=0.0), "eps"),
    (AdamW, dict(amsgrad=True), "amsgrad"),
    (AdamW, dict(amsgrad=True, eps=0), "amsgrad and eps"),
]


@pytest.mark.parametrize(("ours", "options", "message"), IMPOSSIBLE, ids=str)
def test_what_has_no_closed_form_is_refused(ours: type[Adam], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"{ours.__name__}: sparse='exact' cannot.*{message}"):
        ours(embedding(torch.zeros(3, 2)).parameters(), sparse="exact", **options)
    weight = torch.zeros(3, 2, requires_grad=True)
    optimizer = ours([weight], sparse="exact")
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [torch.zeros(3, 2, requires_grad=True)], **options})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(ValueError, match=message):
        ours([{"params": [weight], **options}], sparse="exact")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("ours", "options", "message"), IMPOSSIBLE, ids=str)
def test_an_edit_that_has_no_closed_form_fails_at_the_step(
    ours: type[Adam], options: dict[str, Any], message: str, backend: str
) -> None:
    twins = ExactTwins(random_tables((5, 2), (3, 2)), Adam, ours=ours, backend=backend, weight_decay=0.0)
    grad: Grad = ([0, 1], torch.ones((2, 2), dtype=torch.float64))
    for _ in range(3):
        twins.step(grad, grad)
    twins.step(([1], torch.ones((1, 2), dtype=torch.float64)), None)
    group = twins.ours.param_groups[0]
    old = dict(group)
    group.update(options)
    twins.read(0, [0])  # reading goes on
    for weight in twins.weights:
        weight.grad = coo([0], torch.ones(1, 2, dtype=torch.float64), weight.shape)
    before = snapshot(twins.ours)
    with pytest.raises(ValueError, match=message):
        twins.ours.step()
    assert_unmoved(twins.ours, before)
    group.update(old)
    twins.step(grad, grad)
    twins.assert_close()


@pytest.mark.parametrize("ours", [SGD, SparseAdam])
def test_other_optimizers_have_no_exact_mode(ours: Any) -> None:
    with pytest.raises(ValueError, match=r"'exact'|'touched'"):
        ours([torch.zeros(3, 2, requires_grad=True)], sparse="exact")


def test_l2_is_no_obstacle_where_it_is_decoupled() -> None:
    options = dict(weight_decay=0.1, decoupled_weight_decay=True, lr=0.1)
    twins = ExactTwins(random_tables((5, 2)), torch.optim.Adam, ours=Adam, **options)
    for step in range(20):
        twins.step(([step % 4], torch.ones((1, 2), dtype=torch.float64)))
    twins.assert_close()


# In a training program.


class Words(nn.Module):
    """Two embeddings and a linear layer: classes from words and a bag of others."""

    def __init__(self, sparse: bool) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.word = nn.Embedding(50, 4, sparse=sparse, dtype=torch.float64)
        self.bag = nn.EmbeddingBag(70, 4, mode="mean", sparse=sparse, dtype=torch.float64)
        self.out = nn.Linear(8, 5, dtype=torch.float64)

    def forward(self, words: Tensor, bags: Tensor) -> Tensor:
        return self.out(torch.cat([self.word(words), self.bag(bags)], 1))


def loss_of(model: nn.Module, seed: int) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    words = (50 * torch.rand(8, generator=random) ** 3).long()
    bags = (70 * torch.rand(8, 3, generator=random) ** 3).long()
    return nn.functional.cross_entropy(model(words, bags), words % 5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_loss_curves_are_those_of_torch(backend: str) -> None:
    ours_model, dense_model = Words(True), Words(False)
    options = dict(lr=0.03, weight_decay=0.1)
    ours = AdamW(ours_model.parameters(), sparse="exact", backend=backend, **options)
    ours.attach(ours_model)
    theirs = torch.optim.AdamW(dense_model.parameters(), **options)
    losses: list[list[float]] = [[], []]
    for step in range(150):
        for curve, model, optimizer in zip(losses, (ours_model, dense_model), (ours, theirs), strict=True):
            optimizer.zero_grad()
            loss = loss_of(model, step)
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
    ours_losses, dense_losses = torch.tensor(losses)
    assert dense_losses[-20:].mean() < 0.5 * dense_losses[:20].mean()
    torch.testing.assert_close(ours_losses, dense_losses, rtol=0, atol=1e-3)  # of a loss of 1.6; 0.01 lr is 3e-4


def test_step_with_a_closure() -> None:
    ours_model, dense_model = Words(True), Words(False)
    ours = AdamW(ours_model.parameters(), sparse="exact", lr=0.03)
    ours.attach(ours_model)
    theirs = AdamW(dense_model.parameters(), lr=0.03)
    for step in range(40):
        losses = []
        for model, optimizer in ((ours_model, ours), (dense_model, theirs)):

            def closure(model: nn.Module = model, optimizer: Any = optimizer, step: int = step) -> Tensor:
                optimizer.zero_grad()
                loss = loss_of(model, step)
                loss.backward()
                return loss

            losses.append(optimizer.step(closure))
        torch.testing.assert_close(*losses, rtol=0, atol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_skipped_steps_are_not_missed(backend: str) -> None:
    twins = ExactTwins(random_tables((5, 2)), torch.optim.AdamW, backend=backend, lr=0.1)
    twins.ours.nonfinite = "skip"
    twins.step(([0, 1, 2], torch.ones((3, 2), dtype=torch.float64)))
    for _ in range(10):
        twins.step(([1], torch.ones((1, 2), dtype=torch.float64)))
        twins.read(0, [3])
        twins.weights[0].grad = coo([3], torch.full((1, 2), torch.nan, dtype=torch.float64), (5, 2))
        twins.ours.step()
    assert twins.ours.skipped_steps == 10
    twins.assert_close()


def test_grad_scaler_skips_steps() -> None:
    twins = ExactTwins(random_tables((5, 2), dtype=torch.float32), torch.optim.AdamW, lr=0.1)
    layer, dense = twins.layers[0], embedding(random_tables((5, 2), dtype=torch.float32)[0], sparse=False)
    theirs = torch.optim.AdamW(dense.parameters(), lr=0.1)
    for model, optimizer in ((layer, twins.ours), (dense, theirs)):
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=5)
        for step in range(30):
            optimizer.zero_grad()
            rows = torch.tensor([step % 3, 3 * (step == 0)])
            loss = model(rows).square().sum() * (torch.inf if step % 4 == 1 else 1.0)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() != 4.0
    assert twins.ours.state[layer.weight]["step"] == theirs.state[dense.weight]["step"] == 22
    twins.ours.settle()
    # Rows miss some steps eleven times, at 0.01 lr each; in practice a tenth of that.
    torch.testing.assert_close(layer.weight, dense.weight, rtol=0, atol=0.02 * 0.1)


def test_steps_without_a_gradient_are_no_steps() -> None:
    twins = ExactTwins(random_tables((5, 2)), torch.optim.AdamW, lr=0.1)
    for step in range(30):
        twins.step(([step % 4], torch.ones((1, 2), dtype=torch.float64)))
        twins.step(None)
    assert twins.ours.state[twins.weights[0]]["step"] == 30
    twins.assert_close()


def test_gradients_that_zero_grad_has_zeroed_count() -> None:
    twins = ExactTwins(random_tables((5, 2)), torch.optim.AdamW, lr=0.1)
    twins.step(([0, 1], torch.ones((2, 2), dtype=torch.float64)))
    for _ in range(10):
        twins.edit(lambda optimizer: optimizer.zero_grad(set_to_none=False))
        twins.edit(lambda optimizer: optimizer.step())
        twins.bounds[0].add_step(0.1, rows=np.arange(0), grads=np.zeros(0))
    twins.assert_close()


def test_a_step_repeated_with_the_same_gradient_is_a_step() -> None:
    twins = ExactTwins(random_tables((5, 2)), torch.optim.AdamW, lr=0.1)
    twins.step(([0, 1], torch.ones((2, 2), dtype=torch.float64)))
    for _ in range(5):
        twins.edit(lambda optimizer: optimizer.step())
        twins.bounds[0].add_step(0.1, rows=np.arange(2), grads=np.ones(2))
    twins.assert_close()
