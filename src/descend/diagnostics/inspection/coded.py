"""State in 8 bits, shown as the numbers that it stands for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from descend.core.codecs import SCALE, Codec
from descend.core.coded import decoded, fault_of, negative_scale
from descend.diagnostics.inspection.state_names import FULL_SHAPED, NOT_NEGATIVE
from descend.diagnostics.inspection.stored import Stored


@dataclass(frozen=True)
class Coded(Stored):
    """Codes and scales, read as float32.

    Attributes:
        in_file: bytes of both.
    """

    in_file: int

    @property
    def nbytes(self) -> int:
        return self.in_file

    @property
    def format(self) -> str:
        return "8 bits"


def paired(tensors: Mapping[str, list[Stored]]) -> tuple[dict[str, list[Stored]], list[str]]:
    """A parameter's state with each tensor of codes and its scales made one, and what is wrong with such pairs.

    Other libraries store bytes too: what has an unknown name is ours only if both are there.
    """
    made, faults = dict(tensors), []
    for name in dict.fromkeys(key.removesuffix(SCALE) for key in tensors):
        codes, scale = (_only(made.get(key)) for key in (name, name + SCALE))
        is_pair = codes is not None and scale is not None and codes.dtype == torch.uint8
        if not is_pair and name not in FULL_SHAPED:
            continue
        fault = fault_of(name, codes, scale)
        if fault is None and scale is not None and (values := scale.read()) is not None:
            fault = negative_scale(name, values)
        if codes is not None and codes.dtype == torch.uint8:
            made.pop(name + SCALE, None)
            made[name] = [_coded(name, codes, scale, fault)]
        if fault is not None:
            faults.append(fault)
    return made, faults


def _only(tensors: list[Stored] | None) -> Stored | None:
    return tensors[0] if tensors is not None and len(tensors) == 1 else None


def _coded(name: str, codes: Stored, scale: Stored | None, fault: str | None) -> Coded:
    nbytes = codes.nbytes + (scale.nbytes if scale else 0)
    if scale is None or fault is not None or codes.load is None or scale.load is None:
        return Coded(codes.shape, torch.float32, None, nbytes)
    codec = Codec(signed=name not in NOT_NEGATIVE)

    def load() -> Tensor:
        values, scales = codes.read(), scale.read()
        assert values is not None
        assert scales is not None
        return decoded(values, scales, codec)

    return Coded(codes.shape, torch.float32, load, nbytes)
