"""Which saved state goes to which parameter, and whose options to which group."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from cases import CASES, Case, assert_same_bits, assert_unmoved, give_grads, leaves, params_of, snapshot, state_of
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from descend import SGD, AdamW, IncompatibleKeys

# Groups as text: parameters by name, groups divided by "|"; "~" in front: the optimizer is not told the names.
# Momentum holds the saved parameter's place in the alphabet, lr of a saved group is its number.


def made(groups: str, lr: float | None = None) -> SGD:
    named = not groups.startswith("~")
    listed = [group.split() for group in groups.removeprefix("~").split("|")]
    params: list[Any] = [[(name, torch.zeros(2, requires_grad=True)) for name in group] for group in listed]
    if not named:
        params = [[param for _, param in group] for group in params]
    options = [{} if lr is None else {"lr": lr + i} for i in range(len(params))]
    return SGD([{"params": group, **each} for group, each in zip(params, options, strict=True)], lr=50.0, momentum=0.9)


def saved(groups: str) -> dict[str, Any]:
    optimizer = made(groups, lr=0.0)
    for name, param in zip(groups.replace("|", " ").removeprefix("~").split(), params_of(optimizer), strict=True):
        optimizer.state[param]["momentum_buffer"] = torch.full((2,), float(ord(name[-1])))
    return optimizer.state_dict()


def found_in(optimizer: SGD) -> tuple[str, str]:
    """Whose momentum each parameter has, and which group's lr each group; "-" for its own."""
    buffers = [optimizer.state[param].get("momentum_buffer") for param in params_of(optimizer)]
    momenta = " ".join("-" if buffer is None else chr(int(buffer[0])) for buffer in buffers)
    rates = " ".join("-" if group["lr"] == 50.0 else str(int(group["lr"])) for group in optimizer.param_groups)
    return momenta, rates


CURRENT = dict(hyperparameters="current")
LOADS: list[tuple[str, str, dict[str, Any], str, str]] = [
    ("a b c", "c a b", {}, "c a b", "0"),
    ("a b c", "c a b", dict(match="name"), "c a b", "0"),
    ("a b c", "c a b", dict(match="order"), "a b c", "0"),
    ("~a b c", "c a b", {}, "a b c", "0"),
    ("a b c", "~c a b", {}, "a b c", "0"),
    ("~a b|c", "~b a|c", {}, "a b c", "0 1"),
    ("a a b", "a a b", {}, "a a b", "0"),  # such names tell nothing
    # Wrappers rename everything: DistributedDataParallel, torch.compile, FSDP, checkpointed activations.
    ("module.a module.b", "b a", {}, "b a", "0"),
    ("a x.b", "x._orig_mod.b a", {}, "b a", "0"),
    ("_fsdp_wrapped_module.a b", "b _checkpoint_wrapped_module.a", {}, "b a", "0"),
    ("a module.a", "module.a a", {}, "a a", "0"),  # without "module" they would be one
    # Groups: the same ones in another order keep their options; otherwise positions decide.
    ("a b|c", "c|b a", {}, "c b a", "1 0"),
    ("a b|c", "a|b c", {}, "a b c", "0 1"),
    ("a b|c d", "a b c|d", {}, "a b c d", "0 1"),
    ("a|b|c", "b|c|a", {}, "b c a", "1 2 0"),
    ("a b|c", "c|b a", dict(match="name", **CURRENT), "c b a", "- -"),
    ("a b c", "a|c b", CURRENT, "a c b", "- -"),
    ("a|b|c", "c b a", CURRENT, "c b a", "-"),
    ("~a b c", "~a b c", CURRENT, "a b c", "-"),
]


@pytest.mark.parametrize(("source", "target", "options", "momenta", "rates"), LOADS, ids=str)
def test_state_goes_where_it_belongs(
    source: str, target: str, options: dict[str, Any], momenta: str, rates: str
) -> None:
    optimizer = made(target)
    own_names = [group.get("param_names") for group in optimizer.param_groups]
    assert optimizer.load_state_dict(saved(source), **options) is None
    assert found_in(optimizer) == (momenta, rates)
    if not target.startswith("~"):
        assert [group["param_names"] for group in optimizer.param_groups] == own_names


