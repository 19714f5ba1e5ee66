"""``layer_decay``, ``lr_scale`` and ``combined``."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import leaves
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from descend import SGD, AdamW, combined, from_rule, layer_decay, no_decay


class Block(nn.Module):
    def __init__(self, width: int = 4, experts: int = 0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
        self.experts = nn.ModuleList([nn.Sequential(nn.Linear(width, width)) for _ in range(experts)])


class OtherBlock(Block):
    pass


class Vit(nn.Module):
    """Registered as in BEiT; with a head of two linear layers, which are no blocks."""

    def __init__(self, blocks: list[nn.Module] | None = None) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 4))
        self.patch_embed = nn.Sequential(nn.Conv2d(3, 4, 2), nn.Conv2d(4, 4, 2))
        self.blocks = nn.ModuleList(blocks or [Block(experts=3) for _ in range(3)])
        self.norm = nn.LayerNorm(4)
        self.head = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))


class Staged(nn.Module):
    """Stages of blocks, with a layer between them, as in a ResNet or Swin."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 2)
        self.layer1 = nn.Sequential(Block(), Block())
        self.between = nn.Linear(4, 4)
        self.layer2 = nn.Sequential(Block(), Block(), Block())
        self.fc = nn.Linear(4, 2)


def mlp() -> nn.Sequential:
    linears = [nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU()]
    return nn.Sequential(*linears, nn.Dropout(), nn.Linear(4, 2))


def tied() -> Vit:
    model = Vit()
    model.head[2] = nn.Linear(4, 4)
    model.head[2].weight = model.patch_embed[0].weight = nn.Parameter(torch.zeros(4, 4))
    return model


def beit(name: str, depth: int) -> int:
    """The number that BEiT gives a parameter's layer."""
    if name.startswith(("cls_token", "patch_embed")):
        return 0
    return int(name.split(".")[1]) + 1 if name.startswith("blocks") else depth + 1


def staged(name: str) -> int:
    kind, *rest = name.split(".")
    first = {"stem": 0, "layer1": 1, "between": 2, "layer2": 3, "fc": 6}[kind]
    return first + int(rest[0]) if kind.startswith("layer") else first


MODELS: list[tuple[Callable[[], nn.Module], Callable[[str], int]]] = [
    (Vit, lambda name: beit(name, 3)),
    (lambda: Vit([Block(), OtherBlock(), Block(), Block()]), lambda name: beit(name, 4)),
    (tied, lambda name: beit(name, 3)),
    (Staged, staged),
    (mlp, lambda name: {"0": 1, "1": 1, "3": 2, "4": 2, "7": 3}[name[0]]),
    (lambda: nn.DataParallel(Vit()), lambda name: beit(name.removeprefix("module."), 3)),
]


def scales(groups: Any) -> dict[str, float]:
    return {name: values["lr_scale"] for names, values in groups for name in names}


@pytest.mark.parametrize(("model", "layer"), MODELS, ids=map(str, range(len(MODELS))))
def test_lr_falls_with_the_depth_that_the_tree_of_modules_gives(model: Any, layer: Any) -> None:
    module = model()
    names = [name for name, _ in module.named_parameters()]
    last = max(map(layer, names))
    assert scales(layer_decay(module, 0.75)) == {name: 0.75 ** (last - layer(name)) for name in names}
    optimizer = AdamW(module, lr=0.1, groups=layer_decay(module, 0.75))
    lrs = [group["lr"] for group in optimizer.param_groups]
    assert lrs == sorted(lrs)
    assert lrs[-1] == 0.1
    for group in optimizer.param_groups:
        assert "lr_scale" not in group
        assert {group["lr"]} == {0.1 * 0.75 ** (last - layer(name)) for name in group["param_names"]}


def test_patterns_put_parameters_into_other_layers() -> None:
    expected = scales(layer_decay(Vit(), 0.5))
    assert expected["cls_token"] == 0.5**4
    layers = {"cls_token": 4, re.compile(r"head\..*"): 6, ("norm.bias",): 0}
    changed = scales(layer_decay(Vit(), 0.5, layers))
    assert {name for name in expected if changed[name] != expected[name] * 0.25} == {
        "cls_token", "norm.bias", *(name for name in expected if name.startswith("head"))
    }  # fmt: skip
    assert (changed["cls_token"], changed["head.2.bias"], changed["norm.bias"]) == (0.25, 1.0, 0.5**6)
    pairs = [("a", torch.ones(2)), ("b", torch.ones(2))]
    assert layer_decay(pairs, 0.5, {"b": 0, "*": 1}) == [(("b",), {"lr_scale": 0.5}), (("a",), {"lr_scale": 1.0})]
    assert layer_decay([], 0.5) == []


