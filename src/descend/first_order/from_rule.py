"""A complete optimizer from a plain function."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, Literal

from descend.core.docstrings import with_sections
from descend.core.groups import ParamsT
from descend.core.options import Options
from descend.core.signature import signature
from descend.first_order.optimizer import FirstOrder


def from_rule(
    rule: Callable[..., Any],
    name: str,
    *,
    sums_over: Literal["param", "all"] = "param",
    nonnegative_state: Collection[str] = (),
    **defaults: Any,
) -> type[FirstOrder]:
    """A complete optimizer class from a rule.

    Args:
        rule: ``rule(param, grad, *state, *numbers)`` returning the new parameter and the new state, written with
            arithmetic and the functions of ``descend.ops``. The first arguments after ``grad`` are state, one for each
            value returned after the parameter; they start as zeros. The other arguments are numbers, which become
            options of the optimizer. A number called ``step`` receives the parameter's step count, which starts at 1.
            The last numbers of a rule made with ``descend.ops.summing`` are sums.
        name: name of the class. To pickle its optimizers, assign the class to this name in the rule's module.
        sums_over: what a sum is taken over: ``"param"``, each parameter by itself, or ``"all"`` that have a gradient.
            Default: ``"param"``.
        nonnegative_state: names of state that no step makes negative, such as averages of squares. With
            ``state_dtype="8bit"`` it has codes without a sign, of which a number that is not zero never gets zero. Such
            state is refused in a file in which it is negative. Default: none.
        defaults: defaults of the numbers; they override those in the rule's signature. Default of ``lr``: 1e-3.
    Returns:
        A subclass of ``FirstOrder``: ``Class(params, lr=..., ..., max_norm=None, nonfinite="step", ...)``.
    Raises:
        ValueError: if ``sums_over`` is something else; if ``nonnegative_state`` names what is no state; if a number has
            no default, or has the name of an option that every optimizer has; or if a default belongs to no number.
    Example:
        >>> import torch
        >>> from descend.ops import sign
        >>> def lion(param, grad, exp_avg, lr, beta1, beta2, weight_decay):
        ...     update = sign(exp_avg + (1 - beta1) * (grad - exp_avg))
        ...     exp_avg = exp_avg + (1 - beta2) * (grad - exp_avg)
        ...     return param - lr * (update + weight_decay * param), exp_avg
        >>> Lion = from_rule(lion, "Lion", lr=1e-4, beta1=0.9, beta2=0.99, weight_decay=0.0)
        >>> weight = torch.ones(2, requires_grad=True); weight.sum().backward()
        >>> Lion([weight], lr=0.1).step()
        >>> weight
        tensor([0.9000, 0.9000], requires_grad=True)
    """
    takes = signature(rule)
    options = [number for number in takes.given if number != "step"]
    if sums_over not in ("param", "all"):
        raise ValueError(f"from_rule: sums_over must be 'param' or 'all', got {sums_over!r}.")
    if absent := set(nonnegative_state) - set(takes.state):
        raise ValueError(
            f"from_rule: nonnegative_state must be among the state of {name}, {takes.state}, got {sorted(absent)}."
        )
    if reserved := {"params", "maximize", *Options.__annotations__}.intersection(options):
        raise ValueError(f"from_rule: {name} cannot have a number called {sorted(reserved)}: every optimizer has one.")
    values = {"lr": 1e-3, **takes.defaults, **defaults}
    if unknown := set(defaults) - set(options):
        raise ValueError(f"from_rule: {name} has the numbers {options}, but defaults came for {sorted(unknown)}.")
    if missing := [number for number in options if number not in values]:
        raise ValueError(
            f"from_rule: {name} needs a default for {missing}: from_rule(rule, {name!r}, {missing[0]}=...)."
        )
    group = {number: values[number] for number in options}

    def initialize(self: FirstOrder, params: ParamsT, *args: Any, maximize: bool = False, **given: Any) -> None:
        if len(args) > len(group):
            raise TypeError(f"{name} takes at most {len(group)} options by position, got {len(args)}.")
        positional = dict(zip(group, args, strict=False))
        if twice := positional.keys() & given.keys():
            raise TypeError(f"{name} got multiple values for {sorted(twice)}.")
        chosen = {**group, **positional}
        chosen.update({key: given.pop(key) for key in list(given) if key in group})
        if unknown := set(given) - set(Options.__annotations__):
            raise TypeError(
                f"{name} has no option {sorted(unknown)}; it takes {[*group, 'maximize', *Options.__annotations__]}."
            )
        FirstOrder.__init__(self, params, {**chosen, "maximize": maximize}, **given)

    numbers = {number: f"a number of the rule. Default: {value!r}." for number, value in group.items()}
    arguments = {"Args": {"params": "a module, parameters, or dicts that define groups.", **numbers}}
    members = {
        "__init__": initialize,
        "__doc__": with_sections(rule.__doc__ or f"An optimizer made of the rule ``{rule.__name__}``.", arguments),
        "__module__": rule.__module__,
        "rule": staticmethod(rule),
        "counts_steps": "step" in takes.given,
        "sums_over": sums_over,
        "nonnegative_state": tuple(nonnegative_state),
    }
    return type(name, (FirstOrder,), members)
