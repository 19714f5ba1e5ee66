"""Attaching an optimizer to a model, copies of the model, and what a step refuses since rows were read too early."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import BACKENDS
from exact_cases import (
    ALLOWED,
    LR,
    OPTIONS,
    ExactTwins,
    TiedEmbeddings,
    assert_current,
    assert_unmoved,
    embedding,
    embedding_behind,
    exact_adamw,
    random_tables,
    snapshot,
    train,
)
from sparse_cases import coo
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from descend import Adam, AdamW, FirstOrder


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Torch wakes all threads for a handful of numbers: minutes on a busy machine."""
    torch.set_num_threads(1)


# The model and its optimizer.


def test_the_model_does_not_keep_the_optimizer_alive() -> None:
    layer, optimizer, _ = embedding_behind()
    reference = weakref.ref(optimizer)
    layer(torch.tensor([1]))
    del optimizer
    gc.collect()
    assert reference() is None
    layer(torch.tensor([1]))
    layer.load_state_dict(layer.state_dict())
    train(exact_adamw(layer), layer, [1, 2], steps=3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_optimizer_that_ends_leaves_no_row_behind(backend: str) -> None:
    """A function that trains and returns the model: nobody could bring its rows up to date any more."""
    layer, optimizer, expected = embedding_behind(backend=backend)
    del optimizer
    gc.collect()
    assert_current(layer(torch.tensor([1])), expected[[1]])
    assert_current(layer.state_dict()["weight"], expected)


def hooks_of(module: nn.Module) -> int:
    return sum(
        len(hooks)
        for hooks in (module._forward_pre_hooks, module._state_dict_pre_hooks, module._load_state_dict_pre_hooks)
    )


def test_attaching_twice_is_attaching_once() -> None:
    model = TiedEmbeddings(*random_tables((9, 2)))
    optimizer = exact_adamw(model)
    before = [hooks_of(module) for module in model.modules()]
    optimizer.attach(model)
    optimizer.attach(nn.Sequential(model))
    optimizer.attach(model.source.weight)
    assert [hooks_of(module) for module in model.modules()] == before
    assert before == [0, 3, 3, 3]


def test_two_optimizers_share_a_model() -> None:
    tables = random_tables((6, 2), (6, 2))
    model, dense = (nn.ModuleList(embedding(table, sparse) for table in tables) for sparse in (True, False))
    for each, kind in ((model, "exact"), (dense, None)):
        optimizers = [AdamW(layer.parameters(), sparse=kind, **OPTIONS) for layer in each]
        for optimizer in optimizers if kind else ():
            optimizer.attach(model)
        for step in range(10):
            for optimizer, layer in zip(optimizers, each, strict=True):
                train(optimizer, layer, [step // 2])
        if kind:
            found = model.state_dict()
    torch.testing.assert_close(dict(found), dict(dense.state_dict()), rtol=0, atol=ALLOWED * LR)


def test_groups_added_later_are_attached_later() -> None:
    tables = random_tables((6, 2), (4, 2))
    layers = [embedding(table) for table in tables]
    dense = [embedding(table, sparse=False) for table in tables]
    ours, theirs = exact_adamw(layers[0]), torch.optim.AdamW(dense[0].parameters(), **OPTIONS)
    for step in range(20):
        if step == 7:
            for optimizer, models in ((ours, layers), (theirs, dense)):
                optimizer.add_param_group({"params": list(models[1].parameters()), "lr": 0.03})
            ours.attach(layers[1])
        for models, optimizer in ((layers, ours), (dense, theirs)):
            optimizer.zero_grad()
            (models[0](torch.tensor([step // 3 % 6])).sum() + models[1](torch.tensor([step // 4 % 4])).sum()).backward()
            optimizer.step()
    ours.settle()
    for layer, other in zip(layers, dense, strict=True):
        torch.testing.assert_close(layer.weight, other.weight, rtol=0, atol=3 * ALLOWED * LR)


def test_attach_says_what_it_cannot_do() -> None:
    layer = nn.Embedding(3, 2, sparse=True)
    for sparse in (None, "touched"):
        with pytest.raises(RuntimeError, match=r"Adam: attach is for sparse='exact', this optimizer has sparse="):
            Adam(layer.parameters(), sparse=sparse).attach(layer)
    optimizer = AdamW(layer.parameters(), sparse="exact")
    for model in (nn.Linear(2, 2), nn.Embedding(3, 2), nn.Embedding(3, 2, sparse=True)):
        with pytest.raises(ValueError, match=r"AdamW: attach found no nn.Embedding .* in (Linear|Embedding) whose"):
            optimizer.attach(model)
    with pytest.raises(ValueError, match="not one of this optimizer's parameters"):
        optimizer.attach(torch.zeros(3, 2))


# Copies.


class Uncopied(AdamW):
    """An optimizer that must not be copied."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise AssertionError("the optimizer is copied")


def test_copies_of_the_model_have_no_optimizer() -> None:
    layer = nn.Embedding(6, 2, sparse=True)
    optimizer = Uncopied(layer.parameters(), sparse="exact", **OPTIONS)
    optimizer.attach(layer)
    train(optimizer, layer, [1, 2], steps=3)
    optimizer.settle()
    averaged = AveragedModel(layer).module
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    before = layer.weight.detach().clone()
    for twin in (
        copy.deepcopy(layer),
        averaged,
        pickle.loads(pickle.dumps(layer)),
        torch.load(file, weights_only=False),
    ):
        assert torch.equal(before, twin.weight)
        train(optimizer, layer, [2], steps=3)
        twin(torch.tensor([1, 2]))
        twin.load_state_dict(twin.state_dict())
        assert torch.equal(twin.weight, before)
        own = exact_adamw(twin)  # may be attached to an optimizer of its own
        train(own, twin, [1, 2], steps=3)
        train(own, twin, [1], steps=3)
        assert torch.equal(twin(torch.tensor([2])), twin.state_dict()["weight"][[2]])


def through_file(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "swa": lambda model: AveragedModel(model).module,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": through_file,
}


@pytest.mark.parametrize("way", COPIES.values(), ids=COPIES)
def test_a_copy_is_current_or_refused(way: Callable[[nn.Module], Any]) -> None:
    """Nobody can tell later that rows of a copy are behind: ``best = deepcopy(model)`` is common."""
    layer, _, expected = embedding_behind()
    model = nn.Sequential(nn.Sequential(layer), nn.Linear(2, 1))
    try:
        twin = way(model)
    except RuntimeError as error:
        assert "settle" in str(error)
        return
    assert_current(twin[0][0].weight, expected)


def test_an_average_of_settled_weights_is_that_of_dense_ones() -> None:
    (table,) = random_tables((6, 2))
    layer, dense = embedding(table), embedding(table, sparse=False)
    ours, theirs = exact_adamw(layer), torch.optim.AdamW(dense.parameters(), **OPTIONS)
    averages = [AveragedModel(model) for model in (layer, dense)]
    for step in range(40):
        train(ours, layer, [step // 8])
        train(theirs, dense, [step // 8])
        if step % 4 == 3:
            with ours.settled():
                averages[0].update_parameters(layer)
            averages[1].update_parameters(dense)
    assert_current(averages[0].module.weight, averages[1].module.weight.detach())


# Never silently behind.


def stale_by_functional(layer: nn.Embedding) -> Tensor:
    return nn.functional.embedding(torch.tensor([0, 2]), layer.weight, sparse=True)


def stale_by_forward(layer: nn.Embedding) -> Tensor:
    return layer.forward(torch.tensor([3, 1]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("read", [stale_by_functional, stale_by_forward])
def test_a_row_that_was_read_too_early_stops_the_step(read: Callable[[nn.Embedding], Tensor], backend: str) -> None:
    (first, second) = random_tables((6, 2), (6, 2))
    model = nn.ModuleDict(dict(one=embedding(first), two=embedding(second), out=nn.Linear(2, 2, dtype=torch.float64)))
    optimizer = AdamW(model.named_parameters(), sparse="exact", backend=backend, max_norm=1.0, **OPTIONS)
    optimizer.attach(model)
    for rows in ([0, 1, 2, 3], [0], [0]):
        optimizer.zero_grad()
        model["out"](model["one"](torch.tensor(rows)) + model["two"](torch.tensor(rows))).sum().backward()
        optimizer.step()
    optimizer.zero_grad()
    model["out"](model["one"](torch.tensor([1, 2])) + read(model["two"])).sum().backward()
    before = snapshot(optimizer)
    message = r"AdamW: row [12] of two\.weight has a gradient, but .*optimizer\.settle\(\)"
    for _ in range(2):
        with pytest.raises(RuntimeError, match=message):
            optimizer.step()
        assert_unmoved(optimizer, before)
    optimizer.zero_grad()
    with optimizer.settled():
        (model["out"](model["one"](torch.tensor([1, 2])) + read(model["two"]))).sum().backward()
    optimizer.step()


def test_a_gradient_that_comes_a_step_late_is_refused() -> None:
    layer, optimizer, _ = embedding_behind()
    loss = layer(torch.tensor([1, 2])).sum()
    train(optimizer, layer, [2, 3])
    optimizer.zero_grad()
    loss.backward()
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"row 1 of param_groups\[0\]\['params'\]\[0\] has a gradient"):
        optimizer.step()
    assert_unmoved(optimizer, before)


@pytest.mark.parametrize("attached", [True, False])
def test_a_dense_gradient_of_a_table_is_refused(attached: bool) -> None:
    """Tied weights: something else reads all rows."""
    (table,) = random_tables((6, 2))
    model = nn.ModuleDict(dict(source=embedding(table), out=nn.Linear(2, 6, bias=False, dtype=torch.float64)))
    model["out"].weight = model["source"].weight
    optimizer = AdamW(model["source"].named_parameters(), sparse="exact", **OPTIONS)
    if attached:
        optimizer.attach(model)
        train(optimizer, model["source"], [0, 1], steps=3)
        train(optimizer, model["source"], [0], steps=3)
    optimizer.zero_grad()
    model["out"](model["source"](torch.tensor([0, 1]))).sum().backward()
    before = snapshot(optimizer)
    if not attached:
        optimizer.step()  # as dense as any other
        return
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"AdamW: weight is a table .* dense gradient.*[Tt]ied"):
            optimizer.step()
        assert_unmoved(optimizer, before)
    train(optimizer, model["source"], [0, 1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_dense_gradient_is_refused_while_lr_is_zero_too(backend: str) -> None:
    """It would be a step that rows have missed and nobody has noted; zeros before the first step are not."""
    layer, optimizer, expected = embedding_behind(backend=backend)
    optimizer.param_groups[0]["lr"] = 0.0
    layer.weight.grad = torch.ones_like(layer.weight)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match="dense gradient"):
        optimizer.step()
    assert_unmoved(optimizer, before)
    optimizer.settle()
    assert_current(layer.weight, expected)


@pytest.mark.parametrize("ours", [Adam, AdamW])
def test_what_is_not_attached_is_refused_at_its_first_step(ours: type[FirstOrder]) -> None:
    (table,) = random_tables((6, 2))
    model = nn.Sequential(embedding(table), nn.Linear(2, 2, dtype=torch.float64))
    optimizer: Any = ours(model.named_parameters(), sparse="exact")
    model(torch.tensor([1])).sum().backward()
    before = snapshot(optimizer)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=rf"{ours.__name__}: 0\.weight gets .*optimizer\.attach\(model\)"):
            optimizer.step()
        assert_unmoved(optimizer, before)
    optimizer.attach(model)
    optimizer.step()


def test_a_table_that_was_never_attached_may_become_dense() -> None:
    layer = nn.Embedding(6, 2, sparse=True)
    optimizer = AdamW(layer.parameters(), sparse="exact")
    layer(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="attach"):
        optimizer.step()
    layer.sparse = False
    train(optimizer, layer, [1])


def test_a_table_may_be_dense_before_it_is_attached() -> None:
    """Its rows are current then, and its averages are kept."""
    (table,) = random_tables((6, 2))
    layer, dense = embedding(table, sparse=False), embedding(table, sparse=False)
    ours = AdamW(layer.parameters(), sparse="exact", **OPTIONS)
    theirs = torch.optim.AdamW(dense.parameters(), **OPTIONS)
    for step in range(40):
        if step == 5:
            layer.sparse = True
            ours.attach(layer)
        train(ours, layer, [0, 1, 2] if step < 5 else [0])
        train(theirs, dense, [0, 1, 2] if step < 5 else [0])
    assert_current(layer.state_dict()["weight"], dense.weight.detach())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_with_two_sparse_dimensions_is_refused(backend: str) -> None:
    layer, optimizer, _ = embedding_behind(backend=backend)
    layer.weight.grad = torch.ones(6, 2, dtype=torch.float64).to_sparse()
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match="one sparse dimension"):
        optimizer.step()
    assert_unmoved(optimizer, before)


def test_a_step_count_cannot_be_edited() -> None:
    layer, optimizer, _ = embedding_behind()
    layer.weight.grad = coo([0], torch.ones(1, 2, dtype=torch.float64), (6, 2))
    optimizer.state[layer.weight]["step"].fill_(3)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"step count of .* is 3, but 34 steps are on record"):
        optimizer.step()
    assert_unmoved(optimizer, before)


def clear_state(optimizer: Any) -> None:
    optimizer.state.clear()


def clear_states(optimizer: Any) -> None:
    for state in optimizer.state.values():
        state.clear()


@pytest.mark.parametrize("clear", [clear_state, clear_states])
def test_a_cleared_state_begins_anew(clear: Callable[[Any], None]) -> None:
    twins = ExactTwins(random_tables((6, 2)), torch.optim.AdamW, **OPTIONS)
    ones = torch.ones((3, 2), dtype=torch.float64)
    for rows in ([0, 1, 2], [0, 1, 2], [3], []):
        twins.step((rows, ones[: len(rows)]))
    twins.settle()
    twins.edit(clear)
    twins.bounds[0].forget_steps()
    for rows in ([0, 2], [1], [1]):
        twins.step((rows, ones[: len(rows)]))
    twins.assert_close()


def test_a_state_cleared_while_rows_are_behind_leaves_them_there() -> None:
    layer, optimizer, _ = embedding_behind()
    optimizer.state.clear()
    before = layer.weight.detach().clone()
    layer(torch.tensor([1, 2]))
    optimizer.settle()
    assert torch.equal(layer.state_dict()["weight"], before)
    train(optimizer, layer, [1, 2], steps=3)


def test_a_parameter_taken_out_of_its_group_is_still_brought_up_to_date() -> None:
    layer, optimizer, expected = embedding_behind()
    optimizer.param_groups[0]["params"].clear()
    assert_current(layer(torch.tensor([1])), expected[[1]])
    optimizer.settle()
    assert_current(layer.state_dict()["weight"], expected)