REFUSED: list[tuple[Callable[[], Any], str]] = [
    (lambda: layer_decay(Vit(), 0), r"layer_decay: rate must be in \(0, 1\], got 0"),
    (lambda: layer_decay(Vit(), 1.5), "rate must be in"),
    (lambda: layer_decay(Vit(), float("nan")), "rate must be in"),
    (lambda: layer_decay(Vit().parameters(), 0.5), "layer_decay: groups by name need names"),
    (lambda: layer_decay(nn.Linear(2, 3), 0.5), "no repeated blocks tell which layer weight is in: name the layers of"),
    (lambda: layer_decay(Vit().named_parameters(), 0.5), "names alone do not tell .* cls_token is in: give the module"),
    (lambda: layer_decay(Vit(), 0.5, {"heads.*": 1}), r"'heads.\*' matches no parameter. Near names: head"),
    (lambda: layer_decay(Vit(), 0.5, {"head.*": 1, "head.0.*": 2}), "'head.0.*' matches, earlier patterns take"),
    (lambda: layer_decay(Vit(), 0.5, {"head.*": -1}), "the layer of 'head.*' must be a whole number >= 0, got -1"),
    (lambda: layer_decay(Vit(), 0.5, {"head.*": 1.0}), "must be a whole number >= 0, got 1.0"),  # type: ignore[dict-item]
    (lambda: combined(Vit(), [("heads.*", {})]), r"combined: groups: 'heads.\*' matches no parameter"),
    (lambda: combined(Vit(), ["head.*"]), "combined: groups takes pairs"),  # type: ignore[list-item]
    (lambda: combined(Vit().parameters()), "combined: groups by name need names"),  # type: ignore[arg-type]
    (
        lambda: SGD(Vit(), groups=[("head.*", dict(lr_scale=-1))]),
        "SGD: groups: lr_scale, for .* must be a finite .* got -1",
    ),
    (lambda: SGD(Vit(), groups=[("head.*", dict(lr_scale="1"))]), "must be a finite number >= 0, got '1'"),
    (lambda: SGD(Vit(), groups=[("head.*", dict(lr_scale=torch.inf))]), "must be a finite number"),
]


@pytest.mark.parametrize(("make", "match"), REFUSED, ids=map(str, range(len(REFUSED))))
def test_mistakes_are_errors(make: Callable[[], Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()


def test_scale_multiplies_the_lr_of_its_entry_or_of_the_optimizer() -> None:
    groups = [("head.*", dict(lr=0.5, lr_scale=10)), ("norm.*", dict(lr_scale=0.5))]
    assert [group["lr"] for group in SGD(Vit(), lr=0.1, groups=groups).param_groups] == [0.1, 5.0, 0.05]
    optimizer = AdamW(Vit(), lr=torch.tensor(0.5), groups=groups[1:])
    assert torch.equal(optimizer.param_groups[1]["lr"], torch.tensor(0.25))

    optimizer = AdamW(Vit(), groups=[("head.*", dict(method="sgd", lr_scale=0.5))])
    assert optimizer.param_groups[1]["lr"] == 0.5 * SGD(leaves()).defaults["lr"]

    def shrink(param: Tensor, grad: Tensor, pace: float) -> Tensor:
        return param - pace * grad

    with pytest.raises(ValueError, match=r"'lr_scale', for 'norm.\*', is no option of Shrink. There are pace"):
        from_rule(shrink, "Shrink", pace=0.1)(Vit(), groups=groups[1:])


def test_schedulers_keep_the_ratios() -> None:
    model = mlp()
    optimizer = SGD(model, lr=0.8, groups=layer_decay(model, 0.5))
    scheduler = LambdaLR(optimizer, lambda step: 0.5**step)
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2, 0.4]


def test_combined_lists_give_the_options_of_all() -> None:
    model = Vit()
    bare = {name for names, _ in no_decay(model) for name in names}
    scale = scales(layer_decay(model, 0.5))
    by_hand = [("head.2.*", dict(lr=3.0, weight_decay=0.5)), ("head.*", dict(betas=(0.5, 0.5)))]
    groups = combined(model, by_hand, layer_decay(model, 0.5), no_decay(model))
    optimizer = AdamW(model, lr=1.0, weight_decay=0.1, groups=groups)
    found = {name: group for group in optimizer.param_groups for name in group["param_names"]}
    for name in scale:
        is_last = name.startswith("head.2")
        assert found[name]["lr"] == (3.0 if is_last else scale[name])
        assert found[name]["weight_decay"] == (0.5 if is_last else 0.0 if name in bare else 0.1)
        assert found[name]["betas"] == ((0.5, 0.5) if name.startswith("head.0") else (0.9, 0.999))
    assert len({tuple(names) for names, _ in groups}) == len(groups) == len(optimizer.param_groups)


def test_combined_leaves_out_what_no_pattern_matches() -> None:
    model = Vit()
    assert combined(model) == []
    names = ("head.0.weight", "head.0.bias")
    assert combined(model, [("head.0.*", dict(lr=1))], [(names, dict(weight_decay=1))]) == [
        (names, dict(lr=1, weight_decay=1))
    ]
    assert combined(leaves_by_name(), [("b", {})]) == [(("b",), {})]


def leaves_by_name() -> list[tuple[str, Tensor]]:
    return list(zip("ab", leaves([(2,), (3,)]), strict=True))
