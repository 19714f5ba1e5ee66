"""Structures of tensors become one flat vector and come back as they were."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from descend.second_order.problem.structure import Structure

WHO = "solve"


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=torch.complex128 if dtype.is_complex else torch.float64).to(dtype)


# Makes a structure; the dtype of its flat vector; how many real numbers there are.
TREES: dict[str, tuple[Callable[[], Any], torch.dtype, int]] = {
    "tensor": (lambda: normal(2, 3), torch.float64, 6),
    "0-dim": (lambda: normal(), torch.float64, 1),
    "empty": (lambda: normal(0, 3), torch.float64, 0),
    "float32": (lambda: normal(4, dtype=torch.float32), torch.float32, 4),
    "bfloat16": (lambda: normal(4, dtype=torch.bfloat16), torch.float32, 4),
    "float16": (lambda: normal(4, dtype=torch.float16), torch.float32, 4),
    "complex64": (lambda: normal(2, 2, dtype=torch.complex64), torch.float32, 8),
    "complex128": (lambda: normal(dtype=torch.complex128), torch.float64, 2),
    "conjugated": (lambda: normal(3, dtype=torch.complex128).conj(), torch.float64, 6),
    "transposed": (lambda: normal(2, 3).t(), torch.float64, 6),
    "strided": (lambda: normal(6)[::2], torch.float64, 3),
    "expanded": (lambda: normal(1).expand(3), torch.float64, 3),
    "dict": (lambda: {"b": normal(2), "a": normal()}, torch.float64, 3),
    "ordered": (lambda: OrderedDict(b=normal(2), a=normal(3)), torch.float64, 5),
    "list": (lambda: [normal(2), normal(0), normal()], torch.float64, 3),
    "one in a list": (lambda: [normal(2)], torch.float64, 2),
    "tuple": (lambda: (normal(2), normal(2, 2)), torch.float64, 6),
    "namedtuple": (lambda: Pair(normal(2), normal(2)), torch.float64, 4),
    "nested": (lambda: {"a": [normal(2), (normal(3), {"c": normal()})], "b": normal(1)}, torch.float64, 7),
    "mixed": (
        lambda: [
            normal(3, dtype=dtype)
            for dtype in (torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128)
        ],
        torch.float64,
        21,
    ),
    "half and single": (
        lambda: (normal(2, dtype=torch.bfloat16), normal(2, dtype=torch.float32)),
        torch.float32,
        4,
    ),
    "single and complex": (
        lambda: (normal(2, dtype=torch.float32), normal(2, dtype=torch.complex64)),
        torch.float32,
        6,
    ),
}
each_tree = pytest.mark.parametrize("name", TREES)


def leaves_of(tree: Any) -> list[Tensor]:
    return pytree.tree_leaves(tree)


def assert_same(ours: Any, theirs: Any) -> None:
    assert pytree.tree_structure(ours) == pytree.tree_structure(theirs)
    for a, b in zip(leaves_of(ours), leaves_of(theirs), strict=True):
        assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
        assert torch.equal(a, b)


@each_tree
def test_structure_comes_back_as_it_was(name: str) -> None:
    make, dtype, numel = TREES[name]
    tree = make()
    structure = Structure(tree, WHO)
    flat = structure.flatten(structure.leaves)
    assert (flat.dtype, flat.shape, structure.numel, structure.dtype) == (dtype, (numel,), numel, dtype)
    assert not flat.requires_grad
    assert_same(structure.unflatten(flat), tree)
    assert torch.equal(structure.flatten(structure.split(flat)), flat)


@each_tree
def test_autograd_sees_through_split(name: str) -> None:
    tree = TREES[name][0]()
    structure = Structure(tree, WHO)
    flat = structure.flatten(structure.leaves).clone().requires_grad_()
    direct = [leaf.detach().clone().requires_grad_() for leaf in structure.leaves]

    def value(leaves: list[Tensor]) -> Tensor:
        return sum((leaf.abs().double() ** 3).sum() * (number + 1) for number, leaf in enumerate(leaves))

    (grad,) = torch.autograd.grad(value(structure.split(flat)), flat)
    expected = structure.flatten(torch.autograd.grad(value(direct), direct))
    assert torch.equal(grad, expected)


def test_missing_leaves_are_zeros() -> None:
    structure = Structure([normal(2), normal(2, dtype=torch.complex64), normal()], WHO)
    flat = structure.flatten([None, None, torch.tensor(3.0)])
    assert torch.equal(flat, torch.tensor([0.0] * 6 + [3.0], dtype=torch.float64))
    assert torch.equal(Structure(normal(2), WHO).flatten([None]), torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize("other", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_flat_vector_has_its_dtype_whatever_the_leaves_have(dtype: torch.dtype, other: torch.dtype) -> None:
    # A caller's gradient may have another dtype than x0.
    structure = Structure(normal(2, dtype=dtype), WHO)
    assert structure.flatten([normal(2, dtype=other)]).dtype == dtype


def test_half_precision_rounds_the_flat_vector() -> None:
    structure = Structure((torch.zeros(1, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.float64)), WHO)
    split = structure.split(torch.tensor([1.001, 1.001], dtype=torch.float64))
    assert [float(part) for part in split] == [1.0, 1.001]


@pytest.mark.parametrize(
    ("dtypes", "eps"),
    [
        ([torch.float64], 2.0**-52),
        ([torch.float32], 2.0**-23),
        ([torch.bfloat16], 2.0**-7),
        ([torch.complex128], 2.0**-52),
        ([torch.float64, torch.float16], 2.0**-10),
        ([torch.complex64, torch.float64], 2.0**-23),
    ],
    ids=str,
)
def test_rounding_is_that_of_the_coarsest_leaf(dtypes: list[torch.dtype], eps: float) -> None:
    assert Structure([torch.zeros(1, dtype=dtype) for dtype in dtypes], WHO).eps == eps


def test_module_stands_for_its_trainable_parameters() -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    module[0].bias.requires_grad_(False)
    structure = Structure(module, WHO)
    expected = [module[0].weight, module[1].weight, module[1].bias]
    assert list(map(id, structure.leaves)) == list(map(id, expected))
    assert list(structure.unflatten(torch.zeros(structure.numel))) == ["0.weight", "1.weight", "1.bias"]


def test_tied_parameter_counts_once() -> None:
    module = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    module[1].weight = module[0].weight
    assert Structure(module, WHO).numel == 4


def test_generator_is_read_once() -> None:
    structure = Structure(nn.Linear(2, 3).parameters(), WHO)
    assert structure.numel == 9
    assert isinstance(structure.unflatten(torch.zeros(9)), list)


# Other trees beside one.


def test_like_gives_the_leaves_in_the_structures_own_order() -> None:
    structure = Structure({"b": torch.zeros(2), "a": torch.zeros(2)}, WHO)
    same = {"a": torch.full((2,), 1.0), "b": torch.full((2,), 2.0)}  # a dict is no sequence
    assert [float(leaf[0]) for leaf in structure.like(same, WHO)] == [2.0, 1.0]


@pytest.mark.parametrize(
    "tree",
    [
        torch.zeros(2),
        {"a": torch.zeros(2)},
        {"a": torch.zeros(2), "c": torch.zeros(3)},
        {"a": torch.zeros(2), "b": torch.zeros(3), "c": torch.zeros(1)},
        {"a": torch.zeros(3), "b": torch.zeros(2)},
        {"a": torch.zeros(2), "b": torch.zeros(1, 3)},
        {"a": torch.zeros(2), "b": None},
        {"a": torch.zeros(2), "b": 1.0},
        (torch.zeros(2), torch.zeros(3)),
        None,
    ],
    ids=str,
)
def test_like_refuses_another_structure(tree: Any) -> None:
    structure = Structure({"a": torch.zeros(2), "b": torch.zeros(3)}, WHO)
    with pytest.raises(
        ValueError, match=r"the gradient must have the structure and shapes of x0, .*\(2,\).*\(3,\).*got"
    ):
        structure.like(tree, "the gradient")


INF = math.inf
X = {"b": torch.zeros(2, 2), "a": torch.zeros(2)}


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        (None, [-INF] * 6),
        (2, [2.0] * 6),
        (-INF, [-INF] * 6),
        (torch.tensor(1), [1.0] * 6),
        (torch.tensor([1.0, 2.0]), [1.0, 2.0] * 3),
        (torch.tensor([1.0, 2.0], requires_grad=True), [1.0, 2.0] * 3),
        ({"b": 3, "a": None}, [3.0] * 4 + [-INF] * 2),
        ({"a": None, "b": 3}, [3.0] * 4 + [-INF] * 2),
        ({"b": torch.tensor([[1.0], [2.0]]), "a": torch.tensor([5.0, 6.0])}, [1.0, 1.0, 2.0, 2.0, 5.0, 6.0]),
    ],
    ids=str,
)
def test_broadcast_fills_the_structure(tree: Any, expected: list[float]) -> None:
    flat = Structure(X, WHO).broadcast(tree, -INF, "the bound")
    assert flat.tolist() == expected
    assert (flat.dtype, flat.requires_grad) == (torch.float32, False)


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        (torch.zeros(3), r"broadcast to the shapes of x0, \(2, 2\), \(2,\).*got"),
        (torch.zeros(2, 2), r"broadcast to the shapes of x0.*got"),
        ("1", r"numbers or tensors.*got '1'"),
        ([1.0, 2.0], r"one number or tensor for all of x0, or have its structure.*got"),
        ({"a": 1.0}, r"structure, \{'a': \(2,\), 'b': \(2, 2\)\}; got \{'a': 1.0\}"),
        ({"a": 1.0, "b": 1.0, "c": 1.0}, r"structure.*got"),
        ({"a": 1.0, "b": 1j}, r"numbers or tensors.*got 1j"),
    ],
    ids=str,
)
def test_broadcast_refuses_what_does_not_fit(tree: Any, words: str) -> None:
    with pytest.raises(ValueError, match=rf"(?s)the bound must .*{words}"):
        Structure(X, WHO).broadcast(tree, 0.0, "the bound")


# What is no structure.


@pytest.mark.parametrize(
    ("tree", "error", "words"),
    [
        ([], ValueError, "solve: x0 must hold at least one tensor, got list"),
        ({}, ValueError, "solve: x0 must hold at least one tensor, got dict"),
        (nn.ReLU(), ValueError, "solve: x0 must hold at least one tensor, got ReLU"),
        (1.0, TypeError, "solve: x0 .* got float; convert it"),
        ([1.0, 2.0], TypeError, "solve: x0 .* got float; convert it"),
        (None, TypeError, "solve: x0 .* got NoneType"),
        ("abc", TypeError, "solve: x0 .* got str"),
        (torch.zeros(2).numpy(), TypeError, "solve: x0 .* got ndarray; convert it"),
        (torch.tensor([1, 2]), TypeError, "solve: x0 .* got torch.int64; convert it"),
        (torch.tensor([True]), TypeError, "solve: x0 .* got torch.bool"),
        ([torch.zeros(2), None], TypeError, "solve: x0 .* got NoneType"),
        ({"a": torch.zeros(2), "b": {1, 2}}, TypeError, "solve: x0 .* got set"),
        (torch.eye(2).to_sparse(), TypeError, r"solve: x0 .* dense tensors, got layout torch.sparse_coo; use to_dense"),
        (torch.zeros(2, device="meta"), TypeError, "solve: x0 .* meta"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_other_things_are_errors(tree: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        Structure(tree, WHO)
