"""Compiled steps in formats that are not dtypes, against the eager reference: bit for bit where arithmetic is exact."""

from __future__ import annotations

import platform
import re
from typing import Any

import numba
import numpy as np
import pytest
import torch
from numba.core import types
from torch import Tensor

from descend import LAMB, AdamW, FirstOrder, Monitor, rules
from descend.backends.cpu import codes, formats_kernel, launch, object_files
from descend.backends.cpu.intrinsics import intrinsic, pack
from descend.backends.cpu.launch import CHUNK, Launch, chunk_table
from descend.core.codecs import BLOCK, Codec, Rounded, scale_shape
from descend.core.noise import Stream, sixteen_bits, words
from descend.ops import abs

SINGLE, BRAIN = torch.float32, torch.bfloat16


def halves(param, grad, exp_avg, exp_avg_sq, lr):
    """Products with powers of two only, so that fused multiply-adds round as the reference does."""
    return param - lr * grad, 0.5 * exp_avg + 0.25 * grad, 0.5 * exp_avg_sq + 0.125 * abs(grad)


class Halves(FirstOrder):
    """A method whose compiled arithmetic is the eager one."""

    rule = staticmethod(halves)
    nonnegative_state = ("exp_avg_sq",)
    takes_sparse = True

    def __init__(self, params: Any, lr: float = 0.125, **options: Any) -> None:
        super().__init__(params, {"lr": lr}, **options)

    def scalars(self, group: Any, step: Any) -> tuple[float]:
        return (group["lr"],)


# Rows of one short block, of one block but for an element, of several, of more than a chunk; one dimension.
SHAPES = [(300, 17), (20, 255), (17, 257), (5, 3, 341), (2, CHUNK + 100), (4 * CHUNK + 7,), (20, 256)]

FORMATS: dict[str, dict[str, Any]] = {
    "8 bits": {"state_dtype": "8bit"},
    "8 bits of float64": {"state_dtype": "8bit", "dtype": torch.float64},
    "8 bits at random": {"state_dtype": "8bit", "rounding": "stochastic"},
    "bfloat16 at random": {"rounding": "stochastic", "dtype": BRAIN},
    "compensated": {"rounding": "compensated", "dtype": BRAIN, "state_dtype": {"exp_avg_sq": "8bit"}},
}


def gradient(shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> Tensor:
    """Random numbers of many magnitudes; blocks of zeros, of denormal and of huge ones."""
    random = torch.Generator().manual_seed(seed)
    exponents = torch.randint(-30, 4, shape, generator=random)
    grad = torch.ldexp(torch.randn(shape, generator=random), exponents)
    flat = grad.view(-1)
    for place, factor in ((0, 0.0), (600, 1e-40), (1200, 1e15)):
        flat[place : place + 300] *= factor
    return grad.to(dtype)


def trained(
    make: Any, backend: str, threads: int = 1, steps: int = 3, dtype: torch.dtype = SINGLE, **options: Any
) -> tuple[list[Tensor], FirstOrder]:
    """Parameters and all tensors of their state after some steps."""
    torch.set_num_threads(threads)
    params = []
    for shape in SHAPES:
        params.append(torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_())
    optimizer = make(params, backend=backend, **options)
    for step in range(steps):
        for i, param in enumerate(params):
            param.grad = gradient(tuple(param.shape), 10 * step + i, dtype)
        optimizer.step()
    state = [tensor for param in params for tensor in optimizer.state[param].values()]
    return [*(param.detach() for param in params), *state], optimizer


def assert_equal_bits(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)  # compilers may drop the sign of a zero


@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)
def test_compiled_steps_are_the_eager_ones_bit_for_bit(options: dict[str, Any], monkeypatch: Any) -> None:
    reference, _ = trained(Halves, "eager", **options)
    compiled, optimizer = trained(Halves, "cpu", **options)
    assert {placement.backend for placement in optimizer.backends()} == {"cpu"}
    assert any(tensor.dtype in (torch.uint8, BRAIN) for tensor in compiled)
    assert_equal_bits(compiled, reference)
    assert_equal_bits(trained(Halves, "cpu", threads=2, **options)[0], reference)
    monkeypatch.setattr(launch, "CHUNK", 2 * BLOCK)
    assert_equal_bits(trained(Halves, "cpu", threads=2, **options)[0], reference)


