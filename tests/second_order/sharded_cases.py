"""Problems on one process and on several ranks, and what came of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import descend
from descend.distributed.dtensors import is_dtensor
from descend.second_order.problem.shared_space import full_of

ROWS = 24  # of data: as many for each of 1, 2, 3 or 4 ranks


class Net(nn.Module):
    """Two layers; 2, 3 and 4 ranks divide some of their sizes, but not all."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 8, dtype=torch.float64)
        self.second = nn.Linear(8, 3, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def make_net() -> Net:
    torch.manual_seed(3)
    return Net()


def make_data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(ROWS, 5, generator=generator, dtype=torch.float64)
    return x, torch.sin(x[:, :3]) + 0.1 * torch.randn(ROWS, 3, generator=generator, dtype=torch.float64)


# How a model lies on the ranks, and which mesh divides the data.


def wrap_fsdp(model: Net) -> DeviceMesh:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model, mesh=mesh)
    return mesh


def wrap_hsdp(model: Net) -> DeviceMesh:
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicate", "shard"))
    fully_shard(model.first, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return mesh


def wrap_tp(model: Net) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parallelize_module(model, mesh, {"first": ColwiseParallel(), "second": RowwiseParallel()})


def wrap_fsdp_tp(model: Net) -> DeviceMesh:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    parallelize_module(model, mesh["tp"], {"first": ColwiseParallel(), "second": RowwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    return mesh["dp"]


def wrap_fsdp_of_one(model: Net) -> DeviceMesh:
    """One layer is sharded over all ranks; the other stays plain, with the same gradient on each."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model.first, mesh=mesh)
    for param in model.second.parameters():
        param.register_hook(_mean)
    return mesh


def _mean(grad: Tensor) -> Tensor:
    grad = grad.clone()
    dist.all_reduce(grad)
    return grad / dist.get_world_size()


WRAPPINGS: dict[str, Callable[[Net], DeviceMesh | None]] = {
    "fsdp": wrap_fsdp,
    "hsdp": wrap_hsdp,
    "tp": wrap_tp,
    "fsdp x tp": wrap_fsdp_tp,
    "mixed": wrap_fsdp_of_one,
}


class Fit(NamedTuple):
    """What came of a problem, as far as every rank must agree about it.

    Attributes:
        counts: status, iterations, evaluations and products, of each call of ``step``.
        value, grad_norm: at the end.
        params: whole parameters as one vector.
    """

    counts: list[Any]
    value: float
    grad_norm: float
    params: Tensor


def fit_of(results: Iterable[Any], params: Iterable[Tensor]) -> Fit:
    results = list(results)
    counts = [(str(r.status), r.n_iter, r.n_eval, r.n_hvp) for r in results]
    flat = torch.cat([full_of(param.detach()).reshape(-1) for param in params])
    return Fit(counts, results[-1].fun, results[-1].grad_norm, flat)


def problem(wrapping: str | None, rank: int = 0) -> tuple[Net, Callable[[], Tensor]]:
    """A model, wrapped unless ``wrapping`` is None, and its loss on this rank's data."""
    model, (x, y) = make_net(), make_data()
    mesh = WRAPPINGS[wrapping](model) if wrapping is not None else None
    if mesh is not None:
        part = rank if mesh.size() == dist.get_world_size() else mesh.get_local_rank()
        x, y = x.tensor_split(mesh.size())[part], y.tensor_split(mesh.size())[part]
    return model, lambda: (model(x) - y).square().mean()


def fit_lbfgs(wrapping: str | None, options: dict[str, Any], n_steps: int = 2, rank: int = 0) -> Fit:
    model, loss = problem(wrapping, rank)
    optimizer = descend.LBFGS(model.named_parameters(), tolerance_grad=1e-9, tolerance_change=1e-14, **options)
    results = []
    for _ in range(n_steps):
        optimizer.step(loss)
        results.append(optimizer.result)
    return fit_of(results, model.parameters())


def fit_model(wrapping: str | None, options: dict[str, Any], rank: int = 0) -> Fit:
    model, loss = problem(wrapping, rank)
    return fit_of([descend.minimize(lambda _: loss(), model, **options)], model.parameters())


# A function of tensors.

PLACEMENTS = {
    1: {"a": [Shard(0)], "b": [Replicate()]},
    2: {"a": [Shard(1)], "b": [Replicate()]},
    3: {"a": [Shard(0)], "b": [Shard(0)]},
    4: {"a": [Shard(0), Shard(1)], "b": [Replicate(), Shard(0)]},
}


def make_start() -> dict[str, Tensor]:
    """c stays plain; with 3 and 4 ranks some hold nothing of b."""
    generator = torch.Generator().manual_seed(0)
    sizes: dict[str, tuple[int, ...]] = {"a": (7, 3), "b": (2,), "c": (5,)}
    return {name: torch.randn(size, generator=generator, dtype=torch.float64) for name, size in sizes.items()}


def distributed(start: dict[str, Tensor]) -> dict[str, Tensor]:
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (2, 2) if world == 4 else (world,))
    placements = PLACEMENTS[world]
    return {
        name: distribute_tensor(tensor, mesh, placements[name]) if name in placements else tensor
        for name, tensor in start.items()
    }


def quartic(p: dict[str, Tensor]) -> Tensor:
    sharded = (
        ((p["a"] - 0.3) ** 4).sum() + 1.5 * (p["a"] ** 2).sum() + 10 * (torch.cosh(p["b"] - p["a"].mean()) - 1).sum()
    )
    return full_of(sharded) + 2 * torch.cosh(p["c"] - 0.5).sum()


def minimize_quartic(start: dict[str, Tensor], options: dict[str, Any]) -> Fit:
    result = descend.minimize(quartic, start, **options)
    assert [type(result.x[name]) for name in start] == [type(tensor) for tensor in start.values()]
    assert [type(result.grad[name]) for name in start] == [type(tensor) for tensor in start.values()]
    assert not any(tensor.requires_grad for tensor in result.x.values())
    return fit_of([result], [result.x[name] for name in start])


# Runs that stop and go on.


def optimizer_of(model: Net, kind: str) -> descend.LBFGS | descend.Newton:
    if kind == "newton":
        return descend.Newton(model.named_parameters(), max_iter=4, solver="cg")
    options: dict[str, Any] = dict(max_iter=5, tolerance_grad=1e-9, tolerance_change=1e-14, history_size=4)
    options |= dict(bounds=(-0.4, 0.4), line_search_fn="hager_zhang") if kind == "bounds" else dict(line_search_fn=kind)
    return descend.LBFGS(model.named_parameters(), **options)


def run_on(wrapping: str | None, kind: str, saved: Any = None, n_steps: int = 1, rank: int = 0) -> tuple[Fit, Any]:
    """Take steps, from a checkpoint if there is one; return a checkpoint of whole tensors."""
    model, loss = problem(wrapping, rank)
    optimizer = optimizer_of(model, kind)
    if saved is not None:
        with torch.no_grad():
            for param, whole in zip(model.parameters(), saved["params"], strict=True):
                part = distribute_tensor(whole, param.device_mesh, param.placements) if is_dtensor(param) else whole
                param.copy_(part)
        optimizer.load_state_dict(saved["optimizer"])
    results = []
    for _ in range(n_steps):
        optimizer.step(loss)
        results.append(optimizer.result)
    params = [full_of(param.detach()) for param in model.parameters()]
    return fit_of(results, model.parameters()), {"params": params, "optimizer": optimizer.state_dict()}
