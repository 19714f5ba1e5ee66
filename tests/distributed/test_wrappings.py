"""Models that torch wraps, trained with our optimizers, against one process that sees the whole batch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from cases import Case
from ranks import on_ranks
from sharded import CLOSE, SOME, TABLE, bits, local, mismatches, place, whole
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import Shard
from wrapped import WRAPPINGS, Net, Wrapping, assert_same, loss_on, named, network, reference_loss, sharded

from descend import SGD, AdamW, in_backward

ADAMW = Case(AdamW, torch.optim.AdamW, dict(lr=0.01, weight_decay=0.1))


def follow(label: str, rank: int, wrapping: Wrapping, **ours: Any) -> None:
    case = TABLE[label]
    net = network()
    model = wrapping.wrap(copy.deepcopy(net))
    optimizer, theirs = (
        case.ours(model.parameters(), **case.options, **ours),
        case.theirs(net.parameters(), **case.options),
    )
    for seed in range(3):
        optimizer.zero_grad()
        theirs.zero_grad()
        loss_on(rank, wrapping, model, seed).backward()
        reference_loss(net, seed).backward()
        optimizer.step()
        if "max_norm" in ours:
            norm = torch.nn.utils.clip_grad_norm_(net.parameters(), ours["max_norm"])
            torch.testing.assert_close(optimizer.grad_norm, norm.item(), **CLOSE)
        theirs.step()
    assert_same(model, optimizer, net, theirs)


def compare(rank: int, name: str) -> list[str]:
    wrapping = WRAPPINGS[name]
    found = mismatches(follow, TABLE if name == "FSDP2 of 3" else SOME, rank, wrapping)
    return found + mismatches(follow, SOME, rank, wrapping, max_norm=0.1)


@pytest.mark.parametrize("name", WRAPPINGS)
def test_training_is_that_of_one_process(name: str) -> None:
    for found in on_ranks(WRAPPINGS[name].world, compare, name):
        assert not found


# What else programs do.


def pair(wrapping: Wrapping, case: Case = ADAMW, **ours: Any) -> tuple[nn.Module, Any, Net, Any]:
    """A wrapped model and its optimizer; the model in one process and torch's optimizer."""
    net = network()
    model = wrapping.wrap(copy.deepcopy(net))
    return (
        model,
        case.ours(model.parameters(), **case.options, **ours),
        net,
        case.theirs(net.parameters(), **case.options),
    )


def zero_redundancy(rank: int) -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    net = network()
    model = WRAPPINGS["DDP"].wrap(copy.deepcopy(net))
    for kind, theirs, options in (
        (AdamW, torch.optim.AdamW, dict(lr=0.01)),
        (SGD, torch.optim.SGD, dict(lr=0.1, momentum=0.9)),
    ):
        optimizer = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=kind, **options)
        reference = theirs(net.parameters(), **options)
        for seed in range(3):
            for which, loss in (
                (optimizer, loss_on(rank, WRAPPINGS["DDP"], model, seed)),
                (reference, reference_loss(net, seed)),
            ):
                which.zero_grad()
                loss.backward()
                which.step()
        for name, param in named(model).items():
            torch.testing.assert_close(param.detach(), dict(net.named_parameters())[name].detach(), **CLOSE)


def test_zero_redundancy_optimizer() -> None:
    on_ranks(2, zero_redundancy)


