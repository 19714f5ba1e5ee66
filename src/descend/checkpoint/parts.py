"""What this rank has of the state of a file: its part of whole tensors, and of those that are sharded."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from descend.core.codecs import Codec, scale_shape
from descend.core.coded import decoded
from descend.distributed.dtensors import is_dtensor, layout_of, like, local_of, part_of, redistributed, same_layout

_SAVE_WHOLE = (
    "Save it with torch.distributed.checkpoint, or whole: get_optimizer_state_dict with "
    "StateDictOptions(full_state_dict=True)."
)


def decoded_on_ranks(codes: Tensor, scale: Tensor, codec: Codec, what: str) -> Tensor:
    """The numbers of state in 8 bits, of a sharded one on the same ranks.

    Raises:
        ValueError: if codes and their scales do not lie on the same ranks.
    """
    if not same_layout(codes, scale) or local_of(scale).shape != scale_shape(local_of(codes).shape):
        raise ValueError(f"{what} has {layout_of(codes)}, and its scales {layout_of(scale)}. {_SAVE_WHOLE}")
    return in_place_of(codes, decoded(local_of(codes), local_of(scale), codec))


def in_place_of(owner: Tensor, local: Tensor) -> Tensor:
    """``local``, or the DTensor that it is a part of, as ``owner`` is."""
    return like(owner, local) if is_dtensor(owner) else local


def part_for(owner: Any, value: Any, what: str) -> Tensor:
    """What this rank has of a state tensor; ranks talk only if its layout is not that of its ``owner``.

    Raises:
        ValueError: if the part cannot be found.
    """
    if same_layout(value, owner):
        return local_of(value)
    if not is_dtensor(value):
        try:
            return part_of(value, owner)
        except ValueError as error:
            raise ValueError(f"{what}: {error}.") from None
    if is_dtensor(owner) and value.device_mesh == owner.device_mesh:
        return local_of(redistributed(value.detach(), owner.placements))
    raise ValueError(f"{what} has {layout_of(value)}, the parameter {layout_of(owner)}. {_SAVE_WHOLE}")
