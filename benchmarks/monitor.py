"""Time steps with and without ``descend.Monitor``.

    python benchmarks/monitor.py [--rounds 12] [--every 100] [--only PATTERN]

AdamW on the tensors of GPT-2 small and on 1,000 small tensors, gradients in new memory before each step, outside the
clock. Two optimizers with parameters of their own take turns, one of them monitored. Ordinary steps of both are
compared, and sampled steps with them. From these medians: what a monitor costs at ``--every``, in percent; the target
is 2. On a machine that is busy with something else the figures are worthless.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from contest import draw_values

from descend import AdamW, Monitor
from descend.bench.contenders import reallocate_gradients
from descend.bench.shapes import SHAPES

CASES = (("1000x1000", "float32", 40), ("gpt2", "float32", 1), ("gpt2", "bfloat16", 1))


class Times(NamedTuple):
    """Seconds: medians.

    Attributes:
        plain: a step of an optimizer without a monitor.
        between: a step of a monitored one that is not sampled.
        sampled: one that is.
    """

    plain: float
    between: float
    sampled: float

    def cost(self, every: int) -> float:
        """What a monitor adds to the time of all steps, in percent."""
        return 100 * (((every - 1) * self.between + self.sampled) / (every * self.plain) - 1)


def measure(shape: str, dtype: str, burst: int, rounds: int) -> Times:
    """Time bursts of steps, the two optimizers in turn; in each, one step of the monitored one is sampled."""
    values = draw_values(SHAPES[shape], dtype)
    params = [[value.clone().requires_grad_() for value in values] for _ in range(2)]
    plain, watched = AdamW(params[0]), AdamW(params[1])
    seconds: dict[str, list[float]] = {"plain": [], "between": [], "sampled": []}
    # A burst, one step to warm up in front of it, and the sampled step.
    monitor = Monitor(watched, every=burst + 2)

    def step(optimizer: AdamW, members: list[torch.Tensor]) -> float:
        reallocate_gradients(members, values)
        begin = time.perf_counter()
        optimizer.step()
        return time.perf_counter() - begin

    gc.freeze()
    for number in range(-2, rounds):
        found: dict[str, list[float]] = {name: [] for name in seconds}
        for optimizer, members in [(plain, params[0]), (watched, params[1])][:: 1 if number % 2 else -1]:
            step(optimizer, members)
            found["plain" if optimizer is plain else "between"] += [step(optimizer, members) for _ in range(burst)]
            found["sampled"] += [step(optimizer, members)] if optimizer is watched else []
        if number >= 0:  # the first make state and kernels
            for name, times in found.items():
                seconds[name] += times
    assert len(monitor.history) == rounds + 2
    return Times(*map(statistics.median, seconds.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12, help="turns of each optimizer (default: 12)")
    parser.add_argument("--every", type=int, default=100, help="steps between samples (default: 100)")
    parser.add_argument("--only", default="*", help="pattern of shapes and dtypes, such as gpt2-*")
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; milliseconds, medians")
    print(f"{'tensors':<22}{'plain':>9}{'between':>9}{'sampled':>9}{'sampled/plain':>15}{'cost':>9}")
    for shape, dtype, burst in CASES:
        if fnmatchcase(f"{shape}-{dtype}", arguments.only):
            times = measure(shape, dtype, burst, arguments.rounds)
            cells = "".join(f"{1e3 * value:>9.3f}" for value in times)
            print(
                f"{shape + '-' + dtype:<22}{cells}{times.sampled / times.plain:>15.2f}"
                f"{times.cost(arguments.every):>8.2f}%"
            )


if __name__ == "__main__":
    main()
