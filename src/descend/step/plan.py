"""What a step will do: worked out once, reused while it can be proved to be still true."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from descend.backends import EAGER, FOREACH, available
from descend.backends.backend import Backend
from descend.backends.cpu.probe import make_probe, same_objects
from descend.core import memory
from descend.core.codecs import Codec, Formats, is_plain, stored_names
from descend.core.measures import Sample
from descend.core.method import MethodRef, ref_to
from descend.core.optimizer import MethodOptimizer
from descend.core.signature import Kind, Signature, signature
from descend.core.update import Cell
from descend.distributed.agreement import Agreement
from descend.distributed.dtensors import has_whole_rows, layout_of, local_of
from descend.distributed.local_params import LocalParams
from descend.distributed.ranks import Ranks, Share
from descend.distributed.shard_state import as_sharded, state_mesh
from descend.norms import clip
from descend.sparse.attach import Tables
from descend.state.container import State, checked_state
from descend.state.formats import formats_of
from descend.state.make import reserve_state
from descend.step.decide import Decider, counts_on_device
from descend.step.offload import make_offloaded
from descend.step.stages import Stage, make_stages, make_updates, run_stages
from descend.step.sums import SummedParam, Sums
from descend.step.updates import Entry


class Placement(NamedTuple):
    """Where a parameter's rule runs.

    Attributes:
        name: the parameter's name, or its position in the groups.
        backend: name of the backend.
        reason: why the compiled backends cannot run it, or were not asked; else its dtype.
    """

    name: str
    backend: str
    reason: str


class Position(NamedTuple):
    """The index of a parameter's group, and its index in the group."""

    group: int
    offset: int


class _Group(NamedTuple):
    """A group as it was planned: its number, parameters, method and rule, and whether autograd shall see the step."""

    number: int
    params: list[Tensor]
    method: MethodRef
    rule: Any
    is_graphed: bool


