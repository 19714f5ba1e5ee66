"""Modules as parameters, groups by pattern, and parameters without weight decay."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import CASES, Case, Twins, give_grads, leaves, params_of
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from descend import LBFGS, SGD, AdamW, LeastSquares, Newton, from_rule, no_decay


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.linear = nn.Linear(4, 4)


class Model(nn.Module):
    """Embedding, two blocks and a head that shares the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(4, 6)
        self.head.weight = self.embed.weight
        self.embed.weight.requires_grad_(False)


NAMES = [name for name, _ in Model().named_parameters()]
BIASES = ["blocks.0.norm.bias", "blocks.0.linear.bias", "blocks.1.norm.bias", "blocks.1.linear.bias", "head.bias"]
NORMS = ["blocks.0.norm.weight", "blocks.1.norm.weight"]
LINEARS = ["blocks.0.linear.weight", "blocks.1.linear.weight"]


def groups_of(optimizer: torch.optim.Optimizer) -> list[list[str]]:
    return [group["param_names"] for group in optimizer.param_groups]


def lion(param: Tensor, grad: Tensor, exp_avg: Tensor, lr: float, weight_decay: float) -> tuple[Tensor, Tensor]:
    return param - lr * (exp_avg + weight_decay * param), exp_avg + 0.1 * (grad - exp_avg)


Lion = from_rule(lion, "Lion", lr=1e-4, weight_decay=0.1)


@pytest.mark.parametrize("kind", [SGD, AdamW, Lion, LBFGS, Newton, LeastSquares])
def test_module_gives_its_parameters_with_names_shared_ones_once(kind: Any) -> None:
    model = Model()
    optimizer = kind(model)
    assert groups_of(optimizer) == [NAMES]
    assert params_of(optimizer) == list(model.parameters())  # the frozen one too, as for torch
    assert optimizer.state_dict() == kind(model.named_parameters()).state_dict()


@pytest.mark.parametrize(
    "params",
    [
        lambda: nn.ParameterList(leaves([(2,), (3,)])),
        lambda: leaves([(2,), (3,)]),
        lambda: iter(leaves([(2,), (3,)])),
        lambda: [{"params": leaves([(2,)]), "lr": 0.3}, {"params": leaves([(3,)])}],
        lambda: [("a", leaves([(2,)])[0])],
    ],
)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_torch_takes_makes_torchs_groups(case: Case, params: Callable[[], Any]) -> None:
    twins = Twins(case, params)
    assert twins.ours.state_dict()["param_groups"] == twins.theirs.state_dict()["param_groups"]


DECAY = dict(weight_decay=0.0)
GROUPS: list[tuple[list[Any], list[list[str]]]] = [
    ([], [NAMES]),
    ([("*.bias", DECAY)], [[name for name in NAMES if name not in BIASES], BIASES]),
    # First match wins; what none matches comes first, the others in the order of the patterns.
    (
        [("*norm*", DECAY), ("*.bias", DECAY), ("embed*", dict(lr=1e-4))],
        [LINEARS, sorted([*NORMS, BIASES[0], BIASES[2]], key=NAMES.index), [BIASES[1], *BIASES[3:]], ["embed.weight"]],
    ),
    ([("*", dict(lr=0.5))], [NAMES]),
    ([("head.bias", DECAY), ("*", {})], [["head.bias"], [name for name in NAMES if name != "head.bias"]]),
    ([("blocks.?.linear.weight", DECAY)], [[name for name in NAMES if name not in LINEARS], LINEARS]),
    (
        [("blocks.[!0].*.weight", DECAY)],
        [[name for name in NAMES if name not in (NORMS[1], LINEARS[1])], [NORMS[1], LINEARS[1]]],
    ),
    ([(re.compile(r"blocks\.\d\.linear\.weight"), DECAY)], [[name for name in NAMES if name not in LINEARS], LINEARS]),
    ([(re.compile(".*norm.weight"), DECAY)], [[name for name in NAMES if name not in NORMS], NORMS]),
    # Names stand in the model's order whatever the order of the pattern's.
    ([(set(LINEARS), DECAY)], [[name for name in NAMES if name not in LINEARS], LINEARS]),
    ([[LINEARS[::-1], DECAY]], [[name for name in NAMES if name not in LINEARS], LINEARS]),
]