PLACE = "param_groups[0]['params']"
PARTIAL: list[tuple[str, str, dict[str, Any], str, str, list[str], list[str]]] = [
    ("a b c", "a b c", {}, "a b c", "0", [], []),
    ("a b c", "c a d", {}, "c a -", "0", ["d"], ["b"]),
    ("a b", "a b|d", {}, "a b -", "0 -", ["d"], []),
    ("a b", "d|a b", {}, "- a b", "- 0", ["d"], []),
    ("a|b", "c|a", {}, "- a", "- 0", ["c"], ["b"]),
    ("a|b", "a|c", {}, "a -", "0 1", ["c"], ["b"]),
    ("a b", "a|b", {}, "a b", "0 0", [], []),
    ("a b", "a|b", CURRENT, "a b", "- -", [], []),
    ("a b", "c d", {}, "- -", "0", ["c", "d"], ["a", "b"]),
    ("a module.b", "b c", {}, "b -", "0", ["c"], ["a"]),
    ("e.module.b", "e.b e.module.b", {}, "- b", "0", ["e.b"], []),
    ("~a b c", "~a b", {}, "a b", "0", [], [f"{PLACE}[2]"]),
    ("~a b", "~a b c", {}, "a b -", "0", [f"{PLACE}[2]"], []),
    ("~a b", "~a|b", CURRENT, "a -", "- -", ["param_groups[1]['params'][0]"], [f"{PLACE}[1]"]),
]


@pytest.mark.parametrize(("source", "target", "options", "momenta", "rates", "missing", "unexpected"), PARTIAL, ids=str)
def test_not_strict_loads_what_matches_and_tells_the_rest(
    source: str,
    target: str,
    options: dict[str, Any],
    momenta: str,
    rates: str,
    missing: list[str],
    unexpected: list[str],
) -> None:
    optimizer = made(target)
    told = optimizer.load_state_dict(saved(source), strict=False, **options)
    assert told == IncompatibleKeys(missing_keys=missing, unexpected_keys=unexpected)
    assert found_in(optimizer) == (momenta, rates)
    give_grads(params_of(optimizer), 0)
    optimizer.step()


REFUSED: list[tuple[str, str, dict[str, Any], str]] = [
    ("a b", "a c", {}, r"SGD: the names differ: expected 'c', which.*; it has 'b' instead"),
    ("a b", "a b c", {}, "expected 'c', which.*; it has none instead"),
    ("a b c d e f", "a", {}, "it has 'b', 'c', 'd', 'e', 'f' instead"),
    ("a b c d e f g", "a", {}, "it has 'b', 'c', 'd', 'e', 'f', 1 more instead"),
    (
        "a b c",
        "a b|c",
        {},
        "^loaded state dict has a different number of parameter groups .SGD: 1 there, 2 here.[.] Where parameters have "
        "names, hyperparameters='current' loads the state and leaves the groups.$",
    ),
    ("a|b|c", "a b|c", dict(strict=False), "group 0 were in the groups .0, 1. of the loaded"),
    (
        "a b c e|d",
        "a b|c e d",
        {},
        "group 1 were in the groups .0, 1. of the loaded state dict: whose options shall it have. "
        "hyperparameters='current' keeps those of this optimizer.$",
    ),
    (
        "~a b|c",
        "~a|b c",
        {},
        "^loaded state dict contains a parameter group that doesn't match the size of optimizer's group "
        ".SGD: group 0 has 2 parameters there, 1 here.$",
    ),
    ("~a b|c", "~a b c", {}, "different number of parameter groups"),
    ("~a b|c", "~a b c", dict(strict=False), "different number of parameter groups"),
    (
        "~a b",
        "a b",
        dict(match="name"),
        "match='name' needs a name.*the state dict has not. Give the parameters as model.named_parameters.., before "
        "saving and before loading.$",
    ),
    ("a b", "~a b", dict(match="name"), "match='name' needs a name.*this optimizer has not"),
    ("a a", "a a", dict(match="name"), "a name of its own"),
    ("a", "a", dict(match="names"), "SGD: match must be one of"),
    ("a", "a", dict(hyperparameters="new"), "SGD: hyperparameters must be one of"),
]