class Plan:
    """Every parameter with a gradient, sorted into updates.

    Making a plan validates everything; it compiles nothing and changes nothing. A step then calls, in this order,
    ``compile``, ``read``, ``total_norm`` if it wants to know it, ``set_scalars``, ``make_state``, ``form_scalars`` and
    ``run``. Only ``run`` moves parameters, and it raises nothing of its own. ``is_valid`` tells whether the next step
    may use the same plan.

    Args:
        optimizer: the optimizer.
        tables: its parameters in exact mode.
        only_with_grad: leave out parameters without a gradient; else gradients of sharded parameters are not read.
            Default: True.
        position: of the one parameter to plan for. Default: all parameters of all groups.
        previous: the plan of the last step, which is not valid any more. Default: None.
    Attributes:
        decider: what decides the steps on their devices; None where the host does.
        is_on_cuda: whether some of it runs on a CUDA device.
    """

    def __init__(
        self,
        optimizer: MethodOptimizer,
        tables: Tables,
        only_with_grad: bool = True,
        position: Position | None = None,
        previous: Plan | None = None,
    ) -> None:
        optimizer.check_step_options()
        self._options, self._measures = optimizer.options, optimizer.observer is not None
        self._position, self._only_with_grad = position, only_with_grad
        self._is_compiled = self._has_state = False
        for group in optimizer.param_groups:
            optimizer.check_has_options(group)
        self._requested = optimizer.requested_backend()
        self._is_inference = torch.is_inference_mode_enabled()  # which decides what may be written
        self._state = optimizer.state
        if isinstance(self._state, State) and self._state.owner() is not optimizer:
            self._state.exposed = True  # two optimizers write it: neither knows of the other's steps
        self._groups = [
            _planned(optimizer, index, group, params) for index, group, params in self._selected(optimizer.param_groups)
        ]
        listed = [param for group in self._groups for param in group.params]
        last = previous._locals if previous else None
        self._locals: LocalParams = LocalParams(optimizer, listed, last, reads=only_with_grad)
        self._ranks = Ranks(self._locals.shares())
        self._agreement = Agreement(self._ranks) if self._ranks.meshes else None
        self._collectives = self._collectives_of_norm(optimizer, listed) if self._agreement else {}
        entries: list[Entry] = []
        for planned in self._groups:
            for param in planned.params:
                if (not only_with_grad or param.grad is not None) and self._locals.is_here(param):
                    entries.append(self._entry(optimizer, tables, planned, param))
        self._ending = [ref for ref in dict.fromkeys(group.method for group in self._groups) if ref().ends_steps]
        self._entries = _in_order_where_memory_is_shared(entries, self._locals)
        if self._requested not in ("auto", EAGER.name):
            self._refuse_another_backend(optimizer)
        self._stages: list[Stage] = []
        if self._locals.hosts:
            self._updates = make_offloaded(optimizer, tables, self._entries, self._locals.hosts)
        elif self._locals.wholes():
            self._stages = make_stages(optimizer, tables, self._entries, self._locals)
            self._updates = [update for stage in self._stages for update in stage.updates]
        else:
            self._updates = make_updates(optimizer, tables, self._entries)
        self._sums = self._make_sums(optimizer)
        takes_device = [update.takes_device for update in self._updates]
        self._is_on_devices, self._may_be_decided_there = any(takes_device), all(takes_device)
        self._counts_on_device = self._asks_for_device_counts(optimizer)
        self.decider = self._make_decider(optimizer)
        self.is_on_cuda = any(update.device.type == "cuda" for update in self._updates)
        self._probe: Any = None

    def again(self, optimizer: MethodOptimizer, tables: Tables) -> Plan:
        """The same plan, made anew because a backend has declined a rule."""
        return Plan(optimizer, tables, self._only_with_grad, self._position, previous=self)

    @property
    def waits(self) -> bool:
        """Whether the host waits for a device in each step."""
        if self._locals.hosts or (self._sums is not None and self._is_on_devices):
            return True
        asks = self._options.wants_norm or self._options.amp is not None or self._counts_on_device
        return asks and self.decider is None and not all(update.counts_on_device for update in self._updates)

    def _make_sums(self, optimizer: MethodOptimizer) -> Sums | None:
        """What rules with sums need; None if there are no such rules.

        Raises:
            RuntimeError: if ranks cannot form them together.
        """
        params = [
            SummedParam(param, self._locals.share_of(param), group.method, group.rule)
            for group in self._groups
            if signature(group.rule).summed is not None
            for param in group.params
        ]
        if not params:
            return None
        name = type(optimizer).__name__
        if self._position is not None and params[0].share is not None and self._ranks.meshes:
            raise RuntimeError(
                f"{name}: inside backward the sums over {optimizer.name_of(params[0].param)} cannot be reduced: its "
                "gradient may come at another time on other ranks. Step after backward. Nothing has moved."
            )
        if self._ranks.rounds > 1 and any(param.method().sums_over == "all" for param in params):
            raise RuntimeError(
                f"{name}: sums over all parameters need a device mesh that holds the ranks of all others. "
                "Nothing has moved."
            )
        return Sums(self._ranks, params, [each for update in self._updates for each in update.summed])

    def _asks_for_device_counts(self, optimizer: MethodOptimizer) -> bool:
        """Whether something asks for step counts on the device, of parameters that are on one."""
        groups = optimizer.param_groups
        return self._is_on_devices and counts_on_device(optimizer, [groups[group.number] for group in self._groups])

    def _make_decider(self, optimizer: MethodOptimizer) -> Decider | None:
        """What decides the steps on their devices; None if there is nothing to decide, or somebody waits for it.

        A host that must know of each step waits for the device once: to raise, to tell an observer or other ranks, to
        form scalars of sums, to step parameters on the CPU too, or to count for a method that does so itself.
        """
        updates, options = self._updates, optimizer.options
        is_alone = self._agreement is None and not self._stages and optimizer.observer is None
        if not updates or not is_alone or self._sums is not None or options.nonfinite == "raise":
            return None
        if not self._may_be_decided_there:
            return None
        if self._counts_on_device:
            if not all(update.may_count_on_device(optimizer) for update in updates):
                return None
            for update in updates:
                update.counts_on_device = True
        if not options.wants_norm and options.amp is None:
            return None
        return Decider(optimizer, updates, self._position)

    def _collectives_of_norm(self, optimizer: MethodOptimizer, listed: list[Tensor]) -> dict[str, str]:
        """What decides which collectives a norm needs: ranks must agree about it, or would wait for each other."""
        alone = "" if self._position is None or not listed else optimizer.name_of(listed[0])
        return {"meshes that are in no larger one": str(self._ranks.rounds), "which gradient is next": alone}

    def _selected(self, groups: list[dict[str, Any]]) -> list[tuple[int, dict[str, Any], list[Tensor]]]:
        """The groups of this plan: index, options, and the parameters in it, which may be one of the group's."""
        if self._position is None:
            return [(index, group, group["params"]) for index, group in enumerate(groups)]
        index, offset = self._position
        return [(index, group, group["params"][offset : offset + 1]) for group in groups[index : index + 1]]

    def _entry(self, optimizer: MethodOptimizer, tables: Tables, planned: _Group, param: Tensor) -> Entry:
        index, _, method, _, differentiable = planned
        group = optimizer.param_groups[index]
        rule = method().rule_of(param, group)
        method().check_param(param, group)
        optimizer.check_made_by(param, group)
        tables.check_dense(optimizer, param, group)
        state = dict.get(self._state, param) or {}
        takes = signature(rule)
        local, share = self._locals.of(param), self._locals.share_of(param)
        self._check_whole(optimizer, param, takes.kind, share)
        self._check_rows(optimizer, param, takes.kind)
        grad_dtype = local.dtype if local.grad is None else local.grad.dtype
        formats = formats_of(optimizer, param, grad_dtype, rule, group, state)
        names = stored_names(takes.state, formats)
        tensors = checked_state(optimizer, param, local, names, group, state)
        self._check_place(optimizer, param, group, tensors)
        sparse = optimizer.meaning_of_gradient(param, group)
        entry = Entry(
            param, local, share, index, method, rule, state, EAGER, "backend='eager'", formats, sparse, in_order=False
        )
        if differentiable:
            self._check_plain(optimizer, param, formats)
            self._check_not_cut(optimizer, param)
            self._check_no_sums(optimizer, param, takes)
            return entry._replace(local=param, share=None, reason="differentiable=True", in_order=True)
        return self._routed(entry, tensors)

    def _routed(self, entry: Entry, tensors: Sequence[tuple[str, Tensor]]) -> Entry:
        """The entry with the first backend that can run it; ``tensors`` of its state, those that exist."""
        reason = None  # of a compiled backend, whichever of the others runs it then
        for backend in available(self._requested, signature(entry.rule).kind):
            why_not = _why_not(backend, entry, tensors)
            if why_not is None:
                return entry._replace(backend=backend, reason=reason if backend is FOREACH else None)
            if reason is None or (reason.startswith("on ") and backend is not FOREACH):
                reason = why_not  # a backend for other devices has less to say
        return entry._replace(reason=reason or entry.reason)

    def _check_whole(self, optimizer: MethodOptimizer, param: Tensor, kind: Kind, share: Share | None) -> None:
        """Raise ``RuntimeError`` if a rule of whole matrices would see a part of one."""
        if kind == "matrix" and share is not None and share.replicas < share.mesh.size():
            raise RuntimeError(
                f"{type(optimizer).__name__}: a rule of whole matrices cannot update shards, but "
                f"{optimizer.name_of(param)} has {layout_of(as_sharded(optimizer, param))}: leave it unsharded "
                "(Replicate, no shard_state), or give its group an element-wise method, such as 'adamw'. Nothing has "
                "moved."
            )

    def _check_rows(self, optimizer: MethodOptimizer, param: Tensor, kind: Kind) -> None:
        """Raise ``RuntimeError`` if a rule of rows would see parts of rows."""
        if kind == "row" and not has_whole_rows(sharded := as_sharded(optimizer, param)):
            raise RuntimeError(
                f"{type(optimizer).__name__}: a rule of rows cannot update parts of rows, but "
                f"{optimizer.name_of(param)} has {layout_of(sharded)}: shard its first dimension. Nothing has moved."
            )

    def _check_place(
        self,
        optimizer: MethodOptimizer,
        param: Tensor,
        group: Mapping[str, Any],
        tensors: Sequence[tuple[str, Tensor]],
    ) -> None:
        """Raise ``RuntimeError`` if state is not where ``state_device`` says, or the step needs it elsewhere."""
        who, local = type(optimizer).__name__, self._locals.of(param)
        for name, tensor in tensors:
            if tensor.device != local.device:
                raise RuntimeError(
                    f"{who}: {name} of {optimizer.name_of(param)} is on {tensor.device}, but with "
                    f"state_device={optimizer.options.state_device!r} it must be on {local.device}: "
                    "load_state_dict(state_dict()) moves it. Nothing has moved."
                )
        is_asked = [flag for flag in ("differentiable", "capturable") if group.get(flag)]
        if is_asked and self._locals.hosts.bucket_of(param) is not None:
            raise RuntimeError(
                f"{who}: with state_device='cpu' the host waits for gradients and steps {optimizer.name_of(param)} "
                f"itself: leave out `{is_asked[0]}`, or state_device. Nothing has moved."
            )

    def _check_not_cut(self, optimizer: MethodOptimizer, param: Tensor) -> None:
        """Raise ``RuntimeError`` if other ranks would take a part of a step that is to be differentiated."""
        if self._locals.cut_of(param) is not None:
            raise RuntimeError(
                f"{type(optimizer).__name__}: a step that other ranks take a part of cannot be differentiated: leave "
                "out `differentiable`, or shard_state. Nothing has moved."
            )

    def _check_plain(self, optimizer: MethodOptimizer, param: Tensor, formats: Formats) -> None:
        """Raise ``RuntimeError`` if autograd could not follow how a step that is to be differentiated is stored."""
        if not is_plain(formats):
            raise RuntimeError(
                f"{type(optimizer).__name__}: a step whose results are kept in 8 bits, or rounded at random or with "
                f"compensation, cannot be differentiated ({optimizer.name_of(param)}): leave out `differentiable`, or "
                "state_dtype and rounding. Nothing has moved."
            )

    def _check_no_sums(self, optimizer: MethodOptimizer, param: Tensor, takes: Signature) -> None:
        """Raise ``RuntimeError`` if a step that is to be differentiated needs numbers that autograd does not see."""
        if takes.summed is not None:
            raise RuntimeError(
                f"{type(optimizer).__name__}: a step with sums over {optimizer.name_of(param)} cannot be "
                "differentiated: leave out `differentiable`. Nothing has moved."
            )

    def _refuse_another_backend(self, optimizer: MethodOptimizer) -> None:
        """Raise ``RuntimeError`` if the backend that was asked for cannot run a parameter."""
        for entry in self._entries:
            if entry.reason:
                raise RuntimeError(
                    f"{type(optimizer).__name__}: backend={self._requested!r} cannot run "
                    f"{optimizer.name_of(entry.param)}: {entry.reason}. With backend='auto' another one "
                    "runs such parameters."
                )

    # What a step asks, in this order.

    def compile(self) -> None:
        """Compile, or load from disk, what the step will call. Needed once; may raise ``RuleError``."""
        if not self._is_compiled:
            for update in self._updates:
                update.compile(self._options.wants_norm, self._measures)
            make_probe([], [], [], np.zeros((0, 2), np.int64))  # compiles the probe
            self._is_compiled = True

    def compile_rows(self, optimizer: MethodOptimizer) -> None:
        """Compile, or load from disk, what steps with sparse gradients would call."""
        for entry in self._entries:
            param, _, *state = entry.formats
            wide = torch.promote_types(entry.param.dtype, torch.float32)
            scalars = len(signature(entry.rule).given)
            rows = entry.backend.rows(entry.rule, scalars, (param, wide, *state), False, entry.local)
            rows.compile(optimizer.options.wants_norm, self._measures)

    def read(self, optimizer: MethodOptimizer) -> None:
        """Check the indices of sparse gradients, which are new at every step, and sum their duplicates."""
        for update in self._updates:
            update.read(optimizer)

    def total_norm(self, optimizer: MethodOptimizer) -> float:
        """Of all gradients, in float64; its bits do not depend on threads or on how the plan came about.

        Raises:
            RuntimeError: if ranks that share parameters disagree about the optimizer.
        """
        found = _waited_for([update.sum_of_squares() for update in self._updates])
        if self._agreement is None:
            total = sum(found)
        else:
            sums: dict[Share | None, list[float]] = {None: [0.0]}
            for update, squares in zip(self._updates, found, strict=True):
                sums.setdefault(update.share, [0.0])[0] += squares
            totals, agreed = self._ranks.reduce(sums, self._agreement.numbers(optimizer, self._collectives))
            self._agreement.check(optimizer, agreed, self._collectives)
            (total,) = self._ranks.agree(totals)
        if math.isfinite(total):
            return math.sqrt(total)
        # Not finite, or finite with squares that overflow: the slower way can tell.
        self._locals.read(optimizer)
        grads: defaultdict[Share | None, list[Tensor]] = defaultdict(list)
        for entry in self._entries:
            if entry.local.grad is not None:
                grads[entry.share].append(entry.local.grad)
        return float(clip.norm_of_parts(grads, 2.0, self._ranks))

    def nonfinite_gradients(self, optimizer: MethodOptimizer) -> list[str]:
        """Names of the parameters whose gradients have a NaN or Inf, and the ranks if there are several."""
        self._locals.read(optimizer)
        names = [
            optimizer.name_of(entry.param)
            for entry in self._entries
            if entry.local.grad is not None and not clip.is_finite(entry.local.grad)
        ]
        if not self._ranks.meshes:
            return names
        by_rank = self._ranks.gather(names)
        return [f"{name} on rank {rank}" for rank, names in by_rank.items() for name in names]

    def shake_hands(self, optimizer: MethodOptimizer) -> None:
        """Raise ``RuntimeError`` if ranks that share parameters disagree about the optimizer. Asked once."""
        if self._agreement is not None and not self._stages:
            self._agreement.shake_hands(optimizer)

    def confirm(self, optimizer: MethodOptimizer) -> None:
        """Wait, if ranks will exchange what they update, until all of them are about to; raise if they disagree."""
        if self._agreement is not None and self._stages:
            grads = [entry.param.grad for entry in self._entries if entry.sparse]
            named = [tuple(grad._indices().shape) for grad in grads if grad is not None]
            self._agreement.confirm(optimizer, {"sparse gradients": f"indices of shapes {named}" if named else ""})

    def set_scalars(self, optimizer: MethodOptimizer, scale: float) -> None:
        """Form every scalar of the coming step, so that an option that cannot be used raises before anything moves."""
        try:
            for update in self._updates:
                update.set_scalars(optimizer, scale)
        except Exception:
            for group in optimizer.param_groups:
                optimizer.method_of(group).check_group(group)  # says which option it was
            raise

    def form_scalars(self, optimizer: MethodOptimizer) -> None:
        """Form the scalars that rules with sums need; raises, before anything moves, whatever the method raises."""
        if self._sums is not None:
            self._sums.form(optimizer)

    @property
    def is_atomic(self) -> bool:
        """Whether ``run`` is all or nothing, whatever interrupts it, and no state is missing."""
        return (
            self._has_state
            and not self._stages
            and not self._ending
            and len(self._updates) == 1
            and self._updates[0].is_atomic
        )

    @torch.no_grad()
    def make_state(self, optimizer: MethodOptimizer) -> None:
        """Make the state that is missing, and begin to watch all tensors. Needed once."""
        if self._has_state:
            return
        reserve_state(optimizer, [(entry.method(), entry.param, entry.rule) for entry in self._entries])
        for entry in self._entries:
            optimizer.note_made_by(entry.param, optimizer.param_groups[entry.group])
        cells: dict[Tensor, Cell] = {}
        self._tensors: list[tuple[Tensor, str, Tensor]] = []
        for update in self._updates:
            update.make_state(optimizer)
            self._tensors += update.state_tensors()
            cells |= update.cells()
        listed = [param for group in self._groups for param in group.params]
        watched = [self._locals.of(param) for param in listed]
        watched += [*self._locals.wholes(), *self._locals.hosts.originals()]
        spans = np.concatenate([np.zeros((0, 2), np.int64), *(update.written() for update in self._updates)])
        written = spans[np.argsort(spans[:, 0])]
        tensors = [local_of(tensor) for _, _, tensor in self._tensors]
        wrappers = [self._locals.wrapper_of(param) for param in listed]
        reads_cells = all(entry.local in cells for entry in self._entries if entry.share is not None)
        reads_alone = reads_cells and not self._stages and not self._locals.hosts
        wrappers = wrappers if reads_alone and self._locals.are_direct() else []
        self._probe = make_probe(watched, [cells.get(param) for param in watched], tensors, written, wrappers)
        self._has_state = True

    def run(self, optimizer: MethodOptimizer, sample: Sample | None = None) -> None:
        """Take the step; add to ``sample`` what it asks for."""
        if self._stages:
            run_stages(optimizer, self._stages, state_mesh(optimizer), sample)
            return
        for update in self._updates:
            update.run(optimizer, sample)

    def release(self) -> None:
        """Drop the gradients that were read."""
        for update in self._updates:
            update.release()
        self._locals.release()

    def end_step(self, optimizer: MethodOptimizer) -> None:
        """Tell the methods that want to know it that the step has been taken."""
        for ending in self._ending:
            method = ending()
            method.end_step([group for group in optimizer.param_groups if optimizer.method_of(group) is method])

    # Between steps.

    def is_valid(self, optimizer: MethodOptimizer) -> bool:
        """Whether nothing this plan relies on has changed since it was made."""
        groups = self._selected(optimizer.param_groups)
        if (
            not self._has_state
            or optimizer.options is not self._options
            or optimizer.state is not self._state
            or len(groups) != len(self._groups)
            or optimizer.requested_backend() != self._requested
            or torch.is_inference_mode_enabled() != self._is_inference
        ):
            return False
        for (_, group, listed), (_, params, planned, rule, is_graphed) in zip(groups, self._groups, strict=True):
            method = optimizer.method_of(group)
            if (
                not same_objects(listed, params)
                or planned() is not method
                or method.rule_for(group) is not rule
                or _is_graphed(group) != is_graphed
            ):
                return False
        if self._is_on_devices and self._counts_on_device != self._asks_for_device_counts(optimizer):
            return False
        exposed = not isinstance(self._state, State) or self._state.exposed
        if exposed and not self._has_its_tensors():
            return False
        return self._is_as_probed(optimizer, exposed) and all(update.is_valid(optimizer) for update in self._updates)

    def _is_as_probed(self, optimizer: MethodOptimizer, exposed: bool) -> bool:
        """Whether all tensors are as they were. Addresses of gradients that moved are followed."""
        if not self._locals:
            return bool(self._probe.revalidate(state=exposed))
        if not self._probe.unwraps:
            return self._locals.read(optimizer) and bool(self._probe.revalidate(state=exposed))
        if self._probe.revalidate(state=exposed):
            return True
        # Other objects may describe the placements in the same way.
        return self._locals.are_direct() and bool(self._probe.revalidate(state=exposed, specs=False))

    def _has_its_tensors(self) -> bool:
        """Whether every state tensor is still the one that was put there."""
        for param, name, tensor in self._tensors:
            state = dict.get(self._state, param)
            if state is None or state.get(name) is not tensor:
                return False
        return True

    def placements(self, optimizer: MethodOptimizer) -> list[Placement]:
        """Where each parameter's rule runs, and why."""
        return [
            Placement(
                optimizer.name_of(entry.param),
                entry.backend.name,
                entry.reason or str(entry.param.dtype).removeprefix("torch."),
            )
            for entry in self._entries
        ]


