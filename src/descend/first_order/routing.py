"""Which parameters of a model are hidden matrices, by kind of module, name and dimensions; and groups made of that."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from typing_extensions import Unpack

from descend.core.groups import Groups, ParamsT, grouped, named
from descend.core.method import Method
from descend.core.options import Options
from descend.first_order.adam import AdamW
from descend.first_order.optimizer import FirstOrder

# A component of a name that belongs to embeddings; a parameter's own name; the module that makes the outputs.
_EMBEDDING = re.compile(
    r"(\w*_)?(embed(ding)?s?|emb|wte|wpe)(_\w+)?|rel_pos\w*|pos(itional)?_enc\w*|positions?|relative_attention_bias"
)
_TOKEN = re.compile(r"(\w*_)?tokens?|pos|cls")
_BIAS = re.compile(r"(\w*_)?bias(es)?(_\w+)?")  # gate_up_proj_bias, one row an expert
_DYNAMICS = re.compile(r"A_logs?")  # of state space models: rates of decay
_OUTPUT = re.compile(r"(\w+_)?head|classifier|logits|embed_out|unembed(ding)?|output_projection")
_OUTPUT_ABOVE = re.compile(r"(\w+_)?heads?|classifier|score|proj_out")
_CALLER = 7  # frames between a warning and whoever constructs the optimizer
_CONVOLUTIONS = (nn.modules.conv._ConvNd,)


class Route(NamedTuple):
    """Where a parameter goes, and why.

    Attributes:
        is_matrix: whether it is a hidden matrix.
        decays: whether weight decay is usual for it.
        reason: why, in a word.
        is_stack: whether its first dimension counts matrices.
    """

    is_matrix: bool
    decays: bool
    reason: str
    is_stack: bool = False


def routes(params: nn.Module | Iterable[tuple[str, Tensor]]) -> dict[str, Route]:
    """The route of each parameter, by name.

    Args:
        params: a module; or ``(name, parameter)`` pairs, of which the kind of module is not known.
    Example:
        >>> model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 9))
        >>> for name, route in routes(model).items():
        ...     print(name, route.is_matrix, route.reason)
        0.weight False embedding
        1.weight True linear
        1.bias False bias
        2.weight False norm
        2.bias False norm
        3.weight False output
        3.bias False bias
    """
    if not isinstance(params, nn.Module):
        return {name: _by_name(name, param) or _matrix(param, "expert" in name) for name, param in params}
    head = _output_layer(params)
    # A tied weight has several owners, and one name: it is an embedding if one of them is.
    owners: dict[Tensor, list[tuple[str, nn.Module]]] = {}
    for prefix, module in params.named_modules():
        for name, param in module.named_parameters(prefix, recurse=False):
            owners.setdefault(param, []).append((name, module))
    found = {}
    for name, param in params.named_parameters():
        routed = [_route(at, param, module, module is head) for at, module in owners[param]]
        found[name] = min(routed, key=lambda route: route.is_matrix)
    return found


def _route(name: str, param: Tensor, module: nn.Module, is_head: bool) -> Route:
    if re.search(r"Norm(\dd)?$", type(module).__name__):
        return Route(False, False, "norm")
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return Route(False, True, "embedding")
    if (route := _by_name(name, param)) is not None:
        return route
    if is_head:
        return Route(False, True, "output")
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return Route(False, True, "recurrent")
    if isinstance(module, _CONVOLUTIONS):
        if module.groups > 1 and module.groups == module.in_channels:
            return Route(False, True, "depthwise")
        return Route(True, True, "convolution")
    return Route(True, True, "linear") if isinstance(module, nn.Linear) else _matrix(param, param.ndim > 2)


def _matrix(param: Tensor, is_stack: bool) -> Route:
    return Route(True, True, "stack", True) if is_stack and param.ndim > 2 else Route(True, True, "matrix")


def _by_name(name: str, param: Tensor) -> Route | None:
    """The route that a name and the dimensions decide; None for what may be a matrix."""
    *modules, last = name.split(".")
    if is_lazy(param):
        raise ValueError(f"{name} has no shape yet, which tells matrices apart: run the model once before.")
    if param.ndim < 2:
        return Route(False, False, "bias" if "bias" in last else "vector" if param.ndim else "scalar")
    if param.is_complex():
        return Route(False, True, "complex")
    if modules and (_OUTPUT.fullmatch(modules[-1]) or _OUTPUT_ABOVE.fullmatch(modules[0])):
        return Route(False, True, "output")
    if any(map(_EMBEDDING.fullmatch, [*modules, last])) or _TOKEN.fullmatch(last):
        return Route(False, True, "embedding")
    if _BIAS.fullmatch(last):
        return Route(False, False, "bias")
    if _DYNAMICS.fullmatch(last):
        return Route(False, False, "dynamics")
    is_vector = param.numel() == max(param.shape)
    return Route(False, True, "vector") if is_vector else None


def _output_layer(model: nn.Module) -> nn.Module | None:
    """The last linear layer or convolution, if no repeated block and no attention contains it."""
    found, path = None, []
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, *_CONVOLUTIONS)):
            found, path = module, name.split(".")
    holder = model
    for name in path[:-1]:
        child = holder.get_submodule(name)
        siblings = [each for each in holder.children() if type(each) is type(child)]
        if isinstance(holder, nn.ModuleList) or len(siblings) > 1:
            return None
        holder = child
    return None if isinstance(holder, nn.ModuleList | nn.MultiheadAttention) else found


def routed(
    who: str, params: Any, groups: Groups | None, check_names: Callable[[Mapping[str, Any], str], None]
) -> tuple[Any, dict[str, str]]:
    """Sort parameters into groups: hidden matrices; and with method "adamw" the others, and those that do not decay.

    Dicts that define groups, and parameters that are matrices all, are left as they are.

    Args:
        who: the optimizer's name, for messages.
        params: as given to the optimizer.
        groups: as given to the optimizer.
        check_names: see ``core.groups.grouped``; called for each group that is made.
    Returns:
        Groups in torch's format; and by parameter name why it is where it is.
    """
    is_model = isinstance(params, nn.Module) and not isinstance(params, nn.ParameterList)
    if isinstance(params, Tensor):
        return params, {}
    pairs = list(named(params))
    is_named = all(isinstance(pair, tuple) and len(pair) == 2 for pair in pairs)
    if groups is None and not is_model:
        tensors = [pair[1] for pair in pairs] if is_named else pairs
        if not tensors or not all(isinstance(each, Tensor) for each in tensors):
            return pairs, {}
        fewest, most = min(each.ndim for each in tensors), max(each.ndim for each in tensors)
        if not is_named:
            return (pairs if fewest >= 2 else _by_dimensions(who, tensors)), {}
        if fewest == most == 2:
            _warn_of_names(who, pairs)
            return pairs, {}
    known = routes(params if is_model else pairs)
    entries, patterns = grouped(who, pairs, groups or [], lambda options, where: None)
    result: list[dict[str, Any]] = []
    for entry in entries:
        members = entry.pop("params")
        where = repr(patterns.get(members[0][0], "the other parameters"))
        if "method" in entry:
            check_names(entry, where)
            result.append({"params": members, **entry})
            continue
        parts: dict[tuple[bool, bool, bool], list[Any]] = {}
        for pair in members:
            route = known[pair[0]]
            parts.setdefault((route.is_matrix, route.decays, not route.is_stack), []).append(pair)
            patterns[pair[0]] = " ".join(filter(None, (patterns.get(pair[0]), f"({route.reason})")))
        for (is_matrix, decays, is_single), part in sorted(parts.items(), reverse=True):
            options: dict[str, Any] = {} if is_matrix else {"method": "adamw"}
            if is_matrix and not is_single:
                options["stacked"] = True
            if not decays:
                options["weight_decay"] = 0.0
            check_names(options | entry, where)
            result.append({"params": part, **options, **entry})
    return result, patterns


def _by_dimensions(who: str, params: list[Tensor]) -> list[dict[str, Any]]:
    warnings.warn(
        f"{who}: parameters without names are sorted by their dimensions: those with at least two are taken for hidden "
        "matrices, embeddings and the output layer too. Give the module, which tells them apart.",
        stacklevel=_CALLER,
    )
    matrices = [param for param in params if param.ndim >= 2]
    others = [param for param in params if param.ndim < 2]
    return [
        *([{"params": matrices}] if matrices else []),
        {"params": others, "method": "adamw", "weight_decay": 0.0},
    ]


def _warn_of_names(who: str, pairs: list[tuple[str, Tensor]]) -> None:
    odd = [name for name, route in routes(pairs).items() if not route.is_matrix]
    if odd:
        warnings.warn(
            f"{who}: {odd[0]} does not sound like a hidden matrix. Given parameters of two dimensions alone, all are "
            "taken for matrices, as in torch. Give the module, which tells them apart.",
            stacklevel=_CALLER,
        )


class RoutedOptimizer(FirstOrder):
    """Base of methods for hidden matrices: with AdamW inside for the parameters that are none.

    Args:
        params, defaults, options: see ``FirstOrder``.
        adamw: options of AdamW inside, beside its own defaults.
    """

    is_base = True

    adamw: Mapping[str, Any]

    def __init__(
        self, params: ParamsT, defaults: dict[str, Any], adamw: Mapping[str, Any] | None, **options: Unpack[Options]
    ) -> None:
        if not isinstance(adamw, Mapping | None):
            raise ValueError(f"{type(self).__name__}: adamw must be a dict of AdamW's options, got {adamw!r}.")
        self.adamw = dict(adamw or {})
        super().__init__(params, defaults, **options)

    def _sorted(self, params: ParamsT, groups: Groups | None) -> tuple[Any, dict[str, str]]:
        if added := [key for key in ("method", "lr_scale") if key in self.adamw]:
            raise ValueError(f"{type(self).__name__}: adamw takes options of AdamW, and {added[0]!r} is none.")
        self.check_names({"method": "adamw", **self.adamw}, "adamw")
        self.method_of({"method": "adamw"}).check_group(self.completed({"method": "adamw"}))
        return routed(type(self).__name__, params, groups, self.check_names)

    def defaults_of(self, method: Method) -> Mapping[str, Any]:
        defaults = super().defaults_of(method)
        return {**defaults, **self.adamw} if method.kind is AdamW else defaults

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            for param in group["params"]:
                self.method_of(group).check_param(param, group)
        except Exception:
            self.param_groups.pop()
            raise

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "adamw": self.adamw}