@pytest.mark.parametrize("params", [Model, lambda: Model().named_parameters(), lambda: [*Model().named_parameters()]])
@pytest.mark.parametrize(("groups", "expected"), GROUPS, ids=map(str, range(len(GROUPS))))
def test_patterns_sort_parameters(groups: Any, expected: Any, params: Callable[[], Any]) -> None:
    optimizer = AdamW(params(), lr=0.01, weight_decay=0.1, groups=groups)
    found = groups_of(optimizer)
    assert sorted(name for group in found for name in group) == sorted(NAMES)
    assert found == expected
    defaults = AdamW(leaves(), lr=0.01, weight_decay=0.1).param_groups[0]
    has_rest = len(found) > len(groups)
    for group, options in zip(optimizer.param_groups, [{}] * has_rest + [each for _, each in groups], strict=True):
        assert {key: group[key] for key in group if key not in ("params", "param_names")} == {
            **{key: value for key, value in defaults.items() if key != "params"},
            **options,
        }


REFUSED: list[tuple[Any, Any, str]] = [
    (Model, [("*.bais", DECAY)], r"AdamW: groups: '\*.bais' matches no parameter. Near names: .*\.bias"),
    (Model, [("bias", DECAY)], "'bias' matches no parameter. Near names: head.bias"),  # whole names
    (Model, [("blocks.0.linear.wieght", {})], "Near names: blocks.0.linear.weight"),
    (Model, [("Head.*", {})], r"'Head.\*' matches no parameter"),  # case counts
    (Model, [(re.compile("bias"), {})], "'bias' matches no parameter"),
    (Model, [([*LINEARS, "head.wieght"], {})], r"'head.wieght' matches no parameter. Near names: "),
    (Model, [([], {})], "'' matches no parameter"),
    (Model, [("*.bias", {}), ("head.bias", {})], "all that 'head.bias' matches, earlier patterns take: move it before"),
    (Model, [("*.bias", dict(weight_decy=0))], r"'weight_decy', for '\*.bias', is no option of AdamW. There are lr"),
    (Model, [("*.bias", dict(params=[]))], "'params', for"),
    (Model, [("*.bias", dict(max_norm=1.0))], "'max_norm', for"),
    (Model, [("*.bias", dict(lr=-1))], "Invalid learning rate: -1"),
    (Model, ["*.bias"], r"groups takes pairs of a pattern .* and a dict of options, got '\*.bias'"),
    (Model, [("*.bias", 0.0)], "groups takes pairs"),
    (Model, [("*.bias", DECAY, 1)], "groups takes pairs"),
    (Model, [(len, DECAY)], "groups takes pairs"),
    (
        lambda: Model().parameters(),
        [("*", {})],
        r"names: give the model, or model.named_parameters\(\).*got a Parameter",
    ),
    (lambda: leaves()[0], [("*", {})], "got a Tensor"),
    (lambda: [{"params": leaves()}], [("*", {})], "got a dict"),
    (lambda: nn.ParameterList(leaves()), [("*", {})], "got a Parameter"),
    (lambda: [(0, leaves()[0])], [("*", {})], "got a tuple"),
    (nn.Module, [], "optimizer got an empty parameter list"),
    (nn.Tanh, None, "optimizer got an empty parameter list"),
]


