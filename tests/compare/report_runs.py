"""Comparisons made up for the tests of the report; nothing is trained."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

from descend.compare.records import Comparison, Run

NAN = math.nan


def comparison(**changes: Any) -> Comparison:
    return Comparison(
        **{
            "task": "digits",
            "summary": "handwritten digits",
            "loss_name": "cross-entropy in nats",
            "metric_name": "accuracy",
            "metric_is_error": False,
            "settings": {"steps": 60, "batch_size": 64, "task_file": None},
            "versions": {"descend": "0.9.0"},
            "machine": {"cores": 2},
            "started": "2026-01-02T03:04:05",
        }
        | changes
    )


def run(
    label: str, seed: int = 0, floor: float = 0.1, steps: int = 60, step_seconds: float = 0.001, **changes: Any
) -> Run:
    """Return a run whose loss falls from 2.3 to about ``floor``, with noise that depends on the seed alone."""
    noise = random.Random(seed)
    losses = [floor + (2.3 - floor) * math.exp(-6 * i / steps) * noise.uniform(0.95, 1.05) for i in range(steps)]
    jitter = [step_seconds * noise.uniform(0.98, 1.02) for _ in range(steps)]
    values: dict[str, Any] = {
        "label": label,
        "spec": label,
        "optimizer": f"torch.optim.{label}",
        "options": {"lr": 0.01, "betas": [0.9, 0.999]},
        "lr": 0.01,
        "seed": seed,
        "status": "finished",
        "losses": losses,
        "seconds": [sum(jitter[: i + 1]) for i in range(steps)],
        "evaluations": list(range(1, steps + 1)),
        "parts": {"data": 1e-4, "forward": 3e-4, "backward": 5e-4, "optimizer": step_seconds / 10},
        "first_step_seconds": 0.01,
        "test_steps": [steps // 2, steps],
        "test_losses": [floor * 2, floor + 0.01 * noise.random()],
        "test_metrics": [0.8, 0.9],
        "state_bytes": [209_000],
    }
    return Run(**(values | changes))


def diverged(label: str, at: int = 3, **changes: Any) -> Run:
    """Return a run as it is read from a file: its NaN is None."""
    values = {"losses": [2.3, 9.0, 80.0, None][: at + 1], "seconds": [0.1, 0.2, 0.3], "evaluations": [1, 2, 3]}
    ends = {"test_steps": [3], "test_losses": [None], "test_metrics": [None], "state_bytes": [None]}
    return run(label, **(values | ends | {"status": "diverged", "diverged_at": at, "parts": {}} | changes))


def seeds(label: str, floors: Sequence[float], **changes: Any) -> list[Run]:
    return [run(label, seed, floor, **changes) for seed, floor in enumerate(floors)]


def rich() -> tuple[Comparison, list[Run]]:
    """Return a sweep with everything: curves that coincide, one slow optimizer, one that diverges, one that stops."""
    runs = []
    for lr, floor in ((0.001, 0.3), (0.01, 0.1), (0.1, 0.6)):
        for seed in range(3):
            runs.append(run("adamw", seed, floor, lr=lr))
            runs.append(run("torch.adamw", seed, floor * (1 + 1e-7), lr=lr, step_seconds=0.002))
            runs.append(run("sgd", seed, 2 * floor, lr=lr) if lr < 0.1 else diverged("sgd", lr=lr, seed=seed))
    runs += seeds("slow", (0.5, 0.51, 0.52), step_seconds=0.5, parts={"forward": 3e-4, "optimizer": 0.499})
    runs += seeds("lbfgs", (0.2,), lr=None, steps=20, stopped="the gradient is below tolerance_grad", parts={})
    runs += [diverged("sgd:lr=100", lr=100.0, seed=seed) for seed in range(3)]
    return comparison(tuned="every rate of three was tried"), runs


HOSTILE = "<script>window.hacked=1</script>&lt;<img src=x onerror=window.hacked=2>$x$" + "m" * 60


def cases() -> dict[str, tuple[Comparison, list[Run]]]:
    """Return comparisons that have little to show, too much, or what must not be believed."""
    hostile = comparison(task=f"</title></script>{HOSTILE}", summary=HOSTILE, loss_name=HOSTILE, metric_name=HOSTILE)
    return {
        "nothing": (comparison(), []),
        "one step": (comparison(metric_name=None), [run("sgd", steps=1, test_steps=[1], test_losses=[2.0])]),
        "no steps": (comparison(), [Run("sgd", "sgd", "x", {}, 0.1, 0)]),
        "all diverged": (
            comparison(),
            [diverged("sgd", seed=0), diverged("adam", seed=0, at=1), diverged("adam", seed=1)],
        ),
        "thirty": (comparison(), [run(f"optimizer{i}", floor=0.1 + 0.02 * i) for i in range(30)]),
        "failed": (
            comparison(),
            [Run("a", "a", "x", {}, 0.1, 0, "failed", "RuntimeError: no"), run("b", status="interrupted")],
        ),
        "negative": (
            comparison(metric_is_error=True),
            [run("a", losses=[1.0, 0.0, -1.0] * 20), run("b", losses=[NAN])],
        ),
        "shared machine": (comparison(), seeds("a", (0.1, 0.2), alone=False)),
        "tuning alone": (comparison(), [run("a", tuning=True)]),
        "hostile": (hostile, [run(HOSTILE, options={HOSTILE: HOSTILE}), run("b", stopped=HOSTILE, error=HOSTILE)]),
    }
