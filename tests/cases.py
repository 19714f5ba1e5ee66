"""The table of cases that most tests run over, and a pair of optimizers that take the same steps."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from typing import Any, NamedTuple

import pytest
import textbook
import torch
from torch import Tensor

from descend import (
    ADOPT,
    ASGD,
    LAMB,
    MARS,
    SGD,
    Adadelta,
    Adafactor,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    AdamWScheduleFree,
    Adan,
    AdEMAMix,
    FirstOrder,
    Lion,
    Muon,
    NAdam,
    NorMuon,
    Prodigy,
    RAdam,
    RMSprop,
    Rprop,
)
from descend.core.signature import signature

BACKENDS = ("cpu", "eager") if "DESCEND_TEST_BACKEND" not in os.environ else (os.environ["DESCEND_TEST_BACKEND"],)
DENSE_BACKENDS = BACKENDS if "DESCEND_TEST_BACKEND" in os.environ else (*BACKENDS, "foreach")  # rows are eager's
# On a GPU, whose compiled backend may decline nothing; see ``device``.
ON_GPU = pytest.param("triton", id="cuda", marks=pytest.mark.gpu)
EVERYWHERE = (*BACKENDS, ON_GPU)
DENSE_EVERYWHERE = (*DENSE_BACKENDS, ON_GPU)
SHAPES = ((), (0,), (7, 5), (129,))

MATRICES = ((7, 5), (0, 3), (3, 70, 2), (1, 9), (65, 150), (7, 5), (9, 1))


def one_in(n: int, *axes: Iterable[Any]) -> list[Any]:
    """Every ``n``-th combination of the axes' values, for ``parametrize``: all axes but one still occur in every way.

    Combinations are taken whose positions on the axes add up to a multiple of ``n``, at most the length of any axis.
    """

    def name(value: Any) -> str:
        return getattr(value, "__name__", None) or str(value)

    taken = []
    for combination in product(*(enumerate(axis) for axis in axes)):
        if sum(place for place, _ in combination) % n == 0:
            params = [value if hasattr(value, "marks") else pytest.param(value) for _, value in combination]
            marks = [mark for param in params for mark in param.marks]
            values = [param.values[0] for param in params]
            names = [param.id or name(value) for param, value in zip(params, values, strict=True)]
            taken.append(pytest.param(*values, marks=marks, id="-".join(names)))
    return taken


class Case(NamedTuple):
    """An optimizer, torch's counterpart, and the options of both."""

    ours: type[FirstOrder]
    theirs: type[torch.optim.Optimizer]
    options: dict[str, Any]

    def __str__(self) -> str:
        return "-".join([self.ours.__name__, *(f"{key}={value}" for key, value in self.options.items())])

    def takes(self, option: str) -> bool:
        """Whether the optimizer has an option of this name."""
        return option in inspect.signature(self.ours).parameters

    def needs_sums(self) -> bool:
        """Whether its rule needs sums over whole tensors."""
        optimizer = self.ours([torch.zeros(1, requires_grad=True)], **self.options)
        return signature(optimizer.rule_for(optimizer.param_groups[0])).summed is not None