def _planned(optimizer: MethodOptimizer, index: int, group: Mapping[str, Any], params: list[Tensor]) -> _Group:
    method = optimizer.method_of(group)
    return _Group(index, list(params), ref_to(method), method.rule_for(group), _is_graphed(group))


def _is_graphed(group: Mapping[str, Any]) -> bool:
    return bool(group.get("differentiable"))


def _waited_for(numbers: Sequence[float | Tensor]) -> list[float]:
    """Numbers, out of the tensors that some are in: one wait for each device."""
    if not any(isinstance(each, Tensor) for each in numbers):
        return list(numbers)  # type: ignore[arg-type]
    tensors: defaultdict[torch.device, list[Tensor]] = defaultdict(list)
    for each in numbers:
        if isinstance(each, Tensor):
            tensors[each.device].append(each)
    known = {device: iter(torch.stack(found).tolist()) for device, found in tensors.items()}
    return [next(known[each.device]) if isinstance(each, Tensor) else each for each in numbers]


def _why_not(backend: Backend, entry: Entry, tensors: Sequence[tuple[str, Tensor]]) -> str | None:
    """Why a backend cannot run an entry; None if it can."""
    rule, local, formats = entry.rule, entry.local, entry.formats
    state, stored = tensors, []
    if not is_plain(formats):
        pairs = zip(signature(rule).state, formats[2:], strict=True)
        uncoded = {name for name, format in pairs if not isinstance(format, Codec)}
        state = [(name, tensor) for name, tensor in tensors if name in uncoded]
        stored = [(name, tensor) for name, tensor in tensors if name not in uncoded]
    if entry.sparse:
        reason = backend.why_not_rows(rule, local, state)
    else:
        reason = backend.why_not(rule, local, local.grad, state)
    if reason is not None or is_plain(formats):
        return reason
    return backend.why_not_formats(rule, local, formats, stored)


