"""Sparse tables under DistributedDataParallel, and tables of which each rank has rows of its own."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from exact_cases import ALLOWED, random_tables
from ranks import on_ranks_that_may_die as on_ranks
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import descend
from descend import SGD, Adagrad, AdamW, SparseAdam

ROWS, DIM = 23, 4
OPTIONS: dict[str, Any] = dict(lr=0.02, weight_decay=0.1)


class Words(nn.Module):
    """A table, and something dense behind it."""

    def __init__(self, dtype: torch.dtype = torch.float64, padding_idx: int | None = None) -> None:
        super().__init__()
        weight, head = random_tables((ROWS, DIM), (2, DIM), dtype=dtype)
        self.table = nn.Embedding(ROWS, DIM, padding_idx, sparse=True, dtype=dtype)
        self.head = nn.Linear(DIM, 2, dtype=dtype)
        with torch.no_grad():
            self.table.weight.copy_(weight)
            self.head.weight.copy_(head)
            self.head.bias.zero_()

    def forward(self, rows: Tensor) -> Tensor:
        return (self.head(self.table(rows)).square() + self.table(rows).sum(-1, keepdim=True)).sum()


def lookups(step: int, rank: int, micro: int = 0) -> Tensor:
    """The rows that a rank reads: another number on each, duplicates among them, sometimes none at all."""
    random = torch.Generator().manual_seed(100 * step + 10 * micro + rank)
    count = 0 if (step + rank) % 4 == 3 else 2 + rank + step % 3
    rows = torch.randint(ROWS, (count,), generator=random)
    return rows.where(rows < ROWS // 2, rows // (1 + step % 5))  # some rows are rare


def numbers(module: nn.Module) -> list[np.ndarray]:
    return [param.detach().numpy().copy() for param in module.parameters()]


def table_and_rest(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    params = dict(model.named_parameters())
    table = [params.pop(name) for name in list(params) if name.endswith("table.weight")]
    return table, list(params.values())


def optimizers(model: nn.Module, kind: Callable[..., Any], options: dict[str, Any]) -> list[Any]:
    """SparseAdam takes the table alone; all others take everything."""
    table, rest = table_and_rest(model)
    if kind in (SparseAdam, torch.optim.SparseAdam):
        return [kind(table, **options), torch.optim.SGD(rest, lr=0.01)]
    return [kind([*table, *rest], **options)]


def learning_rate(step: int) -> float:
    return 0.02 * (1 + step % 4)


def train_replicas(
    rank: int, kind: Callable[..., Any], options: dict[str, Any], steps: int, world: int = 0
) -> list[np.ndarray]:
    """Train on the rows of this rank; or, with ``world``, on those of all ranks in one process."""
    model = Words()
    trained: nn.Module = model if world else DistributedDataParallel(model)
    all_optimizers = optimizers(model, kind, options)
    if options.get("sparse") == "exact":
        all_optimizers[0].attach(trained)
    for step in range(steps):
        for optimizer in all_optimizers:
            optimizer.zero_grad()
            optimizer.param_groups[0]["lr"] = learning_rate(step)
        if world:
            sum(trained(lookups(step, each)) / world for each in range(world)).backward()  # type: ignore[union-attr]
        else:
            trained(lookups(step, rank)).backward()
        for optimizer in all_optimizers:
            optimizer.step()
    if options.get("sparse") == "exact":
        all_optimizers[0].settle()
    return numbers(model)


CASES: list[tuple[Any, dict[str, Any]]] = [
    (SparseAdam, dict()),
    (AdamW, dict(sparse="touched", weight_decay=0.1)),
    (AdamW, dict(sparse="touched", weight_decay=0.1, max_norm=0.5, nonfinite="raise")),
    (AdamW, dict(sparse="touched", amsgrad=True, backend="eager")),
    (AdamW, dict(sparse="exact", weight_decay=0.1)),
    (AdamW, dict(sparse="exact", weight_decay=0.1, max_norm=0.5, backend="eager")),
    (Adagrad, dict()),
    (SGD, dict(momentum=0.9, weight_decay=0.1)),
]


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize(("kind", "options"), CASES, ids=lambda value: getattr(value, "__name__", str(value)))
def test_replicas_step_as_one_process(kind: Any, options: dict[str, Any], world: int) -> None:
    expected = train_replicas(0, kind, options, 12, world)
    for found in on_ranks(world, train_replicas, kind, options, 12):
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("ours", "theirs"), [(SparseAdam, torch.optim.SparseAdam), (Adagrad, torch.optim.Adagrad)], ids=str
)
def test_replicas_step_as_torch(ours: Any, theirs: Any) -> None:
    expected = train_replicas(0, theirs, {}, 12, 2)
    for found in on_ranks(2, train_replicas, ours, {}, 12):
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def test_exact_replicas_step_as_a_dense_optimizer() -> None:
    model = Words()
    model.table.sparse = False
    dense = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    for step in range(12):
        dense.zero_grad()
        dense.param_groups[0]["lr"] = learning_rate(step)
        sum(model(lookups(step, rank)) / 3 for rank in range(3)).backward()  # type: ignore[union-attr]
        dense.step()
    for found in on_ranks(3, train_replicas, AdamW, dict(sparse="exact", weight_decay=0.1), 12):
        for a, b in zip(found, numbers(model), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=12 * ALLOWED * 0.08)


# Replicas are equal bit for bit, whatever their ranks read.


STATE = ("step", "exp_avg", "exp_avg_sq", "row_step")  # not what ``state_dict`` adds on the ranks that call it


def everything(model: Words, optimizer: AdamW) -> dict[str, bytes]:
    """The bits of all parameters and of all state."""
    found = {name: param.detach().numpy().tobytes() for name, param in model.named_parameters()}
    for name, param in model.named_parameters():
        state = dict(optimizer.state[param])
        found |= {f"{name} {key}": state[key].numpy().tobytes() for key in STATE if key in state}
    return found


def read_elsewhere(step: int, rank: int, model: Words, optimizer: AdamW) -> None:
    """What programs do between steps on one rank, or on all of them with different data."""
    with torch.no_grad():
        model(lookups(900 + step, rank))  # evaluation
    if step % 7 == 3 and rank == 0:
        model.state_dict()  # to be saved
    if step % 5 == 2 and rank == 1:
        optimizer.state_dict()
    if step % 16 == 13:
        optimizer.settle()  # all ranks
        with optimizer.settled(), torch.no_grad():
            model.table.weight.clamp_(-3, 3)


def train_unevenly(rank: int, options: dict[str, Any], dtype: torch.dtype) -> list[dict[str, bytes]]:
    model = Words(dtype, padding_idx=2)
    trained = DistributedDataParallel(model)
    optimizer = AdamW(model.parameters(), sparse="exact", **{**OPTIONS, **options})
    optimizer.attach(trained)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    found = []
    for step in range(50):
        optimizer.zero_grad()
        for micro in range(3):
            with trained.no_sync() if micro < 2 else nullcontext():
                trained(lookups(step, rank, micro)).backward()
            if micro == 1:
                read_elsewhere(step, rank, model, optimizer)
        read_elsewhere(step + 3, rank, model, optimizer)
        if step == 30:
            optimizer.param_groups[0]["betas"] = (0.8, 0.99)
        optimizer.step()
        scheduler.step()
        found.append(everything(model, optimizer))
    optimizer.settle()
    return [*found, everything(model, optimizer)]


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        (dict(max_norm=1.0), torch.float32),
        (dict(max_norm=1.0, nonfinite="skip", backend="eager"), torch.float64),
        (dict(weight_decay=0.0), torch.float32),
    ],
    ids=str,
)
def test_replicas_are_equal_bit_for_bit(options: dict[str, Any], dtype: torch.dtype, world: int) -> None:
    first, *others = on_ranks(world, train_unevenly, options, dtype)
    for other in others:
        for step, (a, b) in enumerate(zip(first, other, strict=True)):
            assert a.keys() == b.keys()
            assert [name for name in a if a[name] != b[name]] == [], f"step {step}"


def read_between_steps(rank: int) -> float:
    """The largest error of what is read, in units of the learning rate."""
    models = Words(), Words()
    models[1].table.sparse = False
    trained = [DistributedDataParallel(model) for model in models]
    ours, theirs = (
        AdamW(models[0].parameters(), sparse="exact", **OPTIONS),
        torch.optim.AdamW(models[1].parameters(), **OPTIONS),
    )
    ours.attach(trained[0])
    worst = 0.0
    for step in range(40):
        for model, optimizer in zip(trained, (ours, theirs), strict=True):
            optimizer.zero_grad()
            model(lookups(step // 4, rank)).backward()
            optimizer.step()
        rows = torch.arange(rank, ROWS, 2 + step % 3)
        if step % 10 == 7:
            weight = models[0].state_dict()["table.weight"]
        else:
            weight = torch.zeros_like(models[0].table.weight)
            weight[rows] = models[0].table(rows).detach()
        worst = max(worst, float((weight - models[1].table.weight)[rows].detach().abs().max()))
    return worst / OPTIONS["lr"]


def test_what_one_rank_reads_is_up_to_date() -> None:
    """Errors of the rows' catching up add up over the steps in which they had gradients, ten at most."""
    assert max(on_ranks(2, read_between_steps)) < 10 * ALLOWED


