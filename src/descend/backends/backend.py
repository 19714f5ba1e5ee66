"""What a backend offers to the engine, which knows backends through this protocol alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from descend.core.codecs import Formats
from descend.core.decision import Decision
from descend.core.noise import Stream

Rule: TypeAlias = Callable[..., Any]


class RuleError(TypeError):
    """A backend cannot compile a rule; the message says why and where."""


class Declined(RuleError):  # noqa: N818
    """The same, found out late: ``why_not`` gives this reason from now on, and another backend takes the rule."""


class Launch(Protocol):
    """One rule on many tensors of equal formats. ``Backend.together`` runs it."""

    @property
    def addresses(self) -> np.ndarray | None:
        """A row a parameter, its gradient's address in column 1; None if no addresses are kept."""

    def compile(self, wants_norm: bool, measures: bool = False) -> None:
        """Compile, or load from disk, all that the other methods call. May raise ``RuleError``.

        Args:
            wants_norm: whether ``sum_of_squares`` will be called.
            measures: whether steps will be measured.
        """

    def set_state(self, tensors: Sequence[Sequence[Tensor]]) -> None:
        """Take the tensors that ``codecs.stored_names`` lists, one sequence a parameter."""

    def set_scalars(self, row: int, scale: float, scalars: Sequence[float | Tensor]) -> None:
        """Set a row of the scalars table: what the gradient is multiplied by, and the rule's scalars.

        Without those that are formed of sums: each parameter has its own, which ``set_formed`` takes.

        Tensors of shape () on the launch's device stay there: they are read when the launch runs.
        """

    def set_noise(self, row: int, key: int) -> None:
        """Set the 64 bits that all noise of a row of scalars comes from, see ``core.noise``; if there is noise."""

    def sums(self) -> np.ndarray | Tensor:
        """What the part of a rule with sums gives, summed in float64 over each parameter: a row a parameter.

        Of the present parameters, gradients, state and scalars. On a device, which nobody waits for, a tensor that is
        valid until it is called again.
        """

    def set_formed(self, values: np.ndarray) -> None:
        """Take the scalars that are formed of the sums, a row a parameter."""

    def sum_of_squares(self) -> float | Tensor:
        """Of all gradients, in float64; may overflow to Inf. On a device: shape (), valid until it is called again."""

    def measured(self) -> np.ndarray | Tensor:
        """What the last measured step has summed up: a row a parameter, columns as in ``core.measures``, float64."""

    def written(self) -> np.ndarray:
        """First and last addresses (exclusive) of what the launch writes through kept addresses, shape (n, 2)."""


class ScalarState(Protocol):
    """0-dim state tensors of many parameters, such as step counts. ``Backend.together`` and ``Rows.run`` write them."""

    def is_unchanged(self) -> bool:
        """Whether nobody else has written any of them, as far as the host can tell without waiting for a device."""


class DeviceScalarState(ScalarState, Protocol):
    """The same on a device."""

    def write(self, values: Sequence[Sequence[Any]], decision: Decision | None) -> None:
        """Set each parameter's to the numbers, or 0-dim tensors, of its row, unless the step is left out."""


