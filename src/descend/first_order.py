"""The optimizers of ``torch.optim``, in order of complexity: hyper-parameters only, the mathematics is in ``rules``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from descend import rules
from descend.optimizer import FirstOrder, Options, check_at_least_zero, check_lr

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from descend.groups import ParamsT


class SGD(FirstOrder):
    """Gradient descent, with momentum (heavy ball or Nesterov), dampening and weight decay if wanted.

    Drop-in for ``torch.optim.SGD``. Weight decay and L2 regularisation are the same thing here; in Adam they are not.

    Args:
        params: parameters, ``(name, parameter)`` pairs, or dicts that define groups.
        lr: step size, >= 0; a float or a tensor of one element. Default: 1e-3.
        momentum: >= 0. Default: 0.
        dampening: 1 minus the weight of a new gradient in the buffer, from the second step on. Default: 0.
        weight_decay: >= 0, added to the gradient as ``weight_decay * param``. Default: 0.
        nesterov: look ahead; needs momentum > 0 and no dampening. Default: False.
        maximize: ascend instead. Default: False.
        foreach, fused: accepted and kept in the groups; the backend is chosen by ``backend``.
        differentiable: let autograd see the step. Default: False.
        options: ``max_norm``, ``nonfinite``, ``backend``, ``state_dtype``: see ``FirstOrder``.
    Raises:
        ValueError: if an option is out of range.
    Example:
        >>> weight = torch.ones(2, requires_grad=True)
        >>> optimizer = SGD([weight], lr=0.1, momentum=0.9)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> weight
        tensor([0.8000, 0.8000], requires_grad=True)

    Source:
        Sutskever et al. 2013, https://proceedings.mlr.press/v28/sutskever13.html
    """

    counts_steps = False
    takes_sparse = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | torch.Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults, **options)

    def rule_for(self, group: Mapping[str, Any]) -> Callable[..., Any]:
        if group["momentum"] == 0:
            return rules.sgd
        return rules.nesterov if group["nesterov"] else rules.momentum

    def scalars(self, group: Mapping[str, Any], step: float) -> tuple[Any, ...]:
        lr, weight_decay, momentum = group["lr"], group["weight_decay"], group["momentum"]
        if momentum == 0:
            return lr, weight_decay
        # The buffer starts as the first gradient, undamped.
        decay, gain = (0.0, 1.0) if step == 1 else (momentum, 1 - group["dampening"])
        return (lr, weight_decay, decay, gain, momentum) if group["nesterov"] else (lr, weight_decay, decay, gain)

    def check_options(self, options: Mapping[str, Any]) -> None:
        check_lr(self, options)
        check_at_least_zero(self, "momentum value", "momentum", options["momentum"])
        check_at_least_zero(self, "weight_decay value", "weight_decay", options["weight_decay"])
        if options["nesterov"] and (options["momentum"] <= 0 or options["dampening"] != 0):
            raise ValueError(
                "Nesterov momentum requires a momentum and zero dampening "
                f"(SGD: got momentum={options['momentum']}, dampening={options['dampening']})"
            )
        _check_flags(options)


class Adam(FirstOrder):
    """Adam: step sizes from moving averages of the gradient and of its square, both bias-corrected.

    Drop-in for ``torch.optim.Adam``. ``weight_decay`` is L2 regularisation: it joins the gradient, so that weights
    with large gradients decay less. ``AdamW`` decays all weights alike.

    Args:
        params: parameters, ``(name, parameter)`` pairs, or dicts that define groups.
        lr: step size, >= 0; a float or a tensor of one element. Default: 1e-3.
        betas: decay of the averages of gradient and squared gradient, each in [0, 1). Default: (0.9, 0.999).
        eps: >= 0, added to the denominator, in units of the gradient. Default: 1e-8.
        weight_decay: >= 0. Default: 0.
        amsgrad: divide by the largest average so far. Default: False.
        maximize: ascend instead. Default: False.
        foreach, fused, capturable: accepted and kept in the groups; the backend is chosen by ``backend``.
        differentiable: let autograd see the step. Default: False.
        decoupled_weight_decay: decay as ``AdamW`` does. Default: False.
        options: ``max_norm``, ``nonfinite``, ``backend``, ``state_dtype``: see ``FirstOrder``.
    Raises:
        ValueError: if an option is out of range.
    Example:
        >>> weight = torch.ones(2, requires_grad=True)
        >>> optimizer = Adam([weight], lr=0.1)
        >>> weight.square().sum().backward()
        >>> optimizer.step()  # the first step of Adam is as long as lr
        >>> weight
        tensor([0.9000, 0.9000], requires_grad=True)

    Source:
        Kingma & Ba 2015, Algorithm 1, https://arxiv.org/abs/1412.6980
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float | torch.Tensor, float | torch.Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(params, defaults, **options)

    def rule_for(self, group: Mapping[str, Any]) -> Callable[..., Any]:
        if group["amsgrad"]:
            return rules.adamw_amsgrad if group["decoupled_weight_decay"] else rules.adam_amsgrad
        return rules.adamw if group["decoupled_weight_decay"] else rules.adam

    def scalars(self, group: Mapping[str, Any], step: float) -> tuple[Any, ...]:
        beta1, beta2 = group["betas"]
        bias1, bias2 = 1 - beta1**step, 1 - beta2**step
        return group["lr"], 1 - beta1, 1 - beta2, group["eps"], group["weight_decay"], bias1, bias2

    def check_options(self, options: Mapping[str, Any]) -> None:
        _check_tensors(self, options)
        check_lr(self, options)
        check_at_least_zero(self, "epsilon value", "eps", options["eps"])
        for index, beta in enumerate(options["betas"]):
            if not isinstance(beta, int | float | torch.Tensor) or not 0 <= beta < 1:
                name = type(self).__name__
                raise ValueError(
                    f"Invalid beta parameter at index {index}: {beta} ({name}: betas[{index}] must be in [0, 1))"
                )
        check_at_least_zero(self, "weight_decay value", "weight_decay", options["weight_decay"])
        _check_flags(options)


