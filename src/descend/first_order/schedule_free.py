"""AdamW that needs no learning rate schedule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from typing_extensions import Unpack

from descend import rules
from descend.core.checks import check_adam, check_not_negative
from descend.core.codecs import COMPENSATED, COMPENSATION, SCALE, decode, joined, split
from descend.core.groups import ParamsT
from descend.core.interrupts import DeferredSignals
from descend.core.options import Options
from descend.distributed.dtensors import is_dtensor, local_of
from descend.distributed.gather import gather_params
from descend.distributed.shard_state import as_sharded
from descend.first_order.optimizer import FirstOrder
from descend.state.container import checked_state


class AdamWScheduleFree(FirstOrder):
    """Schedule-free AdamW: the weights are averaged over all steps, instead of a learning rate that falls to zero.

    Drop-in for ``AdamWScheduleFree`` of https://github.com/facebookresearch/schedule_free, with its arguments, groups
    and state. There are three points: z takes the steps of AdamW, x is the average of all z, and gradients are
    evaluated at y = (1 - beta1) z + beta1 x. In train mode the parameters are y. ``eval()`` makes them x, the weights
    to evaluate and to save; ``train()`` makes them y again. A new optimizer is in train mode, as modules are. A state
    dict records the mode: load it together with weights that were saved in the same mode. x is recovered from y with
    ``betas[0]``, so ``OneCycleLR`` needs ``cycle_momentum=False``.

    Args:
        params: a module, whose parameters then have names; or parameters, ``(name, parameter)`` pairs, or dicts that
            define groups, as in torch.
        lr: step size, >= 0, held constant; a float or a tensor of one element. Default: 2.5e-3.
        betas: weight of x in y, in (0, 1), and decay of the average of squared gradients, in [0, 1).
            Default: (0.9, 0.999).
        eps: added to the denominator, >= 0, in units of the gradient. Default: 1e-8.
        weight_decay: decoupled, of y, >= 0, multiplied by ``lr``. Default: 0.
        warmup_steps: steps during which ``lr`` grows to its value. Default: 0.
        r: the weight of the k-th step in the average is proportional to ``k ** r``. Default: 0.
        weight_lr_power: and to this power of the largest ``lr`` so far. Default: 2.
        foreach: accepted and kept in the groups; the backend is chosen by ``backend``.
        maximize: ascend instead. Default: False.
    Raises:
        ValueError: if an option is out of range.
        RuntimeError: by ``step()`` in eval mode.
    Example:
        >>> weight = torch.ones(2, requires_grad=True)
        >>> optimizer = AdamWScheduleFree([weight], lr=0.1, betas=(0.5, 0.999))
        >>> for _ in range(2):
        ...     weight.grad = torch.ones(2)
        ...     optimizer.step()
        >>> optimizer.eval()  # the average of 0.9 and 0.8
        >>> weight
        tensor([0.8500, 0.8500], requires_grad=True)
        >>> optimizer.train()
        >>> weight
        tensor([0.8250, 0.8250], requires_grad=True)

    Source:
        Defazio et al. 2024, Algorithm 1, https://arxiv.org/abs/2405.15682
    """

    rule = staticmethod(rules.schedule_free_adamw)
    nonnegative_state = ("exp_avg_sq",)
    exact_state = ("z",)
    counts_steps = False  # each group counts, as in the original: its parameters share one average
    is_for_groups = False  # train() and eval() are about all parameters
    state_follows_param = True
    group_state = ("k", "train_mode", "weight_sum", "lr_max", "scheduled_lr")

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 0.0025,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "r": r,
            "k": 0,
            "warmup_steps": warmup_steps,
            "train_mode": True,
            "weight_sum": 0.0,
            "lr_max": -1.0,
            "scheduled_lr": 0.0,
            "weight_lr_power": weight_lr_power,
            "weight_decay": weight_decay,
            "foreach": foreach,
            "maximize": maximize,
        }
        super().__init__(params, defaults, **options)

    def train(self) -> None:
        """Make the parameters y, where gradients are evaluated. Without effect in train mode."""
        self._switch(True)

    def eval(self) -> None:
        """Make the parameters x, the average, to evaluate and to save. Without effect in eval mode."""
        self._switch(False)

    @torch.no_grad()
    def _switch(self, train: bool) -> None:
        self.check_not_averaged()
        groups = [group for group in self.param_groups if group["train_mode"] != train]
        parts = [self._parts(group) for group in self.param_groups]
        with DeferredSignals():
            for group, pairs in zip(self.param_groups, parts, strict=True):
                if group["train_mode"] == train:
                    continue
                beta1 = group["betas"][0]
                weight = 1 - beta1 if train else 1 - 1 / beta1  # y = x + (1 - beta1) (z - x), solved for x
                for part, z, compensation in pairs:
                    y = part if compensation is None else joined(part, compensation.to(part.device))
                    y = y + weight * (z.to(part.device) - y)
                    if compensation is not None:
                        y, lost = split(y)
                        compensation.copy_(lost)
                    part.copy_(y)
                group["train_mode"] = train
            moved = [param for group in groups for param in group["params"] if "z" in self.state_of(param)]
            torch.autograd.graph.increment_version([param for param in moved if is_dtensor(param)])
            gather_params(self, moved)

    def _parts(self, group: Mapping[str, Any]) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]:
        """This rank's part of each parameter of a group, the numbers of its z, and its compensation, if it has one."""
        pairs = []
        for param in group["params"]:
            part = local_of(as_sharded(self, param))
            names = ["z", "z" + SCALE]
            if self.format_of_param(param) == COMPENSATED:
                names.append(COMPENSATION)
            tensors = checked_state(self, param, part, names, group, self.state_of(param))
            state = {name: local_of(tensor) for name, tensor in tensors}
            if (z := state.get("z")) is not None:
                if (scale := state.get("z" + SCALE)) is not None:
                    z = decode(z, scale, self.codec_of("z"))
                pairs.append((part, z, state.get(COMPENSATION)))
        return pairs

    def scalars(self, group: Mapping[str, Any], step: float) -> tuple[Any, ...]:
        if not group["train_mode"]:
            raise RuntimeError(
                "Optimizer was not in train mode when step is called. Please insert .train() and .eval() calls on the "
                "optimizer (AdamWScheduleFree: the parameters are the average x; train() makes them y again)"
            )
        beta1, beta2 = group["betas"]
        counters = self._next_counters(group)
        lr, weight_sum = counters["scheduled_lr"], counters["weight_sum"]
        weight = self._weight(group, counters) / weight_sum if weight_sum else 0.0
        bias2 = 1 - beta2 ** counters["k"]
        return lr, 1 - beta2, group["eps"], group["weight_decay"], bias2, weight, lr * (1 - beta1 * (1 - weight))

    @staticmethod
    def _weight(group: Mapping[str, Any], counters: Mapping[str, Any]) -> float:
        """Weight of a step in the average."""
        return float(counters["k"] ** group["r"] * counters["lr_max"] ** group["weight_lr_power"])

    def _next_counters(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """The counters of a group after the coming step."""
        k, warmup_steps = group["k"] + 1, group["warmup_steps"]
        lr = float(group["lr"]) * (k / warmup_steps if k <= warmup_steps else 1.0)
        counters = {"k": k, "scheduled_lr": lr, "lr_max": max(lr, group["lr_max"])}
        return {**counters, "weight_sum": group["weight_sum"] + self._weight(group, counters)}

    def end_step(self, groups: Sequence[dict[str, Any]]) -> None:
        for group in groups:
            if group["train_mode"]:
                group.update(self._next_counters(group))

    def initial_state(self, name: str, param: torch.Tensor, group: Mapping[str, Any]) -> Any:
        return param if name == "z" else 0.0

    def check_options(self, options: Mapping[str, Any]) -> None:
        check_adam(self, options)
        if options["betas"][0] == 0:
            raise ValueError(
                "Invalid beta parameter at index 0: 0 (AdamWScheduleFree: betas[0] must be in (0, 1): with 0 all of x "
                "would be lost in y)"
            )
        check_not_negative(self, options, "warmup_steps")