# At least one line for each rule.
CASES = [
    Case(SGD, torch.optim.SGD, dict(lr=0.1, weight_decay=0.1)),
    Case(SGD, torch.optim.SGD, dict(lr=0.1, momentum=0.9, dampening=0.5)),
    Case(SGD, torch.optim.SGD, dict(lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1)),
    Case(Adam, torch.optim.Adam, dict(lr=0.01, weight_decay=0.1)),
    Case(Adam, torch.optim.Adam, dict(lr=0.01, amsgrad=True)),
    Case(AdamW, torch.optim.AdamW, dict(lr=0.01, weight_decay=0.1)),
    Case(AdamW, torch.optim.AdamW, dict(lr=0.01, weight_decay=0.1, amsgrad=True)),
    Case(NAdam, torch.optim.NAdam, dict(lr=0.01, weight_decay=0.1)),
    Case(RAdam, torch.optim.RAdam, dict(lr=0.01, weight_decay=0.1)),
    Case(Adamax, torch.optim.Adamax, dict(lr=0.01, weight_decay=0.1)),
    Case(Adagrad, torch.optim.Adagrad, dict(lr=0.1, lr_decay=0.1, initial_accumulator_value=0.2)),
    Case(Adadelta, torch.optim.Adadelta, dict(weight_decay=0.1)),
    Case(RMSprop, torch.optim.RMSprop, dict(lr=0.01, weight_decay=0.1)),
    Case(RMSprop, torch.optim.RMSprop, dict(lr=0.01, alpha=0.5, momentum=0.9)),
    Case(RMSprop, torch.optim.RMSprop, dict(lr=0.01, alpha=0.5, centered=True)),
    Case(RMSprop, torch.optim.RMSprop, dict(lr=0.01, alpha=0.5, centered=True, momentum=0.5)),
    Case(Rprop, torch.optim.Rprop, dict(lr=0.1)),
    Case(ASGD, torch.optim.ASGD, dict(lr=0.1, lambd=0.1, t0=1)),
    # These betas keep rounding from changing the sign of an update.
    Case(Lion, textbook.Lion, dict(lr=0.01, betas=(0.5, 0.75), weight_decay=0.1)),
    Case(AdamWScheduleFree, textbook.AdamWScheduleFree, dict(lr=0.1, weight_decay=0.1, warmup_steps=3)),
    Case(NAdam, torch.optim.NAdam, dict(lr=0.01, weight_decay=0.1, decoupled_weight_decay=True)),
    Case(RAdam, torch.optim.RAdam, dict(lr=0.01, weight_decay=0.1, decoupled_weight_decay=True)),
    Case(ADOPT, textbook.ADOPT, dict(lr=0.01, weight_decay=0.1)),
    Case(AdEMAMix, textbook.AdEMAMix, dict(lr=0.01, weight_decay=0.1, beta3_warmup=9, alpha_warmup=5)),
    Case(Adan, textbook.Adan, dict(lr=0.01, weight_decay=0.1)),
    Case(MARS, textbook.MARS, dict(lr=0.01, weight_decay=0.1)),
    Case(LAMB, textbook.LAMB, dict(lr=0.01, weight_decay=0.1)),
    Case(Prodigy, textbook.Prodigy, dict(d0=1e-3, weight_decay=0.1)),
]
# The same for rules of whole matrices: parameters have the shapes ``MATRICES``, and results differ by rounding.
MATRIX_CASES = [
    Case(Muon, textbook.Muon, dict(lr=0.1)),
    Case(Muon, textbook.Muon, dict(lr=0.1, nesterov=False, adjust_lr_fn="match_rms_adamw")),
    Case(NorMuon, textbook.NorMuon, dict(weight_decay=0.1)),
]
# Not among the others: it has no compiled backend, and torch's cannot step tensors of no elements.
ADAFACTOR_CASES = [
    Case(Adafactor, torch.optim.Adafactor, dict(lr=0.05)),
    Case(Adafactor, torch.optim.Adafactor, dict(lr=0.02, weight_decay=0.1, maximize=True)),
    Case(Adafactor, torch.optim.Adafactor, dict(lr=0.5, beta2_decay=-0.5, eps=(1e-2, 0.5), d=1.5)),
]
# State that does not start at zero: NAdam's and ASGD's scalars, Adagrad's sums, Rprop's step sizes.
NONZERO_START = [case for case in CASES if case.ours in (NAdam, Adagrad, Rprop, ASGD)]

# Optimizers that update each parameter independently of the others.
INDEPENDENT = [case for case in CASES if case.ours.end_step is FirstOrder.end_step]

