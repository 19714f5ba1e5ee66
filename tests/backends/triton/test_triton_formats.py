"""8-bit state, and bfloat16 rounded at random or compensated: in Triton's interpreter, and compiled for a GPU."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from cases import device
from rule_runs import BRAIN, DOUBLE, SINGLE, Padded, values
from sparse_cases import coo
from sum_rules import trusted
from torch import Tensor

from descend import AdamW, rules
from descend.backends import eager
from descend.backends.opened import Noise
from descend.backends.triton.backend import TritonBackend
from descend.core.codecs import (
    BLOCK,
    MIN_VECTOR,
    Codec,
    Format,
    Formats,
    Rounded,
    element_dtype,
    encode,
    needs_noise,
    scale_shape,
    split,
)
from descend.core.decision import Decision
from descend.core.noise import Stream, step_key
from descend.core.signature import signature

triton = pytest.importorskip("triton")

from machine_code import Machine  # noqa: E402
from triton import knobs  # noqa: E402

from descend.backends.triton import formats_library, launch, rows_library, tuning  # noqa: E402

SIGNED, UNSIGNED = Codec(signed=True), Codec(signed=False)
RANDOM, KEPT = Rounded("stochastic"), Rounded("compensated")
ADAMW: dict[str, Formats] = {
    "8 bits": (SINGLE, SINGLE, SIGNED, UNSIGNED),
    "at random": (RANDOM, BRAIN, SIGNED._replace(stochastic=True), UNSIGNED._replace(stochastic=True)),
    "compensated": (KEPT, BRAIN, RANDOM, SINGLE),
}
# Rows of one block and less, of several, and of one that ends anywhere; one row.
SHAPES = [(3, 600), (2, 512), (5, 7, 16), (1100,)]
KEY, STREAM = step_key(seed=3, step=7), Stream(5, 2**32 - 1000)


def numbers(shape: tuple[int, ...], seed: int) -> Tensor:
    """Return numbers of many sizes, all positive, since some are averages of squares."""
    random = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=random) * torch.logspace(-6, 0, shape[-1]) + 1e-3


class Stored:
    """A parameter, its gradient and its state in formats, in the midst of memory that nobody may write.

    Args:
        formats: of these.
        shape: of the parameter.
        offset: of each tensor in its memory.
    """

    def __init__(self, formats: Formats, shape: tuple[int, ...], offset: int) -> None:
        self._padded: list[Padded] = []
        own, added = [], []
        for column, format in enumerate(formats):
            tensors = self._stored(numbers(shape, column) * (-1 if column == 1 else 1), format)
            first, *more = [self._place(tensor, offset) for tensor in tensors]
            own.append(first)
            added += more
        self.param, self.grad, *self.state = own
        self.state += [
            *(each for each in added if each.dtype == torch.int16),
            *(each for each in added if each.dtype != torch.int16),
        ]
        self.param.grad_dtype = None  # type: ignore[attr-defined]
        self.param.grad = self.grad

    def _stored(self, values: Tensor, format: Format) -> tuple[Tensor, ...]:
        if isinstance(format, Codec):
            return encode(values, format._replace(stochastic=False))
        return split(values) if format == KEPT else (values.to(element_dtype(format)),)

    def _place(self, tensor: Tensor, offset: int) -> Tensor:
        padded = Padded(tensor.numel(), tensor.dtype, offset)
        self._padded.append(padded)
        return padded.tensor.copy_(tensor.reshape(-1)).view(tensor.shape)

    @property
    def written(self) -> list[Tensor]:
        return [self.param, *self.state]

    def is_intact(self) -> bool:
        """Return whether the memory around all tensors is as it was."""
        return all(padded.is_intact() for padded in self._padded)


def bits(tensors: list[Tensor]) -> list[Tensor]:
    """Return copies of what is in memory."""
    return [tensor.reshape(-1).view(torch.uint8).clone() for tensor in tensors]


def run(
    rule: Any, formats: Formats, stored: list[Stored], decision: Decision | None = None, measures: bool = False
) -> Any:
    """Apply a rule with Triton to parameters in formats; return the launch."""
    backend, given = TritonBackend(), values(rule)
    streams = [STREAM._replace(number=i) for i in range(len(stored))] if needs_noise(formats) else []
    made = backend.launch(rule, len(given), formats, [each.param for each in stored], [0] * len(stored), streams)
    made.compile(wants_norm=True)
    made.set_state([each.state for each in stored])
    made.set_scalars(0, 0.5, given)
    if streams:
        made.set_noise(0, KEY)
    none = backend.scalar_state([])
    backend.together([each.param for each in stored], [made], none, none, measures)(torch.zeros(0).numpy(), decision)
    return made


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("offset", [0, 3])
@pytest.mark.parametrize("formats", [f[:3] for f in ADAMW.values()], ids=ADAMW)
def test_results_are_those_of_the_reference_bit_for_bit(formats: Formats, offset: int) -> None:
    stored, theirs = ([Stored(formats, shape, offset) for shape in SHAPES] for _ in range(2))
    for number, each in enumerate(theirs):
        noise = Noise(STREAM._replace(number=number), KEY)
        eager.run(
            rules.momentum, each.param, each.grad, each.state, values(rules.momentum), 0.5, formats=formats, noise=noise
        )
    run(rules.momentum, formats, stored)
    for ours, expected in zip(stored, theirs, strict=True):
        assert all(map(torch.equal, bits(ours.written), bits(expected.written)))
        assert ours.is_intact()


@pytest.mark.usefixtures("interpreter")
def test_blocks_of_nan_of_inf_and_of_zeros() -> None:
    formats = (KEPT, BRAIN, SIGNED)
    stored, theirs = (Stored(formats, (4, 600), 0) for _ in range(2))
    for each in (stored, theirs):
        each.grad[0, 3], each.grad[1, 599], each.grad[2, 256:512] = float("nan"), float("inf"), 0.0
        each.state[-1][2, 1], each.param[2, 256:512], each.state[1][2, 256:512] = 0.0, 0.0, 0
    eager.run(rules.momentum, theirs.param, theirs.grad, theirs.state, values(rules.momentum), 0.5, formats=formats)
    run(rules.momentum, formats, [stored])
    assert all(map(torch.equal, bits(stored.written), bits(theirs.written)))
    scale = stored.state[-1]
    assert scale[0].isnan().tolist() == [True, False, False]
    assert scale[1].isinf().tolist() == [False, False, True]
    assert scale[2, 1] == 0


@pytest.mark.usefixtures("interpreter")
def test_measured_step_measures_what_the_rule_sees() -> None:
    formats = (KEPT, BRAIN, SIGNED)
    stored, theirs = (Stored(formats, (3, 600), 0) for _ in range(2))
    given, param, grad = values(rules.momentum), theirs.param, theirs.grad
    expected = eager.run(rules.momentum, param, grad, theirs.state, given, 0.5, measures=True, formats=formats)
    assert expected is not None
    found = run(rules.momentum, formats, [stored], measures=True).measured()
    torch.testing.assert_close(found, expected[None], rtol=1e-6, atol=0)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("take", [0.0, 1.0])
def test_step_that_is_left_out_writes_nothing(take: float) -> None:
    formats = ADAMW["at random"][:3]
    stored = Stored(formats, (3, 600), 0)
    before = bits(stored.written)
    run(rules.momentum, formats, [stored], Decision(torch.tensor([0.25, take, 1.0, 0.0], dtype=DOUBLE), True))
    are_same = [torch.equal(*pair) for pair in zip(before, bits(stored.written), strict=True)]
    assert are_same == [take == 0] * len(are_same)


@pytest.mark.usefixtures("interpreter")
def test_spans_of_memory_that_is_written() -> None:
    formats = (KEPT, BRAIN, SIGNED)
    stored = Stored(formats, (3, 600), 0)
    written = run(rules.momentum, formats, [stored]).written()
    expected = [(each.data_ptr(), each.data_ptr() + each.numel() * each.itemsize) for each in stored.written]
    assert sorted(map(tuple, written.tolist())) == sorted(expected)


@pytest.mark.usefixtures("interpreter")
def test_steps_of_an_optimizer_are_those_of_the_eager_backend() -> None:
    ends = []
    for backend in ("triton", "eager"):
        params = [numbers(shape, 1).to(BRAIN).requires_grad_() for shape in ((20, 300), (9,))]
        optimizer = AdamW(params, backend=backend, state_dtype="8bit", rounding="stochastic")
        for step in range(2):
            for param in params:
                param.grad = numbers(tuple(param.shape), step).to(BRAIN)
            optimizer.step()
        assert {placement.backend for placement in optimizer.backends()} == {backend}
        state = [value for param in params for value in optimizer.state[param].values()]
        ends.append([*(param.detach() for param in params), *state])
    for ours, theirs in zip(*ends, strict=True):
        # As numbers: the last bit of a float32 may differ, and a code beside it.
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-2, atol=float(ours.dtype == torch.uint8))


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("offset", [0, 3])
def test_sums_are_of_what_the_part_sees(offset: int) -> None:
    formats = (SINGLE, SINGLE, SIGNED)
    stored = [Stored(formats, shape, offset) for shape in SHAPES]
    made: Any = TritonBackend().launch(trusted, 2, formats, [each.param for each in stored], [1, 0, 1, 1])
    made.compile(False)
    made.set_state([each.state for each in stored])
    made.set_scalars(0, 0.5, (0.1, 0.2))
    made.set_scalars(1, 0.25, (0.1, 0.3))
    for each, total, second in zip(stored, made.sums(), (True, False, True, True), strict=True):
        scale, gain = (0.25, 0.3) if second else (0.5, 0.2)
        expected = eager.sums(trusted, each.param, each.grad, each.state, (0.1, gain), scale, formats)
        torch.testing.assert_close(total, expected, rtol=1e-6, atol=0)


def test_layouts_that_blocks_do_not_follow_are_declined(interpreter: None) -> None:
    why_not = TritonBackend().why_not_formats
    param, codes = torch.zeros(4, 600), torch.zeros(4, 600, dtype=torch.uint8)
    stored = [("exp_avg", codes), ("exp_avg_scale", torch.zeros(scale_shape(param.shape)))]
    formats = (SINGLE, SINGLE, SIGNED)
    assert why_not(rules.momentum, param, formats, stored) is None
    assert "not contiguous" in str(why_not(rules.momentum, param.t(), formats, []))
    assert "exp_avg: not contiguous" in str(
        why_not(rules.momentum, param, formats, [("exp_avg", codes.t().contiguous().t())])
    )
    assert "exp_avg_scale: not contiguous" in str(
        why_not(rules.momentum, param, formats, [("exp_avg_scale", torch.zeros(3, 4).t())])
    )
    assert "on meta" in str(why_not(rules.momentum, param, formats, [("exp_avg", codes.to("meta"))]))
    vector = torch.zeros(MIN_VECTOR, requires_grad=True)
    vector.grad = coo([3], torch.ones(1), vector.shape)
    with pytest.raises(RuntimeError, match="does not name rows"):
        AdamW([vector], sparse="touched", state_dtype="8bit").step()


@pytest.mark.usefixtures("interpreter")
def test_captured_launch_keeps_its_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []
    monkeypatch.setattr(launch, "is_capturing", lambda device: True)
    monkeypatch.setattr(launch, "keep", lambda *objects: kept.extend(objects))
    made = run(rules.momentum, (KEPT, BRAIN, SIGNED), [Stored((KEPT, BRAIN, SIGNED), (3, 600), 0)])
    assert any(each is made._pieces for each in kept)
    assert any(each is made._keys for each in kept)


# Rows of sparse gradients.


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("width", [40, 600])
@pytest.mark.parametrize("formats", [f[:3] for f in ADAMW.values()], ids=ADAMW)
def test_touched_rows_are_those_of_the_reference_bit_for_bit(formats: Formats, width: int) -> None:
    formats = (formats[0], SINGLE, formats[2])
    index, ends, measured = torch.tensor([[8, 0, 3, 11, 5]]), [], []
    for backend in (TritonBackend(), eager.EagerBackend()):
        stored = Stored(formats, (12, width), 0)
        grad = coo(index, numbers((5, width), 9), stored.param.shape)
        rows = backend.rows(rules.momentum, len(values(rules.momentum)), formats, False, stored.param, STREAM)
        rows.compile(False, measures=True)
        rows.read(grad._indices(), grad._values(), (12,), None, 0)
        none, scalars = backend.scalar_state([]), values(rules.momentum)
        rows.run(stored.param, stored.state, scalars, 0.5, none, None, measures=True, noise_key=KEY)
        measured.append(rows.measured().reshape(-1))
        assert stored.is_intact()
        ends.append(bits(stored.written))
    assert all(map(torch.equal, *ends))
    torch.testing.assert_close(*measured, rtol=1e-6, atol=1e-6)
    fresh = Stored(formats, (12, width), 0)
    untouched = [row for row in range(12) if row not in index[0].tolist()]
    for before, after in zip(fresh.written, ends[0], strict=True):
        rows_of = [
            tensor.view(torch.uint8).reshape(12, -1)[untouched] for tensor in (before.contiguous().view(-1), after)
        ]
        assert torch.equal(*rows_of)


# On a GPU.


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (SINGLE, dict(state_dtype="8bit")),
        (BRAIN, dict(state_dtype="8bit", rounding="stochastic")),
        (BRAIN, dict(rounding="compensated")),
    ],
    ids=str,
)
def test_steps_on_a_gpu_are_those_on_the_cpu(dtype: torch.dtype, options: dict[str, Any]) -> None:
    ends = []
    for place, backend in ((device(), "triton"), (torch.device("cpu"), "eager")):
        params = [numbers(shape, 1).to(place, dtype).requires_grad_() for shape in ((20, 300), (4100,), (9,))]
        optimizer = AdamW(params, lr=0.01, backend=backend, **options)
        for step in range(2):
            for param in params:
                param.grad = numbers(tuple(param.shape), step).to(place, dtype)
            optimizer.step()
        state = [value for param in params for value in optimizer.state[param].values()]
        ends.append([tensor.detach().cpu() for tensor in (*params, *state)])
    for ours, theirs in zip(*ends, strict=True):
        if ours.dtype in (torch.uint8, BRAIN):  # products and sums are fused there: the last bit may be another
            assert (ours != theirs).double().mean() < 2e-3
        elif ours.dtype != torch.int16:
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
def test_a_graph_of_random_rounding_is_refused() -> None:
    param = torch.ones(300, dtype=BRAIN, device=device(), requires_grad=True)
    param.grad = torch.ones_like(param)
    optimizer = AdamW([param], rounding="stochastic", capturable=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="cannot be captured"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()


# Compiled for a GPU that need not be there.


@pytest.mark.parametrize("name", ADAMW)
def test_kernels_are_good(name: str, tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    formats = ADAMW[name]
    stored = formats_library.Stored.of(formats)
    kernel = formats_library.update(rules.adamw, len(signature(rules.adamw).scalars), formats)
    with knobs.cache.scope(), knobs.nvidia.scope():
        knobs.cache.dir, knobs.nvidia.dump_ptxas_log = str(tmp_path), True
        machine = Machine(kernel, "sm_90", capsys)
    assert machine.spills == 0
    assert machine.registers <= tuning.REGISTERS
    # Codes are those of the reference: two is added to a product that has been rounded.
    assert ("add.f32" in machine.text and "0f40000000" in machine.text) or name == "compensated"
    assert not re.search(r"fma\S+\s[^;]*0f40000000", machine.text)
    numbers_a_thread = tuning.blocks(formats) * BLOCK // tuning.THREADS
    elements = stored.dtypes[: len(formats) + (formats[0] == KEPT)]
    wide = [numbers_a_thread * dtype.itemsize // tuning.BYTES for dtype in elements]
    assert machine.wide["loads"] >= sum(wide)
    assert machine.wide["stores"] >= sum(wide) - wide[1]


def test_kernel_of_rows_is_good(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    formats = ADAMW["8 bits"]
    blocks = rows_library.Blocks.of(64, SINGLE, BLOCK)
    gradient = rows_library.Gradient(torch.int32, SINGLE, SINGLE, True, blocks)
    kernel = rows_library.update(rules.adamw, len(signature(rules.adamw).scalars), formats, gradient, are_aligned=True)
    with knobs.cache.scope(), knobs.nvidia.scope():
        knobs.cache.dir, knobs.nvidia.dump_ptxas_log = str(tmp_path), True
        machine = Machine(kernel, "sm_90", capsys)
    assert machine.spills == 0
    assert machine.registers <= tuning.REGISTERS
    assert machine.wide["stores"] >= blocks.tile * blocks.columns // tuning.THREADS * 4 // tuning.BYTES
