"""Intrinsics that load and store numbers in any format, for ``formats_kernel``.

Loads and stores say which tensor they belong to, and that tensors do not overlap: the plan gives those that do to
another backend. Else a loop over each block would begin with a comparison of every two addresses.
"""

from __future__ import annotations

from typing import Any

import torch
from llvmlite import ir as llvm_ir
from numba.core import cgutils, errors, types

from descend.backends.cpu import codes
from descend.backends.cpu.codes import BYTE, F32, I16, I32, I64
from descend.backends.cpu.columns import Columns
from descend.backends.cpu.intrinsics import COMPUTED, STORED, element, intrinsic, narrow, pack, prefetch_line, widen
from descend.core.codecs import BLOCK, COMPENSATED, STOCHASTIC, Codec

_LLVM = {**STORED, torch.uint8: BYTE, torch.int16: I16}


class _Memory:
    """The tensors of a chunk, by column, and the buffers of those with codes.

    Args:
        builder: emits the instructions.
        columns: of the address table.
    """

    def __init__(self, builder: Any, columns: Columns) -> None:
        self._builder, module = builder, builder.module
        names = [*range(len(columns.dtypes)), *(f"buffer {column}" for column in columns.coded)]
        domain = module.add_metadata(["descend"])
        self._scopes: dict[int | str, Any] = {name: module.add_metadata([str(name), domain]) for name in names}

    def load(self, name: int | str, address: Any, index: Any, kind: Any) -> Any:
        return self._marked(name, self._builder.load(element(self._builder, address, index, kind)))

    def store(self, name: int | str, address: Any, index: Any, value: Any) -> None:
        self._marked(name, self._builder.store(value, element(self._builder, address, index, value.type)))

    def _marked(self, name: int | str, instruction: Any) -> Any:
        module = self._builder.module
        others = [scope for other, scope in self._scopes.items() if other != name]
        instruction.set_metadata("alias.scope", module.add_metadata([self._scopes[name]]))
        instruction.set_metadata("noalias", module.add_metadata(others))
        return instruction


def _constant(value: int) -> Any:
    return llvm_ir.Constant(I64, value)


def _in_table(builder: Any, row: Any, column: int) -> Any:
    """An entry of a row of the address table."""
    return builder.load(element(builder, row, _constant(column), I64))


