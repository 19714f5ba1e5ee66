"""The learning rates of a task: one rule for every optimizer that has a name."""

from __future__ import annotations

from collections.abc import Mapping

# Each as a multiple of Adam's rate.
LIKE_ADAM = {
    **dict.fromkeys(("adam", "adamw", "nadam", "radam", "sparseadam", "adamwschedulefree"), 1.0),
    **dict.fromkeys(("adopt", "ademamix", "adan", "mars", "soap"), 1.0),  # their steps are about as long as Adam's
    "adamax": 2.0,  # as in Kingma & Ba 2015, whose defaults are 0.001 and 0.002
    "rmsprop": 0.5,  # its first steps are 1 / sqrt(1 - alpha) = 10 times Adam's
    "rprop": 0.5,  # of the first step only
    "lion": 0.3,  # Chen et al. 2023: 3 to 10 times smaller than Adam's; short runs need the larger
    **dict.fromkeys(("adagrad", "rowwiseadagrad"), 5.0),  # their steps shrink with the square root of their number
    "adafactor": 20.0,  # a share of the weights' own size
    "lamb": 5.0,  # the same of whole tensors, but biases at zero take steps of Adam at this rate
    **dict.fromkeys(("muon", "normuon"), 10.0),  # their steps have norm 1 by singular value, Adam's by entry
}
LIKE_SGD = ("sgd", "asgd")
FREE = {"adadelta": 1.0, "prodigy": 1.0}  # they find their steps themselves: Zeiler 2012, Mishchenko & Defazio 2024


def rates(*, sgd: float, adam: float, **others: float) -> Mapping[str, float]:
    """Return learning rates by optimizer name.

    Args:
        sgd: rate of gradient descent without momentum.
        adam: rate of Adam, from which those of all methods that scale steps by themselves follow.
        others: exceptions, by name.
    """
    scaled = {name: round(adam * factor, 12) for name, factor in LIKE_ADAM.items()}
    return {**dict.fromkeys(LIKE_SGD, sgd), **scaled, **FREE, **others}
