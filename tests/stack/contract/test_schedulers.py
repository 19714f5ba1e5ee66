"""Every scheduler of torch drives ours as it drives torch's: the same rates, the same parameters."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import assert_same_state, leaves, params_of, state_of
from programs import OURS, TWINS, advance, build
from torch import Tensor
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR

STEPS = 9
LR = 0.05

SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.95**epoch),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, step_size=3),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, milestones=[2, 5]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, factor=0.5, total_iters=4),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=5),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, gamma=0.9),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.ExponentialLR(o, 0.9)], milestones=[3]
    ),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=6),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, factor=0.1, total_iters=3), lr_scheduler.ExponentialLR(o, gamma=0.9)]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, factor=0.5),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, base_lr=0.01, max_lr=0.1, step_size_up=3),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=4),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=STEPS + 1),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=6, power=2.0),
    "SWALR": lambda o: SWALR(o, swa_lr=0.01, anneal_epochs=4),
}
BASES = {"LRScheduler"}


def test_every_scheduler_of_torch_is_here() -> None:
    assert set(SCHEDULERS) - {"SWALR"} == set(lr_scheduler.__all__) - BASES


def outcome(kind: Any, schedule: Callable[[Any], Any], lr: Any) -> Any:
    """Rates, parameters, state and the scheduler's own state; or the error that the scheduler raised."""
    optimizer = build(kind, leaves([(3, 2), (4, 1)]), lr=lr.clone() if isinstance(lr, Tensor) else lr)
    try:
        scheduler = schedule(optimizer)
    except ValueError as error:
        return str(error)
    rates = []
    for seed in range(STEPS):
        advance(optimizer, seed)
        if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
            scheduler.step(1.0)
        else:
            scheduler.step()
        rates.append([float(rate) for rate in scheduler.get_last_lr()])
    assert isinstance(optimizer.param_groups[0]["lr"], Tensor) == isinstance(lr, Tensor)
    return rates, [param.detach() for param in params_of(optimizer)], state_of(optimizer), set(scheduler.state_dict())


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("optimizer", TWINS)
def test_scheduler_drives_ours_as_torchs(optimizer: str, name: str, tensor_lr: bool) -> None:
    lr = torch.tensor(LR, dtype=torch.float64) if tensor_lr else LR
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The epoch parameter")  # torch's SequentialLR, to itself
        kind, their_kind = TWINS[optimizer]
        ours = outcome(kind, SCHEDULERS[name], lr)
        # torch's LBFGS keeps the tensor itself as the length of its last step, and a scheduler rewrites that.
        theirs = outcome(their_kind, SCHEDULERS[name], LR if optimizer == "LBFGS" else lr)
    if isinstance(theirs, str):
        assert ours == theirs
        return
    assert ours[0] == theirs[0]
    assert ours[3] == theirs[3]
    # float64, nine steps; torch's Muon multiplies in bfloat16
    tolerance = 0.03 if optimizer == "Muon" else 1e-11
    for mine, his in zip(ours[1], theirs[1], strict=True):
        torch.testing.assert_close(mine, his, rtol=tolerance, atol=tolerance)
    if optimizer != "LBFGS":
        assert_same_state(ours[2], theirs[2], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("optimizer", ["Lion", "AdamWScheduleFree"])
def test_scheduler_gives_what_torch_has_not_the_rates_of_torchs_adamw(optimizer: str, name: str) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The epoch parameter")  # torch's SequentialLR, to itself
        ours, theirs = (outcome(kind, SCHEDULERS[name], LR) for kind in (OURS[optimizer], torch.optim.AdamW))
    assert ours[0] == theirs[0]
    assert ours[3] == theirs[3]
    assert all(param.isfinite().all() for param in ours[1])


@pytest.mark.parametrize("name", [name for name in OURS if name not in TWINS])
def test_scheduler_drives_what_torch_has_not(name: str) -> None:
    optimizer = build(OURS[name], leaves([(3, 2)]))
    if "lr" not in optimizer.defaults:
        with pytest.raises(KeyError):
            lr_scheduler.StepLR(optimizer, 1)
        return
    optimizer.param_groups[0]["lr"] = LR
    scheduler = lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    for seed in range(3):
        advance(optimizer, seed)
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == LR / 8
