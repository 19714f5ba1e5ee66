"""References for optimizers that torch does not have, written step by step as in their papers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


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


class Counted(torch.optim.Optimizer):
    """The bookkeeping that the algorithms below share: groups, state that starts at zero, and each parameter's step.

    A subclass names its state in ``names``, its options in its constructor, and does ``update``.
    """

    names: tuple[str, ...]

    def __init__(self, params: Any, options: dict[str, Any]) -> None:
        del options["self"], options["params"], options["__class__"]
        super().__init__(params, options)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if not state:
                    state["step"] = torch.tensor(0.0)
                    state.update({name: torch.zeros_like(param) for name in self.names})
                state["step"] += 1
                g = -param.grad if group["maximize"] else param.grad
                tensors = (param, g, *(state[name] for name in self.names))
                real = [torch.view_as_real(t) if t.is_complex() else t for t in tensors]
                self.update(group, state["step"].item(), *real)

    def update(self, group: dict[str, Any], t: float, theta: Tensor, g: Tensor, *state: Tensor) -> None:
        raise NotImplementedError


class ADOPT(Counted):
    """Taniguchi et al. 2024, the clipped algorithm; its time starts at 0 with v_0 = g_0 ** 2."""

    names = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-3,
        betas: tuple[float, float] = (0.9, 0.9999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        *,
        clip_exp: float = 0.25,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
    ) -> None:
        super().__init__(params, locals())

    def update(self, group: dict[str, Any], t: float, theta: Tensor, g: Tensor, *state: Tensor) -> None:
        (m, v), (beta1, beta2), lr = state, group["betas"], float(group["lr"])
        if not group["decoupled_weight_decay"]:
            g = g + group["weight_decay"] * theta
        if t == 1:
            v.copy_(g * g)
            return
        if group["decoupled_weight_decay"]:
            theta -= lr * group["weight_decay"] * theta
        c = g / v.sqrt().clamp(min=group["eps"])
        if group["clip_exp"] != math.inf:
            c = c.clamp(-((t - 1) ** group["clip_exp"]), (t - 1) ** group["clip_exp"])
        m.copy_(beta1 * m + (1 - beta1) * c)
        theta -= lr * m
        v.copy_(beta2 * v + (1 - beta2) * g * g)


class AdEMAMix(Counted):
    """Pagliardini, Ablin & Grangier 2024, Algorithm 1."""

    names = ("exp_avg", "exp_avg_sq", "exp_avg_slow")

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        eps: float = 1e-8,
        alpha: float = 2.0,
        beta3_warmup: int | None = None,
        alpha_warmup: int | None = None,
        weight_decay: float = 0,
        *,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
    ) -> None:
        super().__init__(params, locals())

    def update(self, group: dict[str, Any], t: float, theta: Tensor, g: Tensor, *state: Tensor) -> None:
        (m1, nu, m2), (beta1, beta2, beta3), lr = state, group["betas"], float(group["lr"])
        alpha, eps = group["alpha"], group["eps"]
        if group["alpha_warmup"]:
            alpha = min(t * alpha / group["alpha_warmup"], alpha)
        if group["beta3_warmup"]:
            start, end, part = math.log(beta1), math.log(beta3), t / group["beta3_warmup"]
            beta3 = min(math.exp(start * end / ((1 - part) * end + part * start)), beta3)
        m1.copy_(beta1 * m1 + (1 - beta1) * g)
        m2.copy_(beta3 * m2 + (1 - beta3) * g)
        nu.copy_(beta2 * nu + (1 - beta2) * g * g)
        m1_hat, nu_hat = m1 / (1 - beta1**t), nu / (1 - beta2**t)
        theta -= lr * ((m1_hat + alpha * m2) / (nu_hat.sqrt() + eps) + group["weight_decay"] * theta)


class Adan(Counted):
    """Xie et al. 2022, Algorithm 1, with the bias corrections and the betas of its reference implementation."""

    names = ("exp_avg", "exp_avg_sq", "exp_avg_diff", "previous_grad")

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-3,
        betas: tuple[float, float, float] = (0.98, 0.92, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        no_prox: bool = False,
        *,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
    ) -> None:
        super().__init__(params, locals())

    def update(self, group: dict[str, Any], t: float, theta: Tensor, g: Tensor, *state: Tensor) -> None:
        (m, n, v, before), (beta1, beta2, beta3), lr = state, group["betas"], float(group["lr"])
        change = g - before if t > 1 else torch.zeros_like(g)
        m.copy_(beta1 * m + (1 - beta1) * g)
        v.copy_(beta2 * v + (1 - beta2) * change)
        n.copy_(beta3 * n + (1 - beta3) * (g + beta2 * change) ** 2)
        m_hat, v_hat, n_hat = m / (1 - beta1**t), v / (1 - beta2**t), n / (1 - beta3**t)
        eta = lr / (n_hat.sqrt() + group["eps"])
        decay = lr * group["weight_decay"]
        step = eta * (m_hat + beta2 * v_hat)
        theta.copy_((1 - decay) * theta - step if group["no_prox"] else (theta - step) / (1 + decay))
        before.copy_(g)


class MARS(Counted):
    """Yuan et al. 2024, Algorithm 2, with the previous step's gradient and 0 before the first."""

    names = ("exp_avg", "exp_avg_sq", "previous_grad")

    def __init__(
        self,
        params: Any,
        lr: Any = 3e-3,
        betas: tuple[float, float] = (0.95, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        gamma: float = 0.025,
        *,
        maximize: bool = False,
    ) -> None:
        super().__init__(params, locals())

    def update(self, group: dict[str, Any], t: float, theta: Tensor, g: Tensor, *state: Tensor) -> None:
        (m, v, before), (beta1, beta2), lr = state, group["betas"], float(group["lr"])
        c = g + group["gamma"] * beta1 / (1 - beta1) * (g - before)
        norm = c.double().norm()
        c = (c / norm).to(c.dtype) if norm > 1 else c
        m.copy_(beta1 * m + (1 - beta1) * c)
        v.copy_(beta2 * v + (1 - beta2) * c * c)
        m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
        theta -= lr * (m_hat / (v_hat.sqrt() + group["eps"]) + group["weight_decay"] * theta)
        before.copy_(g)


class LAMB(Counted):
    """You et al. 2020, Algorithm 2, with phi(z) = min(z, clamp_value)."""

    names = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        bias_correction: bool = True,
        *,
        always_adapt: bool = True,
        clamp_value: float = math.inf,
        maximize: bool = False,
    ) -> None:
        super().__init__(params, locals())

    def update(self, group: dict[str, Any], t: float, theta: Tensor, g: Tensor, *state: Tensor) -> None:
        (m, v), (beta1, beta2), lr = state, group["betas"], float(group["lr"])
        m.copy_(beta1 * m + (1 - beta1) * g)
        v.copy_(beta2 * v + (1 - beta2) * g * g)
        t = t if group["bias_correction"] else math.inf
        r = m / (1 - beta1**t) / ((v / (1 - beta2**t)).sqrt() + group["eps"])
        r = r + group["weight_decay"] * theta
        norm, r_norm = float(theta.double().norm()), float(r.double().norm())
        adapts = group["always_adapt"] or group["weight_decay"] != 0
        ratio = min(norm, group["clamp_value"]) / r_norm if adapts and norm and r_norm else 1.0
        theta -= lr * ratio * r


