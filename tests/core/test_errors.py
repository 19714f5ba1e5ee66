"""Mistakes are refused with torch's words and ours, before anything changes."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cases import assert_unmoved, give_grads, leaves, params_of, snapshot

import descend
from descend import (
    ASGD,
    LBFGS,
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    AdamWScheduleFree,
    FirstOrder,
    Lion,
    NAdam,
    RAdam,
    RMSprop,
    Rprop,
    SparseAdam,
    from_rule,
)

NAN = float("nan")

# Class, options, torch's message (a prefix of ours where torch has the check at all).
NEW_IN_TORCH_2_15 = [
    (ASGD, dict(lambd=-0.1), "Invalid lambd value: -0.1"),
    (ASGD, dict(alpha=-0.1), "Invalid alpha value: -0.1"),
]
BAD_OPTIONS = [
    (SGD, dict(lr=-1), "Invalid learning rate: -1"),
    (SGD, dict(lr=NAN), "Invalid learning rate: nan"),
    (SGD, dict(lr="fast"), "Invalid learning rate: fast"),
    (SGD, dict(lr=torch.tensor(-0.5)), "Invalid learning rate: -0.5"),
    (SGD, dict(lr=torch.ones(2)), "Tensor lr must be 1-element"),
    (SGD, dict(momentum=-0.1), "Invalid momentum value: -0.1"),
    (SGD, dict(momentum=NAN), "Invalid momentum value: nan"),
    (SGD, dict(weight_decay=-0.1), "Invalid weight_decay value: -0.1"),
    (SGD, dict(nesterov=True), "Nesterov momentum requires a momentum and zero dampening"),
    (SGD, dict(nesterov=True, momentum=0.9, dampening=0.1), "Nesterov momentum requires a momentum and zero dampening"),
    *(
        (optimizer, options, message)
        for optimizer in (Adam, AdamW)
        for options, message in [
            (dict(lr=-1.0), "Invalid learning rate: -1.0"),
            (dict(lr=NAN), "Invalid learning rate: nan"),
            (dict(lr=torch.ones(2)), "Tensor lr must be 1-element"),
            (
                dict(lr=torch.tensor(0.1), foreach=True),
                "lr as a Tensor is not supported for capturable=False and foreach",
            ),
            (dict(betas=(1.0, 0.9)), "Invalid beta parameter at index 0: 1.0"),
            (dict(betas=(0.9, -0.1)), "Invalid beta parameter at index 1: -0.1"),
            (dict(betas=(NAN, 0.9)), "Invalid beta parameter at index 0: nan"),
            (dict(betas=(0.9, torch.tensor(0.9))), "betas must be either both floats or both Tensors"),
            (dict(betas=(torch.ones(2) / 2, torch.tensor(0.9))), "Tensor betas[0] must be 1-element"),
            (dict(eps=-1e-8), "Invalid epsilon value: -1e-08"),
            (dict(weight_decay=-1), "Invalid weight_decay value: -1"),
        ]
    ),
    *(
        (optimizer, options, message)
        for optimizer in (NAdam, RAdam, Adamax, Adagrad, RMSprop, Adadelta, Rprop, ASGD)
        for options, message in [
            (dict(lr=-1.0), "Invalid learning rate: -1.0"),
            (dict(lr=torch.ones(2)), "Tensor lr must be 1-element"),
        ]
    ),
    *(
        (optimizer, options, message)
        for optimizer in (NAdam, RAdam, Adamax)
        for options, message in [
            (dict(betas=(1.0, 0.9)), "Invalid beta parameter at index 0: 1.0"),
            (dict(betas=(0.9, -0.1)), "Invalid beta parameter at index 1: -0.1"),
            (dict(eps=-1e-8), "Invalid epsilon value: -1e-08"),
            (dict(weight_decay=-1), "Invalid weight_decay value: -1"),
        ]
    ),
    (NAdam, dict(momentum_decay=-0.1), "Invalid momentum_decay value: -0.1"),
    (Adagrad, dict(lr_decay=-0.1), "Invalid lr_decay value: -0.1"),
    (Adagrad, dict(weight_decay=-0.1), "Invalid weight_decay value: -0.1"),
    (Adagrad, dict(initial_accumulator_value=-0.1), "Invalid initial_accumulator_value value: -0.1"),
    (Adagrad, dict(eps=-0.1), "Invalid epsilon value: -0.1"),
    (RMSprop, dict(eps=-0.1), "Invalid epsilon value: -0.1"),
    (RMSprop, dict(momentum=-0.1), "Invalid momentum value: -0.1"),
    (RMSprop, dict(weight_decay=-0.1), "Invalid weight_decay value: -0.1"),
    (RMSprop, dict(alpha=-0.1), "Invalid alpha value: -0.1"),
    (Adadelta, dict(rho=-0.1), "Invalid rho value: -0.1"),
    (Adadelta, dict(rho=1.5), "Invalid rho value: 1.5"),
    (Adadelta, dict(eps=-0.1), "Invalid epsilon value: -0.1"),
    (Adadelta, dict(weight_decay=-0.1), "Invalid weight_decay value: -0.1"),
    (Rprop, dict(etas=(0.0, 1.2)), "Invalid eta values: 0.0, 1.2"),
    (Rprop, dict(etas=(0.5, 1.0)), "Invalid eta values: 0.5, 1.0"),
    (ASGD, dict(weight_decay=-0.1), "Invalid weight_decay value: -0.1"),
    (Lion, dict(lr=-1.0), "Invalid learning rate: -1.0"),
    (Lion, dict(betas=(1.0, 0.9)), "Invalid beta parameter at index 0: 1.0"),
    (Lion, dict(weight_decay=-0.1), "Invalid weight_decay value: -0.1"),
    (AdamWScheduleFree, dict(lr=-1.0), "Invalid learning rate: -1.0"),
    (AdamWScheduleFree, dict(betas=(0.9, 1.0)), "Invalid beta parameter at index 1: 1.0"),
    (AdamWScheduleFree, dict(warmup_steps=-1), "Invalid warmup_steps value: -1"),
    *NEW_IN_TORCH_2_15,
]
BETAS = (None, 0.9, "ab", (0.9,), (0.9, 0.99, 0.999), {0.9, 0.99}, (0.9, None), ("0.9", 0.99), iter((0.9, 0.99)))
# What torch would stumble over later, or never.
NO_PAIRS = [
    *((optimizer, dict(betas=betas)) for optimizer in (Adam, NAdam, RAdam, Adamax, Lion) for betas in BETAS),
    (Rprop, dict(etas=(0.5, 1.2, 1.3))),
    (Rprop, dict(step_sizes=(None, None))),
    (Rprop, dict(step_sizes=0.1)),
]
TORCHS = [
    bad
    for bad in BAD_OPTIONS
    if bad[0] not in (Lion, AdamWScheduleFree) and (bad not in NEW_IN_TORCH_2_15 or torch.__version__ >= "2.15")
]
OURS_ALONE = [
    (dict(max_norm=0), "max_norm must be a number > 0"),
    (dict(max_norm=-1.0), "max_norm must be a number > 0"),
    (dict(max_norm=NAN), "max_norm must be a number > 0"),
    (dict(nonfinite="ignore"), "nonfinite must be one of"),
    (dict(backend="cuda"), "backend must be one of"),
    (dict(state_dtype=torch.int32), "state_dtype must be one of (None, torch.float16"),
    (dict(state_dtype="float32"), "state_dtype must be one of (None, torch.float16"),
    (dict(state_dtype=torch.float8_e4m3fn), "state_dtype must be one of (None, torch.float16"),
    (dict(amp="native"), "amp must be one of"),
]


# What torch takes without a word, to fail in a step, half of which may have been taken then.
OF_ANOTHER_KIND = [
    (SGD, dict(dampening=None), "dampening must be a number, got None"),
    (SGD, dict(dampening="0.5"), "dampening must be a number, got '0.5'"),
    (SGD, dict(momentum=[0.9]), "Invalid momentum value: [0.9]"),
    (SGD, dict(nesterov=torch.ones(2)), "nesterov must be True or False, got tensor([1., 1.])"),
    (Adam, dict(amsgrad=torch.ones(2)), "amsgrad must be True or False"),
    (Adam, dict(maximize="no"), "maximize must be True or False, got 'no'"),
    *((kind, dict(betas=0.9), "betas must be 2 numbers, got 0.9") for kind in (NAdam, RAdam, Adamax, Lion)),
    *((kind, dict(betas=(0.9,)), "betas must be 2 numbers, got (0.9,)") for kind in (AdamWScheduleFree, SparseAdam)),
    (Rprop, dict(etas=(0.5, "2")), "etas must be 2 numbers, got (0.5, '2')"),
    (Rprop, dict(step_sizes=(1e-6, 1.0, 50.0)), "step_sizes must be 2 numbers"),
    (Rprop, dict(step_sizes={1e-6, 50.0}), "step_sizes must be 2 numbers"),
    (ASGD, dict(lambd=1j), "Invalid lambd value: 1j"),
    (ASGD, dict(alpha=torch.ones(2)), "Invalid alpha value: tensor([1., 1.])"),
    (ASGD, dict(t0=torch.ones((), device="meta")), "t0 must be a number"),
    (AdamWScheduleFree, dict(r=None), "r must be a number, got None"),
    (RMSprop, dict(alpha=10**400), "alpha must be a number, got 1000"),
]


def assert_refused(kind: type[Exception], message: str, attempt: Callable[[], Any]) -> None:
    with pytest.raises(kind) as caught:
        attempt()
    assert message in str(caught.value)


@pytest.mark.parametrize(("optimizer_class", "options", "message"), [*BAD_OPTIONS, *OF_ANOTHER_KIND], ids=str)
def test_bad_option_is_refused_in_torchs_words(  # where torch has any
    optimizer_class: type[FirstOrder], options: dict[str, Any], message: str
) -> None:
    assert_refused(ValueError, message, lambda: optimizer_class(leaves(), **options))
    # In a group, while constructing and later: torch takes them silently.
    assert_refused(ValueError, message, lambda: optimizer_class([{"params": leaves(), **options}]))
    optimizer = optimizer_class(leaves())
    before = snapshot(optimizer)
    assert_refused(ValueError, message, lambda: optimizer.add_param_group({"params": leaves([(2,)]), **options}))
    assert len(optimizer.param_groups) == 1
    assert_unmoved(optimizer, before)


@pytest.mark.parametrize(("optimizer_class", "options", "message"), TORCHS, ids=str)
def test_torch_says_the_same_where_it_checks(
    optimizer_class: type[FirstOrder], options: dict[str, Any], message: str
) -> None:
    theirs = getattr(torch.optim, optimizer_class.__name__)
    try:
        theirs(leaves(), **options)
    except ValueError as error:
        assert str(error).startswith(message)
    except (TypeError, RuntimeError):
        return  # an accident of torch's: it compares before it checks
    else:
        assert "nan" in message  # what torch lets through


@pytest.mark.parametrize("optimizer_class", sorted({bad[0] for bad in [*BAD_OPTIONS, *OF_ANOTHER_KIND]}, key=str))
def test_a_subclass_with_its_own_constructor_is_checked_alike(optimizer_class: Any) -> None:
    class Mine(optimizer_class):
        def __init__(self, params: Any, **options: Any) -> None:
            super().__init__(params, **options)

    Mine(leaves([(3,)]))
    for kind, options, message in OF_ANOTHER_KIND:
        if kind is optimizer_class:
            assert_refused(ValueError, message, lambda options=options: Mine(leaves([(3,)]), **options))


def without_address(value: object) -> str:
    """An identifier that is the same in every process."""
    return re.sub(" at 0x[0-9a-f]+", "", str(value))


@pytest.mark.parametrize(("optimizer_class", "options"), NO_PAIRS, ids=without_address)
def test_what_is_no_pair_of_numbers_is_refused(optimizer_class: type[FirstOrder], options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(ValueError, match=f"{name} must be (2 numbers|either both floats or both Tensors), got "):
        optimizer_class(leaves(), **options)


@pytest.mark.parametrize("optimizer_class", [SGD, Adam, LBFGS])
def test_lr_that_is_no_number_is_refused(optimizer_class: Any) -> None:
    for lr in ("0.1", None, [0.1], 0.1j, np.array([0.1, 0.2])):
        assert_refused(ValueError, "Invalid learning rate: ", lambda lr=lr: optimizer_class(leaves(), lr=lr))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize(
    "name", ["SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "RMSprop", "Adadelta", "Rprop", "ASGD"]
)
def test_foreach_with_differentiable_is_refused_by_the_step_as_in_torch(name: str) -> None:
    outcomes = []
    for kind in (getattr(descend, name), getattr(torch.optim, name)):
        params = [param.clone() for param in leaves()]
        optimizer = kind(params, foreach=True, differentiable=True)
        for param in params:
            param.grad = torch.ones_like(param)
        before = snapshot(optimizer)
        try:
            optimizer.step()
        except AssertionError as error:
            if kind.__module__.startswith("descend"):  # torch has counted the step
                assert_unmoved(optimizer, before)
            outcomes.append(str(error).partition(" (")[0])
        else:
            outcomes.append("a step")
    assert outcomes[0] == outcomes[1] == ("a step" if name == "SGD" else "_foreach ops don't support autograd")


@pytest.mark.parametrize(("options", "message"), OURS_ALONE, ids=str)
@pytest.mark.parametrize("optimizer_class", [SGD, Adam, AdamW])
def test_our_own_options_are_checked(optimizer_class: type[FirstOrder], options: dict[str, Any], message: str) -> None:
    assert_refused(ValueError, f"{optimizer_class.__name__}: {message}", lambda: optimizer_class(leaves(), **options))


@pytest.mark.parametrize(
    "options", [dict(max_norm=1.0), dict(nonfinite="skip"), dict(backend="cpu"), dict(amp="fused")], ids=str
)
def test_our_own_options_are_keywords_outside_the_groups(options: dict[str, Any]) -> None:
    optimizer = AdamW(leaves(), **options)
    assert not options.keys() & {*optimizer.defaults, *optimizer.param_groups[0]}
    with pytest.raises(TypeError):
        AdamW(leaves(), 1e-3, (0.9, 0.999), 1e-8, 0.01, False, 1.0)


BAD_PARAMS: list[tuple[str, Callable[[], Any]]] = [
    ("empty", list),
    ("a tensor", lambda: leaves()[0]),
    ("no tensors", lambda: [1.0, 2.0]),
    ("not a leaf", lambda: [leaves()[2] * 2]),
    ("a set", lambda: [{"params": set(leaves())}]),
    ("in two groups", lambda: [{"params": (same := leaves())}, {"params": same}]),
    ("names here and there", lambda: [("a", leaves()[0]), leaves()[1]]),
    ("a string", lambda: "params"),
    ("no params", lambda: [{"lr": 0.1}]),
]


@pytest.mark.parametrize(("what", "params"), BAD_PARAMS, ids=[what for what, _ in BAD_PARAMS])
@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_bad_parameters_are_refused_as_by_torch(name: str, what: str, params: Callable[[], Any]) -> None:
    with pytest.raises(Exception) as theirs:  # noqa: PT011 what torch raises is what this test asks
        getattr(torch.optim, name)(params())
    ours = {"SGD": SGD, "Adam": Adam, "AdamW": AdamW}[name]
    assert_refused(theirs.type, str(theirs.value)[:40], lambda: ours(params()))


def test_flags_that_exclude_each_other_are_refused_as_by_torch() -> None:
    for name, ours in (("SGD", SGD), ("Adam", Adam), ("AdamW", AdamW), ("Adagrad", Adagrad)):
        for flags in (dict(fused=True, foreach=True), dict(fused=True, differentiable=True)):
            with pytest.raises(RuntimeError) as theirs:
                getattr(torch.optim, name)(leaves(), **flags)
            assert_refused(
                RuntimeError, str(theirs.value).rstrip("."), lambda flags=flags, ours=ours: ours(leaves(), **flags)
            )


def complex_params() -> list[torch.Tensor]:
    return [*leaves([(3,)]), torch.ones(2, dtype=torch.complex64, requires_grad=True)]


def step_of(kind: Any, params: Callable[[], Any], **options: Any) -> Callable[[], Any]:
    def step() -> None:
        optimizer = kind(params(), **options)
        for param in params_of(optimizer):
            param.grad = torch.ones_like(param)
        optimizer.step()

    return step


@pytest.mark.parametrize("name", ["Adam", "AdamW", "NAdam", "RAdam", "Adamax", "RMSprop", "Adadelta", "Rprop", "ASGD"])
def test_capturable_on_the_cpu_fails_as_in_torch(name: str) -> None:
    with pytest.raises(AssertionError) as theirs:
        step_of(getattr(torch.optim, name), leaves, capturable=True)()
    message = str(theirs.value).partition(":")[0]
    assert message.endswith("must be on supported devices")
    assert_refused(AssertionError, message, step_of(getattr(descend, name), leaves, capturable=True))


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Adagrad"])
def test_fused_refuses_complex_parameters_as_torch_does(name: str) -> None:
    message = "`fused=True` requires all the params to be floating point Tensors"
    ours = getattr(descend, name)
    theirs = {"SGD": "fused_sgd_kernel", "Adagrad": "`fused` does not support sparse grad or complex param"}
    with pytest.raises(RuntimeError, match=theirs.get(name, message)):
        step_of(getattr(torch.optim, name), complex_params, fused=True)()
    assert_refused(RuntimeError, message, step_of(ours, complex_params, fused=True))


@pytest.mark.parametrize("optimizer_class", [Adam, AdamW])
def test_adam_refuses_sparse_gradients_before_anything_moves(optimizer_class: type[FirstOrder]) -> None:
    params = leaves([(4,), (5, 2)])
    optimizer = optimizer_class([{"params": params[:1]}, {"params": params[1:]}])
    give_grads(params, 0)
    optimizer.step()
    before = snapshot(optimizer)
    params[1].grad = torch.eye(5, 2, dtype=torch.float64).to_sparse()
    message = "Adam does not support sparse gradients, please consider SparseAdam instead"
    assert_refused(RuntimeError, message.removeprefix("Adam "), optimizer.step)
    assert_unmoved(optimizer, before)


@pytest.mark.parametrize("name", ["NAdam", "RAdam", "Adamax", "RMSprop", "Adadelta", "Rprop", "ASGD"])
def test_sparse_gradients_are_refused_in_torchs_words(name: str) -> None:
    def step(kind: Any) -> None:
        (param,) = leaves([(5, 2)])
        param.grad = torch.eye(5, 2, dtype=torch.float64).to_sparse()
        kind([param]).step()

    with pytest.raises(RuntimeError) as theirs:
        step(getattr(torch.optim, name))
    assert_refused(RuntimeError, str(theirs.value), lambda: step(getattr(descend, name)))


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize(
    ("optimizer_class", "options", "name", "value", "message"),
    [
        (Adam, {}, "lr", "fast", "Invalid learning rate: fast|lr must be a number, got 'fast'"),
        (Adam, {}, "betas", (0.9,), "betas must be either both floats|betas must be 2 numbers"),
        (AdamW, {}, "eps", None, "Invalid epsilon value: None"),
        (SGD, dict(momentum=0.9), "dampening", None, "dampening must be a number, got None"),
        (Rprop, {}, "step_sizes", (1e-6,), "step_sizes must be 2 numbers"),
        (ASGD, {}, "alpha", (0.75,), "alpha must be a number"),
    ],
    ids=str,
)
def test_option_spoiled_between_steps_moves_nothing(
    optimizer_class: type[FirstOrder], options: dict[str, Any], name: str, value: Any, message: str, backend: str
) -> None:
    params = leaves()
    optimizer = optimizer_class([{"params": params[:2]}, {"params": params[2:]}], backend=backend, **options)
    good = optimizer.param_groups[1][name]
    give_grads(params, 0)
    for first in (True, False):
        if first:  # the first step of SGD knows no dampening
            optimizer.step()
        optimizer.param_groups[1][name] = value
        before = snapshot(optimizer)
        give_grads(params, 1)
        with pytest.raises(ValueError, match=message):
            optimizer.step()
        assert_unmoved(optimizer, before)
        optimizer.param_groups[1][name] = good
        optimizer.step()


def test_max_norm_spoiled_between_steps_moves_nothing() -> None:
    params = leaves()
    optimizer = SGD(params, max_norm=1.0)
    give_grads(params, 0)
    optimizer.max_norm = -1.0
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="max_norm must be a number > 0"):
        optimizer.step()
    assert_unmoved(optimizer, before)


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("shape", [(1,), (2,), (3, 1), (2, 3)])
def test_state_of_another_shape_moves_nothing(shape: tuple[int, ...], backend: str) -> None:
    params = leaves([(3,), (3,)])
    optimizer = AdamW(params, backend=backend)
    give_grads(params, 0)
    optimizer.step()
    optimizer.state[params[1]]["exp_avg"] = torch.zeros(shape)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"exp_avg of .*\[1\] has shape .* expected \(3,\)"):
        optimizer.step()
    assert_unmoved(optimizer, before)


def differentiable(params: list[torch.Tensor]) -> AdamW:
    for param in params:
        param.requires_grad_(False)  # torch allows no write to a leaf that autograd watches
    return AdamW([{"params": params[:1]}, {"params": params[1:], "differentiable": True}])


def listed_twice(params: list[torch.Tensor]) -> AdamW:
    return AdamW([*params, params[-1]])


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
@pytest.mark.parametrize("make", [differentiable, listed_twice])
def test_unfit_state_of_a_parameter_updated_by_itself_moves_nothing(
    make: Callable[[list[torch.Tensor]], AdamW],
) -> None:
    params = leaves([(3,), (3,)])
    optimizer = make(params)
    give_grads(params, 0)
    optimizer.step()
    optimizer.state[params[1]]["exp_avg"] = torch.zeros(7)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"exp_avg of .* has shape .* expected \(3,\)"):
        optimizer.step()
    assert_unmoved(optimizer, before)
    optimizer.state[params[1]]["exp_avg"] = torch.zeros(3)
    optimizer.step()
    optimizer.state[params[1]]["exp_avg"].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="the memory of exp_avg has been freed"):
        optimizer.step()


def test_unknown_backend_in_the_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    params = leaves()
    optimizer = SGD(params, lr=0.1)
    give_grads(params, 0)
    optimizer.step()
    before = snapshot(optimizer)
    monkeypatch.setenv("DESCEND_BACKEND", "gpu")
    assert_refused(ValueError, "DESCEND_BACKEND must be one of", optimizer.step)
    assert_unmoved(optimizer, before)


def test_a_rule_needs_no_learning_rate() -> None:
    def rule(param, grad, rate):
        return param - rate * grad

    (param,) = leaves([(3,)])
    before = param.detach().clone()
    param.grad = torch.ones_like(param)
    from_rule(rule, "Rule", rate=0.5)([param]).step()
    assert torch.equal(param, before - 0.5)


def test_whole_numbers_cannot_be_trained() -> None:
    param = torch.zeros(3, dtype=torch.int64)
    param.grad = torch.ones_like(param)
    with pytest.raises(RuntimeError, match=r"makes fractions.* torch\.int64"):
        SGD([param]).step()


def test_from_rule_refuses_what_does_not_fit() -> None:
    def no_number(param, grad, max_norm):
        return param - max_norm * grad

    def rule(param, grad, lr, rate):
        return param - lr * rate * grad

    assert_refused(ValueError, "needs a default for ['rate']", lambda: from_rule(rule, "Rule"))
    assert_refused(ValueError, "['speed']", lambda: from_rule(rule, "Rule", rate=1.0, speed=2.0))
    optimizer_class = from_rule(rule, "Rule", rate=1.0)
    assert_refused(TypeError, "Rule has no option ['speed']", lambda: optimizer_class(leaves(), speed=1.0))
    assert_refused(TypeError, "at most 2", lambda: optimizer_class(leaves(), 0.1, 0.2, 0.3))
    assert_refused(TypeError, "multiple values for ['lr']", lambda: optimizer_class(leaves(), 0.1, lr=0.2))
    assert_refused(ValueError, "a number called ['max_norm']", lambda: from_rule(no_number, "Rule", max_norm=1.0))
    assert_refused(ValueError, "Invalid learning rate: -1", lambda: optimizer_class(leaves(), lr=-1))