@pytest.mark.parametrize(("source", "target", "options", "message"), REFUSED, ids=str)
def test_mismatch_is_an_error_that_changes_nothing(
    source: str, target: str, options: dict[str, Any], message: str
) -> None:
    optimizer = made(target)
    give_grads(params_of(optimizer), 0)
    optimizer.step()
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved(source), **options)
    assert_unmoved(optimizer, before)


def test_state_under_a_name_that_no_group_has_is_refused_and_other_keys_are_kept() -> None:
    content = saved("a b")
    content["param_groups"][0]["params"] = ["a", "b"]  # as torch.distributed has it
    content["state"] = {"a": content["state"][0], "b": content["state"][1], 7: {"x": 1}}
    optimizer = made("b a")
    optimizer.load_state_dict(content)
    assert found_in(optimizer) == ("b a", "0")
    assert optimizer.state[7] == {"x": 1}
    content["state"]["c"] = content["state"]["a"]
    with pytest.raises(ValueError, match="state for parameter 'c', which is in none of its groups"):
        optimizer.load_state_dict(content)
    assert optimizer.load_state_dict(content, strict=False) == ([], ["state['c']"])


def test_names_of_torch_distributed_count_where_some_are_known_or_it_is_asked_for() -> None:
    content = saved("a b")
    content["param_groups"][0]["params"] = ["x", "y"]
    content["state"] = {"x": content["state"][0], "y": content["state"][1]}
    optimizer = made("b a")
    optimizer.load_state_dict(content)
    assert found_in(optimizer) == ("a b", "0")
    with pytest.raises(ValueError, match=r"the names differ: expected 'b', 'a'.* it has 'x', 'y' instead"):
        optimizer.load_state_dict(content, match="name")


def test_names_of_some_parameters_are_ignored() -> None:
    content = saved("a|b c")
    del content["param_groups"][1]["param_names"]
    optimizer = made("b|c a")
    optimizer.load_state_dict(content)
    assert found_in(optimizer) == ("a b c", "0 1")
    told = made("~a|b").load_state_dict(content, strict=False)
    assert told == ([], ["param_groups[1]['params'][1]"])


def test_names_of_the_file_name_what_has_none() -> None:
    optimizer = made("~a b|c")
    optimizer.load_state_dict(saved("x y|z"))
    assert [group["param_names"] for group in optimizer.param_groups] == [["x", "y"], ["z"]]
    untold = made("~a b c")
    untold.load_state_dict(saved("x y"), strict=False)  # one of three would stay without
    assert "param_names" not in untold.param_groups[0]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reordered_layers_go_on_as_if_never_saved(case: Case) -> None:
    names = ["first", "second", "third"]
    straight, stopped = (case.ours(list(zip(names, leaves([(4,)] * 3), strict=True)), **case.options) for _ in "ab")
    for optimizer in (straight, stopped):
        for seed in range(3):
            give_grads(params_of(optimizer), seed)
            optimizer.step()
    params = dict(zip(names, params_of(stopped), strict=True))
    reordered = case.ours([(name, params[name]) for name in ("third", "first", "second")], **case.options)
    reordered.load_state_dict(stopped.state_dict())
    for seed in range(3, 6):
        give_grads(params_of(straight), seed)
        give_grads(list(params.values()), seed)
        straight.step()
        reordered.step()
    assert all(map(torch.equal, params_of(straight), params.values()))


