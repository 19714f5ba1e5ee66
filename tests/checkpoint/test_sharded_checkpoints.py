"""Checkpoints of sharded parameters: saved on some ranks, loaded on others, training goes on as one process would."""

from __future__ import annotations

import copy
import os
import pickle
import signal
import threading
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from cases import CASES, Case
from ranks import RankError, on_ranks
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from descend import AdamW, FirstOrder, Rprop, no_decay

BEFORE, AFTER = range(3), range(3, 6)  # steps before and after the checkpoint
EXACT = dict(rtol=1e-12, atol=1e-14)  # but for the order of the ranks' sums
ADAMW = Case(AdamW, torch.optim.AdamW, dict(lr=0.01, weight_decay=0.1, amsgrad=True))
WITH_STATE = [case for case in CASES if "lr" in case.options and case.options != CASES[0].options]


def plain_model() -> nn.Sequential:
    """Over 2, 3 and 4 ranks, parts are uneven or empty."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.LayerNorm(7), nn.Linear(7, 3)).double()


def wrapped(how: str = "fsdp") -> nn.Module:
    """The same model on the present ranks."""
    model, world = plain_model(), dist.get_world_size()
    if how == "fsdp":
        fully_shard(model[0])
        return fully_shard(model)
    if how == "hsdp":
        return fully_shard(model, mesh=init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicas", "shards")))
    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))
    columns, rows = ColwiseParallel(output_layouts=Replicate()), RowwiseParallel(input_layouts=Replicate())
    parallelize_module(model, mesh["tp"], {"3": rows} if how == "tp" else {"0": columns, "3": rows})
    return model if how == "tp" else fully_shard(model, mesh=mesh["dp"])


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: Iterable[int]) -> list[float]:
    """The losses. Every rank has the same batch, so that ranks do not change what is computed."""
    losses = []
    for step in steps:
        batch = torch.randn(4, 5, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        loss = model(batch).square().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def assert_as_one_process(model: nn.Module, optimizer: FirstOrder, straight: nn.Module, other: FirstOrder) -> None:
    """Parameters and all state are those of a single process."""
    for (name, param), expected in zip(model.named_parameters(), straight.parameters(), strict=True):
        torch.testing.assert_close(
            whole(param), expected.detach(), **EXACT, msg=lambda text, name=name: f"{name}: {text}"
        )
        state, wanted = optimizer.state[param], other.state[expected]
        assert list(state) == list(wanted)
        for key, value in wanted.items():
            assert isinstance(state[key], DTensor) == (isinstance(param, DTensor) and value.dim() > 0)
            torch.testing.assert_close(whole(state[key]), value, **EXACT)


def make(case: Case, model: nn.Module, named: bool = True, **changed: Any) -> FirstOrder:
    """An optimizer without decay for biases and norms; without names, of the same two groups."""
    options = {**case.options, **changed}
    if case.ours is Rprop:
        return case.ours(model, **options)
    if named:
        return case.ours(model, groups=no_decay(model), **options)
    matrices, others = (
        [param for param in model.parameters() if (param.dim() > 1) == is_2d] for is_2d in (True, False)
    )
    return case.ours([dict(params=matrices), dict(params=others, weight_decay=0.0)], **options)


def straight(case: Case, steps: Iterable[int]) -> tuple[nn.Module, FirstOrder]:
    model = plain_model()
    optimizer = make(case, model)
    train(model, optimizer, steps)
    return model, optimizer


def save(rank: int, folder: str, how: str, cases: list[Case], flatten: bool = False) -> None:
    for case in cases:
        model = wrapped(how)
        optimizer = make(case, model)
        train(model, optimizer, BEFORE)
        options = StateDictOptions(flatten_optimizer_state_dict=flatten)
        parts = get_model_state_dict(model), get_optimizer_state_dict(model, optimizer, options=options)
        dcp.save(dict(zip(("model", "optimizer"), parts, strict=True)), checkpoint_id=f"{folder}/{case}")


def load(folder: str, model: nn.Module, optimizer: FirstOrder, flatten: bool = False) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    into = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
    }
    dcp.load(into, checkpoint_id=folder)
    set_model_state_dict(model, into["model"])
    set_optimizer_state_dict(model, optimizer, into["optimizer"], options=options)


def assert_goes_on(rank: int, folders: list[str], how: str, cases: list[Case], flatten: bool = False) -> None:
    """On fresh optimizers, with and without ``init_state``, and on used ones; their options come from the file."""
    for case in cases:
        expected = straight(case, [*BEFORE, *AFTER])
        for index, folder in enumerate(folders):
            model = wrapped(how)
            optimizer = make(case, model, lr=0.5)
            if index % 3 == 1:
                optimizer.init_state()
            elif index % 3 == 2:
                train(model, optimizer, range(2))
            load(f"{folder}/{case}", model, optimizer, flatten)
            train(model, optimizer, AFTER)
            assert_as_one_process(model, optimizer, *expected)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Folders with the checkpoints of 1 to 4 ranks."""
    folders = [str(tmp_path_factory.mktemp(f"ranks{world}")) for world in range(1, 5)]
    for world, folder in enumerate(folders, 1):
        on_ranks(world, save, folder, "fsdp", WITH_STATE if world in (1, 3) else [ADAMW])
    return folders


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_any_number_of_ranks_goes_on_from_any_other(world: int, saved: list[str]) -> None:
    on_ranks(world, assert_goes_on, saved, "fsdp", [ADAMW])


