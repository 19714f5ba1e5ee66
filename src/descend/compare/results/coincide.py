"""Curves that coincide: which do, and by how much they differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np

from descend.compare.results.curves import Floats
from descend.compare.results.series import Series, losses, smooth_losses

TOLERANCE = 0.01  # of the height of the picture, which is logarithmic for positive losses
Curves = dict[int, tuple[Floats, Floats]]  # by seed: losses, and the same smoothed


@dataclass(frozen=True)
class Pair:
    """Two series whose curves coincide.

    Args:
        first: the one named first.
        second: the other.
        differences: by step, the largest difference of their losses over the seeds.
    """

    first: Series
    second: Series
    differences: Floats

    @property
    def largest(self) -> float:
        return float(self.differences.max())


def pairs(series: Sequence[Series]) -> list[Pair]:
    """Return each series that coincides with an earlier one, paired with the first such."""
    found: list[Pair] = []
    firsts: list[tuple[Series, Curves]] = []
    for one in series:
        curves = {run.seed: (np.array(losses(run)), np.array(smooth_losses(run))) for run in one.best.runs}
        match = next((first for first, theirs in firsts if _coincide(theirs, curves)), None)
        if match is None:
            firsts.append((one, curves))
        else:
            theirs = next(theirs for first, theirs in firsts if first is match)
            differences = [np.abs(curves[seed][0] - theirs[seed][0]) for seed in curves]
            found.append(Pair(match, one, np.array(list(zip_longest(*differences, fillvalue=0.0))).max(axis=1)))
    return found


def _coincide(first: Curves, second: Curves) -> bool:
    """Tell whether all seeds are the same, and nowhere on the axis of the losses can their curves be told apart."""
    if first.keys() != second.keys():
        return False
    for seed, (_, a) in first.items():
        _, b = second[seed]
        if len(a) != len(b) or not len(a):
            return False
        ends = np.concatenate([a, b])
        if ends.min() > 0:
            a, b, ends = np.log(a), np.log(b), np.log(ends)
        if (np.abs(a - b) > TOLERANCE * (ends.max() - ends.min())).any():
            return False
    return True
