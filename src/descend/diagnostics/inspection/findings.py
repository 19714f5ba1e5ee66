"""What looks wrong in an optimizer's state, in words, with the numbers that say so."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from descend.diagnostics.inspection.examination import ZERO_WITHOUT_GRADIENT, Examination, Measures
from descend.diagnostics.inspection.optimizers import Param, SavedOptimizer
from descend.diagnostics.inspection.state_names import FULL_SHAPED, NOT_NEGATIVE
from descend.diagnostics.inspection.stored import exact, number, shown

# Shares of the elements of a tensor (for eps, also of its group) from which on something is reported.
EPS_SHARE = 0.1
STUCK_SHARE = 0.5
UNDERFLOW_SHARE = 0.01
SUBNORMAL_SHARE = 0.01

# Of each kind: whether it is wrong (or only worth knowing), what it is, and what follows from it.
KINDS = {
    "nonfinite": (True, "NaN or Inf", "Every later step keeps them: go back to an earlier checkpoint."),
    "negative": (True, "Negative state, where none can be", "Its square root is NaN: the file was damaged or edited."),
    "codes": (True, "State in 8 bits cannot be decoded", "Loading refuses it: the file was damaged or edited."),
    "option": (True, "An option is out of range", "No optimizer would accept it."),
    "empty": (
        True,
        "There are no parameters",
        "torch makes no optimizer without them: the file was damaged or edited.",
    ),
    "count": (True, "A step count is not a whole number from 0 on", "The file was damaged or edited."),
    "twice": (
        True,
        "A parameter is in the groups more than once",
        "It is updated more than once a step; torch warns of it, or refuses it.",
    ),
    "orphan": (True, "State of parameters that are in no group", "Loading refuses or loses it."),
    "names": (True, "The list of names does not fit the list of parameters", "State may go to the wrong parameter."),
    "shape": (True, "State does not have its parameter's shape", "It belongs to another parameter, or another model."),
    "never": (True, "No parameter has taken a step", "The file was saved before training, or is not the trained one."),
    "missing": (
        False,
        "No state, though other parameters have it",
        "They have had no gradient: frozen, not used by the loss, or given to the optimizer but not to the model.",
    ),
    "incomplete": (
        True,
        "Part of the state is missing",
        "Most parameters of the group have it, and the next step needs it: the file was damaged or edited.",
    ),
    "steps": (
        False,
        "Step counts differ",
        "Those behind had no gradient in some steps, or were added later; their bias correction differs.",
    ),
    "zero": (True, "State is all zero", "Every gradient was exactly zero: a dead part of the model, or a masked one."),
    "stuck": (
        True,
        "State in low precision cannot decay",
        "The decayed value is rounded back to the old one, so it only grows and steps shrink: keep it in float32.",
    ),
    "underflow": (
        True,
        "Squares of gradients have become zero",
        "Those steps are divided by eps alone. float16 has no squares below 3e-8: keep them in float32 or bfloat16.",
    ),
    "eps": (
        True,
        "eps dominates the denominator",
        "Those elements move as in plain momentum with lr / eps: lower eps, or scale the loss.",
    ),
    "flags": (True, "foreach and fused are both True", "torch refuses to construct such an optimizer."),
    "small": (
        False,
        "eps dominates the denominator of a few",
        "Their gradients are tiny, as those of a key's bias in attention are.",
    ),
    "decay": (
        False,
        "Weight decay on biases or norms",
        "They are usually left out: put them in a group with weight_decay=0.",
    ),
    "quiet": (False, "The last gradients were exactly zero", "A part of the model that died, or was masked or frozen."),
    "rows": (False, "Rows that never had a gradient", "Unused entries of an embedding, or dead units."),
    "lr": (False, "The learning rate is zero", "The next step changes nothing, unless a schedule raises it."),
    "subnormal": (False, "Numbers too small for full precision", "CPUs are slow with them, and low bits are lost."),
    "mixed": (False, "Groups run differently", "foreach, fused and capturable are usually the same in all groups."),
}


@dataclass(frozen=True)
class Case:
    """One place where something was found.

    Attributes:
        where: a parameter's label, or a group.
        detail: the numbers.
    """

    where: str
    detail: str


@dataclass(frozen=True)
class Finding:
    """One thing that looks wrong, and everywhere that it does.

    Attributes:
        kind: a word for it, a key of ``KINDS``.
        cases: the places.
    """

    kind: str
    cases: tuple[Case, ...]

    @property
    def is_wrong(self) -> bool:
        """False for what is only worth knowing."""
        return KINDS[self.kind][0]

    @property
    def what(self) -> str:
        return KINDS[self.kind][1]

    @property
    def advice(self) -> str:
        return KINDS[self.kind][2]


def findings_of(examination: Examination) -> list[Finding]:
    """Everything that was found, in the order of ``KINDS``; a parameter's case is reported under one kind of zeros."""
    cases: dict[str, list[Case]] = {kind: [] for kind in KINDS}
    saved = examination.saved
    for kind, case in (*_of_groups(saved), *_of_params(saved)):
        cases[kind].append(case)
    for param, measures in zip(saved.params, examination.measures, strict=True):
        for kind, case in _of_values(param, measures):
            cases[kind].append(case)
    for kind, case in _of_eps(examination):
        cases[kind].append(case)
    return [Finding(kind, tuple(found)) for kind, found in cases.items() if found]


