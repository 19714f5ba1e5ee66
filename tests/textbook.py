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


class SOAP(torch.optim.Optimizer):
    """Vyas et al. 2024 in the order of the authors' code, https://github.com/nikhilvyas/SOAP, one dimension at a time.

    Everything is a whole matrix, and the momentum is in the parameter's own coordinates between steps, where the
    authors' code puts it at the end of each step.
    """

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], frequency: int, **options: Any) -> None:
        merged = dict(lr=lr, betas=betas, frequency=frequency, shampoo_beta=None, eps=1e-8, weight_decay=0.01)
        super().__init__(params, {**merged, "max_dim": 10000, "vectors": False, "flatten": False, **options})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._step(param, param.grad, self.state[param], group)

    def _step(self, param: Any, g: Any, state: dict[str, Any], group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        shampoo_beta = beta2 if group["shampoo_beta"] is None else group["shampoo_beta"]
        shape = (g.shape[0], g[0].numel()) if group["flatten"] and g.dim() > 2 else g.shape
        g = g.reshape(shape)
        if not state:
            has_factor = [size <= group["max_dim"] and (g.dim() > 1 or group["vectors"]) for size in shape]
            state["t"] = 0
            state["m"], state["v"] = torch.zeros_like(g), torch.zeros_like(g)
            state["factors"] = [
                torch.zeros(n, n, dtype=g.dtype) if has else None for n, has in zip(shape, has_factor, strict=True)
            ]
            self._average(state["factors"], g, shampoo_beta)
            state["bases"] = [
                None if factor is None else torch.linalg.eigh(factor)[1].flip(1) for factor in state["factors"]
            ]
            return
        state["t"] += 1
        t, bases = state["t"], state["bases"]
        state["m"] = beta1 * state["m"] + (1 - beta1) * g
        state["v"] = beta2 * state["v"] + (1 - beta2) * self._into(g, bases) ** 2
        n = self._into(state["m"], bases) / (state["v"].sqrt() + group["eps"])
        eta = group["lr"] * (1 - beta2**t) ** 0.5 / (1 - beta1**t)
        param -= eta * self._out_of(n, bases).reshape(param.shape)
        param -= group["lr"] * group["weight_decay"] * param
        self._average(state["factors"], g, shampoo_beta)
        if t % group["frequency"] == 0:
            for k, factor in enumerate(state["factors"]):
                if factor is not None:
                    order = torch.diag(bases[k].T @ factor @ bases[k]).argsort(descending=True)
                    state["v"] = state["v"].index_select(k, order)
                    bases[k] = torch.linalg.qr(factor @ bases[k][:, order])[0]

    @staticmethod
    def _average(factors: list[Any], g: Any, beta: float) -> None:
        for k, factor in enumerate(factors):
            if factor is not None:
                rows = g.movedim(k, 0).flatten(1) if g.dim() > 1 else g[:, None]
                factor.copy_(beta * factor + (1 - beta) * rows @ rows.T)

    @staticmethod
    def _into(x: Any, bases: list[Any]) -> Any:
        for k, basis in enumerate(bases):
            x = x if basis is None else torch.tensordot(x, basis, dims=([k], [0])).movedim(-1, k)
        return x

    @staticmethod
    def _out_of(x: Any, bases: list[Any]) -> Any:
        for k, basis in enumerate(bases):
            x = x if basis is None else torch.tensordot(x, basis, dims=([k], [1])).movedim(-1, k)
        return x