class Rows(Protocol):
    """One rule on the rows that a sparse gradient touches, or on all rows with zeros for the others."""

    @property
    def rows(self) -> np.ndarray:
        """int64, those of the gradient that was read, each once, in ascending order. The host waits for a device."""

    @property
    def count(self) -> int | Tensor:
        """How many they are. On a device: shape (), and the host does not wait."""

    def compile(self, wants_norm: bool, measures: bool = False) -> None:
        """Compile, or load from disk, all that the other methods call. May raise ``RuleError``.

        Args:
            wants_norm: whether ``sum_of_squares`` will be called.
            measures: whether steps will be measured.
        """

    def read(
        self, indices: Tensor, values: Tensor, sizes: tuple[int, ...], steps: Tensor | None, step: int
    ) -> int | None:
        """Take in a gradient: its rows sorted, those named twice summed. Only scratch memory is written.

        Args:
            indices: int64 of shape (sparse dimensions, entries), contiguous.
            values: of shape (entries, ...), contiguous, float32 or wider.
            sizes: of the sparse dimensions.
            steps: int32, the step each row is current at, if that is to be checked; the sign is ignored.
            step: the step it must be.
        Returns:
            A row that is current at another step; None if there is none.
        Raises:
            IndexError: if an index is out of range.
        """

    def sum_of_squares(self) -> float | Tensor:
        """Of the gradient's rows, summed first where they are named twice. On a device: shape ()."""

    def run(
        self,
        param: Tensor,
        state: Sequence[Tensor],
        scalars: Sequence[float | Tensor],
        scale: float,
        counters: Any,
        mark: tuple[Tensor, int] | None,
        measures: bool = False,
        decision: Decision | None = None,
        noise_key: int = 0,
    ) -> None:
        """Apply the rule to the gradient times ``scale``.

        Args:
            param: the parameter.
            state: the tensors that ``codecs.stored_names`` lists.
            scalars: of the rule; tensors of shape () stay on their device.
            scale: what the gradient is multiplied by.
            counters: a ``ScalarState`` of this backend; one is added to each of its tensors.
            mark: int32, the step each row is current at; and the step that the updated rows are current at now.
            measures: whether ``measured`` will be asked.
            decision: by what else the gradient is multiplied, and whether anything moves.
            noise_key: see ``Launch.set_noise``.
        """

    def measured(self) -> np.ndarray | Tensor:
        """What the last measured ``run`` has summed up over the rows it updated, as one row of ``core.measures``."""

    def release(self) -> None:
        """Drop the gradient."""


class CatchUp(Protocol):
    """Brings rows up to date that have missed steps.

    Attributes:
        rows: int64, the rows that ``find`` has found, each once; valid until it is called again.
    """

    @property
    def rows(self) -> Tensor: ...

    def compile(self) -> None:
        """Compile, or load from disk, all that the other methods call."""

    def find(
        self, which: Tensor | range, sizes: tuple[int, ...], steps: Tensor, now: int, start: int
    ) -> tuple[np.ndarray, bool, bool] | None:
        """The distinct steps at which stale rows are current, among those named or in a range of rows.

        Args:
            which: indices of rows, of any shape; or a range of rows.
            sizes: of the parameter's dimensions.
            steps: int32, the step each row is current at; negative while its state is zero.
            now: the step to bring rows to.
            start: no row is further behind than this step.
        Returns:
            The steps, whether any of the rows has state, and whether any has none; None if an index is out of range.
        """

    def run(
        self,
        param: Tensor,
        state: Sequence[Tensor],
        scalars: np.ndarray | None,
        factors: np.ndarray | None,
        mark: bool,
    ) -> None:
        """Update the rows found, and note that they are current.

        Args:
            param: the parameter.
            state: its state tensors.
            scalars: (rounds, steps, scalars of the first rule), for rows with state; None to leave them alone.
            factors: (steps,), the scalar of the second rule, for rows without; None to leave them alone.
            mark: whether to note it row by row.
        """


class Decisions(Protocol):
    """What a backend offers so that steps are decided on a device."""

    def judge(
        self,
        values: Tensor,
        total: Tensor,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        scale: float,
        max_norm: float,
        skips_nonfinite: bool,
    ) -> None:
        """Write what ``core.decision.judge`` says into the ``values`` of a ``Decision``; the host does not wait.

        Args:
            values: to be written; the last of them is read, too.
            total: shape (), float64, the sum of the squares of all gradients; on the device of ``values``, as are:
            grad_scale: one number, what the loss was multiplied by; None for 1.
            found_inf: one number, not 0 to leave the step out; None for 0.
            scale, max_norm, skips_nonfinite: see ``core.decision.judge``.
        """

    def takes(self, device: torch.device) -> bool:
        """Whether steps on this device are decided there: not on a CPU, where the host need not wait."""

    def scalar_state(self, tensors: Sequence[Sequence[Tensor]], rows: Sequence[int] | np.ndarray) -> DeviceScalarState:
        """Keep 0-dim tensors on a device together.

        Args:
            tensors: for each parameter its scalar state, as many each.
            rows: for each parameter, the row of values that ``Backend.together`` will write.
        """


