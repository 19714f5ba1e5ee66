"""L-BFGS as ``torch.optim.LBFGS`` runs it, operation by operation, but never into NaN.

``s`` is a step, ``y`` the change of the gradient along it, ``rho`` is 1 / y's; torch calls their lists ``old_stps``,
``old_dirs`` and ``ro``. In float64 every number equals torch's as long as torch's stay finite: Python floats replace
0-dimensional tensors and round alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer

from descend.core.checks import check_at_least_zero, check_lr
from descend.second_order.mathematics.space import Space
from descend.second_order.mathematics.torch_line_search import LinePoint, Scalar, strong_wolfe
from descend.second_order.problem.parameters import ClosureFunction, Evaluation, FlatParameters, largest
from descend.second_order.solvers.result import Iteration, Status

LineSearchFn: TypeAlias = Literal["strong_wolfe", "hager_zhang"]
LINE_SEARCHES = (None, *get_args(LineSearchFn))
MIN_CURVATURE = 1e-10  # a pair with a smaller y's is skipped
BACKTRACK = 0.1  # factor for a fixed step that leads to NaN or infinity


class LBFGSOptions(NamedTuple):
    """The options of ``torch.optim.LBFGS``, from the first group."""

    lr: Scalar
    max_iter: int
    max_eval: int
    tolerance_grad: float
    tolerance_change: float
    history_size: int
    line_search_fn: LineSearchFn | None

    @classmethod
    def of(cls, group: dict[str, Any]) -> LBFGSOptions:
        """Read a group's options."""
        lr = group["lr"]
        return cls(lr.reshape(()) if isinstance(lr, Tensor) else lr, *(group[name] for name in cls._fields[1:]))


