"""Gradients that come more than once before a step, or in parts; see also ``test_in_backward.py``."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from backward_cases import assert_same_params_and_state, loss_of, network
from cases import BACKENDS, CASES, Case
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from descend import SGD, AdamW, in_backward


class Branches(nn.Module):
    """Some layers are used by some inputs only."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(5, 4), nn.Linear(4, 1)
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        expert = self.experts[int(x.sum().abs() * 100) % 3]
        return self.last(torch.tanh(expert(self.first(x))))


WINDOWS = [(3, 3, 3), (3, 3, 1, 3, 2), (1, 2, 3), (2, 1)]


@pytest.mark.parametrize("accumulate", [3, 1000])
@pytest.mark.parametrize("windows", WINDOWS, ids=str)
@pytest.mark.parametrize("kind", [Branches, network], ids=["branches", "network"])
@pytest.mark.parametrize("case", [CASES[1], CASES[5]], ids=str)
def test_accumulation_is_the_ordinary_one(
    case: Case, kind: Callable[[], nn.Module], windows: tuple[int, ...], accumulate: int
) -> None:
    optimizers = []
    for inside in (False, True):
        model = kind()
        optimizer = case.ours(model.parameters(), **case.options)
        if inside:
            in_backward(optimizer, accumulate=accumulate)
        seed = 0
        for window in windows:
            for _ in range(window):
                seed += 1
                (loss_of(model, seed) / window).backward()
            optimizer.step()
            optimizer.zero_grad()
        optimizers.append(optimizer)
    assert_same_params_and_state(*optimizers)


def test_every_nth_backward_steps_without_step() -> None:
    weight = torch.zeros(2, requires_grad=True)
    in_backward(SGD([weight], lr=1.0), accumulate=3)
    seen = []
    for _ in range(7):
        weight.sum().backward()
        seen.append((weight[0].item(), None if weight.grad is None else weight.grad[0].item()))
    assert seen == [(0, 1), (0, 2), (-3, None), (-3, 1), (-3, 2), (-6, None), (-6, 1)]


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("discard", ["optimizer", "model", "attribute"])
def test_discarded_gradients_do_not_count(discard: str, to_none: bool) -> None:
    model = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(model.weight)
    optimizer = SGD(model.parameters(), lr=1.0)
    in_backward(optimizer, accumulate=2)
    for _ in range(3):
        model(torch.ones(1, 2)).sum().backward()
        assert model.weight[0, 0] == 0
        if discard == "attribute":
            model.weight.grad = None if to_none else model.weight.grad.zero_()
        else:
            (optimizer if discard == "optimizer" else model).zero_grad(set_to_none=to_none)
    for _ in range(2):
        model(torch.ones(1, 2)).sum().backward()
    assert model.weight.tolist() == [[-2, -2]]


def test_two_backward_passes_are_two_steps_or_one_sum() -> None:
    for accumulate, wanted in ((1, 0.25), (2, 0.0)):
        weight = torch.ones(1, requires_grad=True)
        optimizer = SGD([weight], lr=0.25)
        in_backward(optimizer, accumulate)
        for _ in range(2):
            weight.square().sum().backward()
        optimizer.step()
        assert weight.item() == wanted


def test_graph_kept_for_a_second_backward() -> None:
    for accumulate in (1, 2):
        weight = torch.ones(1, requires_grad=True)
        in_backward(SGD([weight], lr=0.25), accumulate)
        loss = weight.square().sum()
        loss.backward(retain_graph=True)
        if accumulate == 1:  # as after an ordinary step: the loss is of a weight that is no more
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()
        else:
            loss.backward()
            assert weight.item() == 0


def test_second_derivatives_can_be_taken_with_grad() -> None:
    weight = torch.ones(2, requires_grad=True)
    in_backward(SGD([weight], lr=0.5))
    (grad,) = torch.autograd.grad((weight**3).sum(), weight, create_graph=True)
    assert weight.tolist() == [1, 1]  # grad gives a gradient to nobody
    grad.sum().backward()
    assert weight.tolist() == [-2, -2]


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
@pytest.mark.parametrize("backend", BACKENDS)
def test_graph_of_a_gradient_does_not_reach_the_parameter(backend: str) -> None:
    weight = torch.ones(2, requires_grad=True)
    optimizer = AdamW([weight], lr=0.5, backend=backend)
    in_backward(optimizer)
    (weight**3).sum().backward(create_graph=True)
    assert weight.grad_fn is None
    assert not any(value.requires_grad for value in optimizer.state[weight].values())


# Several gradients in one backward pass.


class Stack(nn.Module):
    """Layers, some of them recomputed in the backward pass."""

    def __init__(self, reentrant: bool | None, shared: bool, head: bool, tail: bool, outside: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = [nn.Linear(5, 5) for _ in range(3)]
        self.layers = nn.ModuleList([layers[0]] * 3 if shared else layers)
        self.tail = nn.Linear(5, 5) if tail else nn.Identity()
        self.head = nn.Linear(5, 5) if head else nn.Identity()
        self.reentrant, self.outside = reentrant, outside

    def forward(self, x: Tensor) -> Tensor:
        x = self.tail(x.requires_grad_())
        if self.outside:
            x = self.layers[-1](x)
        for layer in self.layers:
            if self.reentrant is None:
                x = torch.tanh(layer(x))
            else:
                x = checkpoint(lambda x, layer=layer: torch.tanh(layer(x)), x, use_reentrant=self.reentrant)
        return self.head(x)


ENDS = [(True, True), (True, False), (False, True), (False, False)]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(("head", "tail"), ENDS, ids=str)
@pytest.mark.parametrize(("reentrant", "shared"), [(False, False), (False, True), (True, False)], ids=str)
def test_recomputed_layers_step_as_others(
    reentrant: bool, shared: bool, head: bool, tail: bool, accumulate: int
) -> None:
    if reentrant and accumulate > 1 and not head and not tail:
        pytest.skip("passes of which all is recomputed are only told apart by step()")
    optimizers = []
    for inside in (False, True):
        model = Stack(reentrant, shared, head, tail)
        optimizer = AdamW(model.parameters(), lr=0.1)
        if inside:
            in_backward(optimizer, accumulate)
        for seed in range(6):
            loss_of(model, seed).backward()
            if seed % accumulate == accumulate - 1:
                optimizer.step()
                optimizer.zero_grad()
        optimizers.append(optimizer)
    assert_same_params_and_state(*optimizers)


@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(("head", "tail"), ENDS, ids=str)
def test_shared_layer_in_reentrant_checkpoints_is_an_error(
    head: bool, tail: bool, accumulate: int, outside: bool
) -> None:
    model = Stack(True, True, head, tail, outside)
    in_backward(AdamW(model.named_parameters()), accumulate)
    with pytest.raises(RuntimeError, match=r"layers\.0\.\w+ got its gradient in several parts.*use_reentrant=False"):
        loss_of(model, 0).backward()


@pytest.mark.parametrize(("head", "tail"), ENDS[:3], ids=str)
def test_passes_are_told_apart_without_step(head: bool, tail: bool) -> None:
    optimizers = []
    for reentrant in (None, True):
        model = Stack(reentrant, False, head, tail)
        optimizer = AdamW(model.parameters(), lr=0.1)
        in_backward(optimizer)
        for seed in range(4):
            loss_of(model, seed).backward()
        optimizers.append(optimizer)
    assert_same_params_and_state(*optimizers)