def _of_groups(saved: SavedOptimizer) -> Iterator[tuple[str, Case]]:
    for index, group in enumerate(saved.groups):
        where = f"group {index}"
        for name, allowed, value in _out_of_range(group):
            yield "option", Case(where, f"{name}={value:g}, must be {allowed}")
        if isinstance(group.get("lr"), str):
            yield "option", Case(where, f"lr={shown(group['lr'])}, must be a number")
        if number(group.get("lr")) == 0:
            initial = number(group.get("initial_lr"))
            yield "lr", Case(where, "lr=0" if initial is None else f"lr=0, it began at {initial:g}")
        if group.get("foreach") is True and group.get("fused") is True:
            yield "flags", Case(where, "foreach=True, fused=True")
        if index in saved.misnamed:
            yield "names", Case(where, f"{len(saved.keys[index])} parameters")
    for flag in ("foreach", "fused", "capturable"):
        values = [group.get(flag) for group in saved.groups]
        if len({repr(value) for value in values if isinstance(value, bool | None)}) > 1:
            yield "mixed", Case(flag, ", ".join(f"{value} in group {index}" for index, value in enumerate(values)))


def _out_of_range(group: dict[str, Any]) -> Iterator[tuple[str, str, float]]:
    for name in ("lr", "weight_decay", "momentum", "lr_decay"):
        value = number(group.get(name))
        if value is not None and not 0 <= value < math.inf:
            yield name, "finite and not negative", value
    single = {f"betas[{index}]": value for index, value in enumerate(_listed(group.get("betas")))}
    alpha = None if "alpha_warmup" in group else group.get("alpha")  # AdEMAMix's is a weight, others' a decay
    for name, value in {**single, "alpha": alpha, "rho": group.get("rho")}.items():
        beta = number(value)
        if beta is not None and not (0 <= beta < 1 or (beta == 1 and name in ("alpha", "rho"))):
            yield name, "in [0, 1)", beta
    for name, value in {
        "eps": group.get("eps"),
        **{f"eps[{i}]": eps for i, eps in enumerate(_listed(group.get("eps")))},
    }.items():
        eps = number(value)
        if eps is not None and not 0 <= eps < math.inf:
            yield name, "finite and not negative", eps


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _of_params(saved: SavedOptimizer) -> Iterator[tuple[str, Case]]:
    params = [param for param in saved.params if param.group is not None]
    if not params:
        yield "empty", Case("all groups" if saved.groups else "param_groups", "empty")
    for param in saved.params:
        if param.group is None:
            yield "orphan", Case(param.label, ", ".join([*param.scalars, *param.tensors]))
    places: dict[Any, list[Param]] = {}
    for param in params:
        places.setdefault(param.key, []).append(param)
    for same in places.values():
        if len(same) > 1:
            yield "twice", Case(same[0].label, _again([param.group for param in same]))
    params = [param for param in saved.distinct if param.group is not None]
    yield from _of_steps(saved, params)
    yield from _of_gaps(params)
    for param in params:
        shapes = {name: param.tensors[name][0].shape for name in FULL_SHAPED if name in param.tensors}
        if param.weight is not None:
            shapes = {"the weight": param.weight.shape, **shapes}
            rows = next(iter(param.weight.shape), 1)
            if saved.method == "RowwiseAdagrad" and shapes.get("sum") == (rows, 1):
                del shapes["sum"]
        if len(set(shapes.values())) > 1:
            yield "shape", Case(param.label, ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items()))
    # If none has two dimensions, they were flattened to be sharded, and shapes say nothing.
    shapes_tell = any(len(param.shape or ()) > 1 for param in params)
    for param in params:
        for fault in param.faults:
            yield "codes", Case(param.label, fault)
        decay = number(saved.groups[param.group or 0].get("weight_decay"))
        if decay and _is_bias_or_norm(param, shapes_tell):
            yield "decay", Case(param.label, f"weight_decay={decay:g}")


