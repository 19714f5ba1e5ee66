"""Which parameters are hidden matrices, and the groups that Muon makes of it."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import assert_same_bits, params_of, state_of
from torch import Tensor, nn

from descend import AdamW, Muon, NorMuon
from descend.first_order.routing import routes


class Block(nn.Module):
    """Attention whose heads are modules, a table of positions, experts in one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList([nn.Linear(4, 2, bias=False) for _ in range(2)])
        self.rel_pos_bias = nn.Parameter(torch.zeros(5, 2))
        self.experts = nn.Parameter(torch.zeros(3, 4, 4))
        self.scale = nn.Parameter(torch.ones(()))
        self.gate = nn.Linear(4, 1)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(9, 4)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 4))
        self.patches = nn.Conv2d(3, 4, 2)
        self.depthwise = nn.Conv2d(4, 4, 3, groups=4)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.attention = nn.MultiheadAttention(4, 2)
        self.lstm = nn.LSTM(4, 4)
        self.norm = nn.LayerNorm(4)
        self.out = nn.Linear(4, 9, bias=False)


REASONS = {
    "tokens.weight": "embedding",
    "cls_token": "embedding",
    "patches.weight": "convolution",
    "patches.bias": "bias",
    "depthwise.weight": "depthwise",
    "blocks.1.heads.0.weight": "linear",
    "blocks.1.rel_pos_bias": "embedding",
    "blocks.1.experts": "stack",
    "blocks.1.scale": "scalar",
    "blocks.1.gate.weight": "vector",
    "attention.in_proj_weight": "matrix",
    "attention.out_proj.weight": "linear",
    "lstm.weight_hh_l0": "recurrent",
    "norm.weight": "norm",
    "out.weight": "output",
}


def test_routes_of_a_module() -> None:
    found = routes(Model())
    assert {name: found[name].reason for name in REASONS} == REASONS
    matrices = {name for name, route in found.items() if route.is_matrix}
    assert {name for name in REASONS if name in matrices} == {
        name for name, reason in REASONS.items() if reason in ("convolution", "linear", "matrix", "stack")
    }
    assert not any(found[name].decays for name in ("patches.bias", "norm.weight", "blocks.1.scale"))
    assert all(found[name].decays for name in ("tokens.weight", "out.weight", "lstm.weight_hh_l0"))
    assert found["blocks.1.experts"].is_stack


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("lm_head.weight", "output"),
        ("model.classifier.weight", "output"),
        ("classifier.dense.weight", "output"),
        ("heads.head.weight", "output"),
        ("blocks.0.sa.heads.0.key.weight", "matrix"),
        ("transformer.wte.weight", "embedding"),
        ("embed_tokens.weight", "embedding"),
        ("pos_embed", "embedding"),
        ("mixer.token_mixing.weight", "matrix"),
        ("decoder.score.weight", "matrix"),
        ("header.weight", "matrix"),
        ("mlp.experts.gate_up_proj_bias", "bias"),
        ("attention.relative_position_bias_table", "bias"),
        ("mixer.A_log", "dynamics"),
    ],
)
def test_routes_by_name(name: str, reason: str) -> None:
    assert routes([(name, torch.zeros(3, 3))])[name].reason == reason


def test_an_output_layer_that_is_tied_to_an_embedding_is_no_matrix() -> None:
    model = nn.ModuleDict({"out": nn.Linear(4, 9, bias=False), "table": nn.Embedding(9, 4)})
    model["out"].weight = model["table"].weight  # type: ignore[assignment]
    assert {name: route.is_matrix for name, route in routes(model).items()} == {"out.weight": False}


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3)), "output"),
        (nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)]), "linear"),  # a body without a head
        (nn.Sequential(*[nn.Sequential(nn.Linear(3, 3), nn.ReLU()) for _ in range(2)]), "linear"),
        (nn.Linear(3, 3), "output"),
        (nn.Sequential(nn.Linear(3, 4), nn.Conv1d(4, 4, 3), nn.Conv1d(4, 2, 3)), "output"),
        (nn.Sequential(nn.Embedding(5, 4), nn.MultiheadAttention(4, 2)), "linear"),
    ],
)
def test_the_last_layer_makes_outputs_unless_it_is_one_of_many(model: nn.Module, reason: str) -> None:
    assert [route for route in routes(model).values() if route.decays][-1].reason == reason


