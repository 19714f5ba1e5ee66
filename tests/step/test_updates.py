"""Parts of a step: which parameters keep the order of the groups."""

from __future__ import annotations

import torch
from torch import Tensor

from descend import SGD, AdamW


class Subclass(Tensor):
    """Memory of subclasses cannot be compared."""


def test_subclasses_that_share_memory_keep_the_order_of_the_groups() -> None:
    def walk(kind: type[torch.optim.Optimizer], tensors: type[Tensor]) -> Tensor:
        base = torch.ones(4, dtype=torch.float64).as_subclass(tensors)
        first, second, third = base[:3], base[1:], base[2:]
        groups = [{"params": [first]}, {"params": [second], "momentum": 0.9}, {"params": [third]}]
        optimizer = kind(groups, lr=0.3, weight_decay=1.0)
        for _ in range(3):
            for number, param in enumerate((first, second, third)):
                param.grad = torch.full_like(param, number - 2.0)
            optimizer.step()
        return base.as_subclass(Tensor)

    torch.testing.assert_close(walk(SGD, Subclass), walk(torch.optim.SGD, Tensor))


def test_state_is_in_the_order_of_the_parameters() -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.float32, torch.complex64, torch.float64)
    params = [torch.zeros(2, dtype=dtype, requires_grad=True) for dtype in dtypes]
    optimizer = AdamW(params)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert list(optimizer.state_dict()["state"]) == [0, 1, 2, 3, 4]
