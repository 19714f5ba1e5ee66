"""Time steps of sharded parameters: ours against torch's foreach and fused, on gloo ranks on this machine.

    python benchmarks/distributed.py [--only PATTERN] [--quick] [--json FILE]

AdamW, float32, one thread a rank. Prints for each case milliseconds, how many times faster ours is than each peer, CPU
time, the first step, and what a step sends; then Python time, with one number in each tensor on each rank; then the
memory of state with ``shard_state``; at last the figures that the project wants to reach, with what was measured.

    dtensors1000-clip-fsdp-cold-2: 1,000 DTensors of 32 x 16, with clipping, new gradients as FSDP2 makes them, cold
    caches, 2 ranks

All times are medians. ``sharded.py`` says what is timed and how the comparison is kept fair. On a machine that is busy
with something else, or with fewer cores than ranks, only CPU times mean something.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from process_group import on_ranks
from sharded import Case, Measured, Memory, Turn, measure_state, time_case
from step import environment, parse_arguments

from descend.bench.clock import Pace
from descend.bench.methods import FOREACH, FUSED, OURS

Results = dict[str, dict[str, Measured]]
"""Case name -> contender -> what was measured."""

Memories = dict[str, dict[str, Memory]]
"""Case name -> ``SHARDED`` or ``WHOLE`` -> bytes."""

SHARDED, WHOLE = "sharded", "whole"
PEERS = (FOREACH, FUSED)
TURNS = {
    "dtensors1000": Turn(burst=6, uncounted=2),
    "dtensors1000x1": Turn(burst=6, uncounted=2),
    "dtensors5000": Turn(burst=3, uncounted=1),
    "dtensors20000": Turn(burst=2, uncounted=1),
    "gpt2": Turn(burst=1, uncounted=0),
    "ddp": Turn(burst=6, uncounted=2),
    "zero1": Turn(burst=2, uncounted=0),
}
COLD = Turn(burst=2, uncounted=0)
MEMORY = (("resnet50", 2), ("resnet50", 3), ("resnet50", 4), ("gpt2", 2))


class Plan(NamedTuple):
    """How much to run; ``shrink`` makes models smaller."""

    pace: Pace
    shrink: int


FULL = Plan(Pace(rounds=20, share=2.0), shrink=1)
QUICK = Plan(Pace(rounds=2, share=0.0), shrink=16)


def all_cases() -> list[Case]:
    cases = [
        Case("dtensors1000", clip, grads, cold, ranks=2)
        for clip in (False, True)
        for grads in ("fixed", "fsdp", "from_local")
        for cold in (False, True)
    ]
    cases += [
        Case(model, clip, "fsdp", cold, ranks=2)
        for model in ("dtensors5000", "dtensors20000")
        for clip in (False, True)
        for cold in (False, True)
    ]
    cases += [Case("dtensors1000", clip, "fsdp", cold=False, ranks=ranks) for ranks in (3, 4) for clip in (False, True)]
    cases += [Case("dtensors1000x1", clip, "fsdp", cold=False, ranks=2) for clip in (False, True)]
    cases += [Case("gpt2", clip, "fsdp", cold=False, ranks=2) for clip in (False, True)]
    cases += [Case("ddp", clip, "backward", cold=False, ranks=2) for clip in (False, True)]
    return cases + [Case("zero1", False, "fsdp", cold=False, ranks=ranks) for ranks in (2, 4)]


def memory_name(model: str, ranks: int) -> str:
    return f"state-{model}-{ranks}"


class Figure(NamedTuple):
    """How many times faster than a peer ours has to be; the worst of the cases counts."""

    cases: str
    peer: str
    bound: float

    def rows(self, results: Results) -> list[tuple[str, str, float, bool]]:
        """What was asked, the bound, what was measured, whether it is reached; nothing if no case ran."""
        ratios = [
            measured[self.peer].wall.median / measured[OURS].wall.median
            for name, measured in results.items()
            if fnmatchcase(name, self.cases)
        ]
        if not ratios:
            return []
        return [(f"{self.cases} / {self.peer}", f">= {self.bound:g}x", min(ratios), min(ratios) >= self.bound)]


FIGURES = (
    Figure("dtensors1000-plain-*-2", FUSED, 30),
    Figure("dtensors1000-clip-*-2", FUSED, 30),
    Figure("gpt2-plain-*", FUSED, 1),
    Figure("gpt2-clip-*", FUSED, 1.2),
)
MILLISECONDS = 3.0  # at most, for 1,000 DTensors
GROWTH = 1.2  # at most, of the cost per DTensor from 1,000 to 20,000
BEYOND_ITS_PART = 1.02  # at most, of the state's memory


def figures(results: Results, memories: Memories) -> list[tuple[str, str, float, bool]]:
    """Every figure to reach of which something was measured."""
    rows = [row for figure in FIGURES for row in figure.rows(results)]
    times = [
        measured[OURS].wall.median * 1e3
        for name, measured in results.items()
        if fnmatchcase(name, "dtensors1000-plain-*-2")
    ]
    if times:
        rows.append(("dtensors1000-plain-*-2, ms", f"<= {MILLISECONDS:g}", max(times), max(times) <= MILLISECONDS))
    for name in results:
        small = name.replace("dtensors20000", "dtensors1000")
        if small != name and small in results:
            growth = results[name][OURS].cpu.median / results[small][OURS].cpu.median / 20
            rows.append((f"{name}, CPU time a DTensor", f"<= {GROWTH:g}x", growth, growth <= GROWTH))
    for name, memory in memories.items():
        ranks = int(name.rpartition("-")[2])
        share = memory[SHARDED].state / memory[WHOLE].state * ranks
        rows.append((f"{name}, of its part", f"<= {BEYOND_ITS_PART:g}x", share, share <= BEYOND_ITS_PART))
    return rows


# Tables.


def print_row(title: str, cells: Iterable[str]) -> None:
    print(f"{title:<40}" + "".join(f"{cell:>10}" for cell in cells), flush=True)


def cells(measured: dict[str, Measured]) -> list[str]:
    """Milliseconds, ratios; CPU milliseconds, first steps and traffic of ours and of fused."""
    ours, fused = measured[OURS], measured[FUSED]
    walls = [f"{measured[name].wall.median * 1e3:.2f}" if name in measured else "-" for name in (OURS, *PEERS)]
    ratios = [f"{measured[name].wall.median / ours.wall.median:.1f}x" if name in measured else "-" for name in PEERS]
    cpus = [f"{contender.cpu.median * 1e3:.2f}" for contender in (ours, fused)]
    firsts = [f"{contender.first * 1e3:.0f}" for contender in (ours, fused)]
    sent = [
        cell
        for contender in (ours, fused)
        for cell in (f"{contender.collectives:g}", "-" if contender.sent is None else f"{contender.sent:.0f}")
    ]
    return [*walls, *ratios, *cpus, *firsts, *sent]


def report_steps(cases: list[Case], plan: Plan) -> Results:
    """Print a line per case as it is measured."""
    print("\nMilliseconds a step; how many times faster ours is; CPU milliseconds, milliseconds of the first step, and")
    print("collectives and bytes sent in one step by a rank: ours, and fused.\n")
    peers = [*PEERS, *(f"/{peer}" for peer in PEERS)]
    print_row("case", [OURS, *peers, "cpu", FUSED, "first", FUSED, "coll.", "bytes", FUSED, "bytes"])
    results: Results = {}
    for case in cases:
        length = COLD if case.cold else TURNS[case.model]
        results[case.name] = on_ranks(case.ranks, time_case, case, length, plan.pace, plan.shrink)
        print_row(case.name, cells(results[case.name]))
    return results


def report_memory(models: list[tuple[str, int]], plan: Plan) -> Memories:
    """Print the bytes of state on the rank with most, and how much the first steps made its process grow."""
    print(
        "\nMB of AdamW's state on a rank: with shard_state, without, the part; growth of the process in three steps.\n"
    )
    print_row("case", [SHARDED, WHOLE, "part", "growth", WHOLE])
    memories: Memories = {}
    for model, ranks in models:
        memory = {
            kind: on_ranks(ranks, measure_state, model, kind == SHARDED, plan.shrink) for kind in (SHARDED, WHOLE)
        }
        memories[memory_name(model, ranks)] = memory
        states = [memory[kind].state for kind in (SHARDED, WHOLE)]
        grown = [memory[kind].peak for kind in (SHARDED, WHOLE)]
        print_row(
            memory_name(model, ranks),
            [
                *(f"{count / 1e6:.2f}" for count in states),
                f"{states[0] / states[1]:.2%}",
                *(f"{count / 1e6:.1f}" for count in grown),
            ],
        )
    return memories


def report_figures(results: Results, memories: Memories) -> list[dict[str, Any]]:
    """Print the figures to reach beside the measured ones; return them for the JSON file."""
    print("\nFigures to reach (the worst of the cases counts)\n")
    print_row("", ["bound", "measured", "reached"])
    rows = figures(results, memories)
    for title, bound, measured, is_reached in rows:
        print_row(title, [bound, f"{measured:.2f}", "yes" if is_reached else "no"])
    return [
        {"figure": title, "bound": bound, "measured": measured, "reached": is_reached}
        for title, bound, measured, is_reached in rows
    ]


def as_json(measured: Measured) -> dict[str, Any]:
    return {**measured._asdict(), "wall": measured.wall._asdict(), "cpu": measured.cpu._asdict()}


def main() -> None:
    cases = all_cases()
    arguments = parse_arguments(
        [*(case.name for case in cases), *(memory_name(*model) for model in MEMORY)],
        "Time steps of sharded parameters, ours against torch's.",
        "dtensors1000-clip or state-",
    )
    plan = QUICK if arguments.quick else FULL
    about = environment()
    print(", ".join(f"{key} {value}" for key, value in about.items()))

    cases = [case for case in cases if case.name in arguments.names]
    models = [model for model in MEMORY if memory_name(*model) in arguments.names]
    results = report_steps(cases, plan) if cases else {}
    memories = report_memory(models, plan) if models else {}
    reached = report_figures(results, memories)
    if arguments.quick:
        print("\nQuick run: the models were cut down, so none of these times means anything.")

    if arguments.json:
        report = {
            "environment": about,
            "quick": arguments.quick,
            "cases": {
                name: {contender: as_json(measured) for contender, measured in contenders.items()}
                for name, contenders in results.items()
            },
            "memory": {
                name: {kind: memory._asdict() for kind, memory in kinds.items()} for name, kinds in memories.items()
            },
            "figures": reached,
        }
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