def _in_order_where_memory_is_shared(entries: Sequence[Entry], params: LocalParams) -> list[Entry]:
    """Give parameters that share memory to the eager backend, one after the other.

    Memory counts as shared when two tensors of a step overlap and at least one of them is written. Eager parameters
    whose memory cannot be compared (tensor subclasses, devices other than the CPU) keep the order of the groups too.
    """
    spans = []
    for i, entry in enumerate(entries):
        state = [local_of(value) for value in entry.state.values() if isinstance(value, Tensor)]
        # What overlaps on another rank counts here too: all must take the same order.
        # So does what overlaps on a device, where copies in the host's memory stand for it.
        is_itself = params.cut_of(entry.param) is None and params.hosts.bucket_of(entry.param) is None
        local = entry.local if is_itself else entry.param
        for tensor, is_written in ((local, True), (local.grad, False), *((s, True) for s in state)):
            if tensor is not None and (span := memory.span(tensor)):
                spans.append((*span, is_written, i))
    entries, shared, counts = list(entries), memory.overlapping(spans), Counter(id(entry.param) for entry in entries)
    for i, entry in enumerate(entries):
        is_unknown = entry.backend is EAGER and entry.local.numel() > 0 and memory.span(entry.local) is None
        shares_memory = i in shared or counts[id(entry.param)] > 1
        if shares_memory or is_unknown:
            reason = entry.reason or "shares memory with another tensor of the step"
            entries[i] = entry._replace(backend=EAGER, reason=reason, in_order=True, shares_memory=shares_memory)
    return entries
