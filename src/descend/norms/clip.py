"""Norms and clipping as functions, with torch's signatures and results, but without its overflows.

All norms are summed in float64 over fixed chunks in a fixed order, so they do not depend on the number of threads. An
optimizer with ``max_norm`` uses the same norm, and scales inside the update.
"""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from types import GeneratorType
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from descend.backends import available
from descend.backends.backend import Backend
from descend.core.memory import wide
from descend.distributed.dtensors import is_dtensor, is_here, local_of
from descend.distributed.partial_sums import reduced, summands
from descend.distributed.ranks import Ranks, Share, share_of

CHUNK = 16_384  # torch sums shorter vectors on one thread, so that results do not depend on their number

Norm = TypeVar("Norm", float, Tensor)


def get_total_norm(
    tensors: Tensor | Iterable[Tensor],
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Norm of all tensors together, as if they were one vector.

    Args:
        tensors: any number of tensors, of any shapes and devices.
        norm_type: 1, 2, any other p > 0, or ``inf``. Default: 2.
        error_if_nonfinite: raise if the norm is NaN or infinite. Default: False.
        foreach: accepted for compatibility, without effect.
    Returns:
        The norm; shape (), device of the first tensor, the widest dtype of all, at least float32.
    Raises:
        ValueError: if ``norm_type`` is not positive.
        RuntimeError: if the norm is not finite and ``error_if_nonfinite``.
    Example:
        >>> get_total_norm([torch.tensor([3.0]), torch.tensor([[4.0]])])
        tensor(5.)
    """
    tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    norm_type = float(norm_type)
    if not norm_type > 0:
        raise ValueError(f"norm_type must be 1, 2, another p > 0 or inf, got {norm_type}.")
    if not tensors:
        return torch.tensor(0.0)
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype.to_real())
    total = torch.as_tensor(norm(tensors, norm_type), dtype=dtype, device=tensors[0].device)
    if error_if_nonfinite and not torch.isfinite(total):
        raise RuntimeError(
            f"The total norm of order {norm_type} for gradients from `parameters` is non-finite ({total.item()}), "
            "so it cannot be clipped. Look for the cause, or pass `error_if_nonfinite=False` to clip anyway."
        )
    return total


def clip_grads_with_norm_(
    parameters: Tensor | Iterable[Tensor], max_norm: float, total_norm: Tensor, foreach: bool | None = None
) -> None:
    """Scale gradients in place by ``min(1, max_norm / (total_norm + 1e-6))``; a NaN norm makes them NaN.

    Args:
        parameters: parameters whose ``.grad`` is scaled; those without one are skipped.
        max_norm: largest allowed norm, >= 0, in the units of the gradient.
        total_norm: the norm, as ``get_total_norm`` gives it.
        foreach: accepted for compatibility, without effect.
    Raises:
        ValueError: if ``max_norm`` is negative or NaN.
    Example:
        >>> weight = torch.zeros(2, requires_grad=True); weight.grad = torch.tensor([3.0, 4.0])
        >>> clip_grads_with_norm_(weight, max_norm=1.0, total_norm=torch.tensor(10.0))
        >>> weight.grad
        tensor([0.3000, 0.4000])
    """
    max_norm = _not_negative("max_norm", max_norm)
    total_norm = local_of(*reduced([total_norm]))
    _scale(_grads(parameters), clip_coefficient(max_norm, wide(total_norm)))


def clip_coefficient(max_norm: float, total_norm: Norm) -> Norm:
    """``min(1, max_norm / (total_norm + 1e-6))``, as in torch; NaN for a NaN norm."""
    coefficient = max_norm / (total_norm + 1e-6)
    if isinstance(coefficient, Tensor):
        return coefficient.clamp(max=1.0)
    return 1.0 if coefficient > 1 else coefficient  # Python's min(1, nan) is 1


def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Scale gradients in place so that their joint norm is at most ``max_norm``.

    Args:
        parameters: parameters whose ``.grad`` is scaled; those without one are skipped.
        max_norm: largest allowed norm, >= 0, in the units of the gradient.
        norm_type: 1, 2, any other p > 0, or ``inf``. Default: 2.
        error_if_nonfinite: raise, before anything is scaled, if the norm is NaN or infinite. Default: False.
        foreach: accepted for compatibility, without effect.
    Returns:
        Norm before clipping; shape (), device of the gradients, their widest dtype, at least float32.
    Raises:
        ValueError: if ``max_norm`` is negative or NaN, or ``norm_type`` is not positive.
        RuntimeError: if the norm is not finite and ``error_if_nonfinite``.
    Warns:
        UserWarning: if ``parameters`` is a generator that yields nothing: it may have been used up.
    Example:
        >>> weight = torch.zeros(2, requires_grad=True); weight.grad = torch.tensor([3.0, 4.0])
        >>> clip_grad_norm_([weight], max_norm=1.0)
        tensor(5.)

    Source:
        Pascanu et al. 2013, https://arxiv.org/abs/1211.5063
    """
    max_norm = _not_negative("max_norm", max_norm)
    listed = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    if isinstance(parameters, GeneratorType) and not listed:
        warnings.warn("`parameters` is an empty generator, no gradient clipping will occur.", stacklevel=2)
    total_norm = get_total_norm(_grads(listed), norm_type, error_if_nonfinite)
    clip_grads_with_norm_(listed, max_norm, total_norm)
    return total_norm


def clip_grad_value_(parameters: Tensor | Iterable[Tensor], clip_value: float, foreach: bool | None = None) -> None:
    """Limit every element of the gradients, in place, to [-clip_value, clip_value].

    Args:
        parameters: parameters whose ``.grad`` is limited; those without one are skipped.
        clip_value: largest allowed magnitude, >= 0, in the units of the gradient.
        foreach: accepted for compatibility, without effect.
    Raises:
        ValueError: if ``clip_value`` is negative or NaN.
    Example:
        >>> weight = torch.zeros(2, requires_grad=True); weight.grad = torch.tensor([3.0, -0.5])
        >>> clip_grad_value_(weight, 1.0)
        >>> weight.grad
        tensor([ 1.0000, -0.5000])
    """
    clip_value = _not_negative("clip_value", clip_value)
    grads = _grads(parameters)
    with torch.no_grad():
        for grad, whole in zip(grads, reduced(grads), strict=True):
            if grad.is_sparse:  # duplicates count as their sum
                indices, values = grad.coalesce().indices(), summed(grad).clamp(-clip_value, clip_value)
                clipped = torch.sparse_coo_tensor(indices, values, grad.shape, device=grad.device, is_coalesced=True)
                grad.copy_(clipped)
            else:
                clamped = local_of(whole).clamp_(-clip_value, clip_value)
                if whole is not grad:  # partial sums, equal ones from now on
                    local_of(grad).copy_(clamped / summands(grad))
        torch.autograd.graph.increment_version([grad for grad in grads if is_dtensor(grad)])


def _not_negative(name: str, value: float) -> float:
    value = float(value)
    if not value >= 0:
        raise ValueError(f"{name} must be a number >= 0, got {value}: a negative one would flip the gradients.")
    return value


def _grads(parameters: Tensor | Iterable[Tensor]) -> list[Tensor]:
    parameters = [parameters] if isinstance(parameters, Tensor) else parameters
    return [p.grad for p in parameters if p.grad is not None]


def _scale(grads: Sequence[Tensor], coefficient: Tensor) -> None:
    by_kind: defaultdict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
    for grad in grads:
        # A sparse tensor scaled as a whole would not count as coalesced any more; expanded values cannot be scaled.
        in_place = grad._values() if grad.is_sparse and grad._values().is_contiguous() else local_of(grad)
        by_kind[in_place.device, grad.dtype].append(in_place)
    with torch.no_grad():
        for (device, _), members in by_kind.items():
            if device.type == "cpu":
                if (factor := coefficient.item()) != 1:
                    torch._foreach_mul_(members, factor)
            else:  # no waiting for the device
                torch._foreach_mul_(members, coefficient.to(device))
        torch.autograd.graph.increment_version([grad for grad in grads if is_dtensor(grad)])


def norm(tensors: Sequence[Tensor], norm_type: float) -> Tensor | float:
    """The norm of all tensors together, in float64 where the device has it."""
    if any(map(is_dtensor, tensors)):
        parts: defaultdict[Share | None, list[Tensor]] = defaultdict(list)
        with torch.no_grad():
            for tensor in reduced(tensors):
                members = parts[share_of(tensor)]
                if not is_dtensor(tensor) or is_here(tensor):
                    members.append(local_of(tensor))
        return norm_of_parts(parts, norm_type, Ranks(parts))
    if norm_type == 2 and (backend := _compiled_for(tensors)) is not None:
        total = backend.sum_of_squares(tensors)
        if isinstance(total, Tensor):  # on a device: nothing waits for it
            return total.sqrt()
        if math.isfinite(total):
            return math.sqrt(total)
    largest = _combined([_largest(tensor) for tensor in tensors]).max()
    if math.isinf(norm_type):
        return largest
    # Divided by the largest element no power overflows; 0, Inf and NaN are their own norms.
    unit = torch.where(largest > 0, largest, 1.0)
    total_power = _combined([_power_sum(tensor, norm_type, unit) for tensor in tensors]).sum()
    return torch.where(largest.isfinite(), unit * total_power ** (1 / norm_type), largest)


def norm_of_parts(parts: Mapping[Share | None, Sequence[Tensor]], norm_type: float, ranks: Ranks) -> float:
    """The norm of tensors of which each rank holds a part, the same on every rank.

    Args:
        parts: plain tensors, by the ranks that hold the rest of them.
        norm_type: p > 0, or ``inf``.
        ranks: that take part. All make the same calls, whatever they hold.
    """
    if norm_type == 2:
        (total,) = ranks.sum({None: [0.0], **{share: [_sum_of_squares(parts[share])] for share in parts}})
        if math.isfinite(total):
            return math.sqrt(total)
    members = [tensor for tensors in parts.values() for tensor in tensors]
    found = np.array([0.0, *(_largest(tensor).item() for tensor in members)])
    (largest,) = ranks.max([float(found.max())])  # NaN if one is
    if math.isinf(norm_type) or not 0 < largest < math.inf:
        return largest
    unit = torch.tensor(largest, dtype=torch.float64, device="cpu")
    powers = {
        share: [math.fsum(_power_sum(tensor, norm_type, unit).item() for tensor in tensors)]
        for share, tensors in parts.items()
    }
    return float(largest * ranks.sum({None: [0.0], **powers})[0] ** (1 / norm_type))


def _sum_of_squares(tensors: Sequence[Tensor]) -> float:
    backend = _compiled_for(tensors)
    if backend is not None:
        return float(backend.sum_of_squares(tensors))
    return math.fsum(_power_sum(tensor, 2.0, torch.ones(())).item() for tensor in tensors)


def _compiled_for(tensors: Sequence[Tensor]) -> Backend | None:
    """A compiled backend that can sum the squares of all of these, which do not overflow on a device."""
    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1 or any(not tensor.is_cpu and tensor.dtype == torch.float64 for tensor in tensors):
        return None
    for backend in available("auto"):
        if all(backend.why_not(None, tensor, None, ()) is None for tensor in tensors):
            return backend
    return None


def _combined(values: Sequence[Tensor]) -> Tensor:
    return torch.stack([value.to(values[0].device) for value in values])


def summed(tensor: Tensor) -> Tensor:
    """The values of a sparse tensor, duplicates summed in float32 or wider; a dense tensor as it is."""
    if tensor.layout == torch.strided:
        return tensor
    return tensor.to_sparse().to(torch.promote_types(tensor.dtype, torch.float32)).coalesce().values()


def is_finite(grad: Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    return bool(torch.isfinite(summed(grad)).all())


def _chunks(tensor: Tensor) -> Iterable[Tensor]:
    tensor = summed(tensor)
    flat = tensor.detach().abs().flatten() if tensor.is_complex() else tensor.detach().reshape(-1)
    return torch.split(flat, CHUNK) if flat.device.type == "cpu" else (flat,)


def _largest(tensor: Tensor) -> Tensor:
    parts = [torch.linalg.vector_norm(part, math.inf) for part in _chunks(tensor) if part.numel()]
    return torch.stack(parts).max() if parts else torch.zeros((), device=tensor.device)


def _power_sum(tensor: Tensor, power: float, unit: Tensor) -> Tensor:
    unit = unit.to(tensor.device)
    return torch.stack([((wide(part).abs() / unit) ** power).sum() for part in _chunks(tensor)]).sum()
