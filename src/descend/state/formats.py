"""How a parameter and its state are stored: as the state is, or will be when it is made."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from descend.core.codecs import BLOCK, SCALE, Codec, Format, Formats
from descend.core.method import Method
from descend.core.noise import Stream, step_key
from descend.core.optimizer import MethodOptimizer
from descend.core.signature import signature
from descend.distributed.dtensors import first_place, has_whole_blocks, layout_of
from descend.distributed.shard_state import as_sharded


def formats_of(
    optimizer: MethodOptimizer,
    param: Tensor,
    grad: torch.dtype,
    rule: Callable[..., Any],
    group: Mapping[str, Any],
    state: Mapping[str, Any],
) -> Formats:
    """Formats of a parameter, its gradient and the state of its rule.

    Raises:
        RuntimeError: if there are codes without scales, or ranks hold parts of blocks.
    """
    method, formats = optimizer.method_of(group), []
    for name in signature(rule).state:
        if isinstance(tensor := state.get(name), Tensor):
            formats.append(_format_of(optimizer, method, name, tensor, param, state))
        else:
            formats.append(method.format_of_state(name, param, group))
        check_blocks(optimizer, param, name, formats[-1])
    return (method.format_of_param(param), grad, *formats)


def check_blocks(optimizer: MethodOptimizer, param: Tensor, name: str, format: Format) -> None:
    """Raise ``RuntimeError`` if ranks would hold parts of the blocks of the state called ``name``.

    Args:
        optimizer: the optimizer.
        param: the parameter.
        name: of the state.
        format: how the state is stored.
    """
    if isinstance(format, Codec) and not has_whole_blocks(sharded := as_sharded(optimizer, param)):
        raise RuntimeError(
            f"{type(optimizer).__name__}: {name} of {optimizer.name_of(param)} is kept in 8 bits, in blocks of {BLOCK} "
            f"numbers of a row, but has {layout_of(sharded)}, which cut such blocks: keep it in float32 "
            "(float32_state), or shard the first dimension. Nothing has moved."
        )


def _format_of(
    optimizer: MethodOptimizer, method: Method, name: str, tensor: Tensor, param: Tensor, state: Mapping[str, Any]
) -> Format:
    """How state that exists is stored."""
    if tensor.dtype != torch.uint8:
        return method.format_of_dtype(tensor.dtype)
    scale = state.get(name + SCALE)
    if not isinstance(scale, Tensor) or scale.dtype != torch.float32:
        found = f"{name + SCALE} of dtype {scale.dtype}" if isinstance(scale, Tensor) else f"no {name + SCALE}"
        raise RuntimeError(
            f"{type(optimizer).__name__}: {name} of {optimizer.name_of(param)} is in 8 bits, which need float32 "
            f"scales, but there is {found}. Load the state again, or delete it to begin anew. Nothing has moved."
        )
    return method.codec_of(name)


def key_of(optimizer: MethodOptimizer, step: Any) -> int:
    """The key of the noise of a step; the first is 1.

    Raises:
        ValueError: if the step count has been set to NaN or Inf.
    """
    if not math.isfinite(step):
        raise ValueError(
            f"{type(optimizer).__name__}: rounding='stochastic' needs the step count, which must be finite, got "
            f"{float(step)}. Nothing has moved."
        )
    return step_key(optimizer.options.rounding_seed, int(step))


def streams_of(optimizer: MethodOptimizer, params: Sequence[Tensor]) -> list[Stream]:
    """Where the noise of each parameter comes from. They are numbered over all groups.

    A part that is contiguous in the whole parameter, such as some of its rows, has the noise that it would have there.
    Other parts count on from their first element, so that each rank has another noise; replicas have the same.

    Raises:
        RuntimeError: if it is not known where this rank's part lies.
    """
    listed = (param for group in optimizer.param_groups for param in group["params"])
    numbers, streams = {param: number for number, param in enumerate(listed)}, []
    for param in params:
        try:
            streams.append(Stream(numbers[param], first_place(as_sharded(optimizer, param))))
        except ValueError as error:
            raise RuntimeError(
                f"{type(optimizer).__name__}: {optimizer.name_of(param)}: {error}, which rounding='stochastic' needs. "
                "Nothing has moved."
            ) from None
    return streams
