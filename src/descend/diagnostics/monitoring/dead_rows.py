"""Rows of parameters that no gradient has reached, as their state tells."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from descend.core.codecs import SCALE, decode
from descend.core.optimizer import MethodOptimizer
from descend.core.signature import signature
from descend.distributed.dtensors import local_of

# State that a gradient changes in whatever elements it is not zero in, the best evidence first.
_EVIDENCE = ("exp_avg_sq", "square_avg", "sum", "exp_inf", "exp_avg", "momentum_buffer", "prev")


class DeadRows(NamedTuple):
    """Rows of one parameter, on this rank.

    Attributes:
        dead: those that no gradient has reached.
        rows: all of them.
    """

    dead: int
    rows: int


def dead_rows(optimizer: MethodOptimizer, params: Mapping[str, Tensor]) -> dict[str, DeadRows]:
    """See ``Monitor.dead_rows``; ``params`` by name."""
    found = {}
    for name, param in params.items():
        state = optimizer.state_of(param)
        if "row_step" in state:  # sparse="exact": zero or negative while the row's averages are zero
            steps = local_of(state["row_step"])
            found[name] = DeadRows(int((steps <= 0).sum()), len(steps))
            continue
        group = optimizer.group_of(param)
        method = optimizer.method_of(group)
        takes = signature(method.rule_of(param, group)).state
        evidence = next((key for key in _EVIDENCE if key in takes and isinstance(state.get(key), Tensor)), None)
        if evidence is None or local_of(state[evidence]).dim() < 2:
            continue
        tensor, start = local_of(state[evidence]), method.initial_state(evidence, param, group)
        if tensor.dtype == torch.uint8:
            tensor = decode(tensor, local_of(state[evidence + SCALE]), method.codec_of(evidence))
        is_dead = (tensor.flatten(1) == torch.as_tensor(start, device=tensor.device)).all(1)
        found[name] = DeadRows(int(is_dead.sum()), len(is_dead))
    return found