def _is_bias_or_norm(param: Param, shapes_tell: bool) -> bool:
    if shapes_tell and param.shape is not None:
        return len(param.shape) <= 1
    return (param.name or "").rpartition(".")[2] == "bias"


def _of_steps(saved: SavedOptimizer, params: list[Param]) -> Iterator[tuple[str, Case]]:
    if saved.method == "L-BFGS":  # all state is under the first parameter
        return
    with_state = [param for param in params if param.has_state]
    steps = [param.step for param in with_state if param.step is not None]
    expecting = [param for param in params if _expects_state(saved.groups[param.group or 0])]
    counted = [number(group.get("k")) for group in saved.groups if "k" in group]
    for param in params:
        if param.step is not None and math.isfinite(param.step) and (param.step < 0 or param.step % 1):
            yield "count", Case(param.label, f"step is {exact(param.step)}")
    steps = [step for step in steps if math.isfinite(step) and step >= 0 and not step % 1]
    if params and not with_state and expecting:
        yield "never", Case("all parameters", "there is no state")
    elif (steps and not any(steps)) or (counted and not any(counted)):
        yield "never", Case("all parameters", "step 0")
    else:
        if with_state:
            for param in expecting:
                if not param.has_state:
                    yield "missing", Case(param.label, f"group {param.group}")
        if len(set(steps)) > 1:
            common = Counter(steps).most_common(1)[0][0]
            for param in with_state:
                if param.step in steps and param.step != common:
                    yield "steps", Case(param.label, f"{exact(param.step)}, most have {exact(common)}")


def _of_gaps(params: list[Param]) -> Iterator[tuple[str, Case]]:
    """State that one parameter lacks and most of its group have."""
    there = Counter((param.group, name) for param in params for name in (*param.scalars, *param.tensors))
    sizes = Counter(param.group for param in params if param.has_state)
    # Adafactor keeps the variance of all elements, or those of rows and of columns.
    expected = [name for name in ("step", *FULL_SHAPED) if name != "variance"]
    for param in params:
        lacking = [
            name
            for name in expected
            if param.has_state
            and name not in (param.scalars if name == "step" else param.tensors)
            and 2 * there[param.group, name] > sizes[param.group]
        ]
        if lacking:
            yield "incomplete", Case(param.label, f"no {' and no '.join(lacking)}")


def _again(groups: list[int | None]) -> str:
    names = dict.fromkeys(str(group) for group in groups)
    if len(names) > 1:
        return f"in groups {', '.join(names)}"
    return f"{len(groups)} times in group {groups[0]}"


