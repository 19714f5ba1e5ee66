"""Compiled kernels against the eager reference: sizes, layouts, dtypes, rounding, and the instructions used."""

from __future__ import annotations

import platform
import re
from functools import cache
from itertools import product

import pytest
import torch
from cases import CASES, DENSE_BACKENDS, Case, Twins
from rule_runs import RULES
from torch import Tensor

from descend import SGD, Adam, AdamW, FirstOrder, from_rule, rules
from descend.backends.cpu import kernels, object_files
from descend.core.signature import signature

HALF, BRAIN, SINGLE, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64

# Of parameter, gradient and state.
MIXES = [
    (SINGLE, SINGLE, SINGLE),
    (DOUBLE, DOUBLE, DOUBLE),
    (BRAIN, BRAIN, BRAIN),
    (HALF, HALF, HALF),
    (BRAIN, BRAIN, SINGLE),
    (SINGLE, BRAIN, SINGLE),
]
# One rounding of what is stored; the arithmetic is the same but for fused multiply-adds.
TOLERANCE = {HALF: 2**-10, BRAIN: 2**-7, SINGLE: 2e-6, DOUBLE: 1e-14}


def one_step(
    case: Case, backend: str, dtypes: tuple[torch.dtype, ...], params: list[Tensor], steps: int = 2
) -> tuple[list[Tensor], FirstOrder]:
    """The tensors of parameters and state after some steps."""
    param_dtype, grad_dtype, state_dtype = dtypes
    params = [param.detach().clone().to(param_dtype).requires_grad_() for param in params]
    optimizer = case.ours(params, **case.options, backend=backend, state_dtype=state_dtype, max_norm=1e3)
    for step in range(steps):
        for i, param in enumerate(params):
            random = torch.Generator().manual_seed(100 * step + i)
            grad = torch.randn(param.shape, generator=random).to(grad_dtype)
            param.grad_dtype = grad_dtype
            param.grad = torch.empty_like(param, dtype=grad_dtype, requires_grad=False).copy_(grad)
        optimizer.step()
    state = [tensor for param in params for tensor in optimizer.state[param].values()] if optimizer.state else []
    return [*(param.detach() for param in params), *state], optimizer


def assert_kernel_is_eager(case: Case, dtypes: tuple[torch.dtype, ...], params: list[Tensor]) -> None:
    compiled, optimizer = one_step(case, "cpu", dtypes, params)
    eager, _ = one_step(case, "eager", dtypes, params)
    assert {placement.backend for placement in optimizer.backends()} == {"cpu"}
    for ours, theirs in zip(compiled, eager, strict=True):
        assert ours.dtype == theirs.dtype
        # Two roundings where the state is narrow: its own, and the one it causes in the parameter.
        tolerance = 2 * max(TOLERANCE[dtype] for dtype in (ours.dtype, dtypes[0], dtypes[2]))
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance / 10)


# How tensors are stored is no matter of the rule: some rules are tried in every mix, all in the common ones.
TRIED = [(case, dtypes) for place, case in enumerate(CASES) for dtypes in MIXES[: 6 if place < 7 else 3]]


@pytest.mark.parametrize(("case", "dtypes"), TRIED, ids=str)
def test_kernel_matches_eager(case: Case, dtypes: tuple[torch.dtype, ...]) -> None:
    assert_kernel_is_eager(case, dtypes, [torch.randn(numel) for numel in (0, 1, 1023, 65_537)])