def test_torch_gives_reordered_layers_each_others_momentum() -> None:
    """Why names count here; this fails when torch learns it."""
    first, second = leaves([(2,), (2,)])
    theirs = torch.optim.SGD([("a", first), ("b", second)], momentum=0.9)
    give_grads([first, second], 0)
    theirs.step()
    turned = torch.optim.SGD([("b", second), ("a", first)], momentum=0.9)
    turned.load_state_dict(theirs.state_dict())
    assert torch.equal(turned.state[second]["momentum_buffer"], theirs.state[first]["momentum_buffer"])


# A new head on a trained body.


def network(classes: int) -> nn.Sequential:
    torch.manual_seed(classes)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, classes))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    inputs = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
    for _ in range(steps):
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()


def test_training_goes_on_with_a_new_head() -> None:
    model, tuned = network(5), network(3)
    optimizer = AdamW(model, lr=0.01)
    train(model, optimizer, 3)
    tuned[0].load_state_dict(model[0].state_dict())
    new = AdamW(tuned, lr=1e-4, groups=[("2.*", dict(lr=0.1))])
    before = snapshot(new)
    with pytest.raises(ValueError, match=r"loaded exp_avg of 2\.weight has shape \(5, 8\), expected \(3, 8\)\.$"):
        new.load_state_dict(optimizer.state_dict(), hyperparameters="current")
    assert_unmoved(new, before)
    told = new.load_state_dict(optimizer.state_dict(), strict=False, hyperparameters="current")
    assert told == IncompatibleKeys(["2.weight", "2.bias"], ["2.weight", "2.bias"])
    assert [group["lr"] for group in new.param_groups] == [1e-4, 0.1]
    train(tuned, new, 2)
    assert [int(new.state[param]["step"]) for param in tuned.parameters()] == [5, 5, 2, 2]


def test_partial_file_leaves_the_other_parameters_the_state_they_have() -> None:
    named = list(zip("abc", leaves([(3,)] * 3), strict=True))
    source, target = AdamW(copy.deepcopy(named[:2])), AdamW(named[1:])
    for optimizer, seed in ((source, 0), (target, 1), (target, 2)):
        give_grads(params_of(optimizer), seed)
        optimizer.step()
    own = copy.deepcopy(state_of(target)[1])
    told = target.load_state_dict(source.state_dict(), strict=False)
    assert told == IncompatibleKeys(missing_keys=["c"], unexpected_keys=["a"])
    assert_same_bits({0: state_of(target)[0], 1: state_of(target)[1]}, {0: state_of(source)[1], 1: own})
    give_grads(params_of(target), 3)
    target.step()
    assert [int(state["step"]) for state in state_of(target).values()] == [2, 3]


# Options.


def test_current_hyperparameters_stay_with_those_of_schedulers() -> None:
    old, new = AdamW(leaves(), lr=0.5, betas=(0.5, 0.5), weight_decay=0.3), AdamW(leaves(), lr=0.01, amsgrad=True)
    CosineAnnealingLR(old, T_max=7)
    CosineAnnealingLR(new, T_max=9)
    groups = copy.deepcopy([{**group, "params": []} for group in new.param_groups])
    new.load_state_dict(old.state_dict(), hyperparameters="current")
    assert [{**group, "params": []} for group in new.param_groups] == groups
    assert groups[0]["initial_lr"] == 0.01
    new.load_state_dict(old.state_dict())
    loaded = {name: new.param_groups[0][name] for name in ("lr", "initial_lr", "betas", "weight_decay", "amsgrad")}
    assert loaded == dict(lr=0.5, initial_lr=0.5, betas=(0.5, 0.5), weight_decay=0.3, amsgrad=False)


def test_loaded_tensor_lr_is_a_copy_that_still_requires_what_it_did() -> None:
    lr = torch.tensor(0.5, requires_grad=True)
    old, new = SGD(leaves(), lr=lr), SGD(leaves())
    new.load_state_dict(old.state_dict())
    loaded = new.param_groups[0]["lr"]
    assert isinstance(loaded, Tensor)
    assert loaded is not lr
    assert (loaded.item(), loaded.requires_grad) == (0.5, True)