def test_every_optimizer_goes_on_with_other_ranks(saved: list[str]) -> None:
    on_ranks(2, assert_goes_on, [saved[0], saved[2]], "fsdp", WITH_STATE)


def test_any_wrapping_goes_on_from_any_other(tmp_path: Path) -> None:
    for how in ("hsdp", "tp", "fsdp+tp"):
        on_ranks(4, save, str(tmp_path / how), how, [ADAMW], True)
    folders = [str(tmp_path / how) for how in ("hsdp", "tp", "fsdp+tp")]
    for world, how in ((4, "hsdp"), (4, "fsdp+tp"), (2, "tp"), (3, "fsdp")):
        on_ranks(world, assert_goes_on, folders, how, [ADAMW], True)


# Whole and sharded dictionaries in memory.

OPTIONS = [
    dict(),
    dict(flatten_optimizer_state_dict=True),
    dict(cpu_offload=True),
    dict(full_state_dict=True),
    dict(full_state_dict=True, cpu_offload=True, broadcast_from_rank0=True),
]


def with_frozen(model: nn.Module) -> nn.Module:
    model[2].requires_grad_(False)
    return model


def assert_goes_round(rank: int, case: Case, named: bool) -> None:
    expected = with_frozen(plain_model())
    going_on = make(case, expected, named)
    train(expected, going_on, [*BEFORE, *AFTER])
    for number, options in enumerate(OPTIONS):
        how = StateDictOptions(**options)
        first, second = (with_frozen(wrapped()) for _ in range(2))
        saving, loading = make(case, first, named), make(case, second, named, lr=0.5)
        train(first, saving, BEFORE)
        if number % 2:
            train(second, loading, range(2))  # a used optimizer
        taken = get_model_state_dict(first, options=how), get_optimizer_state_dict(first, saving, options=how)
        assert bool(taken[1]) == (rank == 0 or not options.get("broadcast_from_rank0"))
        set_model_state_dict(second, taken[0], options=how)
        set_optimizer_state_dict(second, loading, taken[1], options=how)
        train(second, loading, AFTER)
        assert_as_one_process(second, loading, expected, going_on)


@pytest.mark.parametrize("named", [True, False], ids=["named", "unnamed"])
@pytest.mark.parametrize("world", [2, 3])
def test_dictionaries_of_every_kind_go_round(world: int, named: bool) -> None:
    on_ranks(world, assert_goes_round, ADAMW, named)


def assert_takes_files_of_one_process(rank: int) -> None:
    for theirs in (torch.optim.AdamW, AdamW):
        model, expected = wrapped(), plain_model()
        options = dict(lr=0.01, weight_decay=0.1)
        single = theirs(expected.named_parameters(), **options)
        train(expected, single, BEFORE)
        sharded = AdamW(model, **options)
        saved = single.state_dict()
        sharded.load_state_dict(saved)
        set_model_state_dict(model, expected.state_dict(), options=StateDictOptions(full_state_dict=True))
        going_on = AdamW(expected, **options)
        going_on.load_state_dict(saved)
        train(model, sharded, AFTER)
        train(expected, going_on, AFTER)
        assert_as_one_process(model, sharded, expected, going_on)


def test_each_rank_takes_its_part_of_the_file_of_one_process() -> None:
    on_ranks(3, assert_takes_files_of_one_process)


# load_state_dict itself: other layouts, copies, errors.


