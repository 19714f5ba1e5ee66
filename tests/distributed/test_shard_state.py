"""``shard_state``: a part of the state on each rank, and the parameters of one process."""

from __future__ import annotations

import copy
import pickle
import signal
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import CASES, Case, give_grads, leaves, params_of
from ranks import on_ranks
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import descend
from descend import SGD, AdamW, AdamWScheduleFree, from_rule, in_backward
from descend.distributed import gather
from descend.distributed.dtensors import local_of
from descend.distributed.shard_state import dim_to_cut, part
from descend.ops import of_matrices

SHAPES = [(), (0,), (0, 3), (7, 5), (129,), (1, 5), (1023,), (2, 1, 3), (60, 80), (1,)]


def world() -> Any:
    return dist.group.WORLD


@contextmanager
def small_buckets(size: int = 4096) -> Any:
    """Many buckets, some of which hold a part of a parameter, and gathers in place."""
    before = gather.BUCKET_BYTES, gather.IN_PLACE_BYTES
    gather.BUCKET_BYTES, gather.IN_PLACE_BYTES = size, 2 * size
    try:
        yield
    finally:
        gather.BUCKET_BYTES, gather.IN_PLACE_BYTES = before


def train(optimizer: Any, seeds: range, leave_out: Sequence[int] = ()) -> None:
    for seed in seeds:
        give_grads(params_of(optimizer), seed)
        for index in leave_out:
            params_of(optimizer)[index].grad = None
        optimizer.step()


def result(optimizer: Any) -> tuple[list[Tensor], Any]:
    """All parameters, and the whole state on rank 0."""
    whole = optimizer.consolidated_state_dict()
    return [param.detach().clone() for param in params_of(optimizer)], whole and whole["state"]


def assert_equal(found: tuple[list[Tensor], Any], expected: tuple[list[Tensor], Any], tolerance: float = 0.0) -> None:
    close = dict(rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found[0], expected[0], **close)
    if found[1] is not None:
        assert list(found[1]) == list(expected[1])
        for key, state in expected[1].items():
            assert list(found[1][key]) == list(state)
            for name, value in state.items():
                torch.testing.assert_close(found[1][key][name], value, **close)


def assert_same_on_all(results: Sequence[tuple[list[Tensor], Any]]) -> None:
    for params, _ in results[1:]:
        assert all(map(torch.equal, params, results[0][0]))


# Every optimizer.


def steps(rank: int, case: Case, options: dict[str, Any], sharded: bool) -> tuple[list[Tensor], Any]:
    shard = dict(shard_state=world()) if sharded else {}
    optimizer = case.ours(leaves(SHAPES), **case.options, **options, **shard)
    with small_buckets():
        train(optimizer, range(2))
        train(optimizer, range(2, 4), leave_out=[3])
        train(optimizer, range(4, 5))
        if isinstance(optimizer, AdamWScheduleFree):
            optimizer.eval()
            optimizer.train()
            optimizer.eval()
    return result(optimizer)


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_steps_are_those_of_one_process(case: Case, ranks: int) -> None:
    expected = steps(0, case, {}, False)
    results = on_ranks(ranks, steps, case, {}, True)
    assert_same_on_all(results)
    assert_equal(results[0], expected, 1e-12 if case.needs_sums() else 0.0)  # sums are added in another order


@pytest.mark.parametrize("options", [dict(max_norm=0.5), dict(max_norm=0.5, backend="eager")], ids=str)
@pytest.mark.parametrize(
    "case", [case for case in CASES if "amsgrad" in case.options or "eps" in case.options], ids=str
)
def test_clipped_steps_are_those_of_one_process(case: Case, options: dict[str, Any]) -> None:
    results = on_ranks(3, steps, case, options, True)
    assert_same_on_all(results)
    assert_equal(results[0], steps(0, case, options, False), 1e-12)


@pytest.mark.parametrize("ranks", [1, 4])
def test_other_numbers_of_ranks(ranks: int) -> None:
    case = Case(AdamW, torch.optim.AdamW, dict(lr=0.01, weight_decay=0.1))
    assert_equal(on_ranks(ranks, steps, case, {}, True)[0], steps(0, case, {}, False))