@pytest.mark.slow
@pytest.mark.parametrize("dtypes", list(product(TOLERANCE, repeat=3)), ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_matches_eager_in_every_mix(case: Case, dtypes: tuple[torch.dtype, ...]) -> None:
    assert_kernel_is_eager(case, dtypes, [torch.randn(numel) for numel in (1, 1023)])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_takes_dense_views(case: Case) -> None:
    views = [
        torch.randn(30, 20).t(),
        torch.randn(4, 3, 5, 6).to(memory_format=torch.channels_last),
        torch.randn(2, 3, 4).permute(2, 0, 1),
        torch.randn(50)[7:31],
        torch.randn(1, 5, 1).expand(1, 5, 1),
    ]
    assert_kernel_is_eager(case, MIXES[0], views)


def test_every_rule_has_a_case() -> None:
    tried = {case.ours([torch.zeros(1, requires_grad=True)], **case.options) for case in CASES}
    steps = {optimizer.rule_for(optimizer.param_groups[0]) for optimizer in tried}
    assert steps | {rules.coast, rules.decay} == set(RULES)


@pytest.mark.parametrize("backend", DENSE_BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_nan_and_inf_hit_the_elements_they_hit_in_torch(case: Case, backend: str) -> None:
    twins = Twins(case, lambda: [torch.ones(40, requires_grad=True)], backend=backend)

    def grads(params: list[Tensor], seed: int) -> None:
        params[0].grad = torch.tensor([1.0, torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e-40, 1e18] * 5)

    for seed in range(3):
        twins.step(seed, grads)
    ours, theirs = (optimizer.param_groups[0]["params"][0].detach() for optimizer in twins.both)
    alive = theirs.isfinite()
    assert torch.equal(ours.isfinite(), alive)
    torch.testing.assert_close(ours[alive], theirs[alive], rtol=1e-5, atol=1e-6)  # float32, three steps


@pytest.mark.parametrize("backend", DENSE_BACKENDS)
@pytest.mark.parametrize("case", [case for case in CASES if issubclass(case.ours, Adam)], ids=str)
def test_adam_survives_squares_that_overflow(case: Case, backend: str) -> None:
    twins = Twins(case, lambda: [torch.ones(40, requires_grad=True)], backend=backend)

    def grads(params: list[Tensor], seed: int) -> None:
        params[0].grad = torch.full((40,), 3e38 if seed == 0 else 1.0)

    for seed in range(3):
        twins.step(seed, grads)
    for optimizer in twins.both:
        assert bool(optimizer.param_groups[0]["params"][0].isfinite().all())


# Rounding.


def keep(param, grad, kept, lr):
    return lr * grad, grad


Keep = from_rule(keep, "Keep", lr=1.0)


def awkward(dtype: torch.dtype) -> Tensor:
    """Numbers whose rounding to 16 bits is hard: ties, overflow, denormals, NaN, Inf, and random bits."""
    random = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (100_000,), generator=random, dtype=torch.int64).to(torch.int32)
    half = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    exact = torch.cat([half.view(HALF).float(), half.view(BRAIN).float()])
    halfway = torch.cat([exact[:-1], (exact[:-1].double() + exact[1:].double()).float() / 2])
    named = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, -torch.nan, 65519.0, 65520.0, 65536.0, 3.4e38])
    tiny = torch.tensor([2.0**-149, 2.0**-25, 2.0**-24, 2.0**-24 * 1.5, 2.0**-14, 2.0**-133, 2.0**-134 * 1.5])
    return torch.cat([bits.view(SINGLE), halfway, named, tiny, -tiny]).to(dtype)


@pytest.mark.parametrize("narrow", [HALF, BRAIN], ids=str)
@pytest.mark.parametrize("wide", [SINGLE, DOUBLE], ids=str)
def test_rounding_is_torchs_bit_for_bit(wide: torch.dtype, narrow: torch.dtype) -> None:
    values = awkward(wide)
    if wide == DOUBLE:  # and numbers that a detour through float32 might round twice
        values = torch.cat([values, values * (1 + 2**-30), values * (1 - 2**-30)])
    param = torch.zeros(values.shape, dtype=narrow, requires_grad=True)
    param.grad_dtype = wide
    param.grad = values
    optimizer = Keep([param], backend="cpu", state_dtype=narrow)
    optimizer.step()
    expected = values.to(narrow)
    for stored in (param.detach(), optimizer.state[param]["kept"]):
        assert torch.equal(stored.isnan(), expected.isnan())
        number = ~expected.isnan()
        assert torch.equal(stored[number].view(torch.int16), expected[number].view(torch.int16))


@pytest.mark.parametrize("narrow", [HALF, BRAIN], ids=str)
def test_every_16_bit_number_survives(narrow: torch.dtype) -> None:
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(narrow)
    param = torch.zeros(values.shape, dtype=narrow, requires_grad=True)
    param.grad = values
    optimizer = Keep([param], backend="cpu", state_dtype=SINGLE)
    optimizer.step()
    number = ~values.isnan()
    assert torch.equal(param.detach()[number].view(torch.int16), values[number].view(torch.int16))
    assert torch.equal(optimizer.state[param]["kept"][number], values[number].float())
    assert bool(param.detach()[~number].isnan().all())
    assert bool(optimizer.state[param]["kept"][~number].isnan().all())


# Instructions.

on_x86 = pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="reads x86 assembly")