@pytest.mark.parametrize(("params", "groups", "message"), REFUSED, ids=[message[:50] for *_, message in REFUSED])
def test_mistake_in_groups_is_told(params: Callable[[], Any], groups: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdamW(params(), groups=groups)


@pytest.mark.parametrize("kind", [SGD, AdamW, Lion])
def test_groups_are_a_keyword_of_every_optimizer_and_in_no_group(kind: Any) -> None:
    optimizer = kind(Model(), groups=[("*.bias", dict(lr=0.5))])
    assert [group["lr"] for group in optimizer.param_groups] == [optimizer.defaults["lr"], 0.5]
    by_hand = [{"params": [(name, param) for name, param in Model().named_parameters() if name in BIASES], "lr": 0.5}]
    assert optimizer.param_groups[1].keys() == kind(by_hand).param_groups[0].keys()
    assert optimizer.defaults == kind(Model()).defaults
    with pytest.raises(TypeError):
        kind(Model(), *[0.1] * 9, [("*.bias", {})])


def test_groups_step_and_schedule_as_torchs_do() -> None:
    torch.manual_seed(0)
    model = Model().double()
    twin = copy.deepcopy(model)
    ours = AdamW(model, lr=0.1, groups=[("*.bias", DECAY), ("blocks.1.*", dict(lr=0.01))])
    chosen = dict(twin.named_parameters())
    theirs = torch.optim.AdamW(
        [{"params": [chosen[name] for name in group["param_names"]]} for group in ours.param_groups], lr=0.1
    )
    theirs.param_groups[1]["weight_decay"], theirs.param_groups[2]["lr"] = 0.0, 0.01
    optimizers = (ours, theirs)
    schedules = [
        [LambdaLR(each, [lambda t: 1 / (1 + t), lambda t: 1.0, lambda t: 0.5**t]) for each in optimizers],
        [OneCycleLR(each, max_lr=[0.1, 0.2, 0.3], total_steps=20) for each in optimizers],
    ]
    for seed in range(6):
        for each, *schedule in zip(optimizers, *schedules, strict=True):
            give_grads(params_of(each), seed)
            each.step()
            schedule[seed % 2].step()
    for one, other in zip(params_of(ours), params_of(theirs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)  # float64, 6 steps


# Decay.


class LlamaRMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))


DECAYS: list[tuple[Callable[[], Any], list[str]]] = [
    (lambda: nn.Linear(2, 3), ["bias"]),
    (lambda: nn.Linear(2, 3, bias=False), []),
    (lambda: nn.Conv2d(2, 3, 3), ["bias"]),
    (lambda: nn.BatchNorm2d(3), ["weight", "bias"]),
    (lambda: nn.LayerNorm((3, 4)), ["weight", "bias"]),  # two dimensions, and still a norm
    (lambda: nn.Sequential(LlamaRMSNorm(), nn.Linear(4, 4)), ["0.weight", "1.bias"]),
    (lambda: nn.MultiheadAttention(4, 2, add_bias_kv=True), ["in_proj_bias", "bias_k", "bias_v", "out_proj.bias"]),
    (lambda: nn.LSTM(2, 3), ["bias_ih_l0", "bias_hh_l0"]),
    (lambda: nn.Embedding(3, 2), []),
    (lambda: [("unbiased_kernel", torch.ones(2, 2)), ("q_bias", torch.ones(2, 2))], ["q_bias"]),
    (lambda: nn.PReLU(), ["weight"]),
    (Model, sorted([*BIASES, *NORMS], key=NAMES.index)),
    (lambda: list(Model().named_parameters())[2:], sorted([*BIASES, *NORMS], key=NAMES.index)[1:]),
    (lambda: iter([("scale", torch.ones(()))]), ["scale"]),
]


@pytest.mark.parametrize(("model", "expected"), DECAYS, ids=lambda entry: getattr(entry, "__name__", str(entry)[:40]))
def test_no_decay_names_biases_norms_and_what_has_one_dimension(model: Callable[[], Any], expected: list[str]) -> None:
    assert no_decay(model()) == ([(tuple(expected), {"weight_decay": 0.0})] if expected else [])


def test_no_decay_composes_with_patterns() -> None:
    model = Model()
    optimizer = AdamW(model, weight_decay=0.1, groups=[("head.*", dict(lr=0.5)), *no_decay(model)])
    assert groups_of(optimizer)[1:] == [["head.bias"], sorted([*BIASES[:-1], *NORMS], key=NAMES.index)]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.1, 0.0]
    trained = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    assert len(AdamW(trained, groups=no_decay(trained)).param_groups) == 2
    with pytest.raises(ValueError, match="no_decay: groups by name need names"):
        no_decay(model.parameters())  # type: ignore[arg-type]