class Prodigy(torch.optim.Optimizer):
    """Mishchenko & Defazio 2024, Algorithm 4, with the options of its implementation."""

    def __init__(
        self,
        params: Any,
        lr: Any = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        beta3: float | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0,
        decouple: bool = True,
        use_bias_correction: bool = False,
        safeguard_warmup: bool = False,
        d0: float = 1e-6,
        d_coef: float = 1.0,
        growth_rate: float = math.inf,
        *,
        maximize: bool = False,
    ) -> None:
        options = dict(lr=lr, betas=betas, beta3=beta3, eps=eps, weight_decay=weight_decay)
        options |= dict(d=d0, d0=d0, d_max=d0, d_numerator=0.0, d_coef=d_coef, k=0, growth_rate=growth_rate)
        options |= dict(use_bias_correction=use_bias_correction, decouple=decouple, safeguard_warmup=safeguard_warmup)
        super().__init__(params, options | dict(maximize=maximize))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        first = self.param_groups[0]
        d, d0, k, (beta1, beta2) = first["d"], first["d0"], first["k"] + 1, first["betas"]
        beta3 = math.sqrt(beta2) if first["beta3"] is None else first["beta3"]
        r, s_norm, moves = beta3 * first["d_numerator"], 0.0, []
        for group in self.param_groups:
            gamma = float(group["lr"])
            if group["use_bias_correction"]:
                gamma *= math.sqrt(1 - beta2**k) / (1 - beta1**k)
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if not state:
                    state["step"] = torch.tensor(0.0)
                    state.update({name: torch.zeros_like(param) for name in ("s", "p0", "exp_avg", "exp_avg_sq")})
                    state["p0"].copy_(param)
                state["step"] += 1
                tensors = (param, -param.grad if group["maximize"] else param.grad, *list(state.values())[1:])
                x, g, s, x0, m, v = (torch.view_as_real(t) if t.is_complex() else t for t in tensors)
                if not group["decouple"]:
                    g = g + group["weight_decay"] * x
                r += gamma * d * d / d0 * float((g.double() * (x0 - x).double()).sum())
                s.copy_(beta3 * s + (1.0 if group["safeguard_warmup"] else gamma) * d * d / d0 * g)
                s_norm += float(s.double().abs().sum())
                m.copy_(beta1 * m + (1 - beta1) * d * g)
                v.copy_(beta2 * v + (1 - beta2) * d * d * g * g)
                moves.append((group, gamma, x, m, v))
        if s_norm == 0:
            return
        d_hat = first["d_coef"] * r / s_norm
        d_max = max(first["d_max"], d_hat)
        d_next = min(d_max, (max(d, d_hat) if d == d0 else d) * first["growth_rate"])
        for group, gamma, x, m, v in moves:
            decay = group["weight_decay"] if group["decouple"] else 0.0
            x -= d * gamma * decay * x
            x -= gamma * d * m / (v.sqrt() + d_next * group["eps"])
        for group in self.param_groups:
            group.update(d=d_next, d_max=d_max, d_numerator=r, k=group["k"] + 1)