class AdamW(Adam):
    """Adam with decoupled weight decay: every weight shrinks by ``lr * weight_decay``, whatever its gradients.

    Drop-in for ``torch.optim.AdamW``.

    Args:
        params: parameters, ``(name, parameter)`` pairs, or dicts that define groups.
        lr: step size, >= 0; a float or a tensor of one element. Default: 1e-3.
        betas: decay of the averages of gradient and squared gradient, each in [0, 1). Default: (0.9, 0.999).
        eps: >= 0, added to the denominator, in units of the gradient. Default: 1e-8.
        weight_decay: >= 0, multiplied by ``lr``. Default: 1e-2.
        amsgrad: divide by the largest average so far. Default: False.
        maximize: ascend instead. Default: False.
        foreach, capturable, fused: accepted and kept in the groups; the backend is chosen by ``backend``.
        differentiable: let autograd see the step. Default: False.
        options: ``max_norm``, ``nonfinite``, ``backend``, ``state_dtype``: see ``FirstOrder``.
    Raises:
        ValueError: if an option is out of range.
    Example:
        >>> weight = torch.ones(2, requires_grad=True)
        >>> optimizer = AdamW([weight], lr=0.1, weight_decay=0.5, max_norm=1.0)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> weight
        tensor([0.8500, 0.8500], requires_grad=True)
        >>> round(optimizer.grad_norm, 4)
        2.8284

    Source:
        Loshchilov & Hutter 2019, Algorithm 2, https://arxiv.org/abs/1711.05101
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float | torch.Tensor, float | torch.Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=True,
            **options,
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group["decoupled_weight_decay"] = True


def _check_flags(options: Mapping[str, Any]) -> None:
    if options["fused"] and options["differentiable"]:
        raise RuntimeError("`fused` does not support `differentiable`; leave one of them out.")
    if options["fused"] and options["foreach"]:
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")


def _check_tensors(optimizer: FirstOrder, options: Mapping[str, Any]) -> None:
    """Torch's conditions on options given as tensors."""
    betas = options["betas"]
    if not isinstance(betas, tuple | list) or len(betas) != 2 or len({isinstance(b, torch.Tensor) for b in betas}) != 1:
        raise ValueError(f"betas must be either both floats or both Tensors, got {betas!r}")
    for name, value in (("lr", options["lr"]), ("betas[0]", betas[0]), ("betas[1]", betas[1])):
        if isinstance(value, torch.Tensor):
            if options["foreach"] and not options["capturable"]:
                raise ValueError(f"{name} as a Tensor is not supported for capturable=False and foreach=True")
            if value.numel() != 1:
                raise ValueError(f"Tensor {name} must be 1-element, got shape {tuple(value.shape)}")