def _expects_state(group: dict[str, Any]) -> bool:
    if "dampening" in group or "ns_steps" in group:
        return bool(number(group.get("momentum")))
    return any(name in group for name in ("betas", "alpha", "rho", "lr_decay", "etas", "beta2_decay"))


def _of_values(param: Param, measures: Measures) -> Iterator[tuple[str, Case]]:
    for name, value in param.scalars.items():
        if not math.isfinite(value):
            yield "nonfinite", Case(param.label, f"{name} is {value:g}")
    for name, numbers in measures.statistics.items():
        if numbers is None or not numbers.numel:
            continue
        label = f"{name}: "
        if numbers.nans or numbers.infs:
            yield (
                "nonfinite",
                Case(param.label, f"{label}{numbers.nans:,} NaN, {numbers.infs:,} Inf of {numbers.numel:,}"),
            )
        if name in NOT_NEGATIVE and numbers.negatives:
            detail = f"{label}{numbers.negatives:,} of {numbers.numel:,}, smallest {numbers.smallest:.3g}"
            yield "negative", Case(param.label, detail)
        alive = numbers.numel - numbers.zeros - numbers.nans - numbers.infs
        if numbers.subnormals > SUBNORMAL_SHARE * max(alive, 1):
            yield "subnormal", Case(param.label, f"{label}{numbers.subnormals:,} of {alive:,}")
    yield from _of_zeros(param, measures)
    for name, (still, alive, beta) in measures.stuck.items():
        if still > STUCK_SHARE * alive:
            stored = param.tensors[name][0].format
            detail = f"{name}: {still:,} of {alive:,} in {stored} are the same after a decay by {beta:g}"
            yield "stuck", Case(param.label, detail)


def _of_eps(examination: Examination) -> Iterator[tuple[str, Case]]:
    """It is wrong if it holds for much of a group; single parameters can have such gradients in a healthy model."""
    counts: dict[int | None, tuple[int, int]] = {}
    params = list(zip(examination.saved.params, examination.measures, strict=True))
    for param, measures in params:
        below, total = counts.get(param.group, (0, 0))
        counts[param.group] = (below + measures.below_eps[0], total + measures.below_eps[1])
    for param, measures in params:
        below, total = measures.below_eps
        if total and below > EPS_SHARE * total:
            of_group, in_group = counts[param.group]
            kind = "eps" if of_group > EPS_SHARE * in_group else "small"
            yield kind, Case(param.label, f"sqrt(v_hat) is below eps={measures.eps:.3g} in {below:,} of {total:,}")


def _of_zeros(param: Param, measures: Measures) -> Iterator[tuple[str, Case]]:
    squares = measures.statistics.get("exp_avg_sq")
    average = measures.statistics.get("exp_avg")
    if squares and average:
        lost, stored = squares.zeros - average.zeros, param.tensors["exp_avg_sq"][0]
        # In other types single squares vanish with gradients below 1e-22, which move nothing.
        if lost > (UNDERFLOW_SHARE * squares.numel if stored.dtype == torch.float16 else max(squares.numel - 1, 0)):
            yield "underflow", Case(param.label, f"at least {lost:,} of {squares.numel:,} in {stored.format}")
            return
    if param.step == 0:
        return
    there = {
        name: numbers
        for name in (*ZERO_WITHOUT_GRADIENT, "exp_avg")
        if (numbers := measures.statistics.get(name)) and numbers.numel
    }
    zero = [name for name, numbers in there.items() if numbers.zeros == numbers.numel]
    if zero:
        kind = "zero" if len(zero) == len(there) else "quiet"
        yield kind, Case(param.label, f"{' and '.join(zero)}, {there[zero[0]].numel:,} elements")
        return
    rows, of = measures.zero_rows
    if rows:
        yield "rows", Case(param.label, f"{rows:,} of {of:,}")
