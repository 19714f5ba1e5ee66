"""The direction of a step is an orthogonal matrix: Muon and NorMuon."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from descend import matrix_rules, newton_schulz
from descend.core.checks import check_at_least_zero
from descend.core.groups import ParamsT
from descend.core.options import Options
from descend.first_order.routing import RoutedOptimizer

_JORDAN = newton_schulz.COEFFICIENTS["jordan"][0]
_ADJUSTMENTS = (None, "original", "match_rms_adamw", "spectral_unclamped")


class Muon(RoutedOptimizer):
    """Muon: momentum, orthogonalized: every direction of a weight matrix moves by the same amount.

    Drop-in for ``torch.optim.Muon`` on parameters of two dimensions. Beyond it, parameters may have more: a convolution
    is a matrix with a row an output channel, a stack of matrices is orthogonalized one by one, and fused matrices are
    cut. Embeddings, output layers, norms and biases are no such matrices. Given a module, Muon has AdamW inside for
    them, as the method of their groups, without weight decay for norms and biases; ``summary()`` shows who is where and
    why, and ``groups`` overrides it.

    In bfloat16 with ``nesterov=False``, torch overwrites the momentum by its orthogonal matrix; here it is kept.
    Products are in bfloat16 where that is faster than float32, else in float32, and in float64 for float64 parameters;
    torch's are always in bfloat16.

    Args:
        params: a module, whose parameters are then sorted by kind of module, name and dimensions; or ``(name,
            parameter)`` pairs, sorted by names and dimensions; or parameters, sorted by dimensions, with a warning.
            Dicts that define groups, and pairs or parameters that all have two dimensions, are taken as in torch.
        lr: step size, >= 0; a float or a tensor of one element. Default: 1e-3.
        weight_decay: decoupled, >= 0, multiplied by ``lr``. Default: 0.1.
        momentum: decay of the average of the gradients, >= 0. Default: 0.95.
        nesterov: look ahead. Default: True.
        ns_coefficients: of the Newton-Schulz iterations: three numbers; three for each iteration; or ``"jordan"``,
            ``"polar_express"``, or ``"cans"``, which is made for ``ns_steps=7``; see
            ``descend.newton_schulz.orthogonalize``. Default: (3.4445, -4.775, 2.0315), Jordan's.
        eps: smallest norm that a matrix is divided by, > 0. Default: 1e-7.
        ns_steps: number of iterations, in [0, 100). Default: 5.
        adjust_lr_fn: how ``lr`` depends on a matrix's shape: ``"original"``, ``"match_rms_adamw"`` or
            ``"spectral_unclamped"``; see ``descend.matrix_rules.lr_ratio``. Default: None, the same as ``"original"``.
        adamw: options of AdamW inside, such as ``dict(lr=3e-4)``; it has its own defaults. Default: None.
        split: each matrix is cut along its rows into so many equal pieces, or into pieces of so many rows, each
            orthogonalized by itself: 3 for fused query, key and value. Default: None, not cut.
        stacked: whether the first dimension counts matrices, as in a stack of experts. Default: False.
        maximize: ascend instead. Default: False.
        differentiable: let autograd see the step. Default: False.
    Raises:
        ValueError: if an option is out of range, or a parameter has too few dimensions or rows that cannot be split.
    Example:
        >>> nn = torch.nn
        >>> model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 9))
        >>> rows = Muon(model, lr=0.02, adamw=dict(lr=3e-3)).summary()
        group  pattern                parameters  numbers  state  per number  formats  options that differ
            0  (linear)                        1       16    0 B           -  -
            1  (embedding), (output)           2       72    0 B           -  -        method=adamw
            2  (bias), (norm)                  4       21    0 B           -  -        method=adamw, weight_decay=0.0
        total                                  7      109    0 B           -  -
        >>> weight = torch.ones(2, 2, requires_grad=True)
        >>> optimizer = Muon([weight], lr=0.1, weight_decay=0.0, ns_coefficients="polar_express", ns_steps=8)
        >>> (weight * torch.tensor([[3.0, 0.0], [0.0, 4.0]])).sum().backward()
        >>> optimizer.step()
        >>> weight
        tensor([[0.9000, 1.0000],
                [1.0000, 0.9000]], requires_grad=True)

    Source:
        Jordan 2024, https://kellerjordan.github.io/posts/muon/; Liu et al. 2025, https://arxiv.org/abs/2502.16982
    """

    counts_steps = False
    decay = "decoupled"
    _make_rule = staticmethod(matrix_rules.muon)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: str | Sequence[float] | Sequence[Sequence[float]] = _JORDAN,
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        adamw: Mapping[str, Any] | None = None,
        split: int | Sequence[int] | None = None,
        stacked: bool = False,
        maximize: bool = False,
        differentiable: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "eps": eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
            "split": split,
            "stacked": stacked,
            "maximize": maximize,
            "differentiable": differentiable,
        }
        super().__init__(params, defaults, adamw, **options)

    def rule_for(self, group: Mapping[str, Any]) -> Callable[..., Any]:
        return self._make_rule(
            bool(group["nesterov"]),
            group["adjust_lr_fn"] or "original",
            _hashable(group["ns_coefficients"]),
            group["ns_steps"],
            _hashable(group["split"] or 1),
            int(group["stacked"]),
        )

    def scalars(self, group: Mapping[str, Any], step: float) -> tuple[Any, ...]:
        return group["lr"], group["weight_decay"], group["momentum"], 1 - group["momentum"], group["eps"]

    def check_group(self, options: Mapping[str, Any]) -> None:
        name, steps = type(self).__name__, options["ns_steps"]
        if not (isinstance(steps, int) and 0 <= steps < 100):
            raise ValueError(
                f"Number of steps must be less than 100 for computational efficiency ({name}: ns_steps must be an "
                f"integer in [0, 100), got {steps!r})"
            )
        newton_schulz.iterations(options["ns_coefficients"], steps)
        super().check_group({**options, "ns_coefficients": _JORDAN})  # which may be more than three numbers

    def check_options(self, options: Mapping[str, Any]) -> None:
        name, lr = type(self).__name__, options["lr"]
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError(f"Tensor lr must be 1-element ({name}: got shape {tuple(lr.shape)})")
        for key, words in (("lr", "Learning rate"), ("momentum", "momentum"), ("weight_decay", "weight decay")):
            if not options[key] >= 0:
                raise ValueError(f"{words} should be >= 0 but is: {options[key]} ({name}: {key} must be a number >= 0)")
        check_at_least_zero(self, "epsilon value", "eps", options["eps"])
        if options["adjust_lr_fn"] not in _ADJUSTMENTS:
            raise ValueError(
                f"Adjust learning rate function {options['adjust_lr_fn']} is not supported ({name}: adjust_lr_fn must "
                f"be one of {_ADJUSTMENTS})"
            )
        split = options["split"]
        pieces = (1 if split is None else split,) if isinstance(split, int | None) else tuple(split)
        if not pieces or not all(isinstance(piece, int) and piece >= 1 for piece in pieces):
            raise ValueError(f"{name}: split must be a number of pieces, or the rows of each, got {split!r}.")

    def check_param(self, param: Tensor, group: Mapping[str, Any]) -> None:
        super().check_param(param, group)
        name = type(self).__name__
        if param.is_complex():
            raise RuntimeError(f"{name} does not support complex parameters: {self.name_of(param)}")
        least = 3 if group["stacked"] else 2
        if param.dim() < least:
            raise ValueError(
                f"{name} only supports parameters of at least {least} dimensions, whereas we found a parameter with "
                f"size: {param.size()} ({self.name_of(param)}): give its group method='adamw'."
            )
        try:
            matrix_rules.rows_of_pieces(param.size(least - 2), _hashable(group["split"] or 1))
        except ValueError as error:
            raise ValueError(f"{name}: split={group['split']}, but {self.name_of(param)}: {error}") from None


class NorMuon(Muon):
    """NorMuon: Muon, whose updates are divided row by row by their running root mean squares.

    Every neuron then moves by about the same amount, where Muon lets some move much more than others. The norm of the
    whole update stays Muon's.

    Args:
        params: a module, whose parameters then have names; or parameters, ``(name, parameter)`` pairs, or dicts that
            define groups: see ``Muon``.
        lr: step size, >= 0; a float or a tensor of one element. Default: 0.02.
        weight_decay: decoupled, >= 0, multiplied by ``lr``. Default: 0.
        momentum: decay of the average of the gradients, >= 0. Default: 0.95.
        beta2: decay of the mean squares of the rows, in [0, 1). Default: 0.95.
        nesterov, ns_coefficients, eps, ns_steps, adjust_lr_fn, adamw, split, stacked: see ``Muon``, whose defaults they
            have.
        maximize: ascend instead. Default: False.
        differentiable: let autograd see the step. Default: False.
    Raises:
        ValueError: if an option is out of range, or a parameter has too few dimensions or rows that cannot be split.
    Example:
        >>> weight = torch.ones(2, 2, requires_grad=True)
        >>> optimizer = NorMuon([weight], lr=0.1, ns_coefficients="polar_express", ns_steps=8)
        >>> (weight * torch.tensor([[3.0, 0.0], [0.0, 4.0]])).sum().backward()
        >>> optimizer.step()
        >>> weight
        tensor([[0.9000, 1.0000],
                [1.0000, 0.9000]], requires_grad=True)

    Source:
        Li et al. 2025, https://arxiv.org/abs/2510.05491
    """

    nonnegative_state = ("second_momentum_buffer",)
    _make_rule = staticmethod(matrix_rules.normuon)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.02,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        beta2: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: str | Sequence[float] | Sequence[Sequence[float]] = _JORDAN,
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        adamw: Mapping[str, Any] | None = None,
        split: int | Sequence[int] | None = None,
        stacked: bool = False,
        maximize: bool = False,
        differentiable: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "beta2": beta2,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "eps": eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
            "split": split,
            "stacked": stacked,
            "maximize": maximize,
            "differentiable": differentiable,
        }
        RoutedOptimizer.__init__(self, params, defaults, adamw, **options)

    def scalars(self, group: Mapping[str, Any], step: float) -> tuple[Any, ...]:
        lr, weight_decay, momentum, gain, eps = super().scalars(group, step)
        return lr, weight_decay, momentum, gain, 1 - group["beta2"], eps, _NORM_EPS

    def state_shape(self, name: str, param: Tensor, group: Mapping[str, Any]) -> torch.Size:
        if name != "second_momentum_buffer":
            return param.shape
        rows = 2 if group["stacked"] else 1
        return torch.Size((*param.shape[:rows], *[1] * (param.dim() - rows)))

    def check_options(self, options: Mapping[str, Any]) -> None:
        super().check_options(options)
        if not 0 <= options["beta2"] < 1:
            raise ValueError(f"{type(self).__name__}: beta2 must be in [0, 1), got {options['beta2']}.")


_NORM_EPS = 1e-10  # of the authors' implementation


def _hashable(value: Any) -> Any:
    """Lists, as in a checkpoint, as tuples."""
    return tuple(map(_hashable, value)) if isinstance(value, list | tuple) else value
