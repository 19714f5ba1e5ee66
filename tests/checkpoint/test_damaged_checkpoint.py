"""A damaged or foreign dictionary is refused with a clear message, and changes nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import CASES, Case, assert_unmoved, give_grads, leaves, params_of, snapshot
from torch import Tensor

from descend import ASGD, LBFGS, SGD, Adam, AdamW, AdamWScheduleFree, LeastSquares, NAdam, Newton, Rprop, from_rule
from descend.checkpoint.reading import number_of

SHAPES = [(3, 2), (2,)]
Path = tuple[Any, ...]


def stepped(kind: Any, seed: int = 0, names: bool = False, **options: Any) -> Any:
    params = leaves(SHAPES)
    optimizer = kind(list(zip("ab", params, strict=True)) if names else params, **options)
    step(optimizer, seed)
    return optimizer


def step(optimizer: Any, seed: int) -> None:
    params = params_of(optimizer)
    give_grads(params, seed)
    if isinstance(optimizer, LBFGS | LeastSquares | Newton):
        optimizer.step(lambda: sum(((param - 1) ** 2 + param**4).sum() for param in params))
    else:
        optimizer.step()


def put(dictionary: dict[str, Any], path: Path, value: Any) -> None:
    if not path:
        dictionary.clear()
        return
    *way, last = path
    inner: Any = dictionary
    for key in way:
        inner = inner[key]
    if value is DELETED:
        del inner[last]
    else:
        inner[last] = value


DELETED = object()
NAN = float("nan")
STATE, GROUP = ("state", 0), ("param_groups", 0)
BUFFER = (*STATE, "exp_avg")


def freed() -> Tensor:
    """Not to be printed, which is why the table has the function."""
    tensor = torch.zeros(1)
    tensor.untyped_storage().resize_(0)
    return tensor


def without_values(value: Any) -> Any:
    """The value with a freed tensor wherever it says ``freed``."""
    if isinstance(value, dict):
        return {key: without_values(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [without_values(entry) for entry in value]
    return freed() if value is freed else value


# Of Adam: what is put where, and what is said.
DAMAGES: list[tuple[Path, Any, str]] = [
    ((), {}, "lacks 'param_groups', 'state'"),
    (("state",), DELETED, "lacks 'state'"),
    (("param_groups",), DELETED, "lacks 'param_groups'"),
    (("state",), None, "state of a state dict is a dictionary, got NoneType"),
    (("state",), [1, 2], "state of a state dict is a dictionary, got list"),
    (("param_groups",), {}, "param_groups of a state dict is a list, got dict"),
    (("param_groups",), [], "different number of parameter groups"),
    (GROUP, "group", "group 0 of the loaded state dict has no list 'params'"),
    ((*GROUP, "params"), DELETED, "no list 'params'"),
    ((*GROUP, "params"), "01", "no list 'params'"),
    ((*GROUP, "params"), [0, None], "no list 'params' of numbers or names"),
    ((*GROUP, "params"), [0], r"group 0 has 1 parameters there, 2 here"),
    ((*GROUP, "params"), [0, 1, 2], r"group 0 has 3 parameters there, 2 here"),
    ((*GROUP, "params"), [0, 0], "one state for several parameters"),
    (
        (*GROUP, "params"),
        [0, 7],
        "state for parameter 1, which is in none of its groups. strict=False leaves it aside.$",
    ),
    ((*GROUP, "param_names"), ["a"], "must be a list of 2 names, one for each of its parameters.$"),
    ((*GROUP, "param_names"), "ab", "must be a list of 2 names"),
    (
        (*GROUP, "lr"),
        DELETED,
        "group 0 of the loaded state dict lacks 'lr': is it another optimizer's. hyperparameters='current' keeps this "
        "optimizer's options, strict=False those that lack.$",
    ),
    ((*GROUP, "lr"), None, "Invalid learning rate: None"),
    ((*GROUP, "lr"), NAN, "Invalid learning rate: nan"),
    ((*GROUP, "betas"), (2.0, 0.9), "Invalid beta parameter at index 0: 2.0"),
    ((*GROUP, "betas"), "no", "betas must be either both floats or both Tensors"),
    ((*GROUP, "weight_decay"), "a bit", "Invalid weight_decay value: a bit"),
    ((*GROUP, "amsgrad"), "yes", "amsgrad of group 0 of the loaded state dict must be True or False, got 'yes'"),
    ((*GROUP, "amsgrad"), 2, "must be True or False, got 2"),
    ((*GROUP, "maximize"), None, "maximize of group 0"),
    ((*GROUP, "maximize"), 1.0, "must be True or False, got 1.0"),
    (
        (*GROUP, "weight_decay"),
        10**400,
        r"Adam: weight_decay must be a number, got 10+[.] [(]group 0 of the loaded state dict[)]",
    ),
    (STATE, [1], "the loaded state of 0 is a list, not a dictionary"),
    (STATE, {"momentum_buffer": torch.zeros(3, 2)}, "lacks 'exp_avg', 'exp_avg_sq', 'step', and has 'momentum_buffer'"),
    (("state", 9), {"step": 1}, "state for parameter 9"),
    ((*STATE, "step"), DELETED, "lacks 'step'"),
    ((*STATE, "step"), None, "lacks 'step'.* is it another optimizer's. strict=False leaves such state aside.$"),
    ((*STATE, "step"), "1", "loaded step of .* must be a number >= 0, got '1'"),
    ((*STATE, "step"), True, "must be a number >= 0, got True"),
    ((*STATE, "step"), -1, "must be a number >= 0, got -1"),
    ((*STATE, "step"), torch.tensor(-1.0), "must be a number >= 0, got -1.0"),
    ((*STATE, "step"), torch.tensor(NAN), "must be a number >= 0, got nan"),
    ((*STATE, "step"), float("inf"), "must be a number >= 0, got inf"),
    ((*STATE, "step"), 2.5, "loaded step of .* must be a whole number, got 2.5"),
    ((*STATE, "step"), torch.tensor(2.5), "must be a whole number, got 2.5"),
    ((*STATE, "step"), 10**400, "must be a number >= 0, got 1000"),
    ((*STATE, "step"), torch.ones(3), r"must be a number >= 0, got .a tensor of shape [(]3,[)]"),
    ((*STATE, "step"), torch.tensor(1j), "must be a number >= 0, got 1j"),
    ((*STATE, "step"), torch.zeros((), device="meta"), r"must be a number >= 0, got .a tensor of shape [(][)]"),
    (BUFFER, DELETED, "lacks 'exp_avg'"),
    (BUFFER, 0.5, "loaded exp_avg of .* must be a tensor, got float"),
    (BUFFER, [0.0] * 6, "must be a tensor, got list"),
    (STATE, {"step": None, "exp_avg": None, "exp_avg_sq": None}, "lacks 'exp_avg', 'exp_avg_sq', 'step'"),
    (BUFFER, torch.zeros(2, 3), r"has shape [(]2, 3[)], expected [(]3, 2[)]. Were the parameters in another order.$"),
    (BUFFER, torch.zeros(()), r"has shape [(][)], expected [(]3, 2[)]"),
    (BUFFER, torch.zeros(3, 2, dtype=torch.int64), "must hold numbers as the parameter does.*got torch.int64"),
    (BUFFER, torch.zeros(3, 2, dtype=torch.complex64), "must hold numbers as the parameter does"),
    (BUFFER, torch.zeros(3, 2).to_mkldnn(), "must be a dense tensor"),
    (BUFFER, torch.zeros(3, 2, device="meta"), "has no values"),
    (BUFFER, freed, "has no values"),
    ((*STATE, "step"), freed, r"cannot be copied: the memory of a tensor has been freed[.]$"),
    ((*GROUP, "lr"), freed, r"cannot be copied: the memory of a tensor has been freed[.]$"),
    ((*GROUP, "mine"), [freed], r"cannot be copied: the memory of a tensor has been freed[.]$"),
    (("state", "all"), {"mine": freed}, r"cannot be copied: the memory of a tensor has been freed[.]$"),
    ((*STATE, "mine"), torch.zeros(3, device="meta"), "has no values"),
    ((*STATE, "mine"), [torch.zeros(3, device="meta")], "cannot be copied"),
]


@pytest.mark.parametrize(("path", "value", "message"), DAMAGES, ids=[message for *_, message in DAMAGES])
def test_damage_is_named_and_changes_nothing(path: Path, value: Any, message: str) -> None:
    optimizer = stepped(Adam, seed=1)
    saved = stepped(Adam, lr=0.5).state_dict()
    put(saved, path, without_values(value))
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=message) as caught:
        optimizer.load_state_dict(saved)
    assert_unmoved(optimizer, before)
    assert caught.type is ValueError
    assert "Adam" in str(caught.value) or str(caught.value).startswith(("Invalid", "betas"))


@pytest.mark.parametrize("what", [None, [], "state", 3, torch.zeros(2)], ids=str)
def test_what_is_no_dictionary_is_a_type_error(what: Any) -> None:
    for optimizer in (SGD(leaves()), LBFGS(leaves()), Newton(leaves())):
        with pytest.raises(TypeError, match=f"load_state_dict takes a dictionary, got {type(what).__name__}"):
            optimizer.load_state_dict(what)
        handle = optimizer.register_load_state_dict_pre_hook(lambda opt, saved: 5)
        with pytest.raises(TypeError, match="a hook replaced the state dict by a int"):
            optimizer.load_state_dict(optimizer.state_dict())
        handle.remove()


FOREIGN = [
    (SGD, dict(momentum=0.9), AdamW, r"lacks 'betas', 'eps'"),
    (AdamW, {}, SGD, r"lacks 'momentum', 'dampening'"),
    (AdamW, {}, from_rule(lambda p, g, m, lr: (p - lr * m, m + g), "Rule"), "lacks 'm', and has 'step'"),
    (LBFGS, {}, AdamW, "lacks 'betas'"),
    (AdamW, {}, LBFGS, "lacks n_iter"),
    (AdamW, {}, Newton, "has some for 0|lacks n_iter"),
]


@pytest.mark.parametrize(("saver", "options", "loader", "message"), FOREIGN, ids=lambda entry: str(entry)[:40])
def test_state_of_another_optimizer_is_refused(saver: Any, options: dict[str, Any], loader: Any, message: str) -> None:
    optimizer = stepped(loader)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(stepped(saver, **options).state_dict())
    assert same(optimizer.state_dict(), before)


def test_not_strict_leaves_the_state_of_another_optimizer_aside() -> None:
    optimizer = stepped(AdamW, names=True)
    told = optimizer.load_state_dict(stepped(SGD, names=True, lr=0.25, momentum=0.9).state_dict(), strict=False)
    assert told == (["a", "b"], ["a", "b"])
    assert optimizer.param_groups[0]["lr"] == 0.25  # an option that both have
    step(optimizer, 1)
    extra = optimizer.state_dict()
    extra["state"][7] = {"step": 1}
    assert optimizer.load_state_dict(extra, strict=False) == ([], ["state[7]"])


@pytest.mark.parametrize(
    ("value", "is_count", "message"),
    [
        (-1.0, True, "it must be a number >= 0, got -1.0."),
        (NAN, False, "it must be a number, got nan."),
        (torch.tensor(float("inf")), False, "it must be a number, got inf."),
        ("1", False, "it must be a number, got '1'."),
    ],
)
def test_what_is_no_number_is_named(value: Any, is_count: bool, message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        number_of(value, "it", is_count)
    assert str(caught.value) == message
    assert number_of(-1.0, "it") == -1.0


def test_damaged_scalar_state_is_named() -> None:
    saved = stepped(NAdam).state_dict()
    saved["state"][0]["mu_product"] = "x"
    with pytest.raises(ValueError, match=r"NAdam: the loaded mu_product of param_groups.* must be a number, got 'x'"):
        stepped(NAdam, seed=1).load_state_dict(saved)


SCALARS = [(NAdam, ("mu_product",)), (ASGD, ("eta", "mu"))]


@pytest.mark.parametrize("value", [DELETED, None], ids=["missing", "None"])
@pytest.mark.parametrize(("kind", "names"), SCALARS)
def test_state_without_its_scalars_is_refused(kind: Any, names: tuple[str, ...], value: Any) -> None:
    saved = stepped(kind).state_dict()
    for name in names:
        put(saved, (*STATE, name), value)
    optimizer = stepped(kind, seed=1)
    before = snapshot(optimizer)
    lacking = ", ".join(map(repr, names))
    with pytest.raises(
        ValueError, match=rf"{kind.__name__}: the loaded state of .*\[0\] lacks {lacking}, and has 'step'"
    ):
        optimizer.load_state_dict(saved)
    assert_unmoved(optimizer, before)
    assert optimizer.load_state_dict(saved, strict=False) == (["param_groups[0]['params'][0]"],) * 2


@pytest.mark.parametrize("case", [case for case in CASES if case.ours.nonnegative_state], ids=str)
def test_state_that_cannot_be_negative_is_refused_if_it_is(case: Case) -> None:
    optimizer = stepped(case.ours, **case.options)
    names = set(case.ours.nonnegative_state) & set(optimizer.state_dict()["state"][0])
    assert names
    for name in names:
        saved = copy.deepcopy(optimizer.state_dict())
        saved["state"][0][name].view(-1)[-1] = -0.25
        before = snapshot(optimizer)
        with pytest.raises(
            ValueError, match=rf"{case.ours.__name__}: the loaded {name} of .*\[0\] must be >= 0, got -0.25."
        ):
            optimizer.load_state_dict(saved)
        assert_unmoved(optimizer, before)


def test_negative_numbers_are_noticed_in_every_dtype_and_where_state_may_be_negative() -> None:
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        saved = stepped(Adam).state_dict()
        saved["state"][1]["exp_avg_sq"] = torch.tensor([1.0, -0.5], dtype=dtype)
        with pytest.raises(ValueError, match=r"must be >= 0, got -0[.]5"):
            stepped(Adam).load_state_dict(saved)
    optimizer = Adam([torch.ones(2, dtype=torch.complex64, requires_grad=True)])
    optimizer.init_state()
    saved = optimizer.state_dict()
    saved["state"][0]["exp_avg"] -= 1 + 1j
    optimizer.load_state_dict(saved)
    saved["state"][0]["exp_avg_sq"] -= 1j
    with pytest.raises(ValueError, match=r"must be >= 0, got -1[.]0"):
        optimizer.load_state_dict(saved)
    diverged = stepped(Adam).state_dict()
    diverged["state"][0]["exp_avg_sq"] = torch.full((3, 2), NAN)
    stepped(Adam).load_state_dict(diverged)


NUMBERS = [
    (case, name, value)
    for case in CASES
    for name, value in case.ours(leaves()).defaults.items()
    if isinstance(value, float | int | tuple) and not isinstance(value, bool)
]


@pytest.mark.parametrize(("case", "name", "value"), NUMBERS, ids=str)
def test_no_option_of_a_file_is_nan(case: Case, name: str, value: Any) -> None:
    saved = stepped(case.ours, **case.options).state_dict()
    saved["param_groups"][0][name] = (value[0], NAN) if isinstance(value, tuple) else NAN
    optimizer = stepped(case.ours, seed=1, **case.options)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"nan.*\(group 0 of the loaded state dict\)"):
        optimizer.load_state_dict(saved)
    assert_unmoved(optimizer, before)


def test_an_empty_state_is_that_of_a_parameter_that_has_not_stepped() -> None:
    saved = stepped(Adam).state_dict()
    saved["state"][0] = {}
    optimizer = stepped(Adam, seed=1)
    optimizer.load_state_dict(saved)
    step(optimizer, 2)
    assert [int(state["step"]) for state in optimizer.state_dict()["state"].values()] == [1, 2]


def test_options_of_a_rule_that_are_no_numbers_are_refused() -> None:
    kind = from_rule(lambda p, g, lr, rate: p - lr * rate * g, "Rule", rate=0.5)
    saved = stepped(kind).state_dict()
    saved["param_groups"][0]["rate"] = None
    with pytest.raises(ValueError, match="Rule: the options of group 0 of the loaded state dict cannot be used"):
        stepped(kind, seed=1).load_state_dict(saved)


# Everything, everywhere.

JUNK: list[Callable[[], Any]] = [
    lambda: None,
    lambda: "x",
    lambda: -1,
    lambda: NAN,
    lambda: 10**400,
    lambda: True,
    lambda: 2.5,
    lambda: [],
    lambda: {},
    lambda: {"a": 1},
    lambda: (0.9, 0.99),
    lambda: [1, "b"],
    lambda: torch.zeros(3, 2),
    lambda: torch.tensor(-1.0),
    lambda: torch.zeros(2, dtype=torch.int64),
    lambda: torch.zeros(3, 2, dtype=torch.float8_e4m3fn),
    lambda: torch.zeros(2, device="meta"),
    lambda: object,
    lambda: DELETED,
]
KINDS = [
    *(Case(case.ours, case.theirs, {**case.options, "lr": 0.01}) for case in (CASES[0], CASES[2], CASES[4], CASES[5])),
    *(case for case in CASES if case.ours in (NAdam, Rprop, ASGD, AdamWScheduleFree)),
    Case(LBFGS, torch.optim.LBFGS, dict(max_iter=3, history_size=3)),
    Case(Newton, torch.optim.LBFGS, dict(max_iter=1, solver="cg")),
    Case(LeastSquares, torch.optim.LBFGS, dict(max_iter=1)),
]


def paths(value: Any, so_far: Path = ()) -> Iterator[Path]:
    if so_far:
        yield so_far
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in entries:
        yield from paths(inner, (*so_far, key))


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


@pytest.mark.parametrize(
    ("case", "names"), [(case, names) for case in KINDS for names in (True, False) if names or "lr" in case.options]
)
def test_whatever_is_put_anywhere_is_refused_or_works(case: Case, names: bool) -> None:
    good = stepped(case.ours, names=names, **case.options).state_dict()
    refused, optimizer, before = 0, None, None
    for path in paths(good):
        for junk in JUNK:
            if optimizer is None:
                optimizer = stepped(case.ours, seed=1, names=names, **case.options)
                before = copy.deepcopy((optimizer.state_dict(), params_of(optimizer)))
            saved = copy.deepcopy(good)
            put(saved, path, junk())
            try:
                optimizer.load_state_dict(saved)
            except (TypeError, ValueError):
                refused += 1
                assert same((optimizer.state_dict(), params_of(optimizer)), before), (path, junk())
            else:
                if not (case.ours is LBFGS and path[-1] in ("lr", "history_size")):  # True passes its own checks
                    step(optimizer, 2)
                    step(optimizer, 3)
                optimizer = None
    assert refused > 100


def test_whatever_is_put_into_state_in_8_bits_is_refused_or_works() -> None:
    options: dict[str, Any] = dict(state_dtype="8bit", rounding="compensated", backend="eager")

    def made(seed: int) -> AdamW:
        optimizer = AdamW(leaves([(64, 64)], torch.bfloat16), **options)
        step(optimizer, seed)
        return optimizer

    good, refused = copy.deepcopy(made(0).state_dict()), 0
    for key in good["state"][0]:
        for junk in JUNK:
            optimizer, saved = made(1), copy.deepcopy(good)
            put(saved, (*STATE, key), junk())
            before = copy.deepcopy((optimizer.state_dict(), params_of(optimizer)))
            try:
                optimizer.load_state_dict(saved)
            except (TypeError, ValueError):
                refused += 1
                assert same((optimizer.state_dict(), params_of(optimizer)), before), (key, junk())
            else:
                step(optimizer, 2)
    assert refused > 90