# Every sensible combination of options.
EVERY_CASE = [
    *(
        Case(SGD, torch.optim.SGD, dict(lr=0.1, **kind, weight_decay=weight_decay, maximize=maximize))
        for kind, weight_decay, maximize in product(
            ({}, dict(momentum=0.9), dict(momentum=0.9, dampening=0.5), dict(momentum=0.9, nesterov=True)),
            (0, 0.1),
            (False, True),
        )
    ),
    *(
        Case(Adam, torch.optim.Adam, dict(lr=0.01, **decay, amsgrad=amsgrad, maximize=maximize))
        for decay, amsgrad, maximize in product(
            ({}, dict(weight_decay=0.1), dict(weight_decay=0.1, decoupled_weight_decay=True)),
            (False, True),
            (False, True),
        )
    ),
    *(
        Case(AdamW, torch.optim.AdamW, dict(lr=0.01, weight_decay=weight_decay, amsgrad=amsgrad, maximize=maximize))
        for weight_decay, amsgrad, maximize in product((0, 0.1), (False, True), (False, True))
    ),
    Case(Adam, torch.optim.Adam, dict(lr=0.1, betas=(0.0, 0.5), eps=1e-3)),
    Case(AdamW, torch.optim.AdamW, dict(lr=torch.tensor(0.01, dtype=torch.float64), betas=(0.5, 0.0), eps=1.0)),
    Case(SGD, torch.optim.SGD, dict(lr=torch.tensor([[0.1]]), momentum=0.5)),
    *(
        Case(ours, theirs, dict(lr=0.01, **decay, maximize=maximize))
        for (ours, theirs), decay, maximize in product(
            ((NAdam, torch.optim.NAdam), (RAdam, torch.optim.RAdam)),
            ({}, dict(weight_decay=0.1), dict(weight_decay=0.1, decoupled_weight_decay=True)),
            (False, True),
        )
    ),
    Case(NAdam, torch.optim.NAdam, dict(betas=(0.5, 0.8), eps=1e-3, momentum_decay=0.2)),
    Case(RAdam, torch.optim.RAdam, dict(betas=(0.5, 0.8), eps=1e-3)),
    Case(RAdam, torch.optim.RAdam, dict(betas=(0.0, 0.5))),  # the variance is never finite
    *(
        Case(ours, theirs, dict(weight_decay=weight_decay, maximize=maximize))
        for (ours, theirs), weight_decay, maximize in product(
            (
                (Adamax, torch.optim.Adamax),
                (Adagrad, torch.optim.Adagrad),
                (Adadelta, torch.optim.Adadelta),
                (ASGD, torch.optim.ASGD),
                (Lion, textbook.Lion),
                (AdamWScheduleFree, textbook.AdamWScheduleFree),
            ),
            (0, 0.1),
            (False, True),
        )
    ),
    Case(Adamax, torch.optim.Adamax, dict(lr=0.1, betas=(0.5, 0.8), eps=1e-3)),
    Case(Adagrad, torch.optim.Adagrad, dict(lr_decay=0.2, initial_accumulator_value=0.3, eps=1e-3)),
    Case(Adadelta, torch.optim.Adadelta, dict(lr=0.5, rho=0.5, eps=1e-3)),
    *(
        Case(
            RMSprop, torch.optim.RMSprop, dict(**kind, momentum=momentum, weight_decay=weight_decay, maximize=maximize)
        )
        for kind, momentum, weight_decay, maximize in product(
            ({}, dict(centered=True)), (0, 0.9), (0, 0.1), (False, True)
        )
    ),
    Case(RMSprop, torch.optim.RMSprop, dict(lr=0.1, alpha=0.5, eps=1e-3)),
    Case(Rprop, torch.optim.Rprop, dict()),
    Case(Rprop, torch.optim.Rprop, dict(lr=0.1, etas=(0.3, 1.9), step_sizes=(0.01, 0.2), maximize=True)),
    Case(ASGD, torch.optim.ASGD, dict(lr=0.1, lambd=0.2, alpha=0.5, t0=10, weight_decay=0.1)),
    Case(Lion, textbook.Lion, dict(lr=0.01, betas=(0.0, 0.8))),
    Case(AdamWScheduleFree, textbook.AdamWScheduleFree, dict(lr=0.1, betas=(0.5, 0.8), eps=1e-3, warmup_steps=20)),
    Case(AdamWScheduleFree, textbook.AdamWScheduleFree, dict(r=2.0, weight_lr_power=1.0, warmup_steps=10)),
    Case(ADOPT, textbook.ADOPT, dict(betas=(0.5, 0.8), eps=1e-3, clip_exp=float("inf"), maximize=True)),
    Case(ADOPT, textbook.ADOPT, dict(lr=0.1, clip_exp=0.1, weight_decay=0.1, decoupled_weight_decay=True)),
    Case(AdEMAMix, textbook.AdEMAMix, dict(lr=0.1, betas=(0.5, 0.8, 0.9), alpha=5.0, eps=1e-3, maximize=True)),
    Case(AdEMAMix, textbook.AdEMAMix, dict(betas=(0.9, 0.99, 0.999), beta3_warmup=100, weight_decay=0.1)),
    Case(Adan, textbook.Adan, dict(lr=0.1, betas=(0.5, 0.0, 0.8), eps=1e-3, maximize=True)),
    Case(Adan, textbook.Adan, dict(lr=0.01, no_prox=True, weight_decay=0.1)),
    Case(MARS, textbook.MARS, dict(lr=0.1, betas=(0.5, 0.8), eps=1e-3, gamma=0.5, maximize=True)),
    Case(LAMB, textbook.LAMB, dict(betas=(0.5, 0.8), eps=1e-3, bias_correction=False, clamp_value=3.0, maximize=True)),
    Case(LAMB, textbook.LAMB, dict(lr=0.01, weight_decay=0, always_adapt=False)),
    # In these the estimate grows.
    Case(
        Prodigy, textbook.Prodigy, dict(betas=(0.5, 0.8), eps=1e-3, d0=1e-3, d_coef=9, growth_rate=1.1, maximize=True)
    ),
    Case(Prodigy, textbook.Prodigy, dict(lr=0.5, d0=1e-3, d_coef=9, decouple=False, weight_decay=0.1)),
    Case(Prodigy, textbook.Prodigy, dict(d0=1e-3, d_coef=9, use_bias_correction=True)),
    Case(Prodigy, textbook.Prodigy, dict(beta3=0.9, d0=1e-3, d_coef=5, safeguard_warmup=True)),
]