def test_steps_match_torch() -> None:
    reference = torch.optim.AdamW(leaves(SHAPES), lr=0.1)
    train(reference, range(3))
    for params in on_ranks(2, adamw_steps):
        torch.testing.assert_close(params, params_of(reference), rtol=1e-12, atol=1e-12)


def all_gathered_steps(rank: int) -> list[Tensor]:
    """As on devices, where nothing is broadcast."""
    init = gather.Transfers.__init__

    def without_broadcasts(self: Any, mesh: Any) -> None:
        init(self, mesh)
        self._broadcasts = False

    gather.Transfers.__init__ = without_broadcasts  # type: ignore[method-assign]
    try:
        with small_buckets():
            return adamw_steps(rank)
    finally:
        gather.Transfers.__init__ = init  # type: ignore[method-assign]


@pytest.mark.parametrize("ranks", [2, 3])
def test_all_gathers_do_as_well_as_broadcasts(ranks: int) -> None:
    expected = on_ranks(1, adamw_steps)[0]
    for params in on_ranks(ranks, all_gathered_steps):
        assert all(map(torch.equal, params, expected))


def adamw_steps(rank: int) -> list[Tensor]:
    optimizer = AdamW(leaves(SHAPES), lr=0.1, shard_state=world())
    train(optimizer, range(3))
    return [param.detach().requires_grad_() for param in params_of(optimizer)]


# Dtypes, memory orders, groups.


def strange(dtype: torch.dtype) -> list[Tensor]:
    wide, conv, plain = leaves([(40, 60), (8, 6, 3, 3), (17,)], dtype)
    rows = leaves([(10, 9)], dtype)[0].detach()
    return [
        wide.detach().t().requires_grad_(),
        conv.detach().to(memory_format=torch.channels_last).requires_grad_(),
        plain,
        rows[:, ::2].requires_grad_(),  # not dense
        leaves([(2, 5000)], dtype)[0],  # balances along its second dimension, where parts are not dense
        *(leaves([(5, 3)], torch.float32)),
        *(leaves([(5, 3)], torch.float64)),
    ]


def strange_steps(rank: int, dtype: torch.dtype, backend: str, sharded: bool) -> tuple[list[Tensor], Any]:
    options: dict[str, Any] = dict(shard_state=world(), backend=backend) if sharded else dict(backend=backend)
    params = strange(dtype)
    if backend != "eager":
        del params[3:5]  # kernels take no parts that are not dense
    optimizer = AdamW(params[:3], lr=0.1, **options)
    for seed in range(5):
        if seed == 2:
            optimizer.add_param_group(dict(params=params[3:], lr=0.01, weight_decay=0.3))
        give_grads(params_of(optimizer), seed)
        for param in params[:3]:
            param.grad = torch.empty_like(param).copy_(param.grad)  # in the parameter's memory order
        optimizer.step()
    return result(optimizer)


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.complex64], ids=str)
def test_memory_orders_and_groups_added_later(dtype: torch.dtype, backend: str, ranks: int) -> None:
    if dtype.is_complex and backend == "cpu":
        pytest.skip("no kernel takes complex numbers")
    results = on_ranks(ranks, strange_steps, dtype, backend, True)
    assert_same_on_all(results)
    assert_equal(results[0], strange_steps(0, dtype, backend, False))


def shared_steps(rank: int, sharded: bool) -> list[Tensor]:
    options = dict(shard_state=world()) if sharded else {}
    whole = leaves([(6, 4)])[0]
    view = whole.detach()[1:5, :2].requires_grad_()  # cut elsewhere than the whole
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = SGD([whole, view, whole], lr=0.1, momentum=0.9, **options)
    train(optimizer, range(3))
    return [whole.detach().clone()]


@pytest.mark.parametrize("ranks", [2, 3])
def test_parameters_that_share_memory_step_one_after_the_other(ranks: int) -> None:
    expected = shared_steps(0, False)
    for params in on_ranks(ranks, shared_steps, True):
        assert all(map(torch.equal, params, expected))