@cache
def assembly_of(rule, dtypes: tuple[torch.dtype, ...], compute: torch.dtype) -> str:
    return object_files.machine_assembly(kernels.update_kernel(rule, len(signature(rule).scalars), dtypes, compute))


def double_precision(assembly: str) -> set[str]:
    """The instructions that compute with, or convert, double-precision numbers."""
    found = set(re.findall(r"^\s+(v?\w+[ps]d|v?cvt\w*[ps]d\w*)\s", assembly, re.MULTILINE))
    # Moves and logic do not compute: compilers use them for any bits.
    moves = re.compile(
        r"v?(mov\w*|andn?|or|xor|shuf|unpck[lh]|perm\w*|blend\w*|broadcast\w*|insert\w*|extract\w*)[ps]d"
    )
    return {name for name in found if not moves.fullmatch(name)}


def squared(param, grad, lr):
    return param - 2 * lr * grad * grad / 3 + 1.5


def single_assembly(rule, stored: torch.dtype = SINGLE) -> str:
    """Of the rule in float32, its tensors stored as they say."""
    return assembly_of(rule, (stored,) * (2 + len(signature(rule).state)), SINGLE)


@on_x86
@pytest.mark.parametrize("rule", [*RULES, squared], ids=lambda rule: rule.__name__)
def test_float32_kernel_has_no_double_precision(rule) -> None:
    assert double_precision(single_assembly(rule)) == set()


@on_x86
@pytest.mark.parametrize("stored", [BRAIN, HALF], ids=str)
def test_16_bit_kernel_has_no_double_precision(stored: torch.dtype) -> None:
    assert double_precision(single_assembly(squared, stored)) == set()


@on_x86
def test_float64_kernel_has_double_precision() -> None:
    assert double_precision(assembly_of(squared, (DOUBLE, DOUBLE), DOUBLE)) != set()


@on_x86
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_float32_kernel_is_vectorised(rule) -> None:
    found = single_assembly(rule)
    assert re.findall(r"^\s+v?(?:mul|fn?m(?:add|sub)\d+)ps\s", found, re.MULTILINE)
    if "sqrt" in rule.__code__.co_names:
        assert re.search(r"^\s+v?sqrtps\s", found, re.MULTILINE)


@pytest.mark.parametrize("backend", DENSE_BACKENDS)
def test_betas_near_one_lose_nothing_in_float32(backend: str) -> None:
    param = torch.zeros(20, requires_grad=True)
    optimizer = AdamW([param], betas=(0.9, 0.99999), backend=backend)
    param.grad = torch.ones(20)
    optimizer.step()
    # One rounding: in float32 1 - 0.99999 would be wrong by 1.4e-3.
    torch.testing.assert_close(optimizer.state[param]["exp_avg_sq"], torch.full((20,), 1e-5), rtol=2e-7, atol=0)


# Dtypes of the state.


@pytest.mark.parametrize("backend", DENSE_BACKENDS)
def test_float16_with_default_eps_stays_finite(backend: str) -> None:
    param = torch.ones(100, dtype=HALF, requires_grad=True)
    optimizer = AdamW([param], backend=backend)
    for scale in (0.0, 1e-7, 1.0, 0.0):
        param.grad = torch.full_like(param, scale)
        optimizer.step()
    assert bool(param.isfinite().all())
    assert optimizer.state[param]["exp_avg_sq"].dtype == SINGLE


@pytest.mark.parametrize("backend", DENSE_BACKENDS)
def test_state_dtype_is_obeyed_and_helps_bfloat16(backend: str) -> None:
    ends = {}
    for state_dtype in (None, SINGLE):
        param = torch.ones(10, dtype=BRAIN, requires_grad=True)
        optimizer = AdamW([param], lr=0.01, backend=backend, state_dtype=state_dtype)
        for scale in (1.0, *[0.0] * 400):
            param.grad = torch.full_like(param, scale)
            optimizer.step()
        ends[state_dtype] = float(optimizer.state[param]["exp_avg_sq"][0])
    assert ends[SINGLE] == pytest.approx(0.001 * 0.999**400, rel=1e-4)  # float32, 400 products
    assert ends[None] == pytest.approx(0.001, rel=0.01)  # in bfloat16, 0.999 rounds away: nothing decays


def test_state_dtype_leaves_complex_parameters_alone() -> None:
    param = torch.ones(3, dtype=torch.complex64, requires_grad=True)
    optimizer = SGD([param], momentum=0.9, state_dtype=DOUBLE)
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert optimizer.state[param]["momentum_buffer"].dtype == torch.complex64