_device = torch.device("cpu")


def device() -> torch.device:
    """Where a test's tensors are: on the CPU, or on a GPU if the test is marked ``gpu``."""
    return _device


def rounding(allowed: float) -> float:
    """0 on the CPU: the same bits. On a GPU ``allowed``: one that decides about steps forms bias corrections itself."""
    return 0.0 if _device.type == "cpu" else allowed


@contextmanager
def on(place: torch.device) -> Iterator[None]:
    """Let ``device`` return another one."""
    global _device
    before, _device = _device, place
    try:
        yield
    finally:
        _device = before


def leaves(
    shapes: Sequence[tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float64, seed: int = 0
) -> list[Tensor]:
    """Return random parameters, the same for the same seed."""
    random = torch.Generator().manual_seed(seed)
    values = [torch.randn(shape, generator=random, dtype=torch.float64) for shape in shapes]
    return [value.to(dtype).to(device()).requires_grad_() for value in values]


def give_grads(params: Sequence[Tensor], seed: int) -> None:
    """Set random gradients, the same for the same seed, each in new memory."""
    random = torch.Generator().manual_seed(1000 + seed)
    for param in params:
        grad = torch.randn(param.shape, generator=random, dtype=torch.float64)
        param.grad = grad.to(getattr(param, "grad_dtype", None) or param.dtype).to(param.device)


def complex_grads(params: Sequence[Tensor], seed: int) -> None:
    """Set random gradients of each parameter's dtype and class."""
    random = torch.Generator().manual_seed(seed)
    for param in params:
        param.grad = torch.randn(param.shape, generator=random, dtype=param.dtype).as_subclass(type(param))


class Twins:
    """Our optimizer and torch's for-loop on equal parameters; every edit, gradient and step is applied to both.

    Torch's are on the CPU.
    """

    def __init__(
        self,
        case: Case,
        groups: Callable[[], list[Any]] = leaves,
        **ours: Any,
    ) -> None:
        options = {key: value.clone() if isinstance(value, Tensor) else value for key, value in case.options.items()}
        self.ours = case.ours(groups(), **options, **ours)
        options = {key: value.clone() if isinstance(value, Tensor) else value for key, value in case.options.items()}
        with on(torch.device("cpu")):
            self.theirs = case.theirs(groups(), **options)
        self.both = (self.ours, self.theirs)

    def edit(self, change: Callable[[Any], Any]) -> None:
        """Do the same to both optimizers."""
        for optimizer in self.both:
            change(optimizer)

    def step(self, seed: int, grads: Callable[[Sequence[Tensor], int], None] = give_grads) -> None:
        """Take a step with both, with the same new gradients."""
        for optimizer in self.both:
            grads(params_of(optimizer), seed)
            optimizer.step()

    def assert_equal(self, rtol: float = 1e-12, atol: float = 1e-12) -> None:
        """Assert that parameters and state agree; the default tolerance covers float64 rounding over tens of steps."""
        for ours, theirs in zip(params_of(self.ours), params_of(self.theirs), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol, equal_nan=True, check_device=False)
        assert_same_state(*map(state_of, self.both), rtol, atol)


def params_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return all parameters, in order."""
    return [param for group in optimizer.param_groups for param in group["params"]]


def state_of(optimizer: torch.optim.Optimizer) -> dict[Any, Any]:
    """Return the state of all parameters by position, read as a user does: it counts as exposed from then on.

    Parameters that have taken no step are left out, because torch's Adagrad creates state in its constructor.
    """
    params = params_of(optimizer)
    found = {index: optimizer.state[param] for index, param in enumerate(params) if param in optimizer.state}
    return {index: state for index, state in found.items() if float(state.get("step", 1)) > 0}


def assert_same_state(ours: dict[Any, Any], theirs: dict[Any, Any], rtol: float, atol: float) -> None:
    """Assert that two states have the same keys in the same order, the same types and dtypes, and close values."""
    assert ours.keys() == theirs.keys()
    for key, state in theirs.items():
        assert list(ours[key]) == list(state)
        for name, value in state.items():
            assert type(ours[key][name]) is type(value), name
            if isinstance(value, Tensor):
                found = ours[key][name]
                torch.testing.assert_close(found, value, rtol=rtol, atol=atol, equal_nan=True, check_device=False)
            else:
                assert ours[key][name] == value


def snapshot(optimizer: torch.optim.Optimizer) -> Any:
    """Return copies of parameters, state and group options."""
    params = [param.detach().clone() for param in params_of(optimizer)]
    state = {
        index: {name: value.clone() if isinstance(value, Tensor) else value for name, value in content.items()}
        for index, content in optimizer.state_dict()["state"].items()
    }
    groups = [
        {key: value.clone() if isinstance(value, Tensor) else value for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]
    return params, state, groups


def assert_unmoved(optimizer: torch.optim.Optimizer, before: Any) -> None:
    """Assert that parameters, state and groups are bit for bit those of the snapshot ``before``."""
    params, state, groups = snapshot(optimizer)
    assert all(map(torch.equal, params, before[0]))
    assert_same_bits(state, before[1])
    assert groups == before[2]


def assert_same_bits(ours: dict[Any, Any], theirs: dict[Any, Any]) -> None:
    """Assert that two states are equal bit for bit."""
    assert_same_state(ours, theirs, rtol=0, atol=0)


class WithOwnStep(SGD):
    """A subclass with a step of its own."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)