def read_into_lazy_memory(rank: int) -> list[float]:
    """Reads of a rank leave no trace in the memory of rows that have never had a gradient."""
    model = nn.Embedding(50_000, 16, sparse=True)
    trained = DistributedDataParallel(model)
    optimizer = AdamW(model.parameters(), sparse="exact", state_pages="touched", **OPTIONS)
    optimizer.attach(trained)
    for step in range(3):
        optimizer.zero_grad()
        trained(torch.tensor([step + rank])).sum().backward()
        optimizer.step()
        before = model.weight.detach().clone()
        model.state_dict()
    return [float((model.weight - before)[100:].abs().max()), committed(optimizer.state[model.weight]["exp_avg"])]


def committed(tensor: Tensor) -> float:
    """The share of a tensor's pages that are in memory."""
    start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    with open("/proc/self/smaps", encoding="ascii") as maps:
        inside, total = False, 0
        for line in maps:
            head = line.split()[0]
            if "-" in head and not head.endswith(":"):
                low, high = (int(part, 16) for part in head.split("-"))
                inside = low < end and start < high
            elif inside and head == "Rss:":
                total += 1024 * int(line.split()[1])
    return total / tensor.nbytes


def test_reads_commit_no_memory() -> None:
    for moved, share in on_ranks(2, read_into_lazy_memory):
        assert moved > 0
        assert share < 0.5