class Wrapped:
    """Another optimizer, which does not decay weights, with what options of every optimizer add to it.

    Cautious updates: Liang et al. 2024, Algorithm 1, https://arxiv.org/abs/2411.16085, with the scale of the authors'
    code. Cautious weight decay: Chen et al. 2025, Algorithm 1, https://arxiv.org/abs/2510.12402. Decay by the square of
    lr: Defazio 2025, https://arxiv.org/abs/2506.02285.

    Args:
        optimizer: the other optimizer.
        decay: "decoupled", "l2" or "none".
        cautious, decay_by, ema: as in ``StepOptions``.
        weight_decay, max_lr, maximize: as in groups.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        decay: str,
        weight_decay: float,
        max_lr: float = 1.0,
        maximize: bool = False,
        cautious: str | None = None,
        decay_by: str = "lr",
        ema: float | None = None,
    ) -> None:
        self.param_groups, self.state = optimizer.param_groups, optimizer.state
        self._optimizer, self._decay, self._weight_decay = optimizer, decay, weight_decay
        self._cautious, self._by, self._max_lr, self._ema, self._maximize = cautious, decay_by, max_lr, ema, maximize
        self.averages = [param.detach().clone() for param in self._params()]

    def _params(self) -> list[torch.Tensor]:
        return [param for group in self.param_groups for param in group["params"]]

    @torch.no_grad()
    def step(self) -> None:
        old = [param.detach().clone() for param in self._params()]
        for param in self._params():
            assert param.grad is not None
            param.grad = -param.grad if self._maximize else param.grad.clone()
            if self._decay == "l2":
                param.grad += self._weight_decay * param
            param.zero_()  # so that the update has all its digits
        self._optimizer.step()
        lr = float(self.param_groups[0]["lr"])
        amount = {"lr": lr, "schedule": lr / self._max_lr, "lr_squared": lr**2 / self._max_lr}[self._by]
        for i, (param, before) in enumerate(zip(self._params(), old, strict=True)):
            assert param.grad is not None
            update = -param
            if self._cautious in ("update", "both"):
                mask = (update * param.grad > 0).to(update.dtype)
                update = update * mask / mask.mean().clamp(min=1e-3) if mask.numel() else update
            decay = amount * self._weight_decay * before if self._decay == "decoupled" else torch.zeros_like(before)
            if self._cautious in ("decay", "both"):
                decay = decay * (update * before >= 0)
            param.copy_(before - update - decay)
            if self._ema is not None:
                self.averages[i] += (1 - self._ema) * (param - self.averages[i])


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
