"""References for optimizers that torch does not have, written step by step as in their papers."""

from __future__ import annotations

from typing import Any

import torch


class Lion(torch.optim.Optimizer):
    """Chen et al. 2023, Algorithm 2."""

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        differentiable: bool = False,
    ) -> None:
        options = dict(lr=lr, betas=betas, weight_decay=weight_decay, maximize=maximize, differentiable=differentiable)
        super().__init__(params, options)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            lr, (beta1, beta2) = group["lr"], group["betas"]
            lr = lr.item() if isinstance(lr, torch.Tensor) else lr
            for param in group["params"]:
                if param.grad is None:
                    continue
                g = -param.grad if group["maximize"] else param.grad
                m = self.state[param].setdefault("exp_avg", torch.zeros_like(param))
                theta, g, m = (torch.view_as_real(t) if t.is_complex() else t for t in (param, g, m))
                c = beta1 * m + (1 - beta1) * g
                theta -= lr * (c.sign() + group["weight_decay"] * theta)
                m.copy_(beta2 * m + (1 - beta2) * g)


class AdamWScheduleFree(torch.optim.Optimizer):
    """Defazio et al. 2024, Algorithm 1, with its points x, y and z; x is computed from y and z when it is needed."""

    def __init__(
        self,
        params: Any,
        lr: Any = 0.0025,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        foreach: Any = None,
        *,
        maximize: bool = False,
    ) -> None:
        counts = dict(k=0, train_mode=True, weight_sum=0.0, lr_max=-1.0, scheduled_lr=0.0)
        options = dict(
            lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, warmup_steps=warmup_steps, r=r, foreach=foreach
        )
        merged = {**options, **counts, "weight_lr_power": weight_lr_power, "maximize": maximize}
        order = (
            "lr betas eps r k warmup_steps train_mode weight_sum lr_max scheduled_lr weight_lr_power weight_decay "
            "foreach maximize"
        )
        super().__init__(params, {name: merged[name] for name in order.split()})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            t = group["k"] + 1
            gamma = float(group["lr"]) * min(1.0, t / group["warmup_steps"] if group["warmup_steps"] else 1.0)
            group["lr_max"] = max(gamma, group["lr_max"])
            w = t ** group["r"] * group["lr_max"] ** group["weight_lr_power"]
            group.update(k=t, scheduled_lr=gamma, weight_sum=group["weight_sum"] + w)
            c = w / group["weight_sum"]
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if not state:
                    state["z"], state["exp_avg_sq"] = param.clone(), torch.zeros_like(param)
                g = -param.grad if group["maximize"] else param.grad
                y, z, v, g = (
                    torch.view_as_real(t) if t.is_complex() else t for t in (param, state["z"], state["exp_avg_sq"], g)
                )
                x = (y - (1 - beta1) * z) / beta1
                v.copy_(beta2 * v + (1 - beta2) * g * g)
                v_hat = v / (1 - beta2**t)
                z -= gamma * g / (v_hat.sqrt() + group["eps"]) + gamma * group["weight_decay"] * y
                x = (1 - c) * x + c * z
                y.copy_((1 - beta1) * z + beta1 * x)


class RowwiseAdagrad(torch.optim.Optimizer):
    """FBGEMM's rowwise_adagrad on CPUs, row by row; ``rows`` are those that the gradient names, all if it is dense."""

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-2,
        eps: float = 1e-8,
        weight_decay: float = 0,
        decoupled_weight_decay: bool = False,
        *,
        maximize: bool = False,
    ) -> None:
        options = dict(lr=lr, eps=eps, weight_decay=weight_decay)
        super().__init__(params, options | dict(decoupled=decoupled_weight_decay, maximize=maximize))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            lr, eps, weight_decay = float(group["lr"]), group["eps"], group["weight_decay"]
            for param in group["params"]:
                grads = -param.grad if group["maximize"] else param.grad
                rows = grads.coalesce().indices()[0].tolist() if grads.is_sparse else range(len(param))
                grads = grads.to_dense()
                momentum1 = self.state[param].setdefault("sum", torch.zeros(len(param), 1, dtype=param.dtype))
                for idx in rows:
                    weights, grad_buffer = param[idx].clone(), grads[idx]
                    if not group["decoupled"]:
                        grad_buffer = grad_buffer + weight_decay * weights
                    momentum1[idx] += (grad_buffer**2).sum() / max(grad_buffer.numel(), 1)
                    multiplier = lr / (momentum1[idx].sqrt() + eps)
                    correction = 1 - lr * weight_decay if group["decoupled"] else 1
                    param[idx] = correction * weights - grad_buffer * multiplier