def check_lbfgs(optimizer: Optimizer, options: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` if options of ``LBFGS`` are out of range."""
    name = type(optimizer).__name__
    check_lr(optimizer, options)
    if (isinstance(options["lr"], Tensor) and options["lr"].dtype == torch.bool) or math.isinf(options["lr"]):
        raise ValueError(f"Invalid learning rate: {options['lr']} ({name}: lr must be a finite number >= 0)")
    for option in ("max_iter", "max_eval"):
        check_at_least_zero(optimizer, f"{option} value", option, options[option])
    if "weight_decay" in options:
        check_at_least_zero(optimizer, "weight_decay value", "weight_decay", options["weight_decay"])
    for option in ("tolerance_grad", "tolerance_change"):
        if not (isinstance(options[option], Real) and options[option] == options[option]):
            raise ValueError(f"{name}: {option} must be a number, got {options[option]!r}.")
    size = options["history_size"]
    if not (isinstance(size, Integral) and not isinstance(size, bool) and int(size) >= 1):
        raise ValueError(f"{name}: history_size must be an integer >= 1, got {size!r}.")
    if options["line_search_fn"] not in LINE_SEARCHES:
        raise ValueError(f"{name}: line_search_fn must be one of {LINE_SEARCHES}, got {options['line_search_fn']!r}.")


@dataclass
class Memory:
    """What one iteration passes to the next, also across steps.

    Attributes:
        n_iter: iterations since the last restart from steepest descent.
        d, t: the last direction, and the step along it.
        old_dirs, old_stps, ro: y, s and rho of the stored pairs, oldest first.
        ro_tensors: the first entries of ``ro`` as tensors, as the state has them.
        H_diag: the initial inverse Hessian, a multiple of the identity.
        prev_flat_grad, prev_loss: gradient and value at the start of ``d``.
        space: of the vectors.
    """

    n_iter: int = 0
    d: Tensor | None = None
    t: Scalar = 0
    old_dirs: list[Tensor] = field(default_factory=list)
    old_stps: list[Tensor] = field(default_factory=list)
    ro: list[float] = field(default_factory=list)
    ro_tensors: list[Tensor] = field(default_factory=list)
    H_diag: float = 1
    prev_flat_grad: Tensor | None = None
    prev_loss: float = 0.0
    space: Space = field(default_factory=lambda: Space(0))

    @classmethod
    def read(cls, state: dict[str, Any], point: FlatParameters) -> Memory:
        """From a parameter's state; empty if that is of another number of entries. Copies the lists."""
        if point.space.is_shared:
            cls = SharedMemory
        last = state.get("prev_flat_grad")
        is_other = not state["n_iter"] or last is None or state.get("d") is None or last.numel() != point.numel
        if point.space.largest(is_other):
            return cls(space=point.space)
        assert last is not None
        vectors = [state["d"], last, *state["old_dirs"], *state["old_stps"]]
        if last.dtype != point.dtype or last.device != point.device:  # the model was converted
            vectors = [vector.to(point.device, point.dtype) for vector in vectors]
        n_pairs, rhos = len(state["ro"]), [torch.as_tensor(rho) for rho in state["ro"]]
        on_device = n_pairs and not rhos[0].is_cpu
        return cls(
            n_iter=state["n_iter"],
            d=vectors[0],
            t=float(state["t"]),
            old_dirs=vectors[2 : 2 + n_pairs],
            old_stps=vectors[2 + n_pairs :],
            ro=torch.stack(rhos).tolist() if on_device else [rho.item() for rho in rhos],
            ro_tensors=rhos,
            H_diag=float(state["H_diag"]),
            prev_flat_grad=vectors[1],
            prev_loss=state["prev_loss"],
            space=point.space,
            **({"products": state.get("products")} if point.space.is_shared else {}),
        )

    def write(self, state: dict[str, Any], point: FlatParameters, options: LBFGSOptions) -> None:
        """To a parameter's state, with torch's names and types."""

        def tensor(number: Any) -> Tensor:
            return torch.tensor(number, dtype=point.dtype, device=point.device)

        state["n_iter"] = self.n_iter
        state["d"] = self.d
        state["t"] = tensor(self.t.item()) if isinstance(self.t, Tensor) else self.t
        state["old_dirs"], state["old_stps"] = self.old_dirs, self.old_stps
        if len(self.ro_tensors) < len(self.ro):
            self.ro_tensors += tensor(self.ro[len(self.ro_tensors) :]).unbind()
        state["ro"] = self.ro_tensors
        state["H_diag"] = tensor(self.H_diag) if self.ro else 1
        state["prev_flat_grad"], state["prev_loss"] = self.prev_flat_grad, self.prev_loss
        state.pop("products", None)
        if self.n_iter > 1 and len(state.get("al", ())) < options.history_size:
            state["al"] = [None] * options.history_size  # torch's scratch

    def next_direction(self, grad: Tensor, history_size: int) -> Tensor:
        """Store the pair of the last step and compute the next direction by the two-loop recursion.

        Source: Nocedal & Wright 2006, Numerical Optimization, Algorithm 7.4.
        """
        self.n_iter += 1
        if self.n_iter == 1:
            return self.restart(grad)
        assert self.d is not None
        assert self.prev_flat_grad is not None
        self.learn(grad.sub(self.prev_flat_grad), self.d.mul(self.t), grad, history_size)
        self.d = d = self.descend(grad)
        return d

    def learn(self, y: Tensor, s: Tensor, grad: Tensor, history_size: int) -> None:
        """Store a pair unless its curvature is too small."""
        ys = y.dot(s).item()
        if ys > MIN_CURVATURE:
            self.store(y, s, ys, y.dot(y).item(), history_size)

    def store(self, y: Tensor, s: Tensor, ys: float, yy: float, history_size: int) -> None:
        """Store a pair, and drop the oldest ones."""
        while len(self.ro) >= history_size:
            del self.old_dirs[0], self.old_stps[0], self.ro[0], self.ro_tensors[:1]
        self.old_dirs.append(y)
        self.old_stps.append(s)
        self.ro.append(1.0 / ys)
        self.H_diag = ys / yy

    def descend(self, grad: Tensor) -> Tensor:
        """-H grad from the stored pairs."""
        pairs = list(zip(self.old_dirs, self.old_stps, self.ro, strict=True))
        d, al = grad.neg(), []
        for y, s, rho in reversed(pairs):
            alpha = s.dot(d).item() * rho
            al.append(alpha)
            d.add_(y, alpha=-alpha)
        d.mul_(self.H_diag)
        for y, s, rho in pairs:
            d.add_(s, alpha=al.pop() - y.dot(d).item() * rho)
        return d

    def restart(self, grad: Tensor) -> Tensor:
        """Drop all pairs; return the direction of steepest descent."""
        self.n_iter = 1
        self.old_dirs, self.old_stps, self.ro, self.ro_tensors, self.H_diag = [], [], [], [], 1
        self.d = d = grad.neg()
        return d


@dataclass
class SharedMemory(Memory):
    """The same where ranks share the vectors: all inner products of an iteration are reduced together.

    The two-loop recursion needs those of the gradient with all pairs, and of the pairs with each other. The latter are
    kept, also in the state: an iteration adds a row and a column.

    Attributes:
        products: y_i'y_j and s_i'y_j of the stored pairs, two matrices; None if they are not known.
        along_s, along_y: inner products of the gradient with each s and y.

    Source: Chen, Wang & Zhou 2014, Large-scale L-BFGS using MapReduce, https://papers.nips.cc/paper/5333
    """

    products: Tensor | None = None
    along_s: list[float] = field(default_factory=list)
    along_y: list[float] = field(default_factory=list)

    def learn(self, y: Tensor, s: Tensor, grad: Tensor, history_size: int) -> None:
        ys_before, ss_before = self.old_dirs, self.old_stps
        ys, ss, n = [*ys_before, y], [*ss_before, s], len(ys_before) + 1
        if self.products is None or self.products.shape != (2, n - 1, n - 1):
            self.products = torch.stack([_dots(ys_before, ys_before), _dots(ss_before, ys_before)])
            if n > 1:  # one process has made the pairs
                (self.products,) = self.space.total(self.products)
        # The new row and column: y with each y, each s with y, s with each y; and the gradient with everything.
        with_y = _dots([*ys, *ss, grad], [y])[:, 0], _dots([s], ys_before)[0]
        with_grad = _dots([*ys, *ss], [grad])[:, 0]
        column, row, along = (part.tolist() for part in self.space.total(*with_y, with_grad))
        self.along_y, self.along_s = along[:n], along[n:]
        curvature = column[2 * n - 1]
        if curvature > MIN_CURVATURE:
            first = max(0, n - history_size)
            self.store(y, s, curvature, column[n - 1], history_size)
            yy, sy = self.products.cpu()
            yy = _bordered(yy, column[:n], column[:n])
            sy = _bordered(sy, column[n : 2 * n], [*row, curvature])
            self.products = torch.stack([yy, sy])[:, first:, first:]
            self.along_y, self.along_s = self.along_y[first:], self.along_s[first:]
        else:
            self.along_y, self.along_s = self.along_y[:-1], self.along_s[:-1]

    def descend(self, grad: Tensor) -> Tensor:
        yy, sy = ([], []) if self.products is None else self.products.tolist()
        n, rho, d = len(self.ro), self.ro, grad.neg()
        alphas, betas = [0.0] * n, [0.0] * n
        for i in reversed(range(n)):
            along = -self.along_s[i] - sum(alphas[j] * sy[i][j] for j in range(i + 1, n))
            alphas[i] = along * rho[i]
            d.add_(self.old_dirs[i], alpha=-alphas[i])
        d.mul_(self.H_diag)
        for i in range(n):
            along = -self.along_y[i] - sum(alphas[j] * yy[i][j] for j in range(n))
            along = self.H_diag * along + sum(betas[j] * sy[j][i] for j in range(i))
            betas[i] = alphas[i] - along * rho[i]
            d.add_(self.old_stps[i], alpha=betas[i])
        return d

    def restart(self, grad: Tensor) -> Tensor:
        self.products = None
        return super().restart(grad)

    def write(self, state: dict[str, Any], point: FlatParameters, options: LBFGSOptions) -> None:
        super().write(state, point, options)
        if self.products is not None:
            state["products"] = self.products


def _dots(left: list[Tensor], right: list[Tensor]) -> Tensor:
    """Inner products of each of some vectors with each of others, in float64."""
    dots = [a.dot(b) for a in left for b in right]
    return torch.stack(dots).double().view(len(left), -1) if dots else torch.zeros(len(left), len(right)).double()


def _bordered(matrix: Tensor, column: list[float], row: list[float]) -> Tensor:
    """A matrix with one more column and row, which end in the same entry."""
    wider = torch.cat([matrix, matrix.new_tensor(column[:-1]).view(-1, 1)], dim=1)
    return torch.cat([wider, matrix.new_tensor(row).view(1, -1)])


class TorchSteps:
    """One ``step``: up to ``max_iter`` iterations.

    Args:
        function: evaluates the closure.
        point: its parameters.
        memory: from the last step; updated.
        options: torch's.
        first: evaluation at the present parameters.
    Attributes:
        best: the last evaluation, as in torch. The last of ``max_iter`` fixed steps is not evaluated; then it is that
            of the point before.
    """

    n_hvp = n_negative_curvature = 0

    def __init__(
        self,
        function: ClosureFunction,
        point: FlatParameters,
        memory: Memory,
        options: LBFGSOptions,
        first: Evaluation,
    ) -> None:
        self.function, self.point, self.memory, self.options, self.best = function, point, memory, options, first
        self.n_iter = 0
        self.history: list[Iteration] = []
        self._base: Tensor | None = None  # the start of the present iteration
        self._trial = torch.empty(point.numel, dtype=point.dtype, device=point.device)
        self._met_nonfinite = False  # in the present iteration

    @property
    def n_eval(self) -> int:
        return self.function.n_eval

    def run(self) -> Status:
        """Iterate from the present point, which is finite; return why it ended."""
        try:
            return self._iterate()
        except BaseException:
            self._return_to_base()
            raise

    def shorten_last_step(self) -> None:
        """Shorten the last fixed step of the previous call, which led to NaN or infinity, until it is finite."""
        memory = self.memory
        assert memory.d is not None
        self._base = self.point.gather().sub_(memory.d, alpha=float(memory.t))
        try:
            d_norm = self.point.space.largest(largest(memory.d))
            memory.t, evaluation = self._fixed_step(float(memory.t) * BACKTRACK, d_norm, is_last=False)
        except BaseException:
            self._return_to_base()
            raise
        self._base = None
        self.best = evaluation or self.best

    def _iterate(self) -> Status:
        options, current = self.options, self.best
        self._record(current, 0.0)
        while self.n_iter < options.max_iter:
            self.n_iter += 1
            t, slope, d_norm = self._direction(current)
            if slope > -options.tolerance_change:
                self.memory.t = t
                return Status.precision_limit
            self._base, self._met_nonfinite = self.point.gather(), False
            if options.line_search_fn is None:
                t, evaluation = self._fixed_step(t, d_norm, is_last=self.n_iter == options.max_iter)
            else:
                t, evaluation = self._searched_step(current, t, slope, d_norm)
            self.memory.t, self._base = t, None
            if evaluation is not None:
                self.best = current = evaluation
                self._record(current, float(t))
            if status := self._stop_status(current, abs(t) * d_norm):
                return status
        return Status.max_iter

    def _direction(self, current: Evaluation) -> tuple[Scalar, Scalar, Scalar]:
        """Set the direction; return the first step along it, its slope and its largest absolute entry."""
        memory, lift = self.memory, self._like_lr
        d = memory.next_direction(current.grad, self.options.history_size)
        slope, d_norm = self._slope_and_size(current.grad, d)
        if math.isnan(slope) or not math.isfinite(d_norm):  # the pairs overflow
            d = memory.restart(current.grad)
            slope, d_norm = self._slope_and_size(current.grad, d)
        memory.prev_flat_grad, memory.prev_loss = current.grad, current.value
        t = self.options.lr
        if memory.n_iter == 1:
            t = min(1.0, 1.0 / self.point.space.total(current.grad.abs().sum())[0]) * t
        return t, lift(slope), lift(d_norm)

    def _slope_and_size(self, grad: Tensor, d: Tensor) -> tuple[float, float]:
        """Inner product of gradient and direction, and the direction's largest absolute entry."""
        space = self.point.space
        if not space.is_shared:
            return grad.dot(d).item(), largest(d)
        size = largest(d)
        _, low, high, slope = space.evaluation(d.device, 0.0, -size, size, grad.dot(d))
        return float(slope), max(-low, high)

    def _like_lr(self, number: float) -> Scalar:
        """The number as a tensor if the learning rate is one, as in torch."""
        return torch.tensor(number, dtype=self.point.dtype) if isinstance(self.options.lr, Tensor) else number

    def _fixed_step(self, t: Scalar, d_norm: Scalar, is_last: bool) -> tuple[Scalar, Evaluation | None]:
        """Move by ``t`` and, unless it is the last step, evaluate; shortened while that gives NaN or infinity."""
        while True:
            if self._move(t, d_norm):
                if is_last:
                    return t, None
                evaluation = self.function.evaluate()
                if evaluation.is_finite:
                    return t, evaluation
            self._met_nonfinite = True
            if self.function.n_eval >= self.options.max_eval or not t * d_norm:
                return self._undo(), None
            t = t * BACKTRACK

    def _searched_step(
        self, current: Evaluation, t: Scalar, slope: Scalar, d_norm: Scalar
    ) -> tuple[Scalar, Evaluation | None]:
        """Move to the result of the line search."""
        d = self.memory.d
        assert d is not None

        def phi(t: Scalar) -> LinePoint:
            if self._move(t, d_norm):
                evaluation = self.function.evaluate(d)
                slope_there = evaluation.slope(d)
                if math.isfinite(evaluation.value) and math.isfinite(slope_there):
                    return LinePoint(t, evaluation.value, self._like_lr(slope_there), evaluation)
            self._met_nonfinite = True
            return LinePoint(t, math.inf, self._like_lr(math.nan), current)

        max_ls = self.options.max_eval - self.function.n_eval
        end = strong_wolfe(phi, LinePoint(0, current.value, slope, current), t, d_norm, max_ls)
        if end.t == 0:
            return self._undo(), None
        self._move(end.t, d_norm)
        return end.t, end.evaluation

    def _move(self, t: Scalar, d_norm: Scalar) -> bool:
        """Move the parameters by ``t`` along the direction; False if they would not be finite."""
        assert self._base is not None
        assert self.memory.d is not None
        if not abs(t) * d_norm < 0.5 * torch.finfo(self.point.dtype).max:
            return False
        torch.add(self._base, self.memory.d, alpha=float(t), out=self._trial)
        self.point.scatter_(self._trial)
        # A parameter of a narrower dtype may overflow where the flat vector does not.
        if self.point.is_uniform:
            return True
        return not self.point.space.largest(not torch.isfinite(self.point.gather()).all())

    def _undo(self) -> int:
        """Undo the step and return its length, 0; after NaN or infinity the next iteration is a restart."""
        assert self._base is not None
        self.point.scatter_(self._base)
        if self._met_nonfinite:
            self.memory.n_iter = 0
        return 0

    def _return_to_base(self) -> None:
        if self._base is not None:
            self.point.restore_(self._base)
            # A step of length 0 makes no pair, so that the next call repeats this iteration.
            self.memory.t = 0
            self.memory.n_iter -= 1

    def _stop_status(self, current: Evaluation, moved: Scalar) -> Status | None:
        """Torch's rules for stopping, in torch's order; but whatever meets ``tolerance_grad`` is converged."""
        options, is_searched = self.options, self.options.line_search_fn is not None
        is_last = self.n_iter == options.max_iter
        if self._met_nonfinite and not moved:
            return Status.non_finite
        if current.norm <= options.tolerance_grad and (is_searched or not is_last):
            return Status.converged
        if is_last:
            return Status.max_iter
        if self.function.n_eval >= options.max_eval:
            return Status.max_eval
        if moved <= options.tolerance_change or abs(current.value - self.memory.prev_loss) < options.tolerance_change:
            return Status.line_search_failed if is_searched and not moved else Status.precision_limit
        return None

    def _record(self, current: Evaluation, t: float) -> None:
        self.history.append(Iteration(current.value, current.norm, t, self.function.n_eval, 0))
