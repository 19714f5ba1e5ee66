"""Whatever is done to sharded parameters and their gradients between two steps, the next step sees it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from unittest import mock

import pytest
import torch
from ranks import on_ranks
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from descend import AdamW
from descend.backends.cpu import probe

COUNT = 70  # more than a block of the native probe


@contextmanager
def probe_called(name: str) -> Iterator[None]:
    with mock.patch.object(probe, "_bindings", (lambda: None) if name == "python" else probe._bindings):
        yield


class Trained:
    """Sharded parameters beside plain ones of the same values, stepped with the same gradients."""

    def __init__(self, rank: int, **options: float) -> None:
        self.rank = rank
        self.mesh = init_device_mesh("cpu", (2,))
        whole = [self.draw((5, 3)) for _ in range(COUNT)]
        self.params = [torch.nn.Parameter(self.put(value)) for value in whole]
        self.plain = [torch.nn.Parameter(value.clone()) for value in whole]
        self.optimizer = AdamW([*self.params], lr=0.1, **options)
        self.reference = torch.optim.AdamW([*self.plain], lr=0.1)
        self.give_grads()

    def draw(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, dtype=torch.float64)  # all ranks have the same seed

    def put(self, value: Tensor) -> DTensor:
        return distribute_tensor(value, self.mesh, [Shard(0)], src_data_rank=None)

    def give_grads(self) -> None:
        for param, plain in zip(self.params, self.plain, strict=True):
            plain.grad = self.draw((5, 3))
            param.grad = self.put(plain.grad)

    def step(self) -> None:
        self.optimizer.step()
        self.reference.step()
        for index, (param, plain) in enumerate(zip(self.params, self.plain, strict=True)):
            torch.testing.assert_close(param.full_tensor(), plain, rtol=1e-13, atol=1e-13, msg=f"parameter {index}")


def nothing(trained: Trained) -> None:
    pass


def new_gradients(trained: Trained) -> None:
    trained.give_grads()


def gradients_described_by_the_parameters_spec(trained: Trained) -> None:
    trained.give_grads()
    for param in trained.params:
        param.grad = DTensor(param.grad._local_tensor, param._spec, requires_grad=False)


def gradients_written_in_place(trained: Trained) -> None:
    for param, plain in zip(trained.params, trained.plain, strict=True):
        param.grad.mul_(2)
        plain.grad.mul_(2)


def gradients_whose_inner_tensor_is_exchanged(trained: Trained) -> None:
    for param, plain in zip(trained.params, trained.plain, strict=True):
        plain.grad = -plain.grad
        param.grad._local_tensor = -param.grad._local_tensor


def a_gradient_vanishes(trained: Trained) -> None:
    trained.params[COUNT - 1].grad = trained.plain[COUNT - 1].grad = None


def a_gradient_comes_back(trained: Trained) -> None:
    trained.give_grads()


def a_partial_gradient(trained: Trained) -> None:
    param, plain = trained.params[3], trained.plain[3]
    plain.grad = trained.draw((5, 3))
    part = plain.grad * (0.75 if trained.rank else 0.25)
    param.grad = DTensor.from_local(part, trained.mesh, [Partial()])


def the_inner_tensor_of_a_parameter_is_exchanged(trained: Trained) -> None:
    trained.give_grads()
    param = trained.params[COUNT - 2]
    param._local_tensor = param._local_tensor.clone()


def the_memory_of_an_inner_tensor_is_exchanged(trained: Trained) -> None:
    param = trained.params[2]
    param._local_tensor.data = param._local_tensor.clone()


def a_parameter_is_replaced(trained: Trained) -> None:
    new = trained.draw((5, 3))
    trained.params[1], trained.plain[1] = torch.nn.Parameter(trained.put(new)), torch.nn.Parameter(new.clone())
    for params, optimizer in ((trained.params, trained.optimizer), (trained.plain, trained.reference)):
        optimizer.param_groups[0]["params"][1] = params[1]
    trained.give_grads()


def a_parameter_is_written(trained: Trained) -> None:
    with torch.no_grad():
        trained.params[0].mul_(2)
        trained.plain[0].mul_(2)


def state_is_edited(trained: Trained) -> None:
    trained.optimizer.state[trained.params[5]]["exp_avg"].zero_()
    trained.reference.state[trained.plain[5]]["exp_avg"].zero_()


def state_is_replaced(trained: Trained) -> None:
    state = trained.optimizer.state[trained.params[6]]
    state["exp_avg"] = torch.zeros_like(state["exp_avg"])
    trained.reference.state[trained.plain[6]]["exp_avg"].zero_()


EDITS: list[Callable[[Trained], None]] = [
    nothing,
    new_gradients,
    gradients_described_by_the_parameters_spec,
    nothing,
    gradients_written_in_place,
    gradients_whose_inner_tensor_is_exchanged,
    a_gradient_vanishes,
    new_gradients,
    a_partial_gradient,
    nothing,
    the_inner_tensor_of_a_parameter_is_exchanged,
    the_memory_of_an_inner_tensor_is_exchanged,
    a_parameter_is_replaced,
    a_parameter_is_written,
    state_is_edited,
    new_gradients,
    state_is_replaced,
    a_gradient_comes_back,
]


def edits_are_seen(rank: int, name: str) -> tuple[bool, list[bool]]:
    with probe_called(name):
        trained = Trained(rank)
        plans = []
        for edit in [nothing, *EDITS]:
            edit(trained)
            trained.step()
            plans.append(trained.optimizer._driver._plan)
    return plans[0]._probe.unwraps, [plan is before for before, plan in pairwise(plans)]


@pytest.mark.parametrize("name", ["native", "python"])
def test_every_edit_is_seen(name: str) -> None:
    for unwraps, kept in on_ranks(2, edits_are_seen, name):
        assert unwraps == (name == "native" and probe._bindings() is not None)
        assert kept[:6] == [True] * 6, "a plan is kept while gradients come and go in the same way"


def gradients_elsewhere(rank: int, name: str) -> list[str]:
    """The messages for gradients that lie on the ranks in another way, before the first step and later."""
    messages = []
    with probe_called(name):
        for steps in (0, 2):
            trained = Trained(rank)
            for _ in range(steps):
                trained.step()
            before = trained.params[4].full_tensor().clone()
            whole = trained.draw((5, 3))
            for grad in (distribute_tensor(whole, trained.mesh, [Replicate()], src_data_rank=None),):
                trained.params[4].grad = grad
                with pytest.raises(RuntimeError) as caught:
                    trained.optimizer.step()
                messages.append(str(caught.value))
                assert torch.equal(trained.params[4].full_tensor(), before)
            trained.give_grads()
            trained.step()
    return messages


@pytest.mark.parametrize("name", ["native", "python"])
def test_gradient_on_other_ranks_is_an_error(name: str) -> None:
    for messages in on_ranks(2, gradients_elsewhere, name):
        assert len(messages) == 2
        for message in messages:
            assert "AdamW: param_groups[0]['params'][4] has placements (Shard(dim=0),)" in message
            assert "its gradient has placements (Replicate(),)" in message


def versions(rank: int) -> tuple[list[int], bool]:
    trained = Trained(rank)
    trained.step()
    before = [(param._version, param._local_tensor._version) for param in trained.params]
    trained.step()
    after = [(param._version, param._local_tensor._version) for param in trained.params]
    grads = [param.grad._local_tensor for param in trained.params]
    return [b[i] - a[i] for a, b in zip(before, after, strict=True) for i in (0, 1)], all(g.grad is None for g in grads)


def test_versions_of_wrapper_and_inner_tensor_grow() -> None:
    for grown, _ in on_ranks(2, versions):
        assert min(grown) >= 1


def gradients_are_let_go(rank: int, name: str) -> bool:
    with probe_called(name):
        trained = Trained(rank)
        trained.step()
        trained.step()
        inner = [weakref.ref(param.grad._local_tensor) for param in trained.params]
        trained.optimizer.zero_grad()
        return all(ref() is None for ref in inner)


@pytest.mark.parametrize("name", ["native", "python"])
def test_gradients_are_not_kept_alive(name: str) -> None:
    assert on_ranks(2, gradients_are_let_go, name) == [True, True]


def collectives_of_partial_gradients(rank: int) -> int:
    trained = Trained(rank)
    replicated = [torch.nn.Parameter(param.redistribute(trained.mesh, [Replicate()])) for param in trained.params]
    optimizer = AdamW(replicated, lr=0.1)
    count = 0
    for _ in range(2):
        for param, plain in zip(replicated, trained.plain, strict=True):
            plain.grad = trained.draw((5, 3))
            part = plain.grad * (0.75 if rank else 0.25)
            param.grad = DTensor.from_local(part, trained.mesh, [Partial()])
        with mock.patch("torch.distributed.all_reduce", wraps=torch.distributed.all_reduce) as all_reduce:
            optimizer.step()
        count = all_reduce.call_count
        trained.reference.step()
    for param, plain in zip(replicated, trained.plain, strict=True):
        torch.testing.assert_close(param.to_local(), plain.detach(), rtol=1e-13, atol=1e-13)
    return count


def test_partial_gradients_share_a_collective() -> None:
    assert on_ranks(2, collectives_of_partial_gradients) == [1, 1]