def elements_at(columns: Columns) -> Any:
    """The address of a chunk in each column with elements; the gradient has an offset of its own."""

    @intrinsic
    def addresses(typing: Any, row: Any, offset: Any, grad_offset: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            starts = []
            for column, dtype in enumerate(columns.elements):
                bytes_before = builder.mul(args[2] if column == 1 else args[1], _constant(dtype.itemsize))
                starts.append(builder.add(_in_table(builder, args[0], column), bytes_before))
            return pack(context, builder, starts, types.int64)

        return types.UniTuple(types.int64, len(columns.elements))(types.int64, types.int64, types.int64), generate

    return addresses


def prefetcher(columns: Columns) -> Any:
    """Prefetch the cache line of element ``index`` of every column with elements."""

    @intrinsic
    def prefetch(typing: Any, addresses: Any, index: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            for column, dtype in enumerate(columns.elements):
                address = builder.extract_value(args[0], column)
                prefetch_line(builder, element(builder, address, args[1], _LLVM[dtype]))
            return context.get_dummy_value()

        return types.void(addresses, types.int64), generate

    return prefetch


def scales_prefetcher(columns: Columns) -> Any:
    """Prefetch the scales of a block."""

    @intrinsic
    def prefetch(typing: Any, row: Any, block: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            for column in columns.coded:
                address = _in_table(builder, args[0], columns.scales[column])
                prefetch_line(builder, element(builder, address, args[1], F32))
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), generate

    return prefetch


def scales_loader(columns: Columns) -> Any:
    """The scales of a block, one a column with codes."""

    @intrinsic
    def load(typing: Any, row: Any, block: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            addresses = [_in_table(builder, args[0], columns.scales[column]) for column in columns.coded]
            scales = [builder.load(element(builder, address, args[1], F32)) for address in addresses]
            return context.make_tuple(builder, signature.return_type, scales)

        kind = types.BaseTuple.from_types((types.float32,) * len(columns.coded))
        return kind(types.int64, types.int64), generate

    return load


def scales_storer(columns: Columns) -> Any:
    """Store the scales of a block, from the bits of its largest magnitudes. The results are what ``encoder`` takes."""
    kind = types.Tuple((types.float32, types.int32) * len(columns.coded))

    @intrinsic
    def store(typing: Any, row: Any, block: Any, largest: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            found: list[Any] = []
            for position, column in enumerate(columns.coded):
                codec: Any = columns.formats[column]
                scale, *factors = codes.scale_of(builder, builder.extract_value(args[2], position), codec)
                address = _in_table(builder, args[0], columns.scales[column])
                builder.store(scale, element(builder, address, args[1], F32))
                found.extend(factors)
            return context.make_tuple(builder, kind, found)

        return kind(types.int64, types.int64, largest), generate

    return store


def loader(columns: Columns, compute: torch.dtype, count: int | None = None) -> Any:
    """Load element ``index`` of the first ``count`` tensors, in the compute dtype; by default of all."""
    formats, kind = columns.formats[:count], COMPUTED[compute]

    @intrinsic
    def load(typing: Any, addresses: Any, index: Any, scales: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            memory, values = _Memory(builder, columns), []

            def stored(column: int) -> Any:
                address = builder.extract_value(args[0], column)
                return memory.load(column, address, args[1], _LLVM[columns.elements[column]])

            for column, format in enumerate(formats):
                value, dtype = stored(column), torch.float32
                if isinstance(format, Codec):
                    scale = builder.extract_value(args[2], columns.coded.index(column))
                    value = codes.decoded(builder, value, scale, format)
                elif format == COMPENSATED:
                    value = codes.joined(builder, value, stored(len(columns.formats)))
                else:
                    dtype = columns.elements[column]
                values.append(widen(builder, value, dtype, STORED[compute]))
            return pack(context, builder, values, kind)

        return types.UniTuple(kind, len(formats))(addresses, types.int64, scales), generate

    return load


def storer(columns: Columns, compute: torch.dtype) -> Any:
    """Store what a rule returned in element ``index``; in ``slot`` of the buffer, what will be encoded.

    The results are the bits of the largest magnitudes in columns with codes: those that are given, or this element's.
    """
    written = [column for column in range(len(columns.formats)) if column != 1]  # gradients are never written

    @intrinsic
    def store(
        typing: Any,
        addresses: Any,
        index: Any,
        values: Any,
        buffer: Any,
        slot: Any,
        largest: Any,
        words: Any,
        place: Any,
    ) -> Any:
        kinds = getattr(values, "types", [values])
        if len(kinds) != len(written):
            raise errors.TypingError(f"the rule returned {len(kinds)} values, not {len(written)}")

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            memory, noise = _Memory(builder, columns), _noise(builder, columns, args[6], args[7], args[1])
            found: list[Any] = []
            for position, (column, kind) in enumerate(zip(written, kinds, strict=True)):
                format, value = columns.formats[column], args[2]
                if isinstance(values, types.BaseTuple):
                    value = builder.extract_value(value, position)
                value = context.cast(builder, value, kind, COMPUTED[compute])
                if isinstance(format, torch.dtype):
                    value = narrow(builder, value, format)
                else:
                    value = narrow(builder, value, torch.float32)
                if isinstance(format, Codec):
                    before = builder.extract_value(args[5], len(found))
                    bits = codes.magnitude_bits(builder, value)
                    if not format.signed:
                        value = builder.bitcast(bits, F32)
                    memory.store(f"buffer {column}", _buffer(builder, args[3], len(found)), args[4], value)
                    found.append(builder.select(builder.icmp_signed(">", bits, before), bits, before))
                    continue
                if format == COMPENSATED:
                    value, compensation = codes.split(builder, value)
                    added = len(columns.formats)
                    memory.store(added, builder.extract_value(args[0], added), args[1], compensation)
                elif format == STOCHASTIC:
                    value = codes.rounded_stochastically(builder, value, noise.sixteen_bits(position))
                memory.store(column, builder.extract_value(args[0], column), args[1], value)
            return context.make_tuple(builder, largest, found)

        return largest(addresses, types.int64, values, types.int64, types.int64, largest, words, types.int64), generate

    return store


def encoder(columns: Columns) -> Any:
    """Store the codes of element ``index``, whose numbers are in ``slot`` of the buffer."""

    @intrinsic
    def encode(
        typing: Any, addresses: Any, index: Any, buffer: Any, slot: Any, factors: Any, words: Any, place: Any
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            memory, noise = _Memory(builder, columns), _noise(builder, columns, args[5], args[6], args[1])
            for position, column in enumerate(columns.coded):
                codec: Any = columns.formats[column]
                number = memory.load(f"buffer {column}", _buffer(builder, args[2], position), args[3], F32)
                inverse, mask = (builder.extract_value(args[4], 2 * position + i) for i in (0, 1))
                sixteen_bits = noise.sixteen_bits(column - 1) if codec.stochastic else None
                code = codes.encoded(builder, number, inverse, mask, codec, sixteen_bits)
                memory.store(column, builder.extract_value(args[0], column), args[1], code)
            return context.get_dummy_value()

        return types.void(addresses, types.int64, types.int64, types.int64, factors, words, types.int64), generate

    return encode


def _buffer(builder: Any, buffer: Any, position: int) -> Any:
    """Where the numbers of one column with codes lie."""
    return builder.add(buffer, _constant(4 * BLOCK * position))


def buffer_of(columns: Columns) -> Any:
    """Address of a buffer on the stack: the numbers of a block in each column with codes, float32."""

    @intrinsic
    def buffer(typing: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            address = cgutils.alloca_once(builder, llvm_ir.ArrayType(F32, max(BLOCK * len(columns.coded), 1)))
            address.align = 64
            return builder.ptrtoint(address, I64)

        return types.int64(), generate

    return buffer


def words_loader(columns: Columns) -> Any:
    """The words that a chunk's noise starts from, see ``core.noise.words``; zeros if nothing needs noise."""

    @intrinsic
    def load(typing: Any, row: Any, keys: Any, scalars_row: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            words = [codes.word(0)] * 2
            if columns.stream >= 0:
                key = builder.load(element(builder, args[1], args[2], I64))
                words = [*codes.noise_words(builder, key, _in_table(builder, args[0], columns.stream))]
            return pack(context, builder, words, types.uint32)

        return types.UniTuple(types.uint32, 2)(types.int64, types.int64, types.int64), generate

    return load


def place_loader(columns: Columns) -> Any:
    """The place of a chunk's first element in its parameter; 0 if nothing needs noise."""

    @intrinsic
    def load(typing: Any, row: Any, offset: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            if columns.stream < 0:
                return _constant(0)
            return builder.add(_in_table(builder, args[0], columns.stream + 1), args[1])

        return types.int64(types.int64, types.int64), generate

    return load


def _noise(builder: Any, columns: Columns, words: Any, place: Any, index: Any) -> Any:
    if columns.stream < 0:
        return None
    both = [builder.extract_value(words, i) for i in (0, 1)]
    # Of a sum of 64 bits, places would fill twice as many registers as numbers do.
    return codes.Noise(builder, both, builder.add(builder.trunc(place, I32), builder.trunc(index, I32)))
