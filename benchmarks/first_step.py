"""Seconds that a fresh process waits for its first iteration: import, constructor, ``zero_grad``, backward, ``step``.

Usage: ``python benchmarks/first_step.py`` compares descend with torch.optim; ``... descend`` or ``... torch.optim``
measures one of them in this process and prints JSON, as ``step.py`` needs it. The import of torch and the forward pass
are not counted: users of either library wait for them alike.
"""

from __future__ import annotations

import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

PROCESSES = 5
PARTS = ("import", "constructor", "zero_grad", "backward", "step")


def measure(library: str) -> dict[str, float]:
    """Time the first iteration of an ordinary loop with AdamW; to be called once, in a fresh process."""
    import torch

    # Big enough for every thread to get work: waking the threads is part of a first step.
    model = torch.nn.Linear(1000, 1000)
    loss = model(torch.ones(8, 1000)).square().mean()
    times = [time.perf_counter()]
    optim = importlib.import_module(library)
    times.append(time.perf_counter())
    optimizer = optim.AdamW(model.parameters())
    times.append(time.perf_counter())
    for part in (optimizer.zero_grad, loss.backward, optimizer.step):
        part()
        times.append(time.perf_counter())
    return {part: end - begin for part, begin, end in zip(PARTS, times, times[1:], strict=False)}


def in_fresh_process(library: str, cache: str) -> dict[str, float]:
    """Run this file in a new process, with kernels cached in the folder ``cache``; return its seconds."""
    output = subprocess.run(
        [sys.executable, __file__, library],
        env={**os.environ, "DESCEND_CACHE_DIR": cache},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    ).stdout
    seconds: dict[str, float] = json.loads(output)
    return seconds


def main() -> None:
    print("Seconds, median of fresh processes:\n")
    print(f"{'':<24}" + "".join(f"{part:>12}" for part in (*PARTS, "sum")))
    runs: dict[str, list[dict[str, float]]] = {}
    for _ in range(PROCESSES):
        with tempfile.TemporaryDirectory() as cache:
            for title, library in (
                ("descend, not cached", "descend"),
                ("descend, cached", "descend"),
                ("torch.optim", "torch.optim"),
            ):
                runs.setdefault(title, []).append(in_fresh_process(library, cache))
    for title, measured in runs.items():
        rows = [[*(run[part] for part in PARTS), sum(run.values())] for run in measured]
        print(f"{title:<24}" + "".join(f"{statistics.median(column):>12.3f}" for column in zip(*rows, strict=True)))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1])))
    else:
        main()