# Attaching.


def step_with_rows_of_others(rank: int, how: str) -> str:
    model = Words()
    trained = DistributedDataParallel(model)
    optimizer = AdamW(model.parameters(), sparse="exact", **OPTIONS)
    optimizer.attach(
        {"wrapped": nn.Sequential(trained)}.get(how, model), **({"replicated": True} if how == "told" else {})
    )
    if how == "again":
        optimizer.attach(trained)
        optimizer.attach(model.table.weight)  # changes nothing
    if how == "parameter":
        optimizer.attach(model.table.weight, replicated=True)
    for rows in (torch.tensor([0, 1, 2, 3]), torch.tensor([4]), torch.tensor([rank])):
        optimizer.zero_grad()
        trained(rows).backward()
        before = model.table.weight.detach().clone()
        try:
            optimizer.step()
        except RuntimeError as error:
            assert torch.equal(before, model.table.weight)
            return str(error)
    return ""


def test_attach_finds_replicas() -> None:
    for how in ("wrapped", "told", "again", "parameter"):
        assert on_ranks(2, step_with_rows_of_others, how) == ["", ""]
    assert on_ranks(1, step_with_rows_of_others, "unwrapped") == [""]
    for rank, error in enumerate(on_ranks(2, step_with_rows_of_others, "unwrapped")):
        assert f"AdamW: row {1 - rank} of " in error
        assert "attach the DistributedDataParallel module, or call optimizer.attach(model, replicated=True)" in error


def attach_with_max_norm(rank: int) -> str:
    trained = DistributedDataParallel(nn.Embedding(3, 2, max_norm=1.0, sparse=True))
    try:
        AdamW(trained.parameters(), sparse="exact").attach(trained)
    except ValueError as error:
        return str(error)
    return ""


def test_replicas_are_not_scaled_by_their_embeddings() -> None:
    assert all("leave max_norm of the embedding out" in error for error in on_ranks(2, attach_with_max_norm))
    layer = nn.Embedding(3, 2, max_norm=1.0, sparse=True)
    AdamW(layer.parameters(), sparse="exact").attach(layer, replicated=False)


# Checkpoints.