def test_only_the_last_of_linear_layers_and_convolutions_makes_outputs() -> None:
    model = nn.Sequential(nn.Conv1d(4, 4, 3), nn.Linear(3, 4), nn.Conv1d(4, 2, 3))
    assert [route.reason for route in routes(model).values() if route.decays] == ["convolution", "linear", "output"]


def test_a_complex_matrix_is_none_and_a_lazy_parameter_has_no_route_yet() -> None:
    assert routes([("weight", torch.zeros(2, 2, dtype=torch.complex64))])["weight"] == (False, True, "complex", False)
    with pytest.raises(ValueError, match="weight has no shape yet, which tells matrices apart: run the model once"):
        Muon(nn.LazyLinear(3))


@pytest.mark.parametrize(
    ("adamw", "text"),
    [
        (dict(method="lion"), "Muon: adamw takes options of AdamW, and 'method' is none"),
        (dict(lr_scale=0.5), "and 'lr_scale' is none"),
        (3, "Muon: adamw must be a dict of AdamW's options, got 3"),
        (dict(momentum=0.9), "'momentum', for adamw, is no option of AdamW"),
    ],
)
def test_options_of_adamw_inside_are_checked(adamw: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Muon(chars(), adamw=adamw)


def chars(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    layers = [nn.Embedding(9, 4), nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 4), nn.Linear(4, 9)]
    return nn.Sequential(*layers).double()


def train(model: nn.Module, step: Callable[[], Any], seed: int) -> None:
    inputs = torch.randint(9, (5,), generator=torch.Generator().manual_seed(seed))
    model.zero_grad()
    model(inputs).square().mean().backward()
    step()


@pytest.mark.parametrize("kind", [Muon, NorMuon])
def test_one_optimizer_takes_the_steps_of_two(kind: type[Muon]) -> None:
    ours, theirs = chars(), chars()
    whole = kind(ours, lr=0.02, weight_decay=0.1, adamw=dict(lr=3e-3, weight_decay=0.2))
    hidden = [theirs.get_parameter(name) for name in ("1.weight", "3.weight")]
    decayed = [theirs.get_parameter(name) for name in ("0.weight", "4.weight")]
    others = [param for param in theirs.parameters() if param.ndim < 2]
    muon = kind(hidden, lr=0.02, weight_decay=0.1)
    adamw = AdamW([dict(params=decayed), dict(params=others, weight_decay=0)], lr=3e-3, weight_decay=0.2)
    for seed in range(3):
        train(ours, whole.step, seed)
        train(theirs, lambda: (muon.step(), adamw.step()), seed)
    assert all(map(torch.equal, ours.parameters(), theirs.parameters()))
    assert [len(group["params"]) for group in whole.param_groups] == [2, 2, 5]


def test_groups_override_and_keep_the_route() -> None:
    optimizer = Muon(
        chars(),
        lr=0.02,
        groups=[
            ("4.weight", dict(method="muon", lr=0.1)),
            ("0.weight", dict(method=None)),
            ("1.*", dict(lr=0.5)),
            ("2.*", dict(method="lion")),
        ],
    )
    found = {
        name: (group.get("method"), group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for name in group["param_names"]
    }
    assert found == {
        "0.weight": (None, 0.02, 0.1),
        "3.bias": ("adamw", 1e-3, 0.0),
        "4.bias": ("adamw", 1e-3, 0.0),
        "3.weight": (None, 0.02, 0.1),
        "4.weight": (None, 0.1, 0.1),
        "1.weight": (None, 0.5, 0.1),
        "1.bias": ("adamw", 0.5, 0.0),
        "2.weight": ("lion", 1e-4, 0.0),
        "2.bias": ("lion", 1e-4, 0.0),
    }


def test_the_summary_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    rows = Muon(chars(), groups=[("1.*", dict(lr=0.5))]).summary()
    assert [row.pattern for row in rows] == [
        "(linear)",
        "(embedding), (output)",
        "(norm), (bias)",
        "1.* (linear)",
        "1.* (bias)",
    ]
    assert "(embedding), (output)" in capsys.readouterr().out


def test_stacks_are_orthogonalized_one_by_one() -> None:
    model = nn.Module()
    model.experts = nn.Parameter(torch.randn(3, 4, 5))
    model.other = nn.Parameter(torch.randn(4, 4))
    optimizer = Muon(model)
    assert [group["stacked"] for group in optimizer.param_groups] == [False, True]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_copies_and_checkpoints(copied: Any) -> None:
    model = chars()
    optimizer = Muon(model, lr=0.02, adamw=dict(lr=3e-3))
    train(model, optimizer.step, 0)
    other = copied(optimizer)
    assert other.adamw == dict(lr=3e-3)
    twin = copy.deepcopy(model)
    loaded = Muon(twin, lr=0.5)
    loaded.load_state_dict(optimizer.state_dict())
    for each in (optimizer, other, loaded):
        for param, source in zip(params_of(each), params_of(optimizer), strict=True):
            param.grad = torch.ones_like(param) if source.grad is None else source.grad.clone()
        each.step()
    assert all(map(torch.equal, params_of(optimizer), params_of(other)))
    assert all(map(torch.equal, params_of(optimizer), params_of(loaded)))
    assert_same_bits(state_of(optimizer), state_of(loaded))


def test_a_group_that_is_added_gets_the_options_of_adamw_inside() -> None:
    optimizer = Muon(chars(), adamw=dict(lr=0.7))
    optimizer.add_param_group(dict(params=[("new", nn.Parameter(torch.zeros(3)))], method="adamw"))
    assert optimizer.param_groups[-1]["lr"] == 0.7
    before = len(optimizer.param_groups)
    with pytest.raises(ValueError, match="give its group method='adamw'"):
        optimizer.add_param_group(dict(params=[("newer", nn.Parameter(torch.zeros(3)))]))
    assert len(optimizer.param_groups) == before


def matrices(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.zeros(shape, requires_grad=True) for shape in shapes]


def test_parameters_without_names_are_sorted_by_dimensions_with_a_warning() -> None:
    with pytest.warns(UserWarning, match=r"sorted by their dimensions.*Give the module") as caught:
        optimizer = Muon(matrices((3, 4), (4,), (2, 3, 2, 2)))
    assert caught[0].filename == __file__
    assert [[param.ndim for param in group["params"]] for group in optimizer.param_groups] == [[2, 4], [1]]
    assert optimizer.param_groups[1]["weight_decay"] == 0


def test_matrices_alone_are_torchs_muon() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = Muon(matrices((3, 4), (4, 4)))
        Muon([("a.weight", torch.zeros(2, 2, requires_grad=True))])
    assert len(optimizer.param_groups) == 1
    assert "method" not in optimizer.param_groups[0]
    with pytest.warns(UserWarning, match=r"embed\.weight does not sound like a hidden matrix"):
        Muon([("embed.weight", torch.zeros(2, 2, requires_grad=True))])


def test_names_alone_route_where_dimensions_differ() -> None:
    optimizer = Muon(chars().named_parameters())
    assert optimizer.param_groups[0]["param_names"] == ["0.weight", "1.weight", "3.weight", "4.weight"]
    assert optimizer.param_groups[1]["method"] == "adamw"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (dict(adamw=dict(momentum=1)), r"Muon: groups: 'momentum', for adamw, is no option of AdamW\. Muon,"),
        (dict(adamw=dict(lr=-1)), r"Invalid learning rate: -1 \(AdamW"),
        (dict(groups=[("*", dict(momentum=0.5))]), r"'momentum', for '\*', is no option of AdamW"),
        (dict(groups=[("nope", dict(lr=1))]), "'nope' matches no parameter"),
        (dict(groups=[("1.weight", dict(betas=(0.9, 0.9)))]), r"'betas', for '1\.weight', is no option of Muon"),
    ],
)
def test_bad_options_are_errors(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Muon(chars(), **options)
