"""State in 8 bits and rounded bfloat16 on several ranks: the bits of one process."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import on_ranks
from sharded import local, place, whole
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor, Replicate, Shard, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from descend import AdamW

# On two ranks: parts of 9 and 8 rows; a rank without any; a second dimension that would balance better.
SHAPES = {"wide": (17, 300), "single": (1, 5000), "deep": (9, 16, 32), "long": (5000,), "short": (3,)}
FORMATS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "8bit": (torch.float32, dict(state_dtype="8bit")),
    "stochastic": (torch.bfloat16, dict(state_dtype="8bit", rounding="stochastic", rounding_seed=7)),
    "compensated": (torch.bfloat16, dict(rounding="compensated")),
}
SKIPPED = 1  # a step with a gradient that is not finite

Put = Callable[[Tensor], Tensor]


class Module(nn.Module):
    """Parameters of a dtype, with the same numbers everywhere."""

    def __init__(self, put: Put, dtype: torch.dtype) -> None:
        super().__init__()
        for seed, (name, shape) in enumerate(SHAPES.items()):
            self.register_parameter(name, nn.Parameter(put(numbers(shape, seed).to(dtype))))


def numbers(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def made(put: Put, how: str, **options: Any) -> tuple[Module, AdamW]:
    dtype, own = FORMATS[how]
    module = Module(put, dtype)
    # State of one dimension is coded if it is whole, and not if it is sharded. A set has another order on each rank.
    exact = {"long", "short"} if how != "compensated" else None
    backend = "auto" if how == "stochastic" else "eager"
    return module, AdamW(
        module.named_parameters(), lr=0.01, nonfinite="skip", backend=backend, float32_state=exact, **own, **options
    )


def train(module: Module, optimizer: AdamW, put: Put, seeds: range) -> None:
    for seed in seeds:
        for index, param in enumerate(module.parameters()):
            grad = numbers(tuple(param.shape), 100 + 10 * seed + index).to(param.dtype)
            if seed == SKIPPED and index == 0:
                grad[16, 299] = torch.inf  # on the last rank
            param.grad = put(grad)
        optimizer.step()


def plain(tensor: Tensor) -> Tensor:
    return tensor.clone()


@cache
def straight(how: str, steps: int) -> tuple[Module, AdamW]:
    """A run in one process."""
    module, optimizer = made(plain, how)
    train(module, optimizer, plain, range(steps))
    return module, optimizer


def differences(module: Module, optimizer: AdamW, expected: tuple[Module, AdamW]) -> list[str]:
    """Names of what is not, bit for bit, as in one process; a collective."""
    found = []
    state = optimizer.consolidated_state_dict()
    for index, (name, other) in enumerate(expected[0].named_parameters()):
        if not torch.equal(whole(getattr(module, name)), other):
            found.append(name)
        if state is not None:
            theirs = expected[1].state[other]
            if list(state["state"][index]) != list(theirs):
                found.append(f"{name}: {list(state['state'][index])}, expected {list(theirs)}")
            found += [
                f"{key} of {name}"
                for key, value in state["state"][index].items()
                if value.dtype != theirs[key].dtype or not torch.equal(value, theirs[key])
            ]
    return found


# On two ranks.


def on_two(rank: int, folder: Path) -> dict[str, Any]:
    line, square = init_device_mesh("cpu", (2,)), init_device_mesh("cpu", (2, 1))
    puts: dict[str, tuple[Put, dict[str, Any]]] = {
        "rows": (lambda tensor: place(tensor, line, Shard(0)), {}),
        "replicas of rows": (lambda tensor: place(tensor, square, Replicate(), Shard(0)), {}),
        "shard_state": (plain, dict(shard_state=dist.group.WORLD)),
    }
    found: dict[str, Any] = {}
    for how in FORMATS:
        expected = straight(how, 3)
        for layout, (put, options) in puts.items():
            module, optimizer = made(put, how, **options)
            train(module, optimizer, put, range(3))
            found[f"{how}, {layout}"] = differences(module, optimizer, expected)
            assert optimizer.skipped_steps == 1
            sharded = [t for state in optimizer.state.values() for name, t in state.items() if name != "step"]
            assert all(isinstance(tensor, DTensor) for tensor in sharded)
            if layout != "replicas of rows":
                save(module, optimizer, folder / f"{how}, {layout}")
    found["touched rows"] = touched_rows()
    found["whole state"] = whole_state_dict(puts["rows"][0])
    found["columns"] = columns(line)
    found["data parallel"] = data_parallel(rank)
    return found


def save(module: Module, optimizer: AdamW, folder: Path) -> None:
    parts = {"model": module.state_dict(), "optimizer": get_optimizer_state_dict(module, optimizer)}
    dcp.save(parts, checkpoint_id=folder)


def touched_rows() -> list[str]:
    """Sparse gradients of a table that is cut into rows."""

    def stepped(**options: Any) -> tuple[Tensor, AdamW]:
        table = nn.Parameter(numbers((41, 300), 0).bfloat16())
        optimizer = AdamW([table], lr=0.01, sparse="touched", backend="eager", **FORMATS["stochastic"][1], **options)
        for seed in range(2):
            rows = torch.randint(41, (1, 9), generator=torch.Generator().manual_seed(seed))
            table.grad = torch.sparse_coo_tensor(
                rows, numbers((9, 300), seed).bfloat16(), (41, 300), check_invariants=False
            )
            optimizer.step()
        return table, optimizer

    (table, optimizer), (reference, other) = stepped(shard_state=dist.group.WORLD), stepped()
    state = {name: whole(tensor) for name, tensor in optimizer.state[table].items()}
    expected = {"table": reference, **other.state[reference]}
    return [name for name, tensor in {"table": table, **state}.items() if not torch.equal(tensor, expected[name])]


def whole_state_dict(put: Put) -> list[str]:
    """Codes and scales in torch's dictionaries of whole state."""
    how, options = "8bit", StateDictOptions(full_state_dict=True)
    (module, optimizer), (other, loading) = made(put, how), made(put, how)
    train(module, optimizer, put, range(1))
    taken = get_optimizer_state_dict(module, optimizer, options=options)
    assert "DTensor" not in str(taken)
    other.load_state_dict(module.state_dict())
    set_optimizer_state_dict(other, loading, taken, options=options)
    train(other, loading, put, range(1, 3))
    return differences(other, loading, straight(how, 3))


