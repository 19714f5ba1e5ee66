"""Optimizers by name.

``adamw``, ``adamw:lr=3e-3,betas=(0.9,0.95)``, ``torch.sgd:momentum=0.9,max_norm=1.0``: classes of ``descend`` and of
``torch.optim``; ``lbfgs``, ``newton`` and ``torch.lbfgs`` too, which take one iteration a step (torch's, and L-BFGS on
batches, five) unless ``max_iter`` says otherwise. ``minimize.l-bfgs``, ``scipy.newton-cg``, ``sklearn.lbfgs``: methods
of ``descend.minimize``, of ``scipy.optimize.minimize`` and of scikit-learn's ``LogisticRegression``.
``adam:steps=300+lbfgs``: one after another. ``adamw:dtype=bfloat16``: the model's parameters are in that dtype.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import descend
from descend.compare.chain import ChainSpec
from descend.compare.closures import CLASSES, DEFAULTS, ClosureSpec
from descend.compare.contestant import Contestant, full_name
from descend.compare.first_order import FirstOrderTrainer
from descend.compare.parallel import Construct, Params, construct
from descend.compare.precision import convert_
from descend.compare.problem import Problem
from descend.compare.scipy_solvers import SciPy
from descend.compare.sklearn_solvers import ScikitLearn
from descend.compare.solvers import Library, Minimize, SolverSpec
from descend.compare.tasks.rates import LIKE_ADAM
from descend.compare.trainer import Trainer
from descend.reporting.errors import UsageError, unknown

WORDS = {"true": True, "false": False, "none": None}


@dataclass(frozen=True)
class Spec:
    """One optimizer of a comparison.

    Args:
        label: its name in the table; unique.
        text: what the user wrote.
        optimizer: the class.
        options: keyword arguments of the class, ``lr`` included unless the class's own default is used.
        max_norm: largest norm of the gradients, for a class that has no such option: torch's function clips them.
        dtype: of the model's parameters; None for the task's.
    """

    label: str
    text: str
    optimizer: type[Optimizer]
    options: Mapping[str, Any]
    max_norm: float | None = None
    dtype: torch.dtype | None = None

    def trainer(self, model: nn.Module, problem: Problem) -> Trainer:
        """Return what trains ``model`` in place, a copy of ``problem.model``.

        Raises:
            UsageError: if the optimizer rejects the model's parameters or its options.
        """
        if self.dtype is not None:
            convert_(model, self.dtype)
        self.set_gradients(model, problem.way.takes_sparse)  # DistributedDataParallel looks at them
        wrapped = problem.way.wrap(model)
        optimizers = self.build_for(wrapped, problem.way.construct)
        return FirstOrderTrainer(wrapped, problem.task.loss, optimizers, self.max_norm)

    def build(self, params: Params, construct: Construct = construct) -> Optimizer:
        """Return the optimizer for ``params``, compiled; raise a ``UsageError`` if it rejects them or its options.

        Args:
            params: what it trains.
            construct: makes it, from its class, ``params`` and its options.
        """
        try:
            optimizer = construct(self.optimizer, params, self.options)
            if isinstance(optimizer, descend.FirstOrder):
                descend.warmup(optimizer)
            return optimizer
        except Exception as error:  # an optimizer may reject an option with any exception
            raise UsageError(f"--optimizer {self.text}: {error}") from error

    @property
    def name(self) -> str:
        return full_name(self.optimizer)

    @property
    def lr(self) -> float | None:
        return self.options.get("lr")

    def with_lr(self, lr: float) -> Spec:
        """Return the same with another learning rate."""
        return replace(self, options={**self.options, "lr": lr})

    @property
    def is_sparse(self) -> bool:
        """Whether the optimizer is meant for sparse gradients alone."""
        return self.options.get("sparse") is not None or self.optimizer.__name__ == "SparseAdam"

    def set_gradients(self, model: nn.Module, takes_sparse: bool = True) -> None:
        """Set the embeddings of ``model`` to sparse or dense gradients, as the optimizer needs them.

        RowwiseAdagrad takes both with the same results, so it gets sparse ones if ``takes_sparse``.
        """
        wants_sparse = self.is_sparse or (takes_sparse and issubclass(self.optimizer, descend.RowwiseAdagrad))
        for table in embeddings(model):
            table.sparse = wants_sparse

    def build_for(self, model: nn.Module, construct: Construct = construct) -> list[Optimizer]:
        """Return the optimizers that train ``model``; its gradients must be as ``set_gradients`` sets them.

        Two classes do not take every parameter, and leave the others to a second optimizer, as in programs that use
        them. SparseAdam takes embeddings, Adam from the same library with the same options the rest. torch's Muon takes
        matrices that are no embeddings, AdamW the rest, at the rate that ``rates`` gives it; ours has AdamW inside.
        """
        tables = [table.weight for table in embeddings(model)]
        if issubclass(self.optimizer, descend.Muon):
            inside = {**self._options_beside_muon(), **(self.options.get("adamw") or {})}
            return [replace(self, options={**self.options, "adamw": inside}).build(model, construct)]
        if self.optimizer is torch.optim.Muon:
            own = [param for param in model.parameters() if param.ndim == 2 and not _is_among(param, tables)]
            others = [param for param in model.parameters() if not _is_among(param, own)]
            helper = replace(self, optimizer=torch.optim.AdamW, options=self._options_beside_muon())
            return [spec.build(params, construct) for spec, params in ((self, own), (helper, others)) if params]
        if tables and self.optimizer.__name__ == "SparseAdam":
            library = descend if issubclass(self.optimizer, descend.FirstOrder) else torch.optim
            own = [param for param in model.parameters() if _is_among(param, tables)]
            others = [param for param in model.parameters() if not _is_among(param, tables)]
            return [self.build(own, construct), replace(self, optimizer=library.Adam).build(others, construct)]
        optimizer = self.build(model.parameters(), construct)
        if self.options.get("sparse") == "exact" and isinstance(optimizer, descend.FirstOrder):
            optimizer.attach(model)
        return [optimizer]

    def _options_beside_muon(self) -> dict[str, Any]:
        ratio = LIKE_ADAM["adamw"] / LIKE_ADAM["muon"]
        return {"lr": self.options["lr"] * ratio} if "lr" in self.options else {}


def _is_among(param: Tensor, params: Iterable[Tensor]) -> bool:
    return any(param is other for other in params)


def embeddings(model: nn.Module) -> list[nn.Embedding | nn.EmbeddingBag]:
    """Return the modules of ``model`` that can have sparse gradients."""
    return [module for module in model.modules() if isinstance(module, nn.Embedding | nn.EmbeddingBag)]


@cache
def classes() -> dict[str, type[Optimizer]]:
    """Return optimizer classes by name: those of ``descend``, and those of ``torch.optim`` with prefix ``torch.``."""
    return {
        prefix + name.lower(): value
        for prefix, module in (("", descend), ("torch.", torch.optim))
        for name, value in ((name, getattr(module, name)) for name in dir(module))
        if inspect.isclass(value)
        and issubclass(value, Optimizer)
        and value.__module__.startswith(module.__name__)  # descend re-exports some of torch's own
        and _trains_any_model(value)
    }


def _trains_any_model(optimizer: type[Optimizer]) -> bool:
    """Whether it needs only parameters.

    Base classes need more; LBFGS and Newton, a closure with a fixed loss; LeastSquares, one with residuals.
    """
    if issubclass(optimizer, descend.LBFGS | descend.LeastSquares | descend.Newton):
        return False
    build = list(inspect.signature(optimizer).parameters.values())
    step = list(inspect.signature(optimizer.step).parameters.values())
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return not any(p.default is p.empty and p.kind in positional for p in (*build[1:], *step[1:]))


def libraries() -> dict[str, Library]:
    """Return libraries of solvers, by the prefix of their methods' names."""
    return {"minimize.": Minimize(), "scipy.": SciPy(), "sklearn.": ScikitLearn()}


