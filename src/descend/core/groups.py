"""Parameter groups by name: patterns with options, lists of them combined, and what usually gets no weight decay."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.optim.optimizer import ParamsT as TorchParamsT

ParamsT: TypeAlias = TorchParamsT | nn.Module

Pattern: TypeAlias = str | re.Pattern[str] | Collection[str]
Groups: TypeAlias = Sequence[tuple[Pattern, Mapping[str, Any]]]

_SHOWN = 3  # names listed in a message
_BIAS = re.compile(r"(^|_)bias(es)?($|_)")  # bias, in_proj_bias, bias_ih_l0


def named(params: Any) -> Any:
    """Return a module's named parameters, shared ones once; anything else unchanged, for torch to interpret."""
    # nn.ParameterList is a module, but torch treats it as a list of parameters.
    is_model = isinstance(params, nn.Module) and not isinstance(params, nn.ParameterList)
    return list(params.named_parameters()) if is_model else params


def grouped(
    who: str, params: Any, groups: Groups, check_names: Callable[[Mapping[str, Any], str], None]
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Sort named parameters into groups: first those that no pattern matches, then those of each pattern.

    Args:
        who: the optimizer's name, for errors.
        params: a module, or ``(name, parameter)`` pairs.
        groups: patterns and options; a parameter belongs to the first pattern that matches its name.
        check_names: raises for options that a group may not have; it also gets the text of the pattern.
    Returns:
        Groups in torch's format, none empty; and the text of the matching pattern by parameter name.
    Raises:
        ValueError: if parameters have no names, a pattern gets no parameter, or an option does not exist.
    """
    pairs = named_pairs(who, params)
    names = [name for name, _ in pairs]
    entries = entries_of(who, groups)
    for pattern, values in entries:
        check_names(values, repr(_text(pattern)))
    rest = dict.fromkeys(range(len(pairs)))
    patterns: dict[str, str] = {}
    chosen = []
    for (pattern, values), members in zip(entries, members_of(who, names, entries), strict=True):
        for i in members:
            del rest[i]
            patterns[names[i]] = _text(pattern)
        chosen.append({"params": [pairs[i] for i in members], **values})
    return [*([{"params": [pairs[i] for i in rest]}] if rest else []), *chosen], patterns


def combined(params: nn.Module | Iterable[tuple[str, Tensor]], *lists: Groups) -> Groups:
    """Return entries for ``groups`` that give each parameter the options of several lists at once.

    In each list the first pattern that matches a parameter decides, as in ``groups``. Where two lists set the same
    option, the earlier list decides.

    Args:
        params: a module, or ``(name, parameter)`` pairs.
        lists: lists of entries, such as ``layer_decay`` and ``no_decay`` return, or of your own patterns and options.
    Returns:
        An entry for each set of parameters that get the same of all lists, in the order of the parameters. Those that
        no pattern matches are in none.
    Raises:
        ValueError: if parameters have no names, or a pattern gets no parameter.
    Example:
        >>> from descend import AdamW, layer_decay
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> groups = combined(model, layer_decay(model, 0.5), no_decay(model))
        >>> for entry in groups:
        ...     print(*entry)
        ('0.weight',) {'lr_scale': 0.5}
        ('0.bias',) {'weight_decay': 0.0, 'lr_scale': 0.5}
        ('2.weight',) {'lr_scale': 1.0}
        ('2.bias',) {'weight_decay': 0.0, 'lr_scale': 1.0}
        >>> optimizer = AdamW(model, lr=0.1, weight_decay=0.01, groups=groups)
        >>> [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
        [(0.05, 0.01), (0.05, 0.0), (0.1, 0.01), (0.1, 0.0)]
    """
    names = [name for name, _ in named_pairs("combined", params)]
    options: list[dict[str, Any]] = [{} for _ in names]
    places: list[list[tuple[int, int]]] = [[] for _ in names]  # of the entries that match each parameter
    for which, groups in enumerate(lists):
        entries = entries_of("combined", groups)
        for index, members in enumerate(members_of("combined", names, entries)):
            for i in members:
                places[i].append((which, index))
                options[i] = {**entries[index][1], **options[i]}
    result: dict[Any, tuple[list[str], dict[str, Any]]] = {}
    for name, found, values in zip(names, places, options, strict=True):
        if found:
            result.setdefault(tuple(found), ([], values))[0].append(name)
    return [(tuple(members), values) for members, values in result.values()]


def no_decay(params: nn.Module | Iterable[tuple[str, Tensor]]) -> Groups:
    """Return the usual exceptions from weight decay: biases, norm layers, and parameters with at most one dimension.

    Args:
        params: a module; or ``(name, parameter)`` pairs, where norm layers are recognized only by their one dimension.
    Returns:
        A list with one entry for ``groups``: the names, and ``weight_decay=0``. An empty list if no parameter matches.
    Raises:
        ValueError: if the parameters have no names.
    Example:
        >>> from descend import AdamW
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
        >>> no_decay(model)
        [(('0.bias', '1.weight', '1.bias'), {'weight_decay': 0.0})]
        >>> optimizer = AdamW(model, weight_decay=0.1, groups=no_decay(model))
        >>> [(group["param_names"], group["weight_decay"]) for group in optimizer.param_groups]
        [(['0.weight'], 0.1), (['0.bias', '1.weight', '1.bias'], 0.0)]
    """
    of_norms: set[str] = set()
    if isinstance(params, nn.Module):
        for prefix, module in params.named_modules():
            if re.search(r"Norm(\dd)?$", type(module).__name__):
                of_norms |= {name for name, _ in module.named_parameters(prefix, recurse=False)}
    names = tuple(
        name
        for name, param in named_pairs("no_decay", params)
        if param.ndim <= 1 or _BIAS.search(name.rpartition(".")[2]) or name in of_norms
    )
    return [(names, {"weight_decay": 0.0})] if names else []


def named_pairs(who: str, params: Any) -> list[tuple[str, Tensor]]:
    """The ``(name, parameter)`` pairs of a module, or those given. Raise ``ValueError`` if there are no names."""
    given = named(params)
    pairs: list[Any] = [given] if isinstance(given, Tensor) else list(given)
    for pair in pairs:
        if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)):
            raise ValueError(
                f"{who}: groups by name need names: give the model, or model.named_parameters(), or other (name, "
                f"parameter) pairs; got a {type(pair).__name__}."
            )
    return pairs


def entries_of(who: str, groups: Iterable[Any]) -> list[tuple[Pattern, Mapping[str, Any]]]:
    """The entries of ``groups``. Raise ``ValueError`` if one is no pair of a pattern and options."""
    entries = []
    for entry in groups:
        pattern, values = entry if isinstance(entry, tuple | list) and len(entry) == 2 else (entry, None)
        if not (_is_pattern(pattern) and isinstance(values, Mapping)):
            raise ValueError(
                f"{who}: groups takes pairs of a pattern (text, regular expression or names) and a dict of options, "
                f"got {entry!r}."
            )
        entries.append((pattern, values))
    return entries


def check_pattern(who: str, pattern: Any) -> None:
    """Raise ``ValueError`` for what is no pattern."""
    if not _is_pattern(pattern):
        raise ValueError(f"{who} must be a pattern (text, regular expression or names), got {pattern!r}.")


def _is_pattern(pattern: Any) -> bool:
    is_bytes = isinstance(pattern, bytes) or isinstance(getattr(pattern, "pattern", None), bytes)
    return isinstance(pattern, str | re.Pattern | Collection) and not is_bytes


def members_of(who: str, names: Sequence[str], entries: Iterable[tuple[Pattern, Any]]) -> list[list[int]]:
    """For each entry, the positions of the names that its pattern is the first to match.

    Raises:
        ValueError: if a pattern matches no name, or earlier ones take all that it matches.
    """
    rest, result = set(range(len(names))), []
    for pattern, _ in entries:
        text = _text(pattern)
        matched = [i for i, name in enumerate(names) if matches(pattern, name)]
        absent = [] if isinstance(pattern, str | re.Pattern) else [name for name in pattern if name not in names]
        for lacking in absent or ([] if matched else [text]):
            near = difflib.get_close_matches(lacking, names, _SHOWN, cutoff=0)
            raise ValueError(f"{who}: groups: {lacking!r} matches no parameter. Near names: {', '.join(near)}.")
        members = [i for i in matched if i in rest]
        if not members:
            raise ValueError(f"{who}: groups: all that {text!r} matches, earlier patterns take: move it before them.")
        rest.difference_update(members)
        result.append(members)
    return result


def matches(pattern: Pattern, name: str) -> bool:
    """Whether a pattern is for the parameter called ``name``."""
    if isinstance(pattern, str):
        return fnmatchcase(name, pattern)
    if isinstance(pattern, re.Pattern):
        return pattern.fullmatch(name) is not None
    return name in pattern


def _text(pattern: Pattern) -> str:
    if isinstance(pattern, str):
        return pattern
    if isinstance(pattern, re.Pattern):
        return pattern.pattern
    names = list(pattern)
    return ", ".join(names[:_SHOWN]) + (f", ... ({len(names)} names)" if len(names) > _SHOWN else "")
