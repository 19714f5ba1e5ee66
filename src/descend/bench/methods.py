"""The optimizers that are timed, the ways in which torch runs them, and the bytes that a step must move."""

from __future__ import annotations

from typing import Any, NamedTuple

OURS = "ours"
DEFAULT = "default"
FOREACH = "foreach"
FUSED = "fused"

# torch's default on the CPU is its for-loop; asking for it keeps that so in other versions.
PEERS: dict[str, dict[str, Any]] = {
    DEFAULT: {"foreach": False, "fused": False},
    FOREACH: {"foreach": True},
    FUSED: {"fused": True},
}
EVERY_PEER = (DEFAULT, FOREACH, FUSED)


class Method(NamedTuple):
    """An optimizer.

    Attributes:
        name: of its class, here and in torch.
        state: state tensors as large as their parameter; a step reads and writes each.
        peers: the ways in which torch runs it.
        yardstick: the class in torch to time it against, where torch has none of this name.
        summed: tensors as large as their parameter that are read once more before the step, for sums.
    """

    name: str
    options: dict[str, Any]
    state: int
    peers: tuple[str, ...] = (DEFAULT, FOREACH)
    yardstick: str | None = None
    summed: int = 0

    @property
    def rivals(self) -> tuple[str, ...]:
        """The ways in which torch takes the very same step; none where there is only a yardstick."""
        return () if self.yardstick else self.peers

    def peer_options(self, peer: str) -> dict[str, Any]:
        """Return what makes torch run it in one of its ways; most methods have no ``fused`` to turn off."""
        flags = {flag: value for flag, value in PEERS[peer].items() if flag != FUSED or FUSED in self.peers}
        return {**self.options, **flags}


METHODS = {
    "adamw": Method("AdamW", {}, state=2, peers=EVERY_PEER),
    "adam": Method("Adam", {}, state=2, peers=EVERY_PEER),
    "sgd": Method("SGD", {"momentum": 0.9}, state=1, peers=EVERY_PEER),
    "nadam": Method("NAdam", {}, state=2),
    "radam": Method("RAdam", {}, state=2),
    "adamax": Method("Adamax", {}, state=2),
    "adadelta": Method("Adadelta", {}, state=2),
    "rprop": Method("Rprop", {}, state=2),
    "adagrad": Method("Adagrad", {}, state=1, peers=EVERY_PEER),
    "rowwiseadagrad": Method("RowwiseAdagrad", {}, state=0, peers=EVERY_PEER, yardstick="Adagrad"),
    "rmsprop": Method("RMSprop", {}, state=1),
    "asgd": Method("ASGD", {}, state=1),
    "lion": Method("Lion", {}, state=1, peers=EVERY_PEER, yardstick="AdamW"),
    "adopt": Method("ADOPT", {}, state=2, peers=EVERY_PEER, yardstick="AdamW"),
    "ademamix": Method("AdEMAMix", {}, state=3, peers=EVERY_PEER, yardstick="AdamW"),
    "adan": Method("Adan", {}, state=4, peers=EVERY_PEER, yardstick="AdamW"),
    "mars": Method("MARS", {}, state=3, peers=EVERY_PEER, yardstick="AdamW", summed=2),
    "lamb": Method("LAMB", {}, state=2, peers=EVERY_PEER, yardstick="AdamW", summed=4),
    "prodigy": Method("Prodigy", {}, state=4, peers=EVERY_PEER, yardstick="AdamW", summed=4),
    "adamwschedulefree": Method("AdamWScheduleFree", {}, state=2, peers=EVERY_PEER, yardstick="AdamW"),
}


def bytes_moved(param_bytes: int, state_bytes: int, clip: bool, summed: int = 0) -> int:
    """Return how many bytes a step has to move, whoever takes it.

    It reads and writes parameters and state, and reads the gradient. Clipping reads the gradient once more, as the norm
    has to be known before the first parameter moves; so does what a rule sums over whole tensors.

    Args:
        param_bytes: size of all parameters, and of all gradients.
        state_bytes: size of the state.
        clip: whether gradients are clipped by their norm.
        summed: tensors as large as their parameter that are read for sums.
    Example:
        >>> bytes_moved(param_bytes=4, state_bytes=8, clip=False)  # AdamW in float32, for each number
        28
    """
    return (3 + clip + summed) * param_bytes + 2 * state_bytes
