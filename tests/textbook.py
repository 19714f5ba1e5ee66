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


def newton_schulz(matrix: torch.Tensor, triples: Any, eps: float = 1e-7) -> torch.Tensor:
    """Jordan 2024 (or another set of coefficients), in the dtype of the matrix and of any shape."""
    x = matrix / max(float(matrix.norm()), eps)
    for a, b, c in triples:
        x = a * x + b * (x @ x.T @ x) + c * (x @ x.T @ x @ x.T @ x)
    return x


class Muon(torch.optim.Optimizer):
    """Jordan 2024, https://kellerjordan.github.io/posts/muon/, in the dtype of the parameters."""

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: Any = (3.4445, -4.7750, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        split: Any = None,
        stacked: bool = False,
        maximize: bool = False,
        differentiable: bool = False,
        **more: Any,
    ) -> None:
        options = dict(lr=lr, weight_decay=weight_decay, momentum=momentum, **more, nesterov=nesterov)
        options |= dict(ns_coefficients=ns_coefficients, eps=eps, ns_steps=ns_steps, adjust_lr_fn=adjust_lr_fn)
        options |= dict(split=split, stacked=stacked, maximize=maximize, differentiable=differentiable)
        super().__init__(params, options)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            lr, mu = float(group["lr"]), group["momentum"]
            for param in group["params"]:
                if param.grad is None:
                    continue
                g = -param.grad if group["maximize"] else param.grad
                m = self.state[param].setdefault("momentum_buffer", torch.zeros_like(param))
                m.copy_(mu * m + (1 - mu) * g)
                step = mu * m + (1 - mu) * g if group["nesterov"] else m.clone()
                squares = self.squares(param, group)
                param.mul_(1 - lr * group["weight_decay"])
                for index in range(len(param)) if group["stacked"] else [...]:
                    self.move(param[index], step[index], None if squares is None else squares[index], lr, group)

    def squares(self, param: torch.Tensor, group: dict[str, Any]) -> torch.Tensor | None:
        """NorMuon's second state."""
        return None

    def move(self, param: torch.Tensor, step: torch.Tensor, squares: Any, lr: float, group: dict[str, Any]) -> None:
        """Add the orthogonal matrices of all pieces of one matrix."""
        split = group["split"] or 1
        rows = [len(param) // split] * split if isinstance(split, int) else list(split)
        first = 0
        for count in rows if param.numel() else ():
            piece = slice(first, first + count)
            matrix = step[piece].reshape(count, -1)
            o = newton_schulz(matrix, [group["ns_coefficients"]] * group["ns_steps"], group["eps"])
            if squares is not None:
                o = self.normalized(o, squares[piece].view(count, 1), group)
            kind, (m, n) = group["adjust_lr_fn"], matrix.shape
            ratio = {"match_rms_adamw": 0.2 * max(m, n) ** 0.5, "spectral_unclamped": (m / n) ** 0.5}
            param[piece] -= lr * ratio.get(kind, max(1, m / n) ** 0.5) * o.reshape(param[piece].shape)
            first += count


class NorMuon(Muon):
    """Li et al. 2025, in the order of the authors' normuon.py."""

    def __init__(self, params: Any, lr: Any = 0.02, weight_decay: float = 0.0, **options: Any) -> None:
        super().__init__(params, lr, weight_decay, **{"beta2": 0.95, **options})

    def squares(self, param: torch.Tensor, group: dict[str, Any]) -> torch.Tensor | None:
        rows = 2 if group["stacked"] else 1
        start = param.new_zeros(*param.shape[:rows], *[1] * (param.dim() - rows))
        return self.state[param].setdefault("second_momentum_buffer", start)

    def normalized(self, o: torch.Tensor, v: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        norm = o.norm()
        v.copy_(group["beta2"] * v + (1 - group["beta2"]) * o.square().mean(1, keepdim=True))
        o = o / (v.sqrt() + 1e-10)
        return o * norm / (o.norm() + 1e-10)


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
