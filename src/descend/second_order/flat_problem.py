"""A problem as users state it, and as solvers see it: an objective of one flat vector."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Generic

import torch
from torch import Tensor, nn

from descend.distributed.dtensors import is_dtensor
from descend.second_order.problem.bounds import bounds_of
from descend.second_order.problem.domain import DomainErrors
from descend.second_order.problem.parameters import FlatParameters
from descend.second_order.problem.sharded_parameters import flat_parameters
from descend.second_order.problem.structure import Structure
from descend.second_order.solvers.result import Progress, Solver, X


class FlatProblem(ABC, Generic[X]):
    """A start and bounds as flat vectors, and an objective of such a vector.

    Args:
        who: the caller's name, for errors.
        x0, bounds: as ``minimize`` takes them.
        derivatives: names of the derivatives that the caller gives; they are functions of values. None if empty.
        domain_errors: exceptions that mean that a point is outside the domain of the objective.
    Attributes:
        tree: ``x0``, which the caller's functions get if it is set in place.
        parameters: those that are set in place; None for values.
        start: flat, within the bounds.
    """

    objective: Any

    def __init__(self, who: str, x0: Any, bounds: Any, derivatives: str = "", domain_errors: DomainErrors = ()) -> None:
        self.who = who
        self.tree: Any = list(x0) if hasattr(x0, "__next__") else x0  # module.parameters() can be read only once
        self.structure = structure = Structure(self.tree, who)
        flat_bounds = None if bounds is None else bounds_of(bounds, structure, who)
        self.parameters: FlatParameters | None = None
        self.is_sharded = any(map(is_dtensor, structure.leaves))
        self.is_in_place = all(isinstance(leaf, nn.Parameter) for leaf in structure.leaves)
        if self.is_sharded or self.is_in_place:
            if len({id(leaf) for leaf in structure.leaves}) < len(structure.leaves):
                raise ValueError(f"{who}: x0 must hold each parameter once, got one twice. Remove the duplicate.")
            if derivatives:
                kind = "DTensors" if self.is_sharded else "nn.Parameter"
                instead = "Leave" if self.is_sharded else "Detach x0, or leave"
                raise ValueError(
                    f"{who}: derivatives are functions of values, but x0 is made of {kind}, which are set in "
                    f"place. {instead} {derivatives} out."
                )
            if not self.is_in_place:
                self._copy_leaves()
            self.parameters = flat_parameters([{"params": structure.leaves}], who)
            if flat_bounds is not None:
                flat_bounds = self.parameters.narrow(flat_bounds[0]), self.parameters.narrow(flat_bounds[1])
            self.start = self.parameters.gather()
        else:
            self.start = structure.flatten(structure.leaves).clone()
        self.objective = self.new_objective(flat_bounds)
        self.objective.domain_errors = domain_errors
        if flat_bounds is not None:
            self.start.clamp_(*flat_bounds)

    @abstractmethod
    def new_objective(self, bounds: tuple[Tensor, Tensor] | None) -> Any:
        """The objective, within flat bounds: of ``parameters``, if there are any, else of values."""

    @property
    def holder(self) -> Any:
        """What sets the parameters, with ``move_to`` and ``forget_x``."""
        return self.objective

    def _copy_leaves(self) -> None:
        """Sharded values are optimized in place, in copies that require gradients."""
        self.structure.leaves = [leaf.detach().clone().requires_grad_() for leaf in self.structure.leaves]
        self.tree = self.structure.tree_of(self.structure.leaves)

    def split_tree(self, x: Tensor) -> Any:
        """The structure of a flat vector, with tensors of its own."""
        return (
            self.structure.unflatten(x) if self.parameters is None else self.structure.tree_of(self.parameters.split(x))
        )

    def set_parameters(self, run: Any) -> None:
        """Set parameters to the best point that a run has seen."""
        if self.parameters is not None:
            self.parameters.restore_(run.best.x if run.history else self.start)

    def tree_of(self, x: Tensor) -> X:
        """The structure of a flat vector; the parameters themselves, which have been set to it."""
        tree: X = self.tree if self.is_in_place else self.split_tree(x)
        return tree

    def check_values(self) -> None:
        """Raise an error if x is set in place, and so cannot be the result of an operation."""
        if self.parameters is not None:
            kind = "made of nn.Parameter" if self.is_in_place else "sharded (DTensors)"
            raise ValueError(
                f"{self.who}: differentiable=True needs plain tensors, but x0 is {kind}. Pass detached parameters as a "
                "dict, and let fun call the module with torch.func.functional_call."
            )

    def reporter(self, callback: Callable[[Progress], Any]) -> Callable[[Solver, Any], bool]:
        """The user's callback as a ``Run`` calls it. What the callback writes to is a copy, or is restored."""

        def report(run: Solver, point: Any) -> bool:
            if self.parameters is None:
                return call(run, point)
            self.holder.move_to(point.x)
            before = self.parameters.gather()
            is_stopped = call(run, point)
            is_same = torch.equal(before, self.parameters.gather())
            if self.parameters.space.largest(not is_same):
                self.holder.forget_x()
            return is_stopped

        def call(run: Solver, point: Any) -> bool:
            progress = Progress(
                x=self.tree_of(point.x.clone()),
                fun=point.value,
                grad=self.split_tree(point.grad.clone()),
                grad_norm=point.norm,
                n_iter=run.n_iter,
                n_eval=run.n_eval,
                n_hvp=run.n_hvp,
            )
            try:
                with torch.enable_grad():
                    answer = callback(progress)
            except StopIteration:
                return True
            try:
                return bool(answer)
            except (RuntimeError, ValueError) as error:
                raise TypeError(
                    f"{self.who}: callback must return True to stop, False or None to go on, got {answer!r:.80}."
                ) from error

        return report