def edited_steps(rank: int, sharded: bool) -> list[Tensor]:
    options = dict(shard_state=world()) if sharded else {}
    params = leaves([(5, 4), (7,)])
    optimizer = AdamW(params, lr=0.1, **options)
    train(optimizer, range(1))
    params[1].data = params[1].data + 1
    train(optimizer, range(1, 2))
    params[0].data = params[0].data.t().contiguous().t()  # in another order, so it is cut elsewhere
    if sharded:
        with pytest.raises(RuntimeError, match=r"the parameter placements \(Shard\(dim=1\),\)"):
            optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    train(optimizer, range(2, 4))
    return [param.detach() for param in params]


def test_parameters_may_move_between_steps() -> None:
    for params in on_ranks(2, edited_steps, True):
        torch.testing.assert_close(params, edited_steps(0, False), rtol=0, atol=0)


# Sparse gradients.


def sparse_grad(shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, shape[0], (1, 9), generator=random)
    values = torch.randn(9, *shape[1:], generator=random, dtype=torch.float64)
    return torch.sparse_coo_tensor(rows, values.to(dtype), shape)


def sparse_steps(rank: int, kind: Any, options: dict[str, Any], sharded: bool) -> tuple[list[Tensor], Any]:
    shard = dict(shard_state=world()) if sharded else {}
    params = leaves([(50, 3), (4, 4), (7,), (2, 4000)])
    optimizer = kind([params[0], params[2], params[3]], **options, **shard)
    for seed in range(4):
        for param in params_of(optimizer):
            param.grad = sparse_grad(tuple(param.shape), seed, param.dtype)
        optimizer.step()
    return result(optimizer)


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (descend.SparseAdam, dict(lr=0.1)),
        (AdamW, dict(lr=0.1, sparse="touched")),
        (AdamW, dict(lr=0.1, sparse="touched", max_norm=0.1)),
        (SGD, dict(lr=0.1, momentum=0.9)),
        (descend.Adagrad, dict(lr=0.1)),
    ],
    ids=str,
)
def test_sparse_gradients(kind: Any, options: dict[str, Any], ranks: int) -> None:
    results = on_ranks(ranks, sparse_steps, kind, options, True)
    assert_same_on_all(results)
    assert_equal(results[0], sparse_steps(0, kind, options, False), 1e-12)  # one part is not dense, so it runs eagerly


def sent_for_rows(rank: int) -> int:
    table = nn.Parameter(torch.zeros(100_000, 4))
    optimizer = AdamW([table], sparse="touched", shard_state=world())
    table.grad = sparse_grad((100_000, 4), 0, table.dtype)
    optimizer.step()
    return count_bytes(optimizer.step)


def test_only_touched_rows_travel() -> None:
    assert all(0 < sent < 2000 for sent in on_ranks(2, sent_for_rows))


# Memory and traffic.


GPT2 = [(50257, 768), (1024, 768)] + 12 * [
    (768,), (768,), (2304, 768), (2304,), (768, 768), (768,), (768,), (768,), (3072, 768), (3072,), (768, 3072), (768,)
] + [(768,), (768,)]  # fmt: skip


def bottleneck(stage: int, block: int) -> list[tuple[int, ...]]:
    inside, outside = 64 << stage, 256 << stage
    before = outside if block else 128 << stage if stage else 64
    convolutions = [(inside, before, 1, 1), (inside, inside, 3, 3), (outside, inside, 1, 1)]
    norms = [(inside,)] * 4 + [(outside,)] * 2
    return [*convolutions, *norms] + ([(outside, before, 1, 1), (outside,), (outside,)] if before != outside else [])


RESNET50 = [(64, 3, 7, 7), (64,), (64,)] + [
    shape
    for stage, blocks in enumerate((3, 4, 6, 3))
    for block in range(blocks)
    for shape in bottleneck(stage, block)
] + [(1000, 2048), (1000,)]  # fmt: skip


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
@pytest.mark.parametrize(("shapes", "numbers"), [(GPT2, 124_439_808), (RESNET50, 25_557_032)], ids=["gpt2", "resnet50"])
def test_parts_are_balanced(shapes: list[tuple[int, ...]], numbers: int, ranks: int) -> None:
    assert sum(map(torch.Size.numel, map(torch.Size, shapes))) == numbers
    held = [0] * ranks
    for shape in shapes:
        param = torch.empty(shape, device="meta")
        dim = dim_to_cut(param, ranks)
        assert dim == 0, "other parts are not dense, and run eagerly"
        for rank in range(ranks):
            start, stop = part(shape[dim], ranks, rank)
            held[rank] += (stop - start) * param.numel() // shape[dim]
    assert sum(held) == numbers
    assert max(held) <= 1.02 * numbers / ranks


