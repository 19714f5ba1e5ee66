"""Rules with sums: what is summed, what is formed of it, and that nothing moves before that is known."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from cases import DENSE_EVERYWHERE, assert_unmoved, give_grads, leaves, params_of, snapshot
from sum_rules import Estimated, Trusted, estimated_naively, trust_sums, trusted, trusted_naively
from torch import Tensor

from descend import AdamW, FirstOrder, Monitor, from_rule, in_backward
from descend.backends import EAGER, available
from descend.core.signature import signature
from descend.ops import summing, where

SHAPES = [(), (0,), (1,), (1023,), (31, 33)]
NAIVELY = {Trusted: trusted_naively, Estimated: estimated_naively}


def gradients(params: Sequence[Tensor], count: int) -> list[list[Tensor]]:
    made = torch.Generator().manual_seed(1)
    return [
        [
            torch.empty_like(p.detach()).copy_(torch.randn(p.shape, generator=made, dtype=torch.float64, device="cpu"))
            for p in params
        ]
        for _ in range(count)
    ]


def train(optimizer: FirstOrder, steps: Sequence[Sequence[Tensor]]) -> None:
    for grads in steps:
        for param, grad in zip(params_of(optimizer), grads, strict=True):
            param.grad = grad.clone()
        optimizer.step()


@pytest.mark.parametrize("backend", DENSE_EVERYWHERE)
@pytest.mark.parametrize("kind", NAIVELY, ids=lambda kind: kind.__name__)
def test_steps_match_float64(kind: Any, backend: str) -> None:
    params = leaves(SHAPES)
    steps = gradients(params, 4)
    expected = NAIVELY[kind](params, steps)
    optimizer = kind([dict(params=params[:2]), dict(params=params[2:])], backend=backend)
    train(optimizer, steps)
    assert {placement.backend for placement in optimizer.backends()} == {backend}
    torch.testing.assert_close([param.detach() for param in params], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", NAIVELY, ids=lambda kind: kind.__name__)
def test_parameters_of_several_backends_and_dtypes(kind: Any) -> None:
    params = [
        torch.randn(300, dtype=torch.float64, requires_grad=True),
        torch.randn(30, 40, requires_grad=True),
        torch.randn(40, 60).t()[::2].requires_grad_(),  # not dense in memory
        torch.randn(40, 30).t().requires_grad_(),
        torch.randn(5, dtype=torch.complex64, requires_grad=True),
    ]
    params = [torch.nn.Parameter(param) for param in params]
    steps = gradients(params[:4], 3)
    for grads in steps:
        grads.append(torch.randn(5, dtype=torch.complex64))
    real = [torch.view_as_real(param.detach()) if param.is_complex() else param for param in params]
    real_steps = [[torch.view_as_real(g) if g.is_complex() else g for g in grads] for grads in steps]
    expected = NAIVELY[kind](real, real_steps)
    optimizer = kind(params)
    train(optimizer, steps)
    assert [placement.backend for placement in optimizer.backends()] == ["cpu", "cpu", "foreach", "cpu", "foreach"]
    ends = [torch.view_as_real(param.detach()) if param.is_complex() else param.detach() for param in params]
    torch.testing.assert_close(ends, expected, rtol=1e-5, atol=1e-5, check_dtype=False)


@pytest.mark.parametrize("backend", DENSE_EVERYWHERE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sums_are_float64(dtype: torch.dtype, backend: str) -> None:
    """The part computes in float32; adding costs nothing beyond that."""
    params = [torch.randn(size).to(dtype).requires_grad_() for size in (0, 1, 1023, 70_000)]
    state = [torch.randn(param.shape) for param in params]
    for param in params:
        param.grad = torch.randn(param.shape).to(dtype)
    chosen = next(each for each in (EAGER, *available(backend)) if each.name == backend)
    launch = chosen.launch(trusted, 2, (dtype, dtype, torch.float32), params, [1, 0, 1, 1])
    launch.compile(False)
    launch.set_state([[each] for each in state])
    for row in (0, 1):
        launch.set_scalars(row, 0.5, (0.1, 0.25 * row))
    sums = torch.as_tensor(launch.sums(), device="cpu")
    assert sums.dtype == torch.float64
    for row, param, average, gain in zip(sums, params, state, (0.25, 0.0, 0.25, 0.25), strict=True):
        wide = [tensor.double() for tensor in (param.detach(), 0.5 * param.grad.double(), average)]
        expected = torch.stack([each.sum() for each in trust_sums(*wide, 0.1, gain)])
        torch.testing.assert_close(row, expected.cpu(), rtol=1e-6, atol=0)


def test_bits_do_not_depend_on_threads() -> None:
    ends = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        params = [param.float().detach().requires_grad_() for param in leaves([(100_000,), (40_000,), (7,)])]
        train(Trusted(params), gradients(params, 2))
        ends.append([param.detach() for param in params])
    for end in ends[1:]:
        assert all(map(torch.equal, end, ends[0]))


@pytest.mark.parametrize("backend", DENSE_EVERYWHERE)
def test_part_sees_scaled_and_clipped_gradients(backend: str) -> None:
    params = leaves(SHAPES)
    steps = gradients(params, 3)
    norms = [torch.cat([grad.reshape(-1) for grad in grads]).norm().item() for grads in steps]
    scaled = [[grad * (-1 / (n + 1e-6)) for grad in grads] for grads, n in zip(steps, norms, strict=True)]
    expected = estimated_naively(params, [[-grad for grad in grads] for grads in scaled])
    other = trusted_naively(params, scaled)
    for kind, ends, more in ((Estimated, expected, {}), (Trusted, other, dict(maximize=True))):
        copies = [param.detach().clone().requires_grad_() for param in params]
        optimizer = kind(copies, max_norm=1.0, amp="fused", backend=backend, **more)
        for grads in steps:
            for param, grad in zip(copies, grads, strict=True):
                param.grad = grad * 8
            optimizer.grad_scale = 8.0
            optimizer.step()
        torch.testing.assert_close([copy.detach() for copy in copies], ends, rtol=1e-12, atol=1e-12)


def test_parameters_without_gradients_do_not_count() -> None:
    params = leaves([(5,), (6,)])
    steps = gradients(params, 2)
    expected = estimated_naively(params[:1], [grads[:1] for grads in steps])
    optimizer = Estimated(params)
    for grads in steps:
        params[0].grad = grads[0]
        optimizer.step()
    torch.testing.assert_close(params[0].detach(), expected[0])
    assert torch.equal(params[1], leaves([(5,), (6,)])[1])


def test_sums_over_all_are_those_of_one_method() -> None:
    params = leaves([(5,), (6,), (7,)])
    steps = gradients(params, 3)
    expected = estimated_naively(params[:2], [grads[:2] for grads in steps])
    alone = AdamW(leaves([(5,), (6,), (7,)])[2:], lr=0.1)
    train(alone, [grads[2:] for grads in steps])
    groups = [dict(params=params[:1], method=Estimated), dict(params=params[1:2], method=Estimated, lr=1.0)]
    train(AdamW([*groups, dict(params=params[2:], lr=0.1)]), steps)
    torch.testing.assert_close([param.detach() for param in params[:2]], expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(params[2], params_of(alone)[0])


def test_formed_scalars_are_per_group() -> None:
    params = leaves([(5,), (5,), (9,)])
    steps = gradients(params, 2)
    slow = trusted_naively(params[1:2], [grads[1:2] for grads in steps], lr=0.01)
    fast = trusted_naively(params[::2], [grads[::2] for grads in steps])
    train(Trusted([dict(params=params[:1]), dict(params=params[1:2], lr=0.01), dict(params=params[2:])]), steps)
    torch.testing.assert_close([p.detach() for p in params], [fast[0], slow[0], fast[1]], rtol=1e-12, atol=1e-12)


def test_sums_of_parameters_that_share_memory_are_taken_before_the_step() -> None:
    memory = torch.ones(6, dtype=torch.float64)
    params = [memory.requires_grad_(), memory.detach()[:3].requires_grad_()]
    for param in params:
        param.grad = torch.ones_like(param)
    Trusted(params, gain=1.0).step()
    shrunk = [1 - 0.1 * length / (length + 0.1) for length in (math.sqrt(6), math.sqrt(3))]
    assert memory.tolist() == pytest.approx([sum(shrunk) - 1] * 3 + shrunk[:1] * 3)


def test_measured_step_is_as_any_other() -> None:
    ends = []
    for watched in (False, True):
        optimizer = Trusted(leaves(SHAPES))
        monitor = Monitor(optimizer, every=1) if watched else None
        train(optimizer, gradients(params_of(optimizer), 3))
        ends.append([param.detach() for param in params_of(optimizer)])
        assert monitor is None or len(monitor.history) == 3
    assert all(map(torch.equal, *ends))


def test_nan_flows_and_a_skipped_step_moves_nothing() -> None:
    for nonfinite in ("step", "skip"):
        params = leaves([(5,), (6,)])
        optimizer = Trusted(params, nonfinite=nonfinite)
        give_grads(params, 0)
        params[0].grad[2] = math.nan
        before = snapshot(optimizer)
        optimizer.step()
        if nonfinite == "skip":
            assert_unmoved(optimizer, before)
        else:
            assert params[0].isnan().all()
            assert params[1].isfinite().all()


class Failing(Trusted):
    """Forms no scalar for long parameters, once it is told to."""

    fails = False
    answer: Any = (1.0,)

    def scalars_of_sums(self, group: Mapping[str, Any], sums: Sequence[float], numel: int) -> Any:
        if self.fails and numel > 5:
            raise ZeroDivisionError("nothing to divide by")
        return self.answer


@pytest.mark.parametrize("alone", [True, False])
def test_an_error_leaves_everything_as_it_was(alone: bool) -> None:
    params = leaves([(5,), (6,)])
    if not alone:
        params.append(torch.ones(4, 6, dtype=torch.float64)[:, ::2].requires_grad_())  # another backend's
    optimizer = Failing(params)
    train(optimizer, gradients(params, 1))
    before = snapshot(optimizer)
    give_grads(params, 1)
    optimizer.fails = True
    with pytest.raises(ZeroDivisionError, match="nothing to divide by"):
        optimizer.step()
    assert_unmoved(optimizer, before)
    optimizer.answer, optimizer.fails = (1.0, 2.0), False
    with pytest.raises(TypeError, match=r"scalars_of_sums must return a tuple of trust for the rule trusted, got 2"):
        optimizer.step()
    assert_unmoved(optimizer, before)


def test_inside_backward() -> None:
    ends = []
    for inside in (False, True):
        params = leaves([(5,), (6,)])
        optimizer = Trusted(params)
        handle = in_backward(optimizer) if inside else None
        for _ in range(2):
            sum((param * param).sum() for param in params).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert handle is None or handle.optimizer is optimizer
        ends.append([param.detach() for param in params])
    torch.testing.assert_close(*ends, rtol=0, atol=0)
    over_all = from_rule(by_count, "OverAll", sums_over="all")(leaves([(5,)]))
    with pytest.raises(ValueError, match="in_backward: OverAll needs sums over all parameters"):
        in_backward(over_all)


def test_what_is_refused() -> None:
    weight = torch.zeros(4, 2, requires_grad=True)
    weight.grad = torch.sparse_coo_tensor([[1]], torch.ones(1, 2), (4, 2))
    with pytest.raises(RuntimeError, match="a rule that sums over a tensor cannot update single rows"):
        Trusted([weight], sparse="touched").step()

    class Differentiable(Trusted):
        def __init__(self, params: Any) -> None:
            FirstOrder.__init__(self, params, dict(lr=0.1, gain=0.5, differentiable=True))

    weight.grad = torch.ones(4, 2)
    with pytest.raises(RuntimeError, match=r"a step with sums over .* cannot be differentiated"):
        Differentiable([weight]).step()


def total(param, grad, lr):
    return where(grad > 0, 1.0, 0.0)


@summing(total)
def by_count(param, grad, lr, count):
    return param - lr * count * grad


@pytest.mark.parametrize("backend", DENSE_EVERYWHERE)
def test_by_default_the_sums_are_the_scalars(backend: str) -> None:
    weight = torch.zeros(4, requires_grad=True)
    weight.grad = torch.tensor([1.0, -1.0, 2.0, 0.0]).to(weight)
    kinds = [from_rule(by_count, "ByCount", lr=1.0), from_rule(by_count, "ByCount", lr=1.0, sums_over="all")]
    other = torch.zeros(2, requires_grad=True)
    other.grad = torch.ones_like(other)
    kinds[0]([weight, other], backend=backend).step()
    assert weight.tolist() == [-2.0, 2.0, -4.0, 0.0]
    kinds[1]([weight, other], backend=backend).step()
    assert weight.tolist() == [-6.0, 6.0, -12.0, 0.0]
    assert [*kinds[0]([weight]).param_groups[0]] == ["params", "lr", "maximize"]
    with pytest.raises(ValueError, match="sums_over must be 'param' or 'all', got 'each'"):
        from_rule(by_count, "ByCount", sums_over="each")  # type: ignore[arg-type]


def one_argument(param):
    return param


def other_names(param, grad, rate):
    return param


def everything(param, grad, lr, count):
    return param


def one_tuple(param, grad, lr):
    return (param,)


def keywords(param, grad, *, lr):
    return param


@pytest.mark.parametrize(
    ("part", "why"),
    [
        (one_argument, "from 2 to 3 of param, grad, lr, count; got param"),
        (other_names, "by the same names"),
        (everything, "got param, grad, lr, count"),
        (one_tuple, "must return a number, or a tuple of at least two"),
        (keywords, "positional arguments only"),
    ],
)
def test_part_that_does_not_fit_its_rule(part: Callable[..., Any], why: str) -> None:
    @summing(part)
    def rule(param, grad, lr, count):
        return param - lr * grad

    with pytest.raises(TypeError, match=why):
        signature(rule)


def test_signature_of_a_rule_with_sums() -> None:
    takes = signature(trusted)
    assert (takes.state, takes.given, takes.formed, takes.sums) == (("average",), ("lr", "gain"), ("trust",), 2)
    assert takes.summed is trust_sums