def names() -> list[str]:
    """Return the names of all optimizers."""
    solvers = [prefix + method for prefix, library in libraries().items() for method in library.methods]
    return [*classes(), *CLASSES, *solvers]


def parse_all(texts: Sequence[str], lr: Mapping[str, float]) -> list[Contestant]:
    """Return the specs written as ``texts``, with unique labels.

    Args:
        texts: ``NAME`` or ``NAME:key=value,key=value``; values are Python literals, names of dtypes, or strings.
            Several with ``+`` between them train one after another; all but the last have an option ``steps``.
        lr: learning rate by optimizer name, for specs that give none.
    Raises:
        UsageError: if a name or an option does not exist, or a value has the wrong type.
    """
    seen: Counter[str] = Counter()
    specs: list[Contestant] = []
    for text in texts:
        seen[text] += 1
        label = text if seen[text] == 1 else f"{text} #{seen[text]}"
        specs.append(_parse_chain(text, label, lr))
    return specs


def _parse_chain(text: str, label: str, lr: Mapping[str, float]) -> Contestant:
    parts = re.split(r"\+(?=\s*[A-Za-z])", text)  # not at the + of 1e+3
    if len(parts) == 1:
        return _parse(text, label, lr)
    stages, steps = [], []
    for part in parts[:-1]:
        name, _, rest = part.partition(":")
        items = [item.partition("=") for item in _split(rest)]
        given = [value.strip() for key, _, value in items if key.strip() == "steps"]
        if len(given) != 1 or not re.fullmatch(r"[1-9]\d*", given[0]):
            raise UsageError(
                f"--optimizer {text}: {name.strip()} is followed by another optimizer, so say after how many steps, as "
                f"in {name.strip()}:steps=300+{parts[-1].strip()}."
            )
        steps.append(int(given[0]))
        others = ",".join("".join(item) for item in items if item[0].strip() != "steps")
        stages.append(_parse(f"{name}:{others}" if others else name, part, lr))
    stages.append(_parse(parts[-1], parts[-1], lr))
    if any(stage.is_sparse for stage in stages):
        raise UsageError(f"--optimizer {text}: sparse gradients are for an optimizer alone.")
    if any(isinstance(stage, Spec) and stage.dtype for stage in stages):
        raise UsageError(f"--optimizer {text}: dtype is for an optimizer alone.")
    return ChainSpec(label, text, stages, steps)


