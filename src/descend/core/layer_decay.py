"""Learning rates that fall with depth: entries for ``groups``, from the tree of a model's modules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping

from torch import Tensor, nn

from descend.core.groups import Groups, Pattern, members_of, named_pairs


def layer_decay(
    params: nn.Module | Iterable[tuple[str, Tensor]], rate: float, layers: Mapping[Pattern, int] | None = None
) -> Groups:
    """Return entries whose learning rate falls with depth: the last layer has ``lr``, each earlier one ``rate`` less.

    For fine-tuning: layers near the input change less. The tree of modules gives the depth. Blocks of one class in a
    ``ModuleList`` or ``Sequential`` are layers 1, 2, ...; where there are several such containers, one after the other,
    of nested ones the outermost. A model without blocks has layers such as ``nn.Linear`` in a ``Sequential``. In the
    order of ``named_parameters()``, what comes before the first block is layer 0, what comes after the last block is
    one layer deeper, and what comes in between belongs to the block before it.

    Args:
        params: a module; or ``(name, parameter)`` pairs, of which ``layers`` must then match all.
        rate: of the learning rate of a layer to that of the next, in (0, 1]. 0.65 to 0.9 are usual.
        layers: the layer of parameters that the rule above puts in the wrong one: a pattern of names, as in
            ``groups``, and the number of a layer, >= 0. Default: None.
    Returns:
        A list for ``groups`` with an entry for each layer, the shallowest first: the names, and ``lr_scale``, which
        multiplies the optimizer's ``lr``. ``combined`` joins it with other lists.
    Raises:
        ValueError: if ``rate`` is out of range, the model has no repeated blocks and ``layers`` leaves out a parameter,
            parameters have no names, or a pattern matches none.
    Example:
        >>> from descend import AdamW
        >>> block = lambda: nn.TransformerEncoderLayer(4, nhead=1, dim_feedforward=8)
        >>> model = nn.Sequential(nn.Embedding(9, 4), nn.Sequential(block(), block()), nn.Linear(4, 1))
        >>> optimizer = AdamW(model, lr=1.0, groups=layer_decay(model, 0.5))
        >>> [(group["param_names"][-1], group["lr"]) for group in optimizer.param_groups]
        [('0.weight', 0.125), ('1.0.norm2.bias', 0.25), ('1.1.norm2.bias', 0.5), ('2.bias', 1.0)]

    Source:
        Clark et al. 2020, https://arxiv.org/abs/2003.10555; numbered as in Bao et al. 2021 (BEiT),
        https://arxiv.org/abs/2106.08254
    """
    who = "layer_decay"
    if not 0 < rate <= 1:
        raise ValueError(f"{who}: rate must be in (0, 1], got {rate}.")
    names = [name for name, _ in named_pairs(who, params)]
    given = _given(who, names, layers or {})
    found = _layers_by_tree(params) if isinstance(params, nn.Module) else {}
    if lacking := [name for name in names if name not in given and name not in found]:
        raise ValueError(
            f"{who}: {'no repeated blocks tell' if isinstance(params, nn.Module) else 'names alone do not tell'} which "
            f"layer {lacking[0]} is in: {'' if isinstance(params, nn.Module) else 'give the module, or '}"
            f"name the layers of all parameters, as in layers={{{lacking[0]!r}: 0}}."
        )
    by_layer: dict[int, list[str]] = {}
    for name in names:
        by_layer.setdefault(given.get(name, found.get(name, 0)), []).append(name)
    last = max(by_layer, default=0)
    return [(tuple(members), {"lr_scale": rate ** (last - layer)}) for layer, members in sorted(by_layer.items())]


def _given(who: str, names: list[str], layers: Mapping[Pattern, int]) -> dict[str, int]:
    """The layer of each parameter that a pattern of ``layers`` matches."""
    for pattern, layer in layers.items():
        if not (type(layer) is int and layer >= 0):
            raise ValueError(f"{who}: the layer of {pattern!r} must be a whole number >= 0, got {layer!r}.")
    members = members_of(who, names, layers.items())
    return {names[i]: layer for layer, found in zip(layers.values(), members, strict=True) for i in found}


def _layers_by_tree(model: nn.Module) -> dict[str, int]:
    """The layer of each parameter; empty if the model has no repeated blocks."""
    blocks = _blocks(model, "", _repeated_blocks) or _blocks(model, "", _repeated_leaves)
    number_of = {prefix: number for number, prefix in enumerate(blocks, 1)}
    layers, layer = {}, 0
    for name, _ in model.named_parameters():
        parts = name.split(".")
        owners = (".".join(parts[:count]) for count in range(1, len(parts)))
        number = next((number_of[owner] for owner in owners if owner in number_of), None)
        layer = max(layer, number or 0)
        layers[name] = number or (layer + 1 if layer == len(blocks) else layer)
    return layers if blocks else {}


def _blocks(module: nn.Module, prefix: str, repeated: Callable[[nn.Module], list[str]]) -> list[str]:
    """Names of the repeated blocks in the outermost containers that have some, in the order of the modules."""
    if found := repeated(module):
        return [prefix + name for name in found]
    return [name for key, child in module.named_children() for name in _blocks(child, f"{prefix}{key}.", repeated)]


def _repeated_blocks(module: nn.Module) -> list[str]:
    """The children of a container of blocks: all of one class, or of a few in a ``ModuleList``; else none."""
    children = _with_parameters(module)
    classes = {type(child) for child in children.values()}
    if len(classes) == len(children) or not all(any(child.children()) for child in children.values()):
        return []
    return list(children) if len(classes) == 1 or isinstance(module, nn.ModuleList) else []


def _repeated_leaves(module: nn.Module) -> list[str]:
    """Those children of a container that have its most frequent class; none if no class occurs twice."""
    children = _with_parameters(module)
    counts = Counter(type(child) for child in children.values())
    most, count = counts.most_common(1)[0] if counts else (None, 0)
    return [name for name, child in children.items() if type(child) is most] if count > 1 else []


def _with_parameters(module: nn.Module) -> dict[str, nn.Module]:
    """The children that have parameters, if ``module`` is a container of modules that follow each other."""
    if not isinstance(module, nn.ModuleList | nn.Sequential):
        return {}
    return {name: child for name, child in module.named_children() if any(True for _ in child.parameters())}