def test_dimension_with_the_better_balance_is_cut() -> None:
    dims = {(3, 5000): 1, (1, 9): 1, (3, 4): 0, (1, 1): 0, (5, 1000): 1, (2, 7, 3000): 2}
    assert {shape: dim_to_cut(torch.empty(shape), 4) for shape in dims} == dims
    assert dim_to_cut(torch.empty(32, 200).t(), 4) == 1  # the outermost in memory
    assert dim_to_cut(torch.empty(()), 4) is dim_to_cut(torch.empty(0, 2), 4) is None
    by_rows = torch.empty(3, 5000), torch.empty(1, 9), torch.empty(5000), torch.empty(32, 200).t()
    assert [dim_to_cut(param, 4, by_rows=True) for param in by_rows] == [0] * 4
    assert dim_to_cut(torch.empty(()), 4, by_rows=True) is None


def state_bytes(rank: int) -> tuple[int, int, int]:
    params = [nn.Parameter(torch.zeros(shape)) for shape in [(1000, 96), (96,), (96, 96, 3), (7, 2048)]]
    optimizer = AdamW(params, shard_state=world())
    train(optimizer, range(1))
    tensors = [t for state in optimizer.state.values() for name, t in state.items() if name != "step"]
    assert all(isinstance(tensor, DTensor) for tensor in tensors)
    storages = sum(local_of(tensor).untyped_storage().nbytes() for tensor in tensors)
    return storages, optimizer.summary()[0].state_bytes, sum(param.nbytes for param in params)


@pytest.mark.parametrize("ranks", [2, 3])
def test_each_rank_keeps_its_share(ranks: int) -> None:
    for held, reported, params in on_ranks(ranks, state_bytes):
        assert held <= 1.02 * 2 * params / ranks
        assert reported == held + 4 * 4  # the step counts


