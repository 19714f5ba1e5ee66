"""What cannot be kept in one pass is refused, or kept in a way the user picks; errors leave no mess."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from backward_cases import assert_same_params_and_state
from cases import INDEPENDENT, Case, WithOwnStep, assert_unmoved, leaves, params_of, snapshot, state_of
from torch import Tensor

from descend import LBFGS, SGD, Adam, AdamW, Newton, SparseAdam, in_backward


def already_in_backward() -> SGD:
    optimizer = SGD(leaves())
    in_backward(optimizer)
    return optimizer


def shared_with_another() -> SGD:
    return SGD(params_of(already_in_backward())[1:])


def listed_twice() -> SGD:
    with pytest.warns(UserWarning, match="duplicate parameters"):
        return SGD(leaves([(3,)]) * 2)


def overlapping() -> SGD:
    memory = torch.zeros(9)
    return SGD([memory[:5].requires_grad_(), memory[4:].detach().requires_grad_()])


def complex_for_the_cpu_backend() -> SGD:
    return SGD([torch.zeros(3, dtype=torch.complex64, requires_grad=True)], backend="cpu")


# Optimizer, arguments, the error.
REFUSED: list[tuple[Callable[[], Any], dict[str, Any], type[Exception], str]] = [
    (lambda: torch.optim.SGD(leaves()), {}, TypeError, "takes an optimizer of descend that updates each parameter"),
    (lambda: LBFGS(leaves()), {}, TypeError, "got descend.second_order.lbfgs.LBFGS"),
    (lambda: Newton(leaves()), {}, TypeError, "got descend.second_order.newton.Newton"),
    (lambda: None, {}, TypeError, "got builtins.NoneType"),
    (lambda: WithOwnStep(leaves()), {}, TypeError, "WithOwnStep has a step of its own"),
    *(
        (lambda: SGD(leaves()), dict(accumulate=value), ValueError, "accumulate must be a whole number >= 1")
        for value in (0, -1, 1.5, True, "2", None)
    ),
    (lambda: SGD(leaves()), dict(clip="norm"), ValueError, "clip must be one of"),
    (lambda: SGD(leaves()), dict(nonfinite="skip"), ValueError, "nonfinite must be None or 'parameter'"),
    (lambda: SGD(leaves(), max_norm=1.0), {}, ValueError, "Pass clip='previous' or clip='parameter'"),
    (lambda: SGD(leaves()), dict(clip="previous"), ValueError, "this SGD has none"),
    (lambda: SGD(leaves(), nonfinite="skip"), {}, ValueError, "Pass nonfinite='parameter'"),
    (lambda: SGD(leaves(), nonfinite="raise"), {}, ValueError, "Pass nonfinite='parameter'"),
    (lambda: SGD(leaves()), dict(nonfinite="parameter"), ValueError, "this SGD has 'step'"),
    (lambda: AdamW(leaves(), amp="fused"), {}, ValueError, "AdamW has amp='fused'"),
    (lambda: SGD(leaves(), differentiable=True), {}, ValueError, "cannot be differentiated"),
    (listed_twice, {}, ValueError, r"param_groups[0]['params'][0] of SGD is listed 2 times"),
    (overlapping, {}, ValueError, "shares memory with another tensor"),
    (complex_for_the_cpu_backend, {}, RuntimeError, "backend='cpu' cannot run"),
    (already_in_backward, {}, RuntimeError, "this SGD is in backward already"),
    (shared_with_another, {}, RuntimeError, "steps inside backward with another optimizer"),
]


@pytest.mark.parametrize(("make", "options", "kind", "message"), REFUSED, ids=[message for *_, message in REFUSED])
def test_refused_call_changes_nothing(
    make: Callable[[], Any], options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    optimizer = make()
    before = getattr(optimizer, "in_backward", None)
    hooks = [len(p._post_accumulate_grad_hooks or ()) for p in params_of(optimizer)] if optimizer else []
    with pytest.raises(kind) as caught:
        in_backward(optimizer, **options)
    assert message in str(caught.value)
    assert getattr(optimizer, "in_backward", None) is before
    assert hooks == ([len(p._post_accumulate_grad_hooks or ()) for p in params_of(optimizer)] if optimizer else [])


def test_group_that_is_to_be_differentiated_later_is_an_error() -> None:
    params = leaves([(2,), (3,)])
    optimizer = SGD([{"params": params[:1]}, {"params": params[1:]}])
    in_backward(optimizer)
    optimizer.param_groups[1]["differentiable"] = True
    with pytest.raises(ValueError, match=r"param_groups\[1\].* cannot be differentiated"):
        params[1].sum().backward()


# Clipping.


def give(params: list[Tensor], grads: list[Tensor]) -> None:
    """Gradients that come in the order of the parameters."""
    for param, grad in zip(params, grads, strict=True):
        (param * grad).sum().backward()


def random_grads(seed: int, factor: float) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [factor * torch.randn(shape, generator=random, dtype=torch.float64) for shape in ((4,), (3, 2), (7,))]


@pytest.mark.parametrize("case", INDEPENDENT, ids=str)
def test_clip_by_parameter_is_an_optimizer_for_each(case: Case) -> None:
    params, alone = leaves([(4,), (3, 2), (7,)]), leaves([(4,), (3, 2), (7,)])
    optimizer = case.ours(params, **case.options, max_norm=0.5)
    in_backward(optimizer, clip="parameter")
    others = [case.ours([param], **case.options, max_norm=0.5) for param in alone]
    for seed in range(4):
        grads = random_grads(seed, 10.0**-seed)
        give(params, grads)
        optimizer.step()
        for param, grad, other in zip(alone, grads, others, strict=True):
            param.grad = grad
            other.step()
        assert optimizer.grad_norm == pytest.approx(math.hypot(*(other.grad_norm for other in others)), rel=1e-12)
    assert all(map(torch.equal, params, alone))


@pytest.mark.parametrize("calls_step", [True, False])
@pytest.mark.parametrize("factors", [(1, 1, 1, 1), (1, 100, 1, 1), (1, 1e-3, 1, 1e3), (1e200, 1e-200, 1e300, 1)])
def test_clip_by_previous_norm_or_the_norm_so_far(factors: tuple[float, ...], calls_step: bool) -> None:
    params, expected = leaves([(4,), (3, 2), (7,)]), leaves([(4,), (3, 2), (7,)])
    optimizer = SGD(params, lr=1.0, max_norm=0.5)
    in_backward(optimizer, clip="previous")
    previous = 0.0
    for seed, factor in enumerate(factors):
        grads = random_grads(seed, factor)
        give(params, grads)
        so_far = 0.0
        for param, grad in zip(expected, grads, strict=True):
            so_far = math.hypot(so_far, float((grad / factor).norm()) * factor)
            coefficient = min(1.0, 0.5 / (max(previous, so_far) + 1e-6))
            param.data -= coefficient * grad
        if calls_step:
            optimizer.step()
            assert optimizer.grad_norm == pytest.approx(so_far, rel=1e-12)
        previous = so_far
    for param, wanted in zip(params, expected, strict=True):
        torch.testing.assert_close(param, wanted, rtol=1e-12, atol=1e-12)  # rounding of float64


def test_clip_by_previous_norm_is_exact_while_norms_stay() -> None:
    params, alike = leaves([(4,), (3, 2), (7,)]), leaves([(4,), (3, 2), (7,)])
    inside, ordinary = SGD(params, lr=0.1, max_norm=0.5), SGD(alike, lr=0.1, max_norm=0.5)
    in_backward(inside, clip="previous")
    grads = random_grads(0, 1.0)
    give(params, grads)
    inside.step()
    for param, other in zip(params, alike, strict=True):
        other.data.copy_(param.data)
    for _ in range(3):
        give(params, grads)
        give(alike, grads)
        inside.step()
        ordinary.step()
        ordinary.zero_grad()
    for param, other in zip(params, alike, strict=True):
        torch.testing.assert_close(param, other, rtol=1e-14, atol=0)  # norms of other sums


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_clip_by_previous_norm_forgets_one_that_is_no_number(bad: float) -> None:
    params = leaves([(4,), (3, 2), (7,)])
    optimizer = SGD(params, lr=1.0, max_norm=0.5)
    in_backward(optimizer, clip="previous")
    grads = random_grads(0, 1.0)
    give(params, [*grads[:2], grads[2] * bad])
    optimizer.step()
    assert not math.isfinite(optimizer.grad_norm)
    before = params[0].detach().clone()
    give(params, grads)
    assert 0 < float((params[0].detach() - before).norm()) <= 0.5 * (1 + 1e-12)


def test_max_norm_set_later_is_not_ignored() -> None:
    params = leaves([(4,)])
    optimizer = SGD(params)
    in_backward(optimizer)
    give(params, [torch.ones(4)])
    for name, value, back in (("max_norm", 1.0, None), ("nonfinite", "skip", "step")):
        before = snapshot(optimizer)
        setattr(optimizer, name, value)
        with pytest.raises(ValueError, match="Pass clip=" if name == "max_norm" else "Pass nonfinite="):
            give(params, [torch.ones(4)])
        assert_unmoved(optimizer, before)
        setattr(optimizer, name, back)


# NaN and Inf.


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("case", INDEPENDENT, ids=str)
def test_nonfinite_parameter_skips_it_alone(case: Case, bad: float) -> None:
    params, alike = leaves([(4,), (3, 2), (7,)]), leaves([(4,), (3, 2), (7,)])
    inside = case.ours(params, **case.options, nonfinite="skip", max_norm=0.5)
    in_backward(inside, clip="parameter", nonfinite="parameter")
    others = [case.ours([param], **case.options, nonfinite="skip", max_norm=0.5) for param in alike]
    for seed in range(4):
        grads = random_grads(seed, 1.0)
        if seed in (0, 2):
            grads[1][2, 1] = bad
        give(params, grads)
        inside.step()
        for param, grad, other in zip(alike, grads, others, strict=True):
            param.grad = grad
            other.step()
        assert all(param.grad is None for param in params)
        assert math.isfinite(inside.grad_norm)
    assert inside.skipped_steps == 2
    assert all(map(torch.equal, params, alike))


def test_nonfinite_parameter_raises_out_of_backward() -> None:
    params = leaves([(4,), (3, 2), (7,)])
    optimizer = AdamW(list(zip("abc", params, strict=True)), nonfinite="raise")
    in_backward(optimizer, nonfinite="parameter")
    before = [param.detach().clone() for param in params]
    grads = random_grads(0, 1.0)
    grads[1][0, 0] = math.nan
    with pytest.raises(FloatingPointError, match=r"the step of b failed.*NaN or Inf in the gradient of b\."):
        give(params, grads)
    assert [torch.equal(param, old) for param, old in zip(params, before, strict=True)] == [False, True, True]
    assert params[1].grad is not None
    assert [float(state["step"]) for state in state_of(optimizer).values()] == [1]
    optimizer.zero_grad()
    give(params, random_grads(1, 1.0))
    assert [float(optimizer.state[param]["step"]) for param in params] == [2, 1, 1]


def test_option_spoiled_between_steps_leaves_the_others_as_they_should_be() -> None:
    params, alike = leaves([(4,), (3, 2), (7,)]), leaves([(4,), (3, 2), (7,)])
    inside, ordinary = (Adam([{"params": p[:1]}, {"params": p[1:]}]) for p in (params, alike))
    in_backward(inside)
    inside.param_groups[1]["lr"] = "fast"
    grads = random_grads(0, 1.0)
    with pytest.raises((TypeError, ValueError), match=r"the step of param_groups\[1\]\['params'\]\[0\] failed"):
        give(params, grads)
    inside.param_groups[1]["lr"] = 1e-3
    inside.step()  # it takes the gradient that was left
    give(params[2:], grads[2:])
    for param, grad in zip(alike, grads, strict=True):
        param.grad = grad
    ordinary.step()
    assert_same_params_and_state(inside, ordinary)


def test_errors_keep_their_kind_out_of_backward() -> None:
    table = torch.zeros(4, 2, requires_grad=True)
    optimizer = SparseAdam([table])
    in_backward(optimizer)
    with pytest.raises(RuntimeError, match="SparseAdam does not support dense gradients"):
        table.sum().backward()
    optimizer.zero_grad()

    class OutOfRange(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, weight: Tensor) -> Tensor:
            return weight.sum()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return torch.sparse_coo_tensor(torch.tensor([[9]]), torch.ones(1, 2), (4, 2), check_invariants=False)

    with pytest.raises(IndexError, match=r"the step of param_groups\[0\]\['params'\]\[0\] failed.*out of range"):
        OutOfRange.apply(table).backward()