def mixed_precision(rank: int) -> None:
    """Parameters in bfloat16, gradients reduced in float32: the step itself is that of the gradients that come."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model, optimizer, net, theirs = pair(Wrapping(2, sharded(mp_policy=policy), 2), max_norm=0.1)
    for seed in range(3):
        optimizer.zero_grad()
        loss_on(rank, Wrapping(2, sharded(), 2), model, seed).backward()
        for name, param in net.named_parameters():
            param.grad = whole(named(model)[name].grad).to(param.dtype)
        optimizer.step()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        theirs.step()
    assert_same(model, optimizer, net, theirs)


def test_mixed_precision() -> None:
    on_ranks(2, mixed_precision)


def accumulate(rank: int) -> None:
    wrapping = WRAPPINGS["FSDP2 of 2"]
    model, optimizer, net, theirs = pair(wrapping, max_norm=0.1)
    for step in range(2):
        for micro in range(3):
            model.set_requires_gradient_sync(micro == 2)
            loss_on(rank, wrapping, model, 3 * step + micro).backward()
            reference_loss(net, 3 * step + micro).backward()
        optimizer.step()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        theirs.step()
        optimizer.zero_grad()
        theirs.zero_grad()
    assert_same(model, optimizer, net, theirs)


def test_accumulated_gradients() -> None:
    on_ranks(2, accumulate)


def train(rank: int, wrapping: Wrapping, model: nn.Module, optimizer: Any, net: Net, theirs: Any, seed: int) -> None:
    for which, loss in ((optimizer, loss_on(rank, wrapping, model, seed)), (theirs, reference_loss(net, seed))):
        which.zero_grad()
        loss.backward()
        which.step()


def swapped_after_construction(rank: int) -> None:
    """As Accelerate does it: the optimizer is made first, and gets the sharded parameters later."""
    wrapping, net = WRAPPINGS["FSDP2 of 2"], network()
    model = copy.deepcopy(net)
    optimizer, theirs = AdamW(model.parameters(), lr=0.01), torch.optim.AdamW(net.parameters(), lr=0.01)
    for group in optimizer.param_groups:  # frees the whole ones
        group["params"] = [torch.empty(1, requires_grad=True) for _ in group["params"]]
    model = wrapping.wrap(model)
    optimizer.param_groups[0]["params"] = list(model.parameters())
    for seed in range(3):
        train(rank, wrapping, model, optimizer, net, theirs, seed)
    assert_same(model, optimizer, net, theirs)


def swapped_between_steps(rank: int) -> None:
    """``swap_tensors`` and ``.data`` put other memory under the same parameters."""
    wrapping = WRAPPINGS["FSDP2 of 2"]
    model, optimizer, net, theirs = pair(wrapping)
    train(rank, wrapping, model, optimizer, net, theirs, 0)
    optimizer.zero_grad()
    mesh = init_device_mesh("cpu", (2,))
    weights = [place(torch.full((6, 3), 0.25 * n, dtype=torch.float64), mesh, Shard(0)) for n in range(3)]
    params = [torch.nn.Parameter(weights[0].clone())]
    whole_params = [torch.nn.Parameter(whole(weights[0]).clone())]
    optimizer, theirs = AdamW(params, lr=0.1), torch.optim.AdamW(whole_params, lr=0.1)

    def step() -> None:
        for param in (*params, *whole_params):
            param.grad = torch.ones_like(param)
        optimizer.step()
        theirs.step()

    step()
    step()
    params[0].data = weights[1]
    whole_params[0].data = whole(weights[1])
    step()
    state = optimizer.state[params[0]]
    del params[0].grad
    torch.utils.swap_tensors(params[0], torch.nn.Parameter(weights[2]))
    optimizer.state[params[0]] = state
    whole_params[0].data = whole(weights[2])
    step()
    step()
    torch.testing.assert_close(whole(params[0]), whole_params[0].detach(), **CLOSE)
    assert torch.equal(local(weights[2]), local(params[0]))  # the same memory


def converted_between_steps(rank: int) -> None:
    """``model.to`` another dtype."""
    wrapping = WRAPPINGS["TP"]
    model, optimizer, net, theirs = pair(wrapping)
    train(rank, wrapping, model, optimizer, net, theirs, 0)
    optimizer.zero_grad()
    model.float()
    model.double()
    assert {param.dtype for param in optimizer.param_groups[0]["params"]} == {torch.float64}
    net.float()
    net.double()
    train(rank, wrapping, model, optimizer, net, theirs, 1)
    assert_same(model, optimizer, net, theirs)


@pytest.mark.parametrize("work", [swapped_after_construction, swapped_between_steps, converted_between_steps])
def test_parameters_change(work: Any) -> None:
    on_ranks(2, work)


def state_in(rank: int) -> None:
    """State of another dtype lies like the parameter, and is that of one process."""
    wrapping, net = WRAPPINGS["FSDP2 of 2"], network()
    model = wrapping.wrap(copy.deepcopy(net))
    options: dict[str, Any] = dict(lr=0.01, state_dtype=torch.float32, foreach=True)
    optimizer, alone = AdamW(model.parameters(), **options), AdamW(net.parameters(), **options)
    for seed in range(3):
        for which, loss in ((optimizer, loss_on(rank, wrapping, model, seed)), (alone, reference_loss(net, seed))):
            which.zero_grad()
            loss.backward()
            which.step()
    for name, param in named(model).items():
        for key, value in alone.state[dict(net.named_parameters())[name]].items():
            found = optimizer.state[param][key]
            assert found.dtype == value.dtype == torch.float32
            assert type(found) is (type(param) if value.ndim else torch.Tensor)
            if value.ndim:
                assert local(found).dtype == torch.float32
                assert found.placements == param.placements
            torch.testing.assert_close(whole(found), value, rtol=1e-6, atol=1e-12)


def test_dtype_of_state() -> None:
    on_ranks(2, state_in)


def capturable(rank: int) -> None:
    model, optimizer, _, _ = pair(WRAPPINGS["FSDP2 of 2"], Case(AdamW, torch.optim.AdamW, dict(capturable=True)))
    loss_on(rank, WRAPPINGS["FSDP2 of 2"], model, 0).backward()
    with pytest.raises(AssertionError, match="capturable=True"):
        optimizer.step()
    optimizer = AdamW(model.parameters(), fused=True)
    optimizer.step()
    integers = nn.Parameter(place(torch.ones(4, dtype=torch.int64), init_device_mesh("cpu", (2,)), Shard(0)), False)
    integers.grad = torch.ones_like(integers)
    with pytest.raises(RuntimeError, match="fused=True"):
        AdamW([integers], fused=True).step()


def test_flags_mean_what_they_mean_in_torch() -> None:
    on_ranks(2, capturable)


def inside_backward(rank: int, name: str) -> None:
    """Equal to the ordinary optimizer, bit for bit."""
    wrapping = WRAPPINGS[name]
    ordinary, inside = (pair(wrapping)[:2] for _ in range(2))
    handle = in_backward(inside[1])
    for seed in range(3):
        for model, optimizer in (ordinary, inside):
            optimizer.zero_grad()
            loss_on(rank, wrapping, model, seed).backward()
        if name == "TP":
            assert all(param.grad is None for param in inside[0].parameters())
        inside[1].step()
        ordinary[1].step()
    assert bits(inside[1]) == bits(ordinary[1])
    handle.remove()


@pytest.mark.parametrize("name", ["TP", "FSDP2 of 2", "FSDP2 x TP"])
def test_in_backward(name: str) -> None:
    on_ranks(WRAPPINGS[name].world, inside_backward, name)


def clipped_inside_backward(rank: int) -> float:
    wrapping = WRAPPINGS["TP"]
    model, optimizer, net, _ = pair(wrapping, max_norm=0.05)
    theirs = {param: torch.optim.AdamW([param], **ADAMW.options) for param in net.parameters()}
    in_backward(optimizer, clip="parameter")
    for seed in range(2):
        loss_on(rank, wrapping, model, seed).backward()
        optimizer.step()
        reference_loss(net, seed).backward()
        for param, one in theirs.items():
            torch.nn.utils.clip_grad_norm_(param, 0.05)
            one.step()
            one.zero_grad()
    for name, param in named(model).items():
        torch.testing.assert_close(whole(param), dict(net.named_parameters())[name].detach(), **CLOSE)
    return optimizer.grad_norm


def test_in_backward_with_clipping() -> None:
    one, other = on_ranks(2, clipped_inside_backward)
    assert one == other


def scaled(rank: int, amp: Any) -> list[float]:
    """A gradient that overflows on one rank only: no rank steps, and the scale shrinks on all."""
    wrapping = WRAPPINGS["FSDP2 of 2"]
    model, optimizer, net, theirs = pair(wrapping, amp=amp, max_norm=0.1 if amp else None)
    scaler, scales = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=100), []
    for seed in range(3):
        optimizer.zero_grad()
        theirs.zero_grad()
        scaler.scale(loss_on(rank, wrapping, model, seed)).backward()
        reference_loss(net, seed).backward()
        if seed == 1:
            if rank == 1:
                local(model.up.weight.grad).fill_(torch.inf)
            before = bits(optimizer)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
        if seed == 1:
            assert bits(optimizer) == before
        else:
            if amp:
                torch.nn.utils.clip_grad_norm_(net.parameters(), 0.1)
            theirs.step()
    assert_same(model, optimizer, net, theirs)
    return scales


@pytest.mark.parametrize("amp", [None, "fused"])
def test_grad_scaler(amp: Any) -> None:
    assert on_ranks(2, scaled, amp) == [[1024.0, 512.0, 512.0]] * 2