@contextmanager
def counted() -> Any:
    """The bytes that each collective of a block is given."""
    calls: list[tuple[str, int]] = []
    names = ["all_reduce", "broadcast"]  # gloo's all-gathers are broadcasts
    originals = {name: getattr(dist, name) for name in names}

    def counting(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append((name, args[0].nbytes))
            return originals[name](*args, **kwargs)

        return call

    for name in names:
        setattr(dist, name, counting(name))
    yield calls
    for name, original in originals.items():
        setattr(dist, name, original)


def count_bytes(step: Callable[[], Any]) -> int:
    with counted() as calls:
        step()
    return sum(size for _, size in calls)


def calls_of(rank: int, options: dict[str, Any]) -> list[str]:
    shapes = [(64, 64), (64,)] * 50 + [(3, 1000)]
    params = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    optimizer = AdamW(params, shard_state=world(), **options)
    train(optimizer, range(1))
    give_grads(params, 1)
    with counted() as calls:
        optimizer.step()
    return [name for name, _ in calls]


def test_a_step_is_a_vote_and_an_exchange_for_each_bucket() -> None:
    exchange = ["broadcast"] * 2
    assert on_ranks(2, calls_of, {}) == [["all_reduce", *exchange]] * 2
    assert on_ranks(2, calls_of, dict(max_norm=1.0)) == [["all_reduce", "all_reduce", *exchange]] * 2
    assert on_ranks(1, calls_of, dict(max_norm=1.0)) == [[]]


# What goes wrong.


def nonfinite_steps(rank: int, nonfinite: Any) -> Any:
    params = leaves([(6, 2), (5,)])
    optimizer = AdamW([("a", params[0]), ("b", params[1])], nonfinite=nonfinite, shard_state=world())
    train(optimizer, range(1))
    before = [param.detach().clone() for param in params]
    give_grads(params, 1)
    params[0].grad[5, 1] = torch.inf  # in the last rank's part
    message = None
    try:
        optimizer.step()
    except FloatingPointError as error:
        message = str(error)
    assert all(map(torch.equal, params, before))
    return optimizer.skipped_steps, message


def test_all_ranks_skip_or_raise() -> None:
    assert on_ranks(2, nonfinite_steps, "skip") == [(1, None)] * 2
    skipped, message = on_ranks(2, nonfinite_steps, "raise")[0]
    assert skipped == 0
    assert message.startswith("AdamW: NaN or Inf in the gradient of a on rank 1.")


def disagreement(rank: int, what: str) -> str:
    params = leaves([(6, 2), (5,)])
    optimizer = AdamW(params, lr=0.1, shard_state=world(), sparse="touched")
    train(optimizer, range(1))
    before = [param.detach().clone() for param in params]
    give_grads(params, 1)
    if what == "gradients" and rank == 1:
        params[1].grad = None
    if what == "options" and rank == 1:
        optimizer.param_groups[0]["lr"] = 0.2
    if what == "rows":
        params[0].grad = sparse_grad((6, 2), 0, params[0].dtype)
        if rank == 1:
            params[0].grad = torch.sparse_coo_tensor([[1]], params[0].grad.to_dense()[1:2], (6, 2))
    with pytest.raises(RuntimeError, match="ranks 0 and 1 disagree about") as error:
        optimizer.step()
    assert all(map(torch.equal, params, before))
    return str(error.value)


def test_ranks_that_disagree_raise_before_anything_moves() -> None:
    for what, words in (
        ("gradients", "group 0, parameter 1: (5,) torch.float64 (Shard(dim=0),) with a gradient, torch.strided and"),
        ("options", "group 0, lr: 0.1 and 0.2"),
        ("rows", "sparse gradients: indices of shapes [(1, 9)] and indices of shapes [(1, 1)]"),
    ):
        for message in on_ranks(2, disagreement, what):
            assert words in message


def refusals(rank: int) -> None:
    params = leaves([(6, 2)])
    allowed = "AdamW: shard_state must be a process group or a one-dimensional DeviceMesh that this rank is in"
    for wrong in (True, 2, init_device_mesh("cpu", (1, 2))):
        with pytest.raises(ValueError, match=allowed):
            AdamW(params, shard_state=wrong)
    with pytest.raises(ValueError, match="sparse='exact' keeps whole tables on every rank"):
        AdamW(params, shard_state=world(), sparse="exact")
    optimizer = AdamW(params, shard_state=world())
    with pytest.raises(ValueError, match="in_backward: with shard_state all ranks step together"):
        in_backward(optimizer)
    with pytest.raises(ValueError, match=r"to must be a rank, 0 <= to < 2, got 2"):
        optimizer.consolidated_state_dict(2)
    differentiable = AdamW(params, shard_state=world(), differentiable=True)
    give_grads(params, 0)
    with pytest.raises(RuntimeError, match="a step that other ranks take a part of cannot be differentiated"):
        differentiable.step()
    matrix = from_rule(of_matrix, "OfMatrix")(params, shard_state=world())
    with pytest.raises(RuntimeError, match="a rule of whole matrices cannot update shards"):
        matrix.step()


@of_matrices
def of_matrix(param: Tensor, grad: Tensor, lr: float) -> Tensor:
    return param - lr * grad


def test_what_is_refused() -> None:
    on_ranks(2, refusals)


def interrupted(rank: int) -> tuple[bool, list[Tensor]]:
    """On rank 1 Ctrl-C comes while the first of several buckets is under way."""
    optimizer = AdamW(leaves(SHAPES), lr=0.1, shard_state=world())
    train(optimizer, range(1))
    start, raised = gather.Transfers.start, False

    def interrupt(self: Any, exchange: Any) -> None:
        start(self, exchange)
        signal.raise_signal(signal.SIGINT)

    gather.Transfers.start = interrupt if rank == 1 else start  # type: ignore[method-assign]
    try:
        with small_buckets():
            train(optimizer, range(1, 2))
    except KeyboardInterrupt:
        raised = True
    finally:
        gather.Transfers.start = start  # type: ignore[method-assign]
    train(optimizer, range(2, 3))
    return raised, [param.detach() for param in params_of(optimizer)]


def test_interrupt_on_one_rank_leaves_no_half_step() -> None:
    reference = AdamW(leaves(SHAPES), lr=0.1)
    train(reference, range(3))
    results = on_ranks(2, interrupted)
    assert [raised for raised, _ in results] == [False, True]
    for _, params in results:
        assert all(map(torch.equal, params, params_of(reference)))


def lonely(rank: int) -> bool:
    """Rank 1 cannot take the step, for a reason of its own."""
    params = leaves([(6, 2), (5,)])
    optimizer = AdamW(params, shard_state=world())
    train(optimizer, range(1))
    before = [param.detach().clone() for param in params]
    give_grads(params, 1)
    if rank == 1:
        params[0].grad.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError):
        optimizer.step()
    return all(map(torch.equal, params, before))