def resume(rank: int, saved_by: int) -> list[dict[str, bytes]]:
    """Train, let one rank save, load it on all, and go on."""
    model = Words()
    trained = DistributedDataParallel(model)
    optimizer = AdamW(model.parameters(), sparse="exact", **OPTIONS)
    optimizer.attach(trained)
    found = []
    for step in range(24):
        optimizer.zero_grad()
        trained(lookups(step, rank)).backward()
        optimizer.step()
        if step == 11:
            file = io.BytesIO()
            if rank == saved_by:
                torch.save((trained.state_dict(), optimizer.state_dict()), file)
            content = [file.getvalue()]
            dist.broadcast_object_list(content, src=saved_by)
            model = Words()
            trained = DistributedDataParallel(model)
            optimizer = AdamW(model.parameters(), sparse="exact", **OPTIONS)
            optimizer.attach(trained)
            with torch.no_grad():
                trained(lookups(5, rank))
            weights, state = torch.load(io.BytesIO(content[0]), weights_only=True)
            trained.load_state_dict(weights)
            optimizer.load_state_dict(state)
        found.append(everything(model, optimizer))
    optimizer.settle()
    return [*found, everything(model, optimizer)]


def test_replicas_resume_equal() -> None:
    first, second = on_ranks(2, resume, 1)
    assert first == second


def load_in_the_middle(rank: int) -> list[dict[str, bytes]]:
    """What only one rank has read is not put back into weights that were loaded since."""
    model = Words()
    trained = DistributedDataParallel(model)
    optimizer = AdamW(model.parameters(), sparse="exact", **OPTIONS)
    optimizer.attach(trained)
    found = []
    for step in range(12):
        optimizer.zero_grad()
        trained(lookups(step, rank)).backward()
        optimizer.step()
        model.state_dict() if rank else model(lookups(50 + step, rank))
        if step == 7:
            optimizer.load_state_dict(optimizer.state_dict())
        if step == 9:
            trained.load_state_dict({f"module.{name}": value for name, value in Words().state_dict().items()})
            assert torch.equal(model.table.weight, Words().table.weight)
        if step in (7, 9):
            trained(lookups(50 + step, rank))
    optimizer.settle()
    found.append(everything(model, optimizer))
    return found


def test_loading_forgets_what_was_read() -> None:
    first, second = on_ranks(2, load_in_the_middle)
    assert first == second


# Row-sharded tables.


def local_sparse(grad: Tensor, first: int, count: int) -> Tensor:
    """The entries of a sparse gradient that name rows ``first`` and the next ``count - 1``."""
    rows, values = grad._indices()[0], grad._values()
    own = (rows >= first) & (rows < first + count)
    return torch.sparse_coo_tensor(
        rows[own][None] - first, values[own], (count, *grad.shape[1:]), check_invariants=False
    )


def sparse_grad(step: int) -> Tensor:
    """With duplicates, and in some steps without any entry in the first rows."""
    random = torch.Generator().manual_seed(step)
    rows = torch.randint(8 if step % 3 == 2 else 0, ROWS, (9,), generator=random)
    values = torch.randn((9, DIM), generator=random, dtype=torch.float64)
    return torch.sparse_coo_tensor(rows[None], values, (ROWS, DIM), check_invariants=False)


def whole_tables() -> list[Tensor]:
    return [nn.Parameter(table) for table in random_tables((ROWS, DIM), (5, 3))]


def train_whole(kind: Any, options: dict[str, Any], steps: int) -> list[np.ndarray]:
    table, dense = whole_tables()
    all_optimizers = _made(kind, [table], [dense], options)
    for step in range(steps):
        table.grad, dense.grad = sparse_grad(step), torch.full_like(dense, 0.1 * step)
        for optimizer in all_optimizers:
            optimizer.step()
    return [table.detach().numpy(), dense.detach().numpy()]


def _made(kind: Any, table: list[Tensor], dense: list[Tensor], options: dict[str, Any]) -> list[Any]:
    if kind in (SparseAdam, torch.optim.SparseAdam):
        return [kind(table, **options), SGD(dense, lr=0.01)]
    return [kind([*table, *dense], **options)]


def train_sharded(rank: int, kind: Any, options: dict[str, Any], steps: int, shape: tuple[int, ...]) -> Any:
    names = ("replicas", "rows")[-len(shape) :]
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    placements = [*[Replicate()] * (len(shape) - 1), Shard(0)]
    table, dense = (nn.Parameter(distribute_tensor(value.detach(), mesh, placements)) for value in whole_tables())
    count = table.to_local().shape[0]
    counts: list[int] = [0] * shape[-1]
    dist.all_gather_object(counts, count, group=mesh.get_group("rows"))
    first = sum(counts[: mesh.get_local_rank("rows")])
    all_optimizers = _made(kind, [table], [dense], options)
    for step in range(steps):
        local = local_sparse(sparse_grad(step), first, count)
        table.grad = DTensor(local, table._spec, requires_grad=False)
        dense.grad = distribute_tensor(torch.full((5, 3), 0.1 * step, dtype=torch.float64), mesh, placements)
        for optimizer in all_optimizers:
            optimizer.step()
    optimizer = all_optimizers[0]
    state = {name: value for name, value in dict(optimizer.state[table]).items() if name != "step"}
    assert all(value.placements == table.placements and value.shape == table.shape for value in state.values())
    return [table.full_tensor().detach().numpy(), dense.full_tensor().detach().numpy(), optimizer.grad_norm]