class Backend(Protocol):
    """A way to run rules.

    Attributes:
        name: what ``backend=`` calls it.
        decisions: what takes decisions on devices; None if what the backend runs reads none.
    """

    name: str
    decisions: Decisions | None

    @property
    def is_atomic(self) -> bool:
        """Whether nothing can interrupt what ``together`` returns half-way."""

    def why_not(
        self, rule: Rule | None, param: Tensor, grad: Tensor | None, state: Sequence[tuple[str, Tensor]]
    ) -> str | None:
        """Why it cannot run a rule on this parameter; None if it can. Without a rule: why it cannot sum its squares.

        Of the state, it gets what exists and is stored as a dtype.
        """

    def why_not_rows(self, rule: Rule, param: Tensor, state: Sequence[tuple[str, Tensor]]) -> str | None:
        """Why it cannot run a rule on single rows of this parameter; None if it can."""

    def why_not_formats(
        self, rule: Rule, param: Tensor, formats: Formats, stored: Sequence[tuple[str, Tensor]]
    ) -> str | None:
        """Why it cannot store what a rule returns in these formats; None if it can. Asked if not all are dtypes.

        Args:
            rule: the rule.
            param: the parameter.
            formats: of the parameter, the gradient and the state of the rule.
            stored: names and tensors of codes, scales and compensation, those that exist.
        """

    def launch(
        self,
        rule: Rule,
        scalars: int,
        formats: Formats,
        params: Sequence[Tensor],
        rows: Sequence[int] | np.ndarray,
        streams: Sequence[Stream] = (),
    ) -> Launch:
        """Prepare to apply ``rule`` to the gradients of ``params``. Compiles nothing.

        Args:
            rule: the function to apply.
            scalars: how many scalars it is given; those that are formed of sums are not counted.
            formats: of parameters, gradients and state.
            params: the parameters, all on one device.
            rows: for each parameter, its row in the scalars table.
            streams: where the noise of each parameter comes from; left out unless ``codecs.needs_noise``.
        """

    def scalar_state(self, tensors: Sequence[Tensor]) -> ScalarState:
        """Keep these 0-dim CPU tensors together."""

    def together(
        self,
        params: Sequence[Tensor],
        launches: Sequence[Any],
        counters: Any,
        scalar_state: Any,
        measures: bool = False,
    ) -> Callable[[np.ndarray | Sequence[Sequence[Any]], Decision | None], None]:
        """A function that runs launches of ``params`` and adds one to each counter.

        It also raises the parameters' version counters, and writes the scalar state that it is given: numbers in the
        order of its tensors; or for ``Decisions.scalar_state`` rows of numbers and 0-dim tensors. With ``measures``,
        each launch's ``measured`` tells afterwards what the step was like. A decision may leave all of it out.
        """

    def rows(
        self, rule: Rule, scalars: int, formats: Formats, all_rows: bool, param: Tensor, stream: Stream | None = None
    ) -> Rows:
        """Prepare to apply ``rule`` to rows of ``param``. Compiles nothing."""

    def catch_up(
        self, with_state: Rule, without_state: Rule, scalars: int, dtypes: tuple[torch.dtype, ...], param: Tensor
    ) -> CatchUp:
        """Prepare to catch up with two rules; ``dtypes`` of ``param`` and the state. Compiles nothing."""

    def sum_of_squares(self, tensors: Sequence[Tensor]) -> float | Tensor:
        """Of tensors that ``why_not`` accepts, all on one device, in float64; its bits do not depend on threads.

        On a device: shape (), and the host does not wait.
        """