def _parse(text: str, label: str, lr: Mapping[str, float]) -> Contestant:
    name, colon, rest = text.partition(":")
    name = name.strip().lower()
    if name not in names():
        raise unknown("there is no optimizer", name, names())
    for prefix, library in libraries().items():
        if name.startswith(prefix):
            options = _parse_options(text, rest, None) if colon else {}
            return SolverSpec(label, text, library, name.removeprefix(prefix), options)
    optimizer = CLASSES.get(name) or classes()[name]
    options = _parse_options(text, rest, _defaults(optimizer)) if colon else {}
    if name in CLASSES:
        return ClosureSpec(label, text, optimizer, {**DEFAULTS[name], **options})
    dtype = options.pop("dtype", None)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise UsageError(f"--optimizer {text}: dtype must be bfloat16 or another float format, got {dtype!r}.")
    max_norm = None
    if not issubclass(optimizer, descend.FirstOrder):
        max_norm = options.pop("max_norm", None)
        if max_norm is not None and not (isinstance(max_norm, int | float) and max_norm > 0):
            raise UsageError(f"--optimizer {text}: max_norm must be positive, got {max_norm!r}.")
    family = name.removeprefix("torch.")
    if "lr" not in options and family in lr:
        options["lr"] = lr[family] if family in ("muon", "normuon") else _scaled(lr[family], options.get("momentum"))
    return Spec(label, text, optimizer, options, max_norm, dtype)


def _scaled(lr: float, momentum: Any) -> float:
    # With momentum every gradient eventually counts 1 / (1 - momentum) times. (Muon scales the sum to norm 1.)
    has_momentum = isinstance(momentum, float) and 0 < momentum < 1
    return round(lr * (1 - momentum), 9) if has_momentum else lr


def _defaults(optimizer: type[Optimizer]) -> dict[str, Any]:
    """Return the defaults of an optimizer class's options, by name."""
    parameters = list(inspect.signature(optimizer).parameters.values())[1:]
    if issubclass(optimizer, descend.FirstOrder):
        shared = inspect.signature(descend.FirstOrder).parameters.values()
        parameters += [parameter for parameter in shared if parameter.kind is parameter.KEYWORD_ONLY]
    defaults = {p.name: p.default for p in parameters if p.kind is not p.VAR_KEYWORD}
    return defaults if optimizer in CLASSES.values() else {"max_norm": None, "dtype": None, **defaults}


def _split(rest: str) -> list[str]:
    return re.split(r",(?![^(\[{]*[)\]}])", rest)  # at commas outside brackets


def _parse_options(text: str, rest: str, defaults: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the options written as ``rest``; ``defaults`` None leaves it to a library to know them."""
    options: dict[str, Any] = {}
    for item in _split(rest):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not (key and equals and value):
            raise UsageError(f"--optimizer {text}: expected key=value, got {item.strip()!r}.")
        if defaults is not None and key not in defaults:
            raise unknown(f"{text.partition(':')[0]} has no option", key, defaults)
        if key in options:
            raise UsageError(f"--optimizer {text}: {key} is given twice.")
        options[key] = _parse_value(value)
        if defaults is not None and isinstance(options[key], str) and not isinstance(defaults[key], str | None):
            raise UsageError(f"--optimizer {text}: {key} takes a value like {defaults[key]!r}, got {value!r}.")
    return options


def _parse_value(text: str) -> Any:
    if text.lower() in WORDS:
        return WORDS[text.lower()]
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        value = text
    return {key: _dtype_or(each) for key, each in value.items()} if isinstance(value, dict) else _dtype_or(value)


def _dtype_or(value: Any) -> Any:
    """Return the dtype that a string names; anything else as it is."""
    dtype = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else None
    return dtype if isinstance(dtype, torch.dtype) else value