SHARDED: list[tuple[Any, dict[str, Any]]] = [
    (SparseAdam, dict()),
    (AdamW, dict(sparse="touched", weight_decay=0.1)),
    (AdamW, dict(sparse="touched", max_norm=0.5, nonfinite="raise")),
    (AdamW, dict(sparse="touched", max_norm=0.5, backend="eager")),
    (Adagrad, dict(max_norm=0.5)),
    (SGD, dict(lr=0.1, momentum=0.9, weight_decay=0.1)),
]


@pytest.mark.parametrize("shape", [(2,), (3,), (2, 2)], ids=str)
@pytest.mark.parametrize(("kind", "options"), SHARDED, ids=lambda value: getattr(value, "__name__", str(value)))
def test_row_shards_step_as_the_whole_table(kind: Any, options: dict[str, Any], shape: tuple[int, ...]) -> None:
    expected = train_whole(kind, options, 8)
    for *found, norm in on_ranks(int(np.prod(shape)), train_sharded, kind, options, 8, shape):
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)
        if "max_norm" in options:
            squares = float(sparse_grad(7).coalesce().values().square().sum()) + 15 * 0.7**2
            assert norm == pytest.approx(squares**0.5, rel=1e-13)


def test_row_shards_step_as_torch() -> None:
    expected = train_whole(torch.optim.SparseAdam, {}, 8)
    for found in on_ranks(3, train_sharded, SparseAdam, {}, 8, (3,)):
        np.testing.assert_allclose(found[0], expected[0], rtol=1e-12, atol=1e-12)


def some_without_gradient(rank: int) -> list[Any]:
    """One rank has no gradient at all, one has a NaN: none of them steps, then all of them do."""
    mesh = init_device_mesh("cpu", (2,))
    table = nn.Parameter(distribute_tensor(whole_tables()[0].detach(), mesh, [Shard(0)]))
    optimizer = AdamW([table], sparse="touched", nonfinite="skip")
    before = table.full_tensor().detach().clone()
    for bad in (True, False):
        if rank:
            value = torch.full((1, DIM), float("nan") if bad else 1.0, dtype=torch.float64)
            local = torch.sparse_coo_tensor(torch.tensor([[2]]), value, table.to_local().shape)
            table.grad = DTensor(local, table._spec, requires_grad=False)
        optimizer.step()
        if bad:
            assert torch.equal(table.full_tensor(), before)
    moved = (table.full_tensor() != before).any(1).nonzero().flatten().tolist()
    return [optimizer.skipped_steps, moved]


def test_ranks_without_entries_take_part() -> None:
    assert on_ranks(2, some_without_gradient) == [[1, [14]]] * 2


def refused(rank: int) -> list[str]:
    mesh = init_device_mesh("cpu", (2,))
    found = []
    for placements, grad_placements, sparse in (
        ([Shard(0)], [Shard(0)], "exact"),
        ([Replicate()], [Partial()], "touched"),
    ):
        table = nn.Parameter(distribute_tensor(whole_tables()[0].detach(), mesh, placements))
        optimizer = AdamW([table], sparse=sparse)
        local = sparse_grad(0) if sparse == "touched" else local_sparse(sparse_grad(0), 12 * rank, 12 - rank)
        spec = distribute_tensor(torch.zeros(ROWS, DIM, dtype=torch.float64), mesh, placements)._spec
        spec = type(spec)(spec.mesh, tuple(grad_placements), spec.tensor_meta)
        table.grad = DTensor(local, spec, requires_grad=False)
        before = table.full_tensor().detach().clone()
        try:
            optimizer.step()
        except RuntimeError as error:
            found.append(str(error))
        assert torch.equal(before, table.full_tensor())
    return found


def test_what_sharded_tables_cannot_do_is_an_error() -> None:
    for exact, partial in on_ranks(2, refused):
        assert exact.startswith("AdamW: sparse='exact' needs whole tables, but this rank updates only a part of ")
        assert partial.startswith("AdamW: param_groups[0]['params'][0] has a sparse gradient with placements (Partial")