def test_every_column_has_its_noise() -> None:
    @intrinsic
    def all_bits(typing: Any, place: Any, first: Any, second: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            noise = codes.Noise(builder, args[1:], args[0])
            return pack(context, builder, [noise.sixteen_bits(column) for column in range(6)], types.uint32)

        return types.UniTuple(types.uint32, 6)(types.uint32, types.uint32, types.uint32), generate

    @numba.njit("(uint32, uint32, uint32)")
    def read(place: Any, first: Any, second: Any) -> Any:
        return all_bits(place, first, second)

    for place in (0, 1, 2**31 + 5, 2**32 - 1):
        expected = [sixteen_bits(torch.tensor(place), 7, 8, column).item() for column in range(6)]
        assert list(read(place, *words(7, 8))) == expected


def test_a_compensated_parameter_may_be_set_to_zero_between_steps() -> None:
    found = []
    for backend in ("eager", "cpu"):
        tensors, optimizer = trained(Halves, backend, **FORMATS["compensated"])
        params = tensors[: len(SHAPES)]
        for param in params:
            param.mul_(0.0)  # zeros of both signs, above any compensation
        optimizer.step()
        assert all(bool(param.isfinite().all()) for param in params[:1])
        found.append([tensor.clone() for tensor in tensors])
    assert_equal_bits(*found)


@pytest.mark.parametrize("number", [torch.nan, -torch.inf])
def test_numbers_that_are_not_finite_stay_in_their_block(number: float) -> None:
    found = []
    for backend in ("cpu", "eager"):
        param = torch.zeros(20, 300, requires_grad=True)
        optimizer = Halves([param], backend=backend, state_dtype="8bit")
        param.grad = torch.ones(20, 300)
        param.grad[3, 256] = number
        optimizer.step()
        state = optimizer.state[param]
        found.append([state[name] for name in ("exp_avg", "exp_avg_sq")])
        for name in ("exp_avg", "exp_avg_sq"):
            bad = ~state[name + "_scale"].isfinite()
            assert bad.nonzero().tolist() == [[3, 1]]
            assert not state[name][3, 256:].any()
    assert_equal_bits(*found)


@pytest.mark.parametrize("sparse", [None, "touched"])
def test_rows_are_stepped_as_eagerly_bit_for_bit(sparse: Any) -> None:
    found = []
    for backend in ("cpu", "eager"):
        table = torch.randn(200, 600, generator=torch.Generator().manual_seed(0)).requires_grad_()
        optimizer = Halves([table], backend=backend, state_dtype="8bit", rounding="stochastic", sparse=sparse)
        for step in range(3):
            rows = torch.tensor([[5, 199, 7, 5, 0]]) if step else torch.tensor([[8, 7, 7]])
            values = gradient((rows.shape[1], 600), step, SINGLE)
            table.grad = torch.sparse_coo_tensor(rows, values, table.shape)
            optimizer.step()
        state = optimizer.state[table]
        assert state["exp_avg"].dtype == torch.uint8
        found.append([table.detach(), *state.values()])
    assert_equal_bits(*found)


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_entries_of_a_vector_are_no_rows(backend: str) -> None:
    vector = torch.zeros(70_000, requires_grad=True)
    optimizer = Halves([vector], backend=backend, state_dtype="8bit")
    vector.grad = torch.sparse_coo_tensor(torch.tensor([[5, 69_999]]), torch.ones(2), vector.shape)
    with pytest.raises(RuntimeError, match="does not name rows"):
        optimizer.step()
    assert not vector.any()
    vector.grad = torch.ones_like(vector)
    optimizer.step()
    assert vector.all()


def test_adamw_in_8_bits_follows_the_eager_trajectory() -> None:
    compiled, eager = (
        trained(AdamW, backend, steps=20, state_dtype="8bit", lr=1e-3)[0] for backend in ("cpu", "eager")
    )
    for ours, theirs in zip(compiled[: len(SHAPES)], eager[: len(SHAPES)], strict=True):
        alive = theirs.isfinite()  # squares of some gradients overflow
        assert torch.equal(ours.isfinite(), alive)
        off = (ours - theirs)[alive].abs()
        # Fused multiply-adds move a number over the boundary of two codes once in a while: to the next sixteenth.
        assert (off < 1e-6).float().mean() > 0.95
        assert off.max() < 20 * 1e-3 / 16


def test_rules_with_sums_see_decoded_state() -> None:
    compiled, eager = (trained(LAMB, backend, state_dtype="8bit")[0] for backend in ("cpu", "eager"))
    for ours, theirs in zip(compiled[: len(SHAPES)], eager[: len(SHAPES)], strict=True):
        assert torch.equal(ours.isfinite(), theirs.isfinite())
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_a_watched_step_measures_decoded_state_and_changes_no_bit() -> None:
    ends, records = [], []
    for backend, watched in (("cpu", True), ("cpu", False), ("eager", True)):
        param = torch.randn(40, 600, generator=torch.Generator().manual_seed(0)).requires_grad_()
        optimizer = AdamW([param], backend=backend, state_dtype="8bit")
        monitor = Monitor(optimizer, every=1) if watched else None
        for step in range(2):
            param.grad = gradient((40, 600), step, SINGLE)
            optimizer.step()
        ends.append([param.detach(), *optimizer.state[param].values()])
        if monitor is not None:
            records.append(monitor.read())
    assert_equal_bits(ends[0], ends[1])
    ours, theirs = ({name: value for name, value in found.items() if isinstance(value, float)} for found in records)
    assert ours.pop("lost_updates") == pytest.approx(theirs.pop("lost_updates"), abs=1e-3)
    assert ours["signal_to_noise"] > 0
    assert ours == pytest.approx(theirs, rel=1e-4)


# Where things are.


@pytest.mark.parametrize(
    "shape", [(7, 1), (3, 255), (40, 256), (1000, 257), (2, CHUNK), (3, CHUNK + 1), (0, 9), (50_000,)]
)
def test_chunks_end_where_blocks_do_and_cover_everything(shape: tuple[int, ...]) -> None:
    size, width = int(np.prod(shape)), shape[-1]
    chunks = chunk_table(np.array([size, 512]), np.array([0, 1]), np.array([width, 512]))
    own = chunks[chunks[:, 0] == 0]
    begins, ends = own[:, 1], own[:, 1] + own[:, 3]
    assert np.array_equal(np.r_[0, ends], np.r_[begins, size])
    assert (own[:, 3] <= CHUNK).all()
    for edge in (begins, ends):
        assert ((edge % width % BLOCK == 0) | (edge % width == 0)).all()
    assert chunks[-1].tolist()[:4] == [1, 0, 0, 512]


def test_written_memory_is_that_of_codes_scales_and_compensation() -> None:
    param = torch.zeros(20, 300, dtype=BRAIN)
    formats = (Rounded("compensated"), BRAIN, Codec(True, True), SINGLE)
    tensors = [
        torch.zeros(20, 300, dtype=torch.uint8), torch.zeros(20, 300), torch.zeros(20, 300, dtype=torch.int16),
        torch.zeros(scale_shape(param.shape)),
    ]  # fmt: skip
    made = Launch(halves, 1, formats, [param], [0], [Stream(0, 0)])
    made.set_state([tensors])
    expected = [(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in (param, *tensors)]
    assert sorted(map(tuple, made.written().tolist())) == sorted(expected)


def test_another_order_in_memory_is_left_to_the_eager_backend() -> None:
    param = torch.randn(80, 90).t().requires_grad_()
    optimizer = Halves([param], state_dtype="8bit")
    param.grad = torch.ones(80, 90).t()
    optimizer.step()
    (placement,) = optimizer.backends()
    assert placement.backend == "eager"
    assert "stride" in str(placement.reason)


# Instructions.

on_x86 = pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="reads x86 assembly")


@on_x86
def test_both_passes_over_a_block_are_vectorised() -> None:
    formats = (SINGLE, SINGLE, Codec(True, True), Codec(False))
    made = object_files.machine_assembly(formats_kernel.update_kernel(rules.adamw, 7, formats, SINGLE))
    registers = "zmm" if "zmm" in made else "ymm" if "ymm" in made else "xmm"
    assert re.search(rf"^\s+v?sqrtps\s.*%{registers}", made, re.MULTILINE)
    assert re.search(rf"^\s+v?(?:pmovdb|packus\w+|pshufb|perm\w+)\s.*%{registers}", made, re.MULTILINE)
    assert re.search(rf"^\s+v?pmuludq|v?pmulld\s.*%{registers}", made, re.MULTILINE)  # the noise
    assert not re.search(r"^\s+v?(?:add|mul|div|sqrt|cvt\w+)[ps]d\s", made, re.MULTILINE)
