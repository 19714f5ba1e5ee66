"""Rows in exact mode are up to date whenever they are read, whoever reads them; where they are not, a step says so."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pytest
import torch
from cases import BACKENDS
from exact_cases import (
    ALLOWED,
    LR,
    OPTIONS,
    TiedEmbeddings,
    assert_current,
    embedding,
    embedding_behind,
    exact_adamw,
    random_tables,
    train,
)
from sparse_cases import coo
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from descend import AdamW
from descend.sparse.table import Table


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Torch wakes all threads for a handful of numbers: minutes on a busy machine."""
    torch.set_num_threads(1)


# What reads.


class Lookup(NamedTuple):
    """A module with a table of 9 rows, and what it is called with."""

    make: Callable[..., nn.Module]
    inputs: Callable[[Tensor], tuple[tuple[Any, ...], dict[str, Any]]]


LOOKUPS = {
    "embedding": Lookup(lambda **o: nn.Embedding(9, 2, **o), lambda rows: ((rows,), {})),
    "two-dimensional": Lookup(lambda **o: nn.Embedding(9, 2, **o), lambda rows: ((rows.view(3, 2).T,), {})),
    "keyword": Lookup(lambda **o: nn.Embedding(9, 2, **o), lambda rows: ((), {"input": rows})),
    "int32": Lookup(lambda **o: nn.Embedding(9, 2, **o), lambda rows: ((rows.int(),), {})),
    "one row": Lookup(lambda **o: nn.Embedding(9, 2, **o), lambda rows: ((rows[0],), {})),
    "no rows": Lookup(lambda **o: nn.Embedding(9, 2, **o), lambda rows: ((rows[: int(rows[0])],), {})),
    "padding": Lookup(lambda **o: nn.Embedding(9, 2, padding_idx=4, **o), lambda rows: ((rows,), {})),
    "renormalized": Lookup(lambda **o: nn.Embedding(9, 2, max_norm=0.5, **o), lambda rows: ((rows,), {})),
    "bag": Lookup(lambda **o: nn.EmbeddingBag(9, 2, **o), lambda rows: ((rows.view(2, 3),), {})),
    "bag with offsets": Lookup(
        lambda **o: nn.EmbeddingBag(9, 2, mode="sum", **o), lambda rows: ((rows, torch.tensor([0, 1, 1, 4])), {})
    ),
    "bag of int32": Lookup(
        lambda **o: nn.EmbeddingBag(9, 2, include_last_offset=True, **o),
        lambda rows: ((rows.int(), torch.tensor([0, 2, 6], dtype=torch.int32)), {}),
    ),
    "bag with keywords": Lookup(
        lambda **o: nn.EmbeddingBag(9, 2, padding_idx=1, mode="sum", **o),
        lambda rows: ((), {"offsets": torch.tensor([0, 3]), "input": rows}),
    ),
    "weighted bag": Lookup(
        lambda **o: nn.EmbeddingBag(9, 2, mode="sum", **o),
        lambda rows: ((rows.view(2, 3),), {"per_sample_weights": rows.view(2, 3).double() - 3}),
    ),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lookup", LOOKUPS.values(), ids=LOOKUPS)
def test_every_lookup_reads_what_a_dense_table_holds(lookup: Lookup, backend: str) -> None:
    torch.manual_seed(0)
    layer, dense = (lookup.make(sparse=sparse, dtype=torch.float64) for sparse in (True, False))
    dense.load_state_dict(layer.state_dict())
    ours, theirs = exact_adamw(layer, backend=backend), torch.optim.AdamW(dense.parameters(), **OPTIONS)
    random = torch.Generator().manual_seed(5)
    for step in range(40):
        rows = torch.randint(0, 4, (6,), generator=random) + step // 4 % 5
        args, kwargs = lookup.inputs(rows)
        outputs = []
        for model, optimizer in ((layer, ours), (dense, theirs)):
            optimizer.zero_grad()
            outputs.append(model(*args, **kwargs))
            (outputs[-1].square().sum() + outputs[-1].sum()).backward()
            optimizer.step()
        # Rows have coasted up to eight times, and are weighted and summed.
        torch.testing.assert_close(*outputs, rtol=0, atol=8 * ALLOWED * LR)
    assert_current(layer.state_dict()["weight"], dense.weight.detach())


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_what_is_read_is_brought_up_to_date(backend: str) -> None:
    layer, optimizer, expected = embedding_behind(backend=backend)
    before, version = layer.weight.detach().clone(), layer.weight._version
    output = layer(torch.tensor([[2, 0], [2, 2]]))
    assert_current(output[0, 0], expected[2])
    changed = (layer.weight != before).any(1)
    assert changed.tolist() == [False, False, True, False, False, False]
    assert layer.weight._version == version
    again = layer.weight.detach().clone()
    layer(torch.tensor([2, 2]))
    assert torch.equal(layer.weight, again)
    optimizer.settle()
    assert_current(layer.weight, expected)
    settled = layer.weight.detach().clone()
    optimizer.settle()
    layer(torch.arange(6))
    layer.state_dict()
    assert torch.equal(layer.weight, settled)


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_does_not_matter_who_brings_a_row_up_to_date(backend: str) -> None:
    weights = []
    for way in range(3):
        layer, optimizer, _ = embedding_behind(backend=backend)
        if way == 0:
            layer(torch.tensor([1, 4]))
            layer(torch.tensor([3]))
        elif way == 1:
            layer.state_dict()
        optimizer.settle()
        weights.append(layer.weight.detach())
    assert all(torch.equal(weight, weights[0]) for weight in weights)


def test_other_indices_than_rows_are_left_to_torch() -> None:
    layer, optimizer, expected = embedding_behind()
    for rows in ([2, 6], [-1]):
        with pytest.raises(IndexError, match="out of range"):
            layer(torch.tensor(rows))
    with pytest.raises((RuntimeError, TypeError)):
        layer([1, 2])
    optimizer.settle()
    assert_current(layer.weight, expected)


def test_a_module_that_owns_the_table_reads_current_rows() -> None:
    (table,) = random_tables((9, 2))
    models, outputs = (TiedEmbeddings(table), TiedEmbeddings(table, sparse=False)), []
    optimizers = exact_adamw(models[0]), torch.optim.AdamW(models[1].parameters(), **OPTIONS)
    for model, optimizer in zip(models, optimizers, strict=True):
        for step in range(20):
            train(optimizer, model, [step // 3, 0, step // 5])
        outputs.append(model.neighbours(torch.eye(2, dtype=torch.float64)))
        outputs.append(model(torch.tensor([3, 2, 6])))
    torch.testing.assert_close(outputs[0], outputs[2], rtol=0, atol=7 * ALLOWED * LR)
    torch.testing.assert_close(outputs[1], outputs[3], rtol=0, atol=30 * ALLOWED * LR)


class Hashed(nn.Embedding):
    """Looks up other rows than it is called with."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input % self.num_embeddings)


class Scaled(nn.Embedding):
    """Looks up the rows it is called with, and has an argument before them."""

    def forward(self, scale: float, rows: Tensor) -> Tensor:
        return scale * super().forward(rows)


def assert_settles(layer: nn.Module, read: Callable[[], Tensor]) -> None:
    """What ``layer`` reads is what it reads after ``settle``."""
    optimizer = exact_adamw(layer)
    for step in range(12):
        layer.weight.grad = coo([0, 1, 2] if step < 3 else [0], torch.ones(3 if step < 3 else 1, 2), (4, 2))
        optimizer.step()
    found = read()
    optimizer.settle()
    assert torch.equal(found, read())


def test_embeddings_that_look_up_something_else_read_current_rows() -> None:
    for rows in ([5], [2, 6, -3]):
        layer = Hashed(4, 2, sparse=True)
        assert_settles(layer, lambda layer=layer, rows=rows: layer(torch.tensor(rows)))
    patched = nn.Embedding(4, 2, sparse=True)
    look_up = patched.forward
    patched.forward = lambda rows: look_up(rows % 4)  # as wrappers of whole models do
    assert_settles(patched, lambda: patched(torch.tensor([5])))
    scaled = Scaled(4, 2, sparse=True)
    assert_settles(scaled, lambda: scaled(2.0, torch.tensor([1, 2])))


def test_hooks_that_change_what_is_looked_up_do_not_hide_it() -> None:
    layer = nn.Embedding(4, 2, sparse=True)
    layer.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    assert_settles(layer, lambda: layer(torch.tensor([0, 1])))


@pytest.mark.parametrize("backend", BACKENDS)
def test_state_dict_of_the_model_is_current(backend: str) -> None:
    layer, _, expected = embedding_behind(backend=backend)
    assert_current(nn.Sequential(nn.Sequential(layer)).state_dict()["0.0.weight"], expected)


def test_loading_weights_replaces_what_rows_have_missed() -> None:
    layer, optimizer, _ = embedding_behind()
    (table,) = random_tables((6, 2))
    layer.load_state_dict({"weight": table})
    optimizer.settle()
    assert torch.equal(layer.weight, table)


def test_weights_may_be_written_when_settled() -> None:
    (table,) = random_tables((6, 2))
    layer, dense = embedding(table), embedding(table, sparse=False)
    ours, theirs = exact_adamw(layer), torch.optim.AdamW(dense.parameters(), **OPTIONS)
    for model, optimizer in ((layer, ours), (dense, theirs)):
        train(optimizer, model, [0, 1, 2, 3], steps=4)
        train(optimizer, model, [0], steps=30)
        ours.settle()
        with torch.no_grad():
            model.weight.mul_(0.5)
            model.weight.data = model.weight.data.clone()
        train(optimizer, model, [0], steps=3)
    assert_current(layer.state_dict()["weight"], dense.weight.detach())


def test_settled_is_a_place_to_read_in() -> None:
    layer, optimizer, expected = embedding_behind()
    with optimizer.settled():
        assert_current(layer.weight, expected)
    with pytest.raises(KeyError, match="mine"), optimizer.settled():
        raise KeyError("mine")
    AdamW(nn.Linear(2, 2).parameters()).settle()  # nothing to do


def test_a_parameter_alone_may_be_attached() -> None:
    (table,) = random_tables((6, 2))
    weight, dense = (table.clone().requires_grad_() for _ in range(2))
    ours, theirs = AdamW([weight], sparse="exact", **OPTIONS), torch.optim.AdamW([dense], **OPTIONS)
    ours.attach(weight)
    for step in range(20):
        rows = torch.tensor([step // 4])
        with ours.settled():
            nn.functional.embedding(rows, weight, sparse=True).square().sum().backward()
        nn.functional.embedding(rows, dense).square().sum().backward()
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()
    ours.settle()
    assert_current(weight, dense.detach())


@pytest.mark.parametrize("shape", [(6,), (6, 2, 3)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_may_have_any_shape(shape: tuple[int, ...], backend: str) -> None:
    random = torch.Generator().manual_seed(0)
    table = torch.randn(shape, generator=random, dtype=torch.float64)
    weight, dense = (table.clone().requires_grad_() for _ in range(2))
    ours = AdamW([weight], sparse="exact", backend=backend, **OPTIONS)
    ours.attach(weight)
    theirs = torch.optim.AdamW([dense], **OPTIONS)
    for step in range(20):
        ours.settle()
        weight.grad = coo([step // 4], torch.ones((1, *shape[1:]), dtype=torch.float64), shape)
        dense.grad = weight.grad.to_dense()
        ours.step()
        theirs.step()
    ours.settle()
    assert_current(weight, dense.detach())


@pytest.mark.parametrize(
    "table",
    [torch.randn(2, 6).T, *(torch.randn(6, 2, dtype=dtype) for dtype in (torch.complex64, torch.complex128))],
    ids=["strided", "complex64", "complex128"],
)
def test_what_no_kernel_takes_is_settled_eagerly(table: Tensor) -> None:
    weight, dense = (table.clone(memory_format=torch.preserve_format).requires_grad_() for _ in range(2))
    assert weight.is_contiguous() == table.is_contiguous()
    ours, theirs = AdamW([weight], sparse="exact", **OPTIONS), torch.optim.AdamW([dense], **OPTIONS)
    ours.attach(weight)
    for step in range(20):
        ours.settle()
        weight.grad = coo([step // 4], torch.full((1, 2), 1.5, dtype=table.dtype), (6, 2))
        dense.grad = weight.grad.to_dense()
        ours.step()
        theirs.step()
    ours.load_state_dict(ours.state_dict())
    ours.settle()
    assert_current(weight, dense.detach())


def test_the_model_may_change_its_dtype() -> None:
    (table,) = random_tables((6, 2))
    layer, dense = embedding(table), embedding(table, sparse=False)
    ours, theirs = exact_adamw(layer), AdamW(dense.parameters(), **OPTIONS)
    for model, optimizer in ((layer, ours), (dense, theirs)):
        train(optimizer, model, [0, 1, 2, 3], steps=4)
        train(optimizer, model, [0], steps=5)
        model.float()
        train(optimizer, model, [0], steps=5)
    assert_current(layer.state_dict()["weight"], dense.weight.detach())


# Between a forward and its backward pass.


@pytest.mark.parametrize("backend", BACKENDS)
def test_several_forward_passes_before_one_backward_pass(backend: str) -> None:
    (table,) = random_tables((9, 2))
    models = TiedEmbeddings(table), TiedEmbeddings(table, sparse=False)
    optimizers = exact_adamw(models[0], backend=backend), torch.optim.AdamW(models[1].parameters(), **OPTIONS)
    for step in range(30):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            loss = torch.zeros((), dtype=torch.float64)
            for turn in range(3):
                row = (step // 3 + 2 * turn) % 8
                used = model.source.weight[row].detach()  # what is read is not only what embeddings look up
                loss = loss + (model(torch.tensor([row])) * model.source(torch.tensor([row]))).sum() + 0 * used.sum()
                model.state_dict()
            loss.backward()
            optimizer.step()
    torch.testing.assert_close(
        models[0].state_dict()["source.weight"], models[1].state_dict()["source.weight"], rtol=0, atol=20 * ALLOWED * LR
    )


def test_autograd_sees_no_write() -> None:
    """A weight that a graph has saved is settled before its backward pass."""
    layer, optimizer, _ = embedding_behind()
    optimizer.settle()
    rows = layer.weight[:2] * layer.weight[:2]  # saves the weight
    layer.weight.grad = None
    layer(torch.tensor([3]))
    layer.state_dict()
    rows.sum().backward()
    for backend in BACKENDS:
        layer, optimizer, _ = embedding_behind(backend=backend)
        product = layer.weight.square().sum()
        optimizer.settle()
        product.backward()
        assert layer.weight.grad is not None


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bag_that_reads_its_rows_in_the_backward_pass(backend: str) -> None:
    """Gradients of per_sample_weights need the rows; another forward pass may have settled others since."""
    (table,) = random_tables((6, 2))
    found = []
    for sparse in (True, False):
        bag = nn.EmbeddingBag.from_pretrained(table.clone(), freeze=False, mode="sum", sparse=sparse)
        optimizer = exact_adamw(bag, backend=backend) if sparse else torch.optim.AdamW(bag.parameters(), **OPTIONS)
        for step in range(12):
            weights = torch.ones((1, 3), dtype=torch.float64, requires_grad=True)
            optimizer.zero_grad()
            first = bag(torch.tensor([[step % 3, 1, 2]]), per_sample_weights=weights)
            second = bag(torch.tensor([[5, 4, step % 2 + 3]]), per_sample_weights=weights)
            (first * second).sum().backward()
            optimizer.step()
        found.append(weights.grad)
    torch.testing.assert_close(*found, rtol=0, atol=20 * ALLOWED * LR)


def test_gradients_may_accumulate_over_forward_passes() -> None:
    (table,) = random_tables((9, 2))
    layer, dense = embedding(table), embedding(table, sparse=False)
    ours, theirs = exact_adamw(layer), torch.optim.AdamW(dense.parameters(), **OPTIONS)
    for step in range(20):
        for model, optimizer in ((layer, ours), (dense, theirs)):
            for turn in range(3):
                model(torch.tensor([(step // 2 + turn * turn) % 8, 1])).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(layer.state_dict(), dense.state_dict(), rtol=0, atol=5 * ALLOWED * LR)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activations_may_be_recomputed(reentrant: bool) -> None:
    (table,) = random_tables((9, 2))
    layer, dense = embedding(table), embedding(table, sparse=False)
    anchor = torch.ones((), dtype=torch.float64, requires_grad=True)
    ours, theirs = exact_adamw(layer), torch.optim.AdamW(dense.parameters(), **OPTIONS)
    for step in range(20):
        rows = torch.tensor([step // 2 % 8, 0])
        for model, optimizer in ((layer, ours), (dense, theirs)):
            optimizer.zero_grad()
            output = checkpoint(
                lambda scale, model=model, rows=rows: scale * model(rows).square(), anchor, use_reentrant=reentrant
            )
            output.sum().backward()
            optimizer.step()
    torch.testing.assert_close(layer.state_dict(), dense.state_dict(), rtol=0, atol=3 * ALLOWED * LR)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_reading_without_gradients_is_reading(mode: Callable[[], Any], backend: str) -> None:
    layer, optimizer, expected = embedding_behind(backend=backend)
    with mode():
        assert_current(layer(torch.tensor([1, 5])), expected[[1, 5]])
    train(optimizer, layer, [1, 2])
    layer, optimizer, expected = embedding_behind(backend=backend)
    with mode():
        optimizer.settle()
    assert_current(layer.weight, expected)
    train(optimizer, layer, [1, 2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_threads_read_what_one_thread_would(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (table,) = random_tables((300, 8))
    layers = [embedding(table) for _ in range(2)]
    optimizers = [exact_adamw(layer, backend=backend) for layer in layers]
    random = torch.Generator().manual_seed(0)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(6) as pool:
            for _ in range(6):
                touched = torch.randint(0, 250, (20,), generator=random)
                for layer, optimizer in zip(layers, optimizers, strict=True):
                    train(optimizer, layer, touched, steps=3)
                read = torch.randint(0, 300, (60, 40), generator=random)

                def look_up(rows: Tensor, layer: nn.Module = layers[0]) -> Tensor:
                    with torch.no_grad():
                        return layer(rows)

                found = list(pool.map(look_up, read))
                expected = layers[1](read)
                assert torch.equal(torch.stack(found), expected)
    finally:
        sys.setswitchinterval(interval)
    assert torch.equal(layers[0].state_dict()["weight"], layers[1].state_dict()["weight"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_state_dict_of_another_thread_waits_for_the_step(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, optimizer, _ = embedding_behind(backend=backend)
    begin_step = Table.begin_step
    saver = threading.Thread(target=optimizer.state_dict)

    def save_meanwhile(self: Table, *args: Any) -> Any:
        result = begin_step(self, *args)
        saver.start()
        saver.join(0.5)  # it should be waiting, so this cannot be
        return result

    with monkeypatch.context() as patch:
        patch.setattr(Table, "begin_step", save_meanwhile)
        train(optimizer, layer, [1, 2])
    saver.join()
    train(optimizer, layer, [1, 2])


def test_a_compiled_model_breaks_its_graph() -> None:
    (table,) = random_tables((6, 2))
    layer, dense = embedding(table), embedding(table, sparse=False)
    optimizer, theirs = exact_adamw(layer), torch.optim.AdamW(dense.parameters(), **OPTIONS)
    model = nn.Sequential(layer, nn.Tanh())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's compiler warns of its own affairs
        compiled = torch.compile(model, backend="eager")
        for step in range(12):
            train(optimizer, compiled, [step // 3])
            train(theirs, nn.Sequential(dense, nn.Tanh()), [step // 3])
        torch.testing.assert_close(
            compiled(torch.tensor([1, 0])), dense(torch.tensor([1, 0])).tanh(), rtol=0, atol=1e-3
        )
    torch.testing.assert_close(layer.state_dict(), dense.state_dict(), rtol=0, atol=ALLOWED * LR)


def test_a_functional_call_reads_the_parameters_it_is_given() -> None:
    layer, _, expected = embedding_behind()
    rows = torch.tensor([1, 2])
    assert_current(torch.func.functional_call(layer, dict(layer.named_parameters()), (rows,)), expected[rows])
    other = torch.zeros(6, 2)
    assert not torch.func.functional_call(layer, {"weight": other}, (rows,)).any()