def sharded(placement: Any = None, mesh: Any = None, rows: int = 5) -> tuple[nn.Parameter, AdamW]:
    values = torch.arange(rows * 3, dtype=torch.float64).reshape(rows, 3)
    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
    param = nn.Parameter(distribute_tensor(values, mesh, [placement or Shard(0)]))
    optimizer = AdamW([("weight", param)], lr=0.1)
    param.grad = param.detach() + 1
    optimizer.step()
    return param, optimizer


def assert_other_layouts_are_redistributed(rank: int) -> None:
    for here, saved in ((Shard(0), Shard(1)), (Shard(0), Replicate()), (Replicate(), Shard(1))):
        param, optimizer = sharded(here)
        other, saving = sharded(saved)
        saving.step()
        optimizer.load_state_dict(saving.state_dict())
        state, wanted = optimizer.state[param], saving.state[other]
        assert state["exp_avg"].placements == (here,)
        assert all(torch.equal(whole(state[name]), whole(wanted[name])) for name in wanted)
        optimizer.step()


def test_state_of_other_placements_is_redistributed() -> None:
    on_ranks(3, assert_other_layouts_are_redistributed)


def assert_refused(optimizer: FirstOrder, saved: dict[str, Any], message: str) -> None:
    before = [value.to_local() if isinstance(value, DTensor) else value for value in state_tensors(optimizer)]
    copies = [value.clone() for value in before]
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    after = [value.to_local() if isinstance(value, DTensor) else value for value in state_tensors(optimizer)]
    assert all(map(torch.equal, after, copies))


def state_tensors(optimizer: FirstOrder) -> list[Tensor]:
    return [value for state in optimizer.state.values() for value in state.values()]


def assert_misfits_are_named(rank: int) -> None:
    world = dist.get_world_size()
    _, optimizer = sharded()
    square = init_device_mesh("cpu", (1, world))
    other = nn.Parameter(distribute_tensor(torch.zeros(5, 3, dtype=torch.float64), square, [Replicate(), Shard(0)]))
    saving = AdamW([("weight", other)])
    saving.init_state()
    assert_refused(
        optimizer,
        saving.state_dict(),
        rf"exp_avg of weight has placements \(Replicate\(\), Shard\(dim=0\)\) on a mesh of shape \(1, {world}\), "
        rf"the parameter placements \(Shard\(dim=0\),\) on a mesh of shape \({world},\)\. Save it with",
    )
    plain = nn.Parameter(torch.zeros(5, 3, dtype=torch.float64))
    alone = AdamW([("weight", plain)])
    assert_refused(alone, optimizer.state_dict(), r"has placements .* the parameter a plain tensor\. Save it")
    _, longer = sharded(rows=6)
    assert_refused(optimizer, longer.state_dict(), r"exp_avg of weight has shape \(6, 3\), expected \(5, 3\)\.")
    assert optimizer.load_state_dict(longer.state_dict(), strict=False) == (["weight"], ["weight"])
    good, lost, negative = optimizer.state_dict(), torch.zeros(5, 3), torch.zeros(5, 3)
    lost.untyped_storage().resize_(0)
    negative[4] = -1.0  # a row of the last rank; every rank raises
    for name, value, message in (
        ("exp_avg_sq", negative, r"must be >= 0, got -1\.0\."),
        ("exp_avg", lost, "has no value"),
    ):
        bad = {**good, "state": {0: {**good["state"][0], name: value}}}
        assert_refused(optimizer, bad, f"loaded {name} of weight {message}")


def test_state_that_does_not_fit_is_an_error_and_nothing_changes() -> None:
    on_ranks(2, assert_misfits_are_named)


def assert_state_is_copied(rank: int) -> None:
    param, optimizer = sharded()
    saved = optimizer.state_dict()
    for wide in (
        saved,
        {**saved, "state": {0: {k: v.full_tensor() if v.dim() else v for k, v in saved["state"][0].items()}}},
    ):
        for asked in (None, torch.float32):
            copy = AdamW([("weight", param)], state_dtype=asked)
            with nullcontext() if asked is None else pytest.warns(UserWarning, match="float64 -> float32"):
                copy.load_state_dict(wide)
            for name in ("exp_avg", "exp_avg_sq"):
                mine, its = copy.state[param][name], wide["state"][0][name]
                local = its.to_local() if isinstance(its, DTensor) else its
                assert mine.dtype == (asked or torch.float64)
                assert mine.to_local().untyped_storage().data_ptr() != local.untyped_storage().data_ptr()
                assert torch.equal(whole(mine), whole(its).to(mine.dtype))
    narrow = {**saved, "state": {0: {key: value.float() for key, value in saved["state"][0].items()}}}
    optimizer.load_state_dict(narrow)
    loaded = optimizer.state[param]["exp_avg"]
    assert loaded.dtype == loaded.to_local().dtype == torch.float64
    assert torch.equal(whole(loaded), whole(narrow["state"][0]["exp_avg"]).double())
    assert_codes_go_round()