def train_plain_shards(rank: int, options: dict[str, Any]) -> np.ndarray:
    """Sharding by hand: each rank's rows are a plain tensor, which is all that its optimizer knows."""
    whole = whole_tables()[0].detach()
    first, count = (0, 12) if rank == 0 else (12, ROWS - 12)
    layer = nn.Embedding.from_pretrained(whole[first : first + count].clone(), freeze=False, sparse=True)
    optimizer = AdamW(layer.parameters(), **options)
    if options["sparse"] == "exact":
        optimizer.attach(layer)
    for step in range(8):
        layer.weight.grad = None
        for rows, values in entries(step):
            own = rows[(rows >= first) & (rows < first + count)]
            (layer(own - first) * values[own]).sum().backward()
        optimizer.step()
    optimizer.settled().__enter__()
    return layer.weight.detach().numpy()


def entries(step: int) -> Iterator[tuple[Tensor, Tensor]]:
    grad = sparse_grad(step).coalesce()
    yield grad.indices()[0], grad.to_dense()


@pytest.mark.parametrize("sparse", ["touched", "exact"])
def test_plain_shards_step_as_the_whole_table(sparse: str) -> None:
    table = nn.Embedding.from_pretrained(whole_tables()[0].detach(), freeze=False, sparse=True)
    optimizer = AdamW(table.parameters(), sparse=sparse, **OPTIONS)
    if sparse == "exact":
        optimizer.attach(table)
    for step in range(8):
        table.weight.grad = None
        for rows, values in entries(step):
            (table(rows) * values[rows]).sum().backward()
        optimizer.step()
    optimizer.settle()
    found = np.concatenate(on_ranks(2, train_plain_shards, dict(sparse=sparse, **OPTIONS)))
    np.testing.assert_allclose(found, table.weight.detach().numpy(), rtol=1e-12, atol=1e-12)


# What the documentation says.


def run_documented(rank: int, blocks: list[str]) -> list[list[np.ndarray]]:
    """Train with the examples of docs/sparse.md: under DistributedDataParallel, then a row-sharded table."""
    torch.manual_seed(0)
    table = nn.Parameter(distribute_tensor(whole_tables()[0].detach(), init_device_mesh("cpu", (2,)), [Shard(0)]))
    names: dict[str, Any] = dict(descend=descend, torch=torch, DTensor=DTensor, net=Words(), table=table)
    names |= dict(DistributedDataParallel=DistributedDataParallel, loss_of=torch.sum)
    exec(blocks[0], names)
    for step in range(5):
        names["optimizer"].zero_grad()
        names["model"](lookups(step, rank)).backward()
        names["optimizer"].step()
    found = numbers(names["net"])
    names |= dict(indices=torch.tensor([12 * rank, 12 * rank + 1]), first_row=12 * rank)
    names["optimizer"] = AdamW([table], sparse="touched", lr=1.0, weight_decay=0.0)
    before = table.full_tensor().detach()
    exec(blocks[1], names)
    return [*found, (before - table.full_tensor().detach()).numpy()]


def test_documented_examples_run() -> None:
    section = (Path(__file__).parents[2] / "docs" / "sparse.md").read_text().split("## Across ranks")[1]
    blocks = re.findall(r"```py\n(.*?)```", section, re.DOTALL)
    first, second = on_ranks(2, run_documented, blocks)
    expected = np.zeros((ROWS, DIM))
    expected[[0, 1, 12, 13]] = 1
    np.testing.assert_allclose(first[-1], expected, atol=1e-6)
    assert all(map(np.array_equal, first, second))


# What travels.


def send(rank: int) -> tuple[int, int, bool]:
    model = nn.Embedding(10_000, 16, sparse=True)
    trained = DistributedDataParallel(model)
    sent = []

    def hook(state, bucket):
        buffer = bucket.buffer()
        sent.append(buffer)
        return dist.all_reduce(buffer, async_op=True).get_future().then(lambda future: future.value()[0])

    trained.register_comm_hook(None, hook)
    random = torch.Generator().manual_seed(rank)
    rows = torch.randint(10_000, (64,), generator=random)
    trained(rows.repeat(3)).sum().backward()
    grad = model.weight.grad
    assert grad is not None
    return len(sent), grad._nnz(), all(buffer.layout == torch.sparse_coo for buffer in [*sent, grad])


def test_only_touched_rows_travel() -> None:
    assert all(found[0] == 1 and found[1] <= 2 * 64 and found[2] for found in on_ranks(2, send))
