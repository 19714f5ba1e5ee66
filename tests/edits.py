"""Edits that programs make to parameters, state and groups between two steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from cases import leaves, params_of


def swap_storage(optimizer: Any) -> None:
    for param in params_of(optimizer):
        param.data = param.data.clone() + 1


def swap_for_transposed(optimizer: Any) -> None:
    for param in params_of(optimizer):
        param.data = param.data.mT.contiguous().mT if param.dim() > 1 else param.data


def swap_for_strided(optimizer: Any) -> None:
    for param in params_of(optimizer):
        param.data = torch.stack([param.data, param.data], -1)[..., 0]


def swap_for_another_shape(optimizer: Any) -> None:
    optimizer.state.clear()
    for param in params_of(optimizer):
        param.data = torch.cat([param.data, param.data]) if param.dim() else param.data


def set_in_place(optimizer: Any) -> None:
    for param in params_of(optimizer):
        param.data.set_(param.data.clone() * 2)


def swap_tensors(optimizer: Any) -> None:
    for param in params_of(optimizer):
        torch.utils.swap_tensors(param, torch.nn.Parameter(param.detach() * 2))


def write_params(optimizer: Any) -> None:
    with torch.no_grad():
        for param in params_of(optimizer):
            param.mul_(0.5)


def clear_state(optimizer: Any) -> None:
    optimizer.state.clear()


def drop_state_of_one(optimizer: Any) -> None:
    optimizer.state.pop(params_of(optimizer)[0], None)


def replace_state(optimizer: Any) -> None:
    for state in optimizer.state.values():
        for name, value in state.items():
            state[name] = value.clone() if name == "step" else value * 0.5


def edit_state_in_place(optimizer: Any) -> None:
    for state in optimizer.state.values():
        for name, value in state.items():
            value.add_(3) if name == "step" else value.mul_(0.25)


def swap_state_data(optimizer: Any) -> None:
    for state in optimizer.state.values():
        for value in state.values():
            value.data = value.data.clone()


def edit_through_state_dict(optimizer: Any) -> None:
    for state in optimizer.state_dict()["state"].values():
        for name, value in state.items():
            value.fill_(100.0) if name == "step" else value.mul_(0.25)


def replace_whole_state(optimizer: Any) -> None:
    optimizer.state = (
        type(optimizer.state)(dict, optimizer.state) if isinstance(optimizer, torch.optim.Optimizer) else {}
    )


def exchange_states(optimizer: Any) -> None:
    first, last = params_of(optimizer)[2:4]
    a, b = optimizer.state.get(first), optimizer.state.get(last)
    if a and "step" in a:
        a["step"], b["step"] = b["step"] + 5, a["step"]


def edit_options(optimizer: Any) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * 0.3
        group["weight_decay"] = 0.05
        if "betas" in group:
            group["betas"] = (0.8, 0.95)


def fill_lr(optimizer: Any) -> None:
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(float(group["lr"]), dtype=torch.float64)
        group["lr"].fill_(0.005)


def maximize_from_now(optimizer: Any) -> None:
    for group in optimizer.param_groups:
        group["maximize"] = True


def replace_group(optimizer: Any) -> None:
    optimizer.param_groups[0] = {**optimizer.param_groups[0], "lr": 0.007}


def append_param(optimizer: Any) -> None:
    optimizer.param_groups[0]["params"].extend(leaves([(6,)], seed=5))


def remove_param(optimizer: Any) -> None:
    del optimizer.param_groups[0]["params"][1]


def replace_params(optimizer: Any) -> None:
    optimizer.param_groups[0]["params"] = leaves(seed=9)


def reverse_params(optimizer: Any) -> None:
    optimizer.param_groups[0]["params"].reverse()


def add_group(optimizer: Any) -> None:
    optimizer.add_param_group({"params": leaves([(4, 4)], seed=6), "lr": 0.05, "weight_decay": 0.2})


EDITS: list[Callable[[Any], None]] = [
    swap_storage,
    swap_for_transposed,
    swap_for_strided,
    swap_for_another_shape,
    set_in_place,
    swap_tensors,
    write_params,
    clear_state,
    drop_state_of_one,
    replace_state,
    edit_state_in_place,
    swap_state_data,
    edit_through_state_dict,
    replace_whole_state,
    exchange_states,
    edit_options,
    fill_lr,
    maximize_from_now,
    replace_group,
    append_param,
    remove_param,
    replace_params,
    reverse_params,
    add_group,
]
