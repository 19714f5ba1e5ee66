"""What a CUDA graph must not capture: a step that the host would have to think about when the graph is replayed."""

from __future__ import annotations

import torch

from descend.core.optimizer import MethodOptimizer


def is_capturing() -> bool:
    """Whether the current stream records a CUDA graph."""
    return bool(torch.cuda.is_initialized()) and torch.cuda.is_current_stream_capturing()  # type: ignore[no-untyped-call]


def refuse_new_plan(optimizer: MethodOptimizer) -> None:
    """Raise ``RuntimeError`` if a graph is being captured: a plan is made by reading what is on the device."""
    if is_capturing():
        raise RuntimeError(
            f"{type(optimizer).__name__}: the first step, and the first after an edit of groups, options or state, "
            "cannot be captured: it reads step counts from the device. Take one before the capture. Nothing has moved."
        )


def check_capture(optimizer: MethodOptimizer, waits: bool) -> None:
    """Raise ``RuntimeError`` if a graph is being captured that could not be replayed.

    Args:
        optimizer: the optimizer.
        waits: whether the host waits for the device in a step.
    """
    if not is_capturing():
        return
    name = type(optimizer).__name__
    if optimizer.options.rounding == "stochastic":
        raise RuntimeError(
            f"{name}: a step with rounding='stochastic' cannot be captured: every replay would round with the noise of "
            "this one. Take it outside of the graph, or choose rounding='compensated'. Nothing has moved."
        )
    # Without a step count every replay is right, as with torch's SGD, which has no such option either.
    counts_nothing = {method: not method.counts_steps and not method.ends_steps for method, _ in optimizer.methods()}
    if not all(group.get("capturable", counts_nothing[optimizer.method_of(group)]) for group in optimizer.param_groups):
        cure = "Make it with capturable=True." if "capturable" in optimizer.defaults else f"{name} has no such option."
        raise RuntimeError(
            f"Attempting CUDA graph capture of step() for an instance of {name} but some param_groups' capturable is "
            f"False: a replay would repeat this step's learning rate and bias correction. {cure}"
        )
    if waits:
        raise RuntimeError(
            f"{name}: a step that waits for the device cannot be captured. nonfinite='raise', sparse='exact', a "
            "Monitor, parameters on the CPU and sharded parameters wait. Nothing has moved."
        )
