"""Time SOAP steps on the hidden matrices of GPT-2: ours against pytorch-optimizer's and heavyball's, in turns.

    python benchmarks/soap_part.py [--blocks 1] [--rounds 13]

Each contender has parameters of its own and gets the same gradients. Steps between two changes of the bases are timed
apart from those that end with one. The first step, which finds eigenvectors, does not count. Peers that are not
installed are left out.
"""

from __future__ import annotations

import argparse
import time
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from descend import SOAP
from descend.bench.clock import Timing
from descend.bench.shapes import gpt2_sizes

FREQUENCY = 6  # steps from one change of the bases to the next
BETWEEN, TURNING = "between changes of the bases", "with a change"
OPTIONS: dict[str, Any] = {"lr": 3e-3, "betas": (0.95, 0.95), "weight_decay": 0.01, "precondition_frequency": FREQUENCY}


def contenders(values: list[Tensor]) -> dict[str, tuple[list[Tensor], Any]]:
    """Parameters and optimizer of each, by name; all have a factor for every dimension."""
    made = {}
    for name in ("ours", "pytorch_optimizer", "heavyball"):
        params = [value.clone().requires_grad_() for value in values]
        try:
            if name == "ours":
                optimizer: Any = SOAP(params, **OPTIONS)
            elif name == "heavyball":
                heavyball = import_module(name)
                heavyball.utils.compile_mode = None  # compiling changes little: a step is products
                optimizer = heavyball.SOAP(
                    params, **OPTIONS, shampoo_beta=0.95, max_precond_dim=10000, use_precond_schedule=False
                )
            else:
                optimizer = import_module(name).SOAP(params, **OPTIONS)
        except ImportError:
            continue
        made[name] = params, optimizer
    return made


def time_soap(blocks: int, rounds: int) -> dict[str, dict[str, Timing]]:
    """Time ``rounds`` steps of each contender, who take turns; by kind of step, then by contender.

    Args:
        blocks: of GPT-2's 12; each has four matrices.
        rounds: at least ``FREQUENCY + 1``.
    """
    torch.manual_seed(0)
    sizes = [size for size in gpt2_sizes(blocks=blocks)[2:] if len(size) == 2]
    entries = contenders([torch.randn(size) for size in sizes])
    seconds: dict[str, dict[str, list[float]]] = {kind: {name: [] for name in entries} for kind in (BETWEEN, TURNING)}
    names = list(entries)
    for number in range(rounds + 1):
        grads = [torch.randn(size) for size in sizes]
        kind = TURNING if number % FREQUENCY == 0 else BETWEEN
        first = number % len(names)
        for name in names[first:] + names[:first]:
            params, optimizer = entries[name]
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad.clone()
            begin = time.perf_counter()
            optimizer.step()
            if number:
                seconds[kind][name].append(time.perf_counter() - begin)
    return {kind: {name: Timing.of(times) for name, times in found.items()} for kind, found in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--blocks", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=13)
    arguments = parser.parse_args()
    for kind, timings in time_soap(arguments.blocks, arguments.rounds).items():
        ours = timings["ours"].median
        print(kind)
        for name, timing in timings.items():
            print(f"  {name:20} {timing.median * 1e3:8.0f} ms  {timing.median / ours:5.2f}x  ({timing.steps} steps)")


if __name__ == "__main__":
    main()
