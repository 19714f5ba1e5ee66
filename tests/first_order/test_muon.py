"""Muon and NorMuon beside torch's and their papers, with what applies to every optimizer."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import (
    MATRICES,
    MATRIX_CASES,
    Case,
    Twins,
    assert_same_bits,
    assert_unmoved,
    give_grads,
    leaves,
    params_of,
    snapshot,
    state_of,
)
from torch import Tensor

from descend import AdamW, Muon, NorMuon

FLAT = (*(shape for shape in MATRICES if len(shape) == 2 and 0 not in shape), (100, 40))  # what torch's takes
MUON_BACKENDS = ("matrix", "eager")
KINDS = pytest.mark.parametrize("kind", [Muon, NorMuon])


def matrices() -> list[Tensor]:
    return leaves(MATRICES)


@pytest.mark.parametrize("backend", MUON_BACKENDS)
@pytest.mark.parametrize("case", MATRIX_CASES, ids=str)
def test_trajectory_is_the_textbooks(case: Case, backend: Any) -> None:
    twins = Twins(case, matrices, backend=backend)
    for seed in range(10):
        twins.step(seed)
    twins.assert_equal(rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(nesterov=False, weight_decay=0),
        dict(adjust_lr_fn="match_rms_adamw", momentum=0.5),
        dict(ns_coefficients=(2.0, -1.5, 0.5), ns_steps=3, eps=1e-3),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_trajectory_is_torchs_but_for_rounding_to_bfloat16(dtype: torch.dtype, options: dict[str, Any]) -> None:
    ours, theirs = (
        kind(leaves(FLAT, dtype), lr=1.0, **options)  # type: ignore[operator]
        for kind in (Muon, torch.optim.Muon)
    )
    for seed in range(3):
        before = [param.detach().clone() for param in params_of(ours)]
        for a, b in zip(params_of(ours), params_of(theirs), strict=True):
            with torch.no_grad():
                b.copy_(a)
        for optimizer in (ours, theirs):
            give_grads(params_of(optimizer), seed)
            optimizer.step()
        if dtype == torch.bfloat16 and not options.get("nesterov", True):
            break  # torch has overwritten its momentum
        for a, b, old in zip(params_of(ours), params_of(theirs), before, strict=True):
            step = (b.detach() - old).norm()
            # Five iterations in bfloat16; then bfloat16 parameters round each element.
            allowed = 0.06 * step + (0.006 * old.norm() if dtype == torch.bfloat16 else 0)
            assert float((a.detach() - b.detach()).norm()) < float(allowed)
        for a, b in zip(state_of(ours).values(), state_of(theirs).values(), strict=True):
            torch.testing.assert_close(a, b, atol=1e-2 if dtype == torch.bfloat16 else 1e-6, rtol=1e-5)


def test_momentum_in_bfloat16_is_not_overwritten_as_in_torch() -> None:
    (weight,) = leaves([(7, 5)], torch.bfloat16)
    optimizer = Muon([weight], nesterov=False)
    weight.grad = torch.full_like(weight, 2.0)
    optimizer.step()
    torch.testing.assert_close(optimizer.state[weight]["momentum_buffer"], torch.full_like(weight, 0.1))


@KINDS
def test_matrices_that_torch_refuses(kind: Any) -> None:
    convolution, flat = leaves([(6, 2, 3, 3)]), [leaves([(6, 2, 3, 3)])[0].detach().flatten(1).requires_grad_()]
    stack, each = leaves([(3, 6, 5)]), [part.detach().clone().requires_grad_() for part in leaves([(3, 6, 5)])[0]]
    fused, parts = leaves([(9, 4)]), [part.detach().clone().requires_grad_() for part in leaves([(9, 4)])[0].split(3)]
    for ours, options, plain in (
        (convolution, {}, flat),
        (stack, dict(stacked=True), each),
        (fused, dict(split=3), parts),
        (leaves([(9, 4)]), dict(split=(3, 3, 3)), [part.detach().clone().requires_grad_() for part in parts]),
    ):
        one, many = kind(ours, **options), kind(plain)
        for seed in range(2):
            give_grads(ours, seed)
            cut = ours[0].grad.reshape(len(plain), *plain[0].shape)
            for param, grad in zip(plain, cut, strict=True):
                param.grad = grad
            one.step()
            many.step()
        torch.testing.assert_close(ours[0].detach().reshape(cut.shape), torch.stack(plain).detach())


def test_state_dict_goes_to_torch_and_back() -> None:
    ours, theirs = Muon(leaves(FLAT, torch.float32)), torch.optim.Muon(leaves(FLAT, torch.float32))
    assert theirs.defaults.items() <= ours.defaults.items()
    assert list(ours.defaults)[: len(theirs.defaults)] == list(theirs.defaults)
    for optimizer in (ours, theirs):
        give_grads(params_of(optimizer), 0)
        optimizer.step()
    assert list(ours.state_dict()["state"][0]) == list(theirs.state_dict()["state"][0]) == ["momentum_buffer"]
    theirs.load_state_dict(ours.state_dict())
    ours = Muon(leaves(FLAT, torch.float32), lr=0.5)
    ours.load_state_dict(theirs.state_dict())
    assert ours.param_groups[0]["lr"] == 1e-3
    assert_same_bits(state_of(ours), state_of(theirs))
    theirs.step()
    give_grads(params_of(ours), 1)
    ours.step()


def test_checkpoint_of_torch_without_our_options() -> None:
    theirs, ours = torch.optim.Muon(leaves(FLAT)), Muon(leaves(FLAT))
    give_grads(params_of(theirs), 0)
    theirs.step()
    ours.load_state_dict(theirs.state_dict())
    give_grads(params_of(ours), 1)
    ours.step()
    assert ours.param_groups[0].get("split") is None


@KINDS
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_copies_continue_alike(kind: Any, copied: Callable[[Any], Any]) -> None:
    optimizer = kind(matrices(), max_norm=1.0, ns_coefficients="polar_express")
    give_grads(params_of(optimizer), 0)
    optimizer.step()
    again = copied(optimizer)
    for each in (optimizer, again):
        give_grads(params_of(each), 1)
        each.step()
    assert_same_bits(state_of(optimizer), state_of(again))
    assert all(map(torch.equal, params_of(optimizer), params_of(again)))
    restored = kind(matrices())
    restored.load_state_dict(optimizer.state_dict())
    assert restored.param_groups[0]["ns_coefficients"] == "polar_express"
    assert_same_bits(state_of(optimizer), state_of(restored))


@KINDS
def test_maximize_climbs(kind: Any) -> None:
    down, up = kind(matrices(), weight_decay=0.0), kind(matrices(), weight_decay=0.0, maximize=True)
    start = [param.detach().clone() for param in params_of(down)]
    for optimizer in (down, up):
        give_grads(params_of(optimizer), 0)
        optimizer.step()
    for a, b, old in zip(params_of(down), params_of(up), start, strict=True):
        torch.testing.assert_close(a.detach() - old, old - b.detach())


@KINDS
def test_gradients_that_are_not_finite(kind: Any) -> None:
    optimizer = kind(matrices(), nonfinite="skip")
    give_grads(params_of(optimizer), 0)
    optimizer.step()
    before = snapshot(optimizer)
    give_grads(params_of(optimizer), 1)
    params_of(optimizer)[0].grad[0, 0] = math.nan
    optimizer.step()
    assert_unmoved(optimizer, before)
    assert optimizer.skipped_steps == 1
    optimizer = kind(matrices())
    give_grads(params_of(optimizer), 0)
    params_of(optimizer)[0].grad[0, 0] = math.nan
    optimizer.step()
    found = [bool(param.isnan().any()) for param in params_of(optimizer)]
    assert found == [True] + [False] * (len(MATRICES) - 1)  # not even those of the same batch


@KINDS
def test_gradients_are_left_as_they_were(kind: Any) -> None:
    optimizer = kind(matrices(), max_norm=0.1, maximize=True)
    give_grads(params_of(optimizer), 0)
    before = [param.grad.clone() for param in params_of(optimizer)]
    optimizer.step()
    assert all(torch.equal(param.grad, old) for param, old in zip(params_of(optimizer), before, strict=True))


@KINDS
def test_steps_are_differentiable(kind: Any) -> None:
    def moved(scale: Tensor) -> Tensor:
        weight = leaves([(4, 3)])[0].detach().clone().requires_grad_()
        leaf = weight.clone()
        leaf.grad = scale * torch.arange(12.0, dtype=torch.float64).view(4, 3).sin()
        kind([leaf], lr=0.1, differentiable=True, ns_steps=2).step()
        return leaf

    scale = torch.ones(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(moved, (scale,))


def test_options_that_are_wrong_are_errors() -> None:
    for options, message in (
        (dict(lr=-1.0), "Learning rate should be >= 0 but is: -1.0"),
        (dict(lr=math.nan), "Learning rate should be >= 0"),
        (dict(lr=torch.ones(2)), "Tensor lr must be 1-element"),
        (dict(momentum=-0.1), "momentum should be >= 0 but is: -0.1"),
        (dict(weight_decay=-0.1), "weight decay should be >= 0 but is: -0.1"),
        (dict(adjust_lr_fn="more"), "Adjust learning rate function more is not supported"),
        (dict(ns_steps=100), "Number of steps must be less than 100"),
        (dict(ns_steps=2.5), "must be an integer"),
        (dict(eps=-1.0), "Invalid epsilon value"),
        (dict(ns_coefficients="keller"), "coefficients must be one of"),
        (dict(ns_coefficients=(1.0, 2.0)), "Coefficients must be a tuple of exactly 3 values"),
        (dict(split=0), "split must be a number of pieces, or the rows of each, got 0"),
        (dict(split=(2, 0)), "split must be"),
        (dict(split="qkv"), "split must be"),
    ):
        with pytest.raises(ValueError, match=message):
            Muon(matrices(), **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"NorMuon: beta2 must be in \[0, 1\), got 1"):
        NorMuon(matrices(), beta2=1.0)


def test_parameters_that_are_no_matrices_are_errors() -> None:
    bias = torch.zeros(3, requires_grad=True)
    stack = torch.zeros(2, 3, requires_grad=True)
    group = dict(params=[("weight", stack), ("bias", bias)])
    for params, options, message in (
        ([group], {}, r"at least 2 dimensions, .* size: torch.Size\(\[3\]\) \(bias\)"),
        ([("stack", stack)], dict(stacked=True), r"at least 3 dimensions, .* \(stack\)"),
        ([("stack", stack)], dict(split=3), "split=3, but stack: 2 rows cannot be cut into 3 equal pieces"),
        ([("stack", stack)], dict(split=(1, 2)), "split=.*, but stack: 2 rows cannot be cut into pieces"),
    ):
        with pytest.raises(ValueError, match=message):
            Muon(params, **options)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="does not support complex parameters"):
        Muon([torch.zeros(2, 2, dtype=torch.complex64, requires_grad=True)])
    optimizer = Muon([stack])
    with pytest.raises(ValueError, match="at least 2 dimensions"):
        optimizer.add_param_group(dict(params=[bias]))
    assert len(optimizer.param_groups) == 1


def test_sparse_gradients_are_an_error() -> None:
    weight = torch.zeros(4, 2, requires_grad=True)
    weight.grad = torch.sparse_coo_tensor([[1]], torch.ones(1, 2), (4, 2))
    with pytest.raises(RuntimeError, match="Muon does not support sparse gradients"):
        Muon([weight]).step()


def test_a_group_of_another_optimizer_may_be_muons() -> None:
    matrix, bias, alone = torch.zeros(4, 3, requires_grad=True), torch.zeros(3, requires_grad=True), leaves([(4, 3)])
    alone[0].data.zero_()
    alone[0].data = alone[0].data.float()
    groups: Any = [dict(params=[matrix], method="muon", lr=0.1), dict(params=[bias])]
    optimizer, muon = AdamW(groups), Muon(alone, lr=0.1)
    for param in (matrix, bias, *alone):
        param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    muon.step()
    assert torch.equal(matrix, alone[0])
    assert bool(bias.any())