def assert_codes_go_round() -> None:
    """State in 8 bits goes from any layout to any other, and to and from float32."""
    mesh, random = init_device_mesh("cpu", (dist.get_world_size(),)), torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=random) for shape in ((33, 150), (9000,))]

    def made(placement: Any = None, state_dtype: Any = "8bit") -> AdamW:
        params = [
            value.clone() if placement is None else distribute_tensor(value, mesh, [placement]) for value in values
        ]
        return AdamW([nn.Parameter(param) for param in params], state_dtype=state_dtype, backend="eager")

    plain = made()
    for param, value in zip(plain.param_groups[0]["params"], values, strict=True):
        param.grad = value.cos()
    plain.step()
    decoded = made(state_dtype=torch.float32)
    decoded.load_state_dict(plain.state_dict())
    saved = {"plain": plain.state_dict(), "decoded": decoded.state_dict()}
    for placement in (Replicate(), Shard(0)):
        sharded = made(placement)
        sharded.load_state_dict(saved["plain"])
        saved[str(placement)] = sharded.state_dict()
    for source in saved.values():
        for placement in (Shard(0), Replicate(), None):
            if placement is None and isinstance(source["state"][0]["exp_avg"], DTensor):
                continue
            for asked, expected in (("8bit", plain), (torch.float32, decoded)):
                optimizer = made(placement, asked)
                optimizer.load_state_dict(source)  # loses nothing, so warns of nothing
                for index, content in enumerate(optimizer.state.values()):
                    # One-dimensional codes could have a block on two ranks.
                    its = decoded if index and placement is not None else expected
                    for name, value in its.state_dict()["state"][index].items():
                        assert torch.equal(whole(content[name]), value)
    good = saved[str(Shard(0))]["state"]
    scale = good[0]["exp_avg_scale"]
    for bad, asked, message in (
        (-scale, "8bit", "exp_avg_scale must be >= 0, got -"),
        (-scale, torch.float32, "exp_avg_scale must be >= 0, got -"),
        (whole(scale), torch.float32, "has placements .*, and its scales a plain tensor"),
    ):
        damaged = {**saved["plain"], "state": {**good, 0: {**good[0], "exp_avg_scale": bad}}}
        with pytest.raises(ValueError, match=message):
            made(Shard(0), asked).load_state_dict(damaged)


def test_loaded_parts_are_copies_in_the_format_that_is_asked_for() -> None:
    on_ranks(2, assert_state_is_copied)