def columns(mesh: Any) -> list[bool]:
    """State of columns is coded where blocks stay whole, and refused where they do not."""

    def stepped(put: Put, width: int, **options: Any) -> tuple[Tensor, AdamW]:
        param = nn.Parameter(put(numbers((8, width), 0)))
        param.grad = put(numbers((8, width), 1))
        optimizer = AdamW([("weight", param)], lr=0.01, state_dtype="8bit", backend="eager", **options)
        optimizer.step()
        return param, optimizer

    def put(tensor: Tensor) -> Tensor:
        return place(tensor, mesh, Shard(1))

    (param, optimizer), (reference, other) = stepped(put, 1024), stepped(plain, 1024)
    scale = optimizer.state[param]["exp_avg_scale"]
    is_same = [
        torch.equal(whole(param), reference),
        torch.equal(whole(scale), other.state[reference]["exp_avg_scale"]),
        local(scale).shape == (8, 2),
    ]
    refusal = r"AdamW: exp_avg of weight .*Shard\(dim=1\).*float32_state.*shard the first dimension.*Nothing has moved"
    with pytest.raises(RuntimeError, match=refusal):
        stepped(put, 1000)
    with pytest.raises(RuntimeError, match=refusal):
        AdamW([("weight", nn.Parameter(put(numbers((8, 1000), 0))))], state_dtype="8bit").init_state()
    param, optimizer = stepped(put, 1000, float32_state="weight")
    single = nn.Parameter(place(torch.zeros(5000), mesh, Shard(0)))
    vectors = AdamW([single], state_dtype="8bit")
    vectors.init_state()
    dtypes = optimizer.state[param]["exp_avg"].dtype, vectors.state[single]["exp_avg"].dtype
    return [*is_same, dtypes == (torch.float32, torch.float32)]


def data_parallel(rank: int) -> list[bytes]:
    """Parameters and state of replicas, each of which has seen other data."""
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(80, 64, dtype=torch.bfloat16))
    optimizer = AdamW(model.parameters(), lr=0.01, backend="eager", **FORMATS["stochastic"][1])
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(4, 80, generator=torch.Generator().manual_seed(rank)).bfloat16()).square().mean().backward()
        optimizer.step()
    tensors = [*model.parameters(), *(value for state in optimizer.state.values() for value in state.values())]
    return [tensor.detach().view(-1).view(torch.uint8).numpy().tobytes() for tensor in tensors]


# On three, and on one without a process group.


def go_on(put: Put, folder: Path, **options: Any) -> list[str]:
    how = folder.name.split(", ")[0]
    module, optimizer = made(put, how, **options)
    optimizer.init_state()
    into = {"model": module.state_dict(), "optimizer": get_optimizer_state_dict(module, optimizer)}
    dcp.load(into, checkpoint_id=folder)
    set_optimizer_state_dict(module, optimizer, into["optimizer"])
    train(module, optimizer, put, range(3, 5))
    return differences(module, optimizer, straight(how, 5))


def on_three(rank: int, folder: Path) -> dict[str, list[str]]:
    mesh = init_device_mesh("cpu", (3,))
    found = {}
    for saved in sorted(folder.iterdir()):
        if saved.name.endswith("rows"):
            found[saved.name] = go_on(lambda tensor: place(tensor, mesh, Shard(0)), saved)
        else:
            found[saved.name] = go_on(plain, saved, shard_state=mesh)
    return found


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_formats_on_ranks_are_those_of_one_process(tmp_path: Path) -> None:
    straight("stochastic", 3)  # compiles what the ranks then find on disk
    first, second = on_ranks(2, on_two, tmp_path)
    assert first.pop("data parallel") == second.pop("data parallel")
    assert first.pop("columns") == second.pop("columns") == [True] * 4
    assert first == second == {name: [] for name in first}
    names = [path.name for path in tmp_path.iterdir()]
    assert len(names) == 6
    assert on_ranks(3, on_three, tmp_path) == [{name: [] for name in names}] * 3
    for how in FORMATS:
        assert go_on(plain, tmp_path / f"{how}, rows") == []