def test_rank_that_raises_keeps_the_others_from_stepping() -> None:
    assert on_ranks(2, lonely, timeout=2) == [True, True]


# Whole programs.


def ddp(rank: int, sharded: bool, world_size: int) -> tuple[list[Tensor], float]:
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(5, 30), nn.Tanh(), nn.Linear(30, 3)).double()
    inputs = torch.randn(12, 5, dtype=torch.float64)
    if sharded:
        model = DistributedDataParallel(model, gradient_as_bucket_view=True)
    options = dict(shard_state=world()) if sharded else {}
    optimizer = AdamW(model.parameters(), lr=0.01, max_norm=1.0, **options)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, gamma=0.5)
    for _ in range(8):
        optimizer.zero_grad()
        (model(inputs[rank::world_size]) ** 2).mean().backward()
        optimizer.step()
        scheduler.step()
    return [param.detach() for param in model.parameters()], optimizer.grad_norm


@pytest.mark.parametrize("ranks", [2, 3])
def test_data_parallel_training(ranks: int) -> None:
    expected = ddp(0, False, 1)
    for found in on_ranks(ranks, ddp, True, ranks):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def scaled(rank: int) -> tuple[list[Tensor], float]:
    params = leaves([(6, 2), (5,)], torch.float32)
    optimizer = AdamW(params, lr=0.1, amp="fused", shard_state=world())
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for seed in range(3):
        scaler.scale(torch.zeros(()))
        give_grads(params, seed)
        for param in params:
            param.grad *= 4
        if seed == 1:
            params[0].grad[5, 1] = torch.inf
        scaler.step(optimizer)
        scaler.update(4.0)
    return [param.detach() for param in params], float(optimizer.state[params[0]]["step"])


def test_loss_scaling() -> None:
    reference = torch.optim.AdamW(leaves([(6, 2), (5,)], torch.float32), lr=0.1)
    for seed in (0, 2):
        train(reference, range(seed, seed + 1))
    for params, count in on_ranks(2, scaled):
        assert count == 2
        torch.testing.assert_close(params, [param.detach() for param in params_of(reference)])


def copies(rank: int) -> list[Tensor]:
    optimizer = AdamW(leaves([(6, 2), (5,)]), lr=0.1, shard_state=world())
    train(optimizer, range(2))
    found = []
    for duplicate in (optimizer, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        train(duplicate, range(2, 4))
        found += params_of(duplicate)
    return [param.detach() for param in found]


def test_copies_and_pickles_go_on() -> None:
    reference = AdamW(leaves([(6, 2), (5,)]), lr=0.1)
    train(reference, range(4))
    for params in on_ranks(2, copies):
        assert all(map(torch.equal, params, 3 * params_of(reference)))


def switched(rank: int) -> list[Tensor]:
    optimizer = AdamW(leaves([(6, 2), (5,)]), lr=0.1)
    train(optimizer, range(2))
    optimizer.shard_state = init_device_mesh("cpu", (2,))
    give_grads(params_of(optimizer), 2)
    with pytest.raises(RuntimeError, match=r"after setting shard_state, load_state_dict\(state_dict\(\)\) moves it"):
        optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    train(optimizer, range(2, 4))
    return [param.detach() for param in params_of(optimizer)]


def test_shard_state_may_be_set_later() -> None:
    reference = AdamW(leaves([(6, 2), (5,)]), lr=0.1)
    train(reference, range(4))
    for params in on_ranks(2, switched):
        assert all(map(torch.equal, params, params_of(reference)))