def assert_copies_go_on(rank: int, folder: str) -> None:
    def twin() -> tuple[nn.Parameter, AdamW]:
        param, optimizer = sharded(rows=8)
        optimizer.step()
        return param, optimizer

    _, straight = twin()
    straight.step()
    wanted = [whole(value) for value in state_tensors(straight)]

    _, optimizer = twin()
    torch.save(optimizer.state_dict(), f"{folder}/{rank}")  # a file a rank, for as many ranks
    param, loading = sharded(rows=8)
    set_as(param, optimizer)
    loading.load_state_dict(torch.load(f"{folder}/{rank}", weights_only=True))
    copies = [loading, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
    _, exact = twin()
    exact.sparse = "exact"  # whose zeros are copied lazily
    copies.append(copy.deepcopy(exact))
    copies[-1].sparse = None
    for each in copies:
        param = each.param_groups[0]["params"][0]
        assert isinstance(param, DTensor)
        param.grad = straight.param_groups[0]["params"][0].grad
        each.step()
        assert all(map(torch.equal, map(whole, state_tensors(each)), wanted))


def set_as(param: nn.Parameter, optimizer: FirstOrder) -> None:
    with torch.no_grad():
        param.copy_(optimizer.param_groups[0]["params"][0])


@pytest.mark.parametrize("world", [1, 2])
def test_copies_pickles_and_files_of_a_rank_go_on(world: int, tmp_path: Path) -> None:
    on_ranks(world, assert_copies_go_on, str(tmp_path))


def assert_new_layer_starts_anew(rank: int) -> None:
    first, second = wrapped(), plain_model().append(nn.Linear(3, 3).double())
    fully_shard(second)
    saving, loading = AdamW(first), AdamW(second)
    train(first, saving, BEFORE)
    taken = get_optimizer_state_dict(first, saving)
    set_optimizer_state_dict(second, loading, taken, options=StateDictOptions(strict=False))
    train(second, loading, range(1))
    assert [int(loading.state[param]["step"]) for param in second.parameters()] == [4] * 6 + [1] * 2


def test_not_strict_loading_leaves_new_layers_alone() -> None:
    on_ranks(3, assert_new_layer_starts_anew)


def assert_new_head_keeps_its_state(rank: int) -> None:
    first = wrapped()
    saving = AdamW(first)
    train(first, saving, BEFORE)
    second = plain_model()
    second[3] = nn.Linear(7, 2).double()
    fully_shard(second)
    loading = AdamW(second)
    missing, unexpected = loading.load_state_dict(saving.state_dict(), strict=False)
    assert missing == unexpected == ["3.weight", "3.bias"]
    train(second, loading, BEFORE)
    assert [int(loading.state[param]["step"]) for param in second.parameters()] == [6] * 4 + [3] * 2


def test_a_part_of_a_sharded_dictionary_can_be_loaded() -> None:
    on_ranks(3, assert_new_head_keeps_its_state)


# Saving while training goes on, and being killed.


def assert_saves_the_state_of_the_call(rank: int, folder: str, through_writer: bool) -> None:
    may_write, write = threading.Event(), dcp.FileSystemWriter.write_data

    def write_later(*args: Any) -> Any:
        assert may_write.wait(30)
        return write(*args)

    background = dist.new_group(backend="gloo")
    path = f"{folder}/{ADAMW}"
    where = dict(storage_writer=dcp.FileSystemWriter(path)) if through_writer else dict(checkpoint_id=path)
    model = wrapped()
    optimizer = make(ADAMW, model)
    train(model, optimizer, BEFORE)
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dcp.FileSystemWriter, "write_data", write_later)
        saving = dcp.async_save(state, process_group=background, **where)
        train(model, optimizer, AFTER)
        assert not saving.done()
        may_write.set()
        saving.result()
    assert_as_one_process(model, optimizer, *straight(ADAMW, [*BEFORE, *AFTER]))
    assert_goes_on(rank, [folder], "fsdp", [ADAMW])


@pytest.mark.parametrize("through_writer", [False, True], ids=["checkpoint_id", "storage_writer"])
def test_asynchronous_save_has_the_state_of_its_call(through_writer: bool, tmp_path: Path) -> None:
    on_ranks(2, assert_saves_the_state_of_the_call, str(tmp_path), through_writer)


class KilledWriter(dcp.FileSystemWriter):
    """Writes this rank's data; then the last rank is killed."""

    def write_data(self, *args: Any, **kwargs: Any) -> Any:
        written = super().write_data(*args, **kwargs)
        written.wait()
        if dist.get_rank() == dist.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return written


def be_killed(rank: int, folder: str) -> None:
    model = wrapped()
    optimizer = make(ADAMW, model)
    for number in range(2):
        train(model, optimizer, [number])
        state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
        writer = (KilledWriter if number else dcp.FileSystemWriter)(f"{folder}/{number}")
        dcp.save(state, storage_writer=writer)


def restart(rank: int, folder: str) -> list[float]:
    model = wrapped()
    optimizer = make(ADAMW, model)
    with pytest.raises(dcp.api.CheckpointException):
        load(f"{folder}/1", model, optimizer)
    load(f"{folder}/0", model, optimizer)
    return train(model, optimizer, range(1, 6))


def test_killed_while_saving_fewer_ranks_continue_the_curve(tmp_path: Path) -> None:
    with pytest.raises(RankError, match=r"rank \d of 3"):
        on_ranks(3, be_killed, str(tmp_path), timeout=10)
    assert [path.suffix for path in (tmp_path / "1").iterdir()].count(".distcp") > 0  # data without metadata
    model = plain_model()
    curve = train(model, make(ADAMW, model), range(6))
    for losses in on_ranks(2, restart, str(tmp_path)):
        assert losses == pytest.approx(curve[1:], rel=1e-12)
