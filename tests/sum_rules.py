"""Two rules with sums: one over each parameter, one over all; and the same in float64, one tensor after the other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from descend import FirstOrder
from descend.ops import abs, summing


def trust_sums(param, grad, average, lr, gain):
    average = (1 - gain) * average + gain * grad
    return param * param, average * average


@summing(trust_sums)
def trusted(param, grad, average, lr, gain, trust):
    """As in LAMB, a step is about as long as the parameter."""
    average = (1 - gain) * average + gain * grad
    return param - lr * trust * average, average


class Trusted(FirstOrder):
    """Steps along an average of gradients, about as long as the parameter times ``lr``."""

    rule = staticmethod(trusted)
    counts_steps = False

    def __init__(self, params: Any, lr: float = 0.1, gain: float = 0.5, maximize: bool = False, **options: Any) -> None:
        super().__init__(params, dict(lr=lr, gain=gain, maximize=maximize), **options)

    def scalars_of_sums(self, group: Mapping[str, Any], sums: Sequence[float], numel: int) -> tuple[float, ...]:
        param, average = map(math.sqrt, sums)
        return (param / (average + 0.1),)


def distance_sums(param, grad, start, total, lr, estimate):
    return grad * (start - param), abs(total + estimate * grad)


@summing(distance_sums)
def estimated(param, grad, start, total, lr, estimate, distance):
    """As in Prodigy, the distance to the solution is estimated over all parameters."""
    return param - lr * distance * grad, start, total + estimate * grad


class Estimated(FirstOrder):
    """Gradient descent whose rate grows with the estimated distance to the solution."""

    rule = staticmethod(estimated)
    counts_steps = False
    sums_over = "all"
    group_state = ("estimate",)

    def __init__(self, params: Any, lr: float = 1.0, estimate: float = 0.01, **options: Any) -> None:
        super().__init__(params, dict(lr=lr, estimate=estimate), **options)
        self.next_estimate: dict[int, float] = {}

    def initial_state(self, name: str, param: Tensor, group: Mapping[str, Any]) -> Any:
        return param if name == "start" else 0.0

    def scalars_of_sums(self, group: Mapping[str, Any], sums: Sequence[float], numel: int) -> tuple[float, ...]:
        gained, total = sums
        distance = max(group["estimate"], gained / (total + 0.1))
        self.next_estimate[id(group)] = distance
        return (distance,)

    def end_step(self, groups: Sequence[dict[str, Any]]) -> None:
        for group in groups:
            group["estimate"] = self.next_estimate.pop(id(group), group["estimate"])


def trusted_naively(params: Sequence[Tensor], steps: Sequence[Sequence[Tensor]], lr: float = 0.1) -> list[Tensor]:
    """What ``Trusted`` makes of float64 copies."""
    ends = []
    for i, param in enumerate(params):
        end = param.detach().double().clone()
        average = torch.zeros_like(end)
        for grads in steps:
            average = 0.5 * average + 0.5 * grads[i].double()
            end = end - lr * end.norm() / (average.norm() + 0.1) * average
        ends.append(end)
    return ends


def estimated_naively(params: Sequence[Tensor], steps: Sequence[Sequence[Tensor]], lr: float = 1.0) -> list[Tensor]:
    """What ``Estimated`` makes of float64 copies."""
    starts = [param.detach().double().clone() for param in params]
    ends, totals = [start.clone() for start in starts], [torch.zeros_like(start) for start in starts]
    estimate = 0.01
    for grads in steps:
        wide = [grad.double() for grad in grads]
        gained = sum((g * (s - e)).sum().item() for g, s, e in zip(wide, starts, ends, strict=True))
        totals = [total + estimate * grad for total, grad in zip(totals, wide, strict=True)]
        total = sum(each.abs().sum().item() for each in totals)
        estimate = max(estimate, gained / (total + 0.1))
        ends = [end - lr * estimate * grad for end, grad in zip(ends, wide, strict=True)]
    return ends
