"""The mistakes that PyTorch's own tests of optimizers make: our classes refuse them with the same errors.

Transcribed from torch/testing/_internal/common_optimizers.py of torch 2.15.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import descend

LR = 0.01
BETA1, BETA2 = torch.tensor(0.9), torch.tensor(0.99)


class Refused(NamedTuple):
    """Classes, options, the error, and the first torch that raises it."""

    names: str
    options: dict[str, Any]
    message: str
    kind: type[Exception] = ValueError
    since: str = "2.11"

    def libraries(self) -> tuple[Any, ...]:
        """Those that raise the error."""
        return (descend, torch.optim) if torch.__version__ >= self.since else (descend,)


# Parameters are None: options come first.
OPTIONS = [
    Refused(
        "SGD Adam AdamW NAdam RAdam Adamax Adagrad RMSprop Adadelta Rprop ASGD LBFGS",
        dict(lr=torch.tensor([0.001, 0.001])),
        "Tensor lr must be 1-element",
    ),
    Refused("Adadelta", dict(lr=LR, rho=1.1), "Invalid rho value: 1.1"),
    Refused("Adagrad", dict(lr=LR, lr_decay=-0.5), "Invalid lr_decay value: -0.5"),
    Refused(
        "Adam AdamW NAdam RAdam SparseAdam", dict(lr=LR, betas=(1.0, 0.0)), "Invalid beta parameter at index 0: 1.0"
    ),
    Refused("Adamax", dict(lr=LR, betas=(0.0, 1.0)), "Invalid beta parameter at index 1: 1.0"),
    Refused("Adam AdamW RAdam", dict(lr=LR, weight_decay=-1), "Invalid weight_decay value: -1"),
    Refused(
        "Adam AdamW",
        dict(lr=torch.tensor(0.001), foreach=True),
        "lr as a Tensor is not supported for capturable=False and foreach=True",
    ),
    Refused("Adam AdamW", dict(lr=LR, betas=(0.9, BETA2)), "betas must be either both floats or both Tensors"),
    Refused("Adam AdamW", dict(lr=LR, betas=(BETA1, 0.99)), "betas must be either both floats or both Tensors"),
    Refused(
        "Adam AdamW",
        dict(lr=LR, betas=(BETA1, BETA2), foreach=True),
        "betas[0] as a Tensor is not supported for capturable=False and foreach=True",
    ),
    Refused("NAdam", dict(lr=LR, momentum_decay=-0.2), "Invalid momentum_decay value: -0.2"),
    Refused("RMSprop", dict(lr=LR, momentum=-1.0), "Invalid momentum value: -1.0"),
    Refused("Rprop", dict(lr=LR, etas=(1.0, 0.5)), "Invalid eta values: 1.0, 0.5"),
    Refused("SGD", dict(lr=LR, momentum=-0.5), "Invalid momentum value: -0.5"),
    Refused("ASGD", dict(lr=LR, weight_decay=-0.5), "Invalid weight_decay value: -0.5"),
    Refused("ASGD", dict(lr=LR, lambd=-0.5), "Invalid lambd value: -0.5", since="2.15"),
    Refused("ASGD", dict(lr=LR, alpha=-0.5), "Invalid alpha value: -0.5", since="2.15"),
]
FLAGS = [
    Refused(
        "SGD Adam AdamW Adagrad", dict(foreach=True, fused=True), "`fused` and `foreach` cannot be `True`", RuntimeError
    ),
    Refused(
        "SGD Adam AdamW Adagrad",
        dict(fused=True, differentiable=True),
        "`fused` does not support `differentiable`",
        RuntimeError,
    ),
]


def weight(device: str = "cpu") -> Tensor:
    return torch.nn.Parameter(torch.ones(1, 1, device=device))


def assert_refused(
    kind: type[Exception], message: str, attempt: Callable[..., Any], *args: Any, **options: Any
) -> None:
    with pytest.raises(kind) as caught:
        attempt(*args, **options)
    assert message in str(caught.value)


def one_by_one(refused: list[Refused]) -> list[tuple[str, Refused]]:
    return [(name, case) for case in refused for name in case.names.split()]


@pytest.mark.parametrize(("name", "case"), one_by_one(OPTIONS), ids=str)
def test_options_are_refused_before_parameters(name: str, case: Refused) -> None:
    for library in case.libraries():
        generator = (param for param in [weight()])
        for params in (None, generator):
            assert_refused(case.kind, case.message, getattr(library, name), params, **case.options)
        assert len(list(generator)) == 1


@pytest.mark.parametrize(("name", "case"), one_by_one(FLAGS), ids=str)
def test_flags_that_exclude_each_other_are_refused(name: str, case: Refused) -> None:
    for library in case.libraries():
        assert_refused(case.kind, case.message, getattr(library, name), [weight()], **case.options)


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Adagrad"])
def test_fused_refuses_devices_without_such_kernels(name: str) -> None:
    message = "`fused=True` requires all the params to be floating point Tensors of supported devices: ["
    for library in (descend, torch.optim):
        param = weight("meta")
        optimizer = getattr(library, name)([param], fused=True)
        param.grad = torch.ones_like(param)
        assert_refused(RuntimeError, message, optimizer.step)


NAMED, UNNAMED = [("weight", weight())], [weight()]
SHARED = weight()
PARAMETERS: list[tuple[Any, type[Exception], str]] = [
    (SHARED, TypeError, "params argument given to the optimizer should be an iterable of Tensors or dicts"),
    ([SHARED, SHARED], UserWarning, "a parameter group with duplicate parameters"),
    ([{"params": SHARED}, {"params": SHARED}], ValueError, "some parameters appear in more than one parameter group"),
    ([*NAMED, *UNNAMED], ValueError, "all optimizer params should be with/without names. Some param names are missing"),
    (
        [{"params": UNNAMED, "lr": LR}, {"params": NAMED}],
        ValueError,
        "all optimizer param groups should be with/without names. cannot add param group with names to the optimizer",
    ),
]


@pytest.mark.parametrize(("params", "kind", "message"), PARAMETERS, ids=[message for *_, message in PARAMETERS])
@pytest.mark.parametrize("name", OPTIONS[0].names.split()[:-1])
def test_parameters_are_refused(name: str, params: Any, kind: type[Exception], message: str) -> None:
    for library in (descend, torch.optim):
        copied = [{**group} for group in params] if isinstance(params, list) and type(params[0]) is dict else params
        assert_refused(kind, message, getattr(library, name), copied)


SPARSE = [torch.zeros(3, layout=torch.sparse_coo)]
COMPLEX = [torch.ones(2, 3, dtype=torch.complex64)]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (SPARSE, "SparseAdam requires dense parameter tensors"),
        ([{"params": SPARSE}], "SparseAdam requires dense parameter tensors"),
        (COMPLEX, "SparseAdam does not support complex parameters"),
    ],
    ids=["sparse", "sparse in a group", "complex"],
)
def test_sparse_adam_refuses_sparse_and_complex_parameters(params: Any, message: str) -> None:
    for library in (descend, torch.optim):
        assert_refused(ValueError, message, library.SparseAdam, params)
