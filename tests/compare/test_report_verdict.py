"""What the report says: only what the seeds bear out."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from report_runs import comparison, diverged, rich, run, seeds

from descend.compare.records import Run
from descend.compare.results.series import gather
from descend.compare.results.verdict import Finding, common_loss, findings, of_bytes, of_seeds


def say(runs: Sequence[Run], **changes: object) -> dict[str, Finding]:
    return {finding.quantity: finding for finding in findings(comparison(**changes), gather(runs))}


def test_seeds_that_overlap_have_no_verdict() -> None:
    finding = say(seeds("a", (0.1, 0.2, 0.3)) + seeds("b", (0.15, 0.25, 0.35)))["Training loss"]
    assert finding.words == "No difference shown: the seeds overlap."
    assert finding.kind == "open"
    assert len(finding.numbers) == 2


def test_seeds_that_part_have_one() -> None:
    finding = say(seeds("a", (0.3, 0.31, 0.32)) + seeds("b", (0.1, 0.11, 0.12)))["Training loss"]
    assert finding.words == "b is lower than a: no seeds overlap (by chance: 1 in 10)."
    assert finding.kind == "shown"


@pytest.mark.parametrize("count", [1, 2])
def test_few_seeds_have_no_verdict_however_far_they_part(count: int) -> None:
    said = say(seeds("a", (0.1,) * count) + seeds("b", (0.9,) * count))
    for quantity in ("Held-out loss", "Training loss", "Held-out accuracy"):
        assert said[quantity].words.startswith(f"No verdict from {count} seed")
        assert said[quantity].kind == "open"


def test_best_is_judged_against_each() -> None:
    values = {"a": [1.0, 2, 3], "b": [2.5, 3.5, 4], "c": [5.0, 6, 7], "d": [6.0, 7, 8]}
    finding = of_seeds("x", values, str, "lower")
    assert finding is not None
    assert finding.words == (
        "No difference shown between a and b: the seeds overlap. "
        "a is lower than c and d: no seeds overlap (by chance: 1 in 10 for each)."
    )


def test_higher_is_better_where_it_is() -> None:
    finding = of_seeds("accuracy", {"a": [0.5, 0.6, 0.7], "b": [0.8, 0.9, 0.95]}, str, "higher")
    assert finding is not None
    assert finding.words.startswith("b is higher than a")


@pytest.mark.parametrize(("optimizers", "odds"), [(2, "1 in 10"), (3, "1 in 28")])
def test_odds_are_those_of_all_orders(optimizers: int, odds: str) -> None:
    owners = [index for index in range(optimizers) for _ in range(3)]
    orders = set(itertools.permutations(owners)) if optimizers == 2 else None
    if orders is None:  # of nine: where the seeds of each optimizer can stand
        places = itertools.combinations(range(9), 3)
        orders = {tuple(0 if i in own else 1 for i in range(9)) for own in places}
        share = optimizers * sum(order[:3] == (0, 0, 0) for order in orders) / len(orders)
    else:
        share = sum(len(set(order[:3])) == 1 for order in orders) / len(orders)
    values = {str(index): [10.0 * index, 10.0 * index + 1, 10.0 * index + 2] for index in range(optimizers)}
    finding = of_seeds("x", values, str, "lower")
    assert finding is not None
    assert odds == f"1 in {1 / share:.0f}"
    assert f"(by chance: {odds})" in finding.words


def test_diverged_runs_are_named_with_their_step_and_never_judged() -> None:
    said = say([*seeds("a", (0.1, 0.2, 0.3)), *seeds("b", (0.5, 0.6))[:2], diverged("b", at=3, seed=2)])
    assert said["Diverged"].words == "b in 1 of 3 seeds, at step 3. It has no final loss."
    assert said["Diverged"].kind == "bad"
    for finding in said.values():
        assert finding.quantity in ("Diverged", "State") or not any(text.startswith("b ") for text in finding.numbers)


def test_step_times_part_if_their_quartiles_do() -> None:
    apart = say([run("a", step_seconds=0.001), run("b", step_seconds=0.002)])["Time of a step"]
    assert apart.words == "a is faster than b: the quartiles do not overlap."
    close = say([run("a", step_seconds=0.001), run("b", step_seconds=0.00101)])["Time of a step"]
    assert close.words == "No difference shown between a and b: the quartiles overlap."


def test_times_of_runs_that_shared_the_machine_are_not_judged() -> None:
    said = say(seeds("a", (0.1,) * 3, alone=False) + seeds("b", (0.2,) * 3, alone=False, step_seconds=1.0))
    assert not [quantity for quantity in said if quantity.startswith("Time")]
    assert any(quantity.startswith("Evaluations") for quantity in said)


def test_common_loss_is_reached_by_all_and_counted_where_it_is() -> None:
    runs = seeds("fast", (0.1, 0.11, 0.12)) + seeds("slow", (0.5, 0.51, 0.52))
    goal = common_loss(gather(runs))
    assert goal == max(run.final_loss for run in runs if run.final_loss is not None)
    [finding] = [one for one in findings(comparison(), gather(runs)) if one.quantity.startswith("Evaluations")]
    slowest = next(run for run in runs if run.final_loss == goal)
    assert str(len(slowest.losses)) in finding.numbers[1]
    assert finding.words.startswith("fast needs fewer than slow")


def test_state_is_exact() -> None:
    assert of_bytes({"a": 2e6, "b": 2e6}).words == "No difference."  # type: ignore[union-attr]
    finding = of_bytes({"a": 2e6, "b": 1e6})
    assert finding is not None
    assert finding.words == "b keeps least."
    assert list(finding.numbers) == ["b 1 MB", "a 2 MB"]


def test_ends_are_told() -> None:
    said = say(
        [
            run("a", stopped="the gradient is small"),
            run("b", status="interrupted"),
            run("c", status="failed", error="no"),
        ]
    )
    assert said["Stopped early"].words == "a, after 60 steps: the gradient is small"
    assert said["Interrupted"].words == "b, after 60 steps. It is not judged."
    assert said["Failed"].words == "c: no"


def test_of_a_sweep_the_best_rate_by_held_out_loss_is_judged() -> None:
    _, runs = rich()
    best = {one.label: one.best.lr for one in gather(runs)}
    assert best["adamw"] == best["torch.adamw"] == best["sgd"] == 0.01
    ends = [finding.words for finding in findings(comparison(), gather(runs)) if finding.quantity == "Diverged"]
    assert [words.split(",")[0] for words in ends] == ["sgd with lr 0.1 in 3 of 3 seeds", "sgd:lr=100 in 3 of 3 seeds"]


def test_rate_at_the_edge_of_those_tried_is_told() -> None:
    inside = [run("a", floor=floor, lr=lr) for lr, floor in ((0.01, 0.3), (0.1, 0.1), (1.0, 0.3))]
    edge = [run("b", floor=floor, lr=lr) for lr, floor in ((0.01, 0.3), (0.1, 0.2), (1.0, 0.1))]
    assert say(inside + edge)["Rate at the edge"].words.startswith("b: 1 is the largest rate that was tried")
    assert "Rate at the edge" not in say([*inside, run("c")])
    tried = [run("d", seed=1000, lr=lr, tuning=True) for lr in (0.01, 0.1)]
    assert say([run("d", lr=0.01), *tried])["Rate at the edge"].words.startswith("d: 0.01 is the smallest")


def test_state_that_is_not_known_is_not_judged() -> None:
    said = say([run("a", state_bytes=[None]), run("b", state_bytes=[1_000]), run("c", state_bytes=[1_000])])["State"]
    assert (said.words, list(said.numbers)) == ("No difference.", ["b and c 1 kB"])
    sizes = {"a": None, "b": 1e3, "c": 1e3, "d": 2e3}
    assert of_bytes(sizes).words == "b and c keep least, of those known."  # type: ignore[union-attr]


def test_run_that_blew_up_and_came_back_is_named() -> None:
    spiked = run("a")
    spiked.losses = [*spiked.losses[:30], 1e15, *spiked.losses[31:]]
    finding = say([spiked, run("b")])["Blew up"]
    assert finding.words == "a: the loss rose to 1e+15 at step 31 and came back."
    assert "Blew up" not in say([run("a"), run("b")])


@pytest.mark.parametrize(("second", "named"), [((0.12, 0.2), ["a 0.01 or 0.1"]), ((0.3, 0.4), [])])
def test_rates_that_the_tuning_seeds_do_not_tell_apart_are_named(second: tuple[float, float], named: list[str]) -> None:
    tried = {0.01: (0.1, 0.2), 0.1: second, 1.0: (0.8, 0.9)}
    tuning = [
        run("a", seed, lr=lr, test_losses=[loss], tuning=True)
        for lr, losses in tried.items()
        for seed, loss in enumerate(losses, 10_000)
    ]
    said = say([*tuning, run("a", lr=0.1)])
    assert [
        number for finding in said.values() if finding.quantity == "Rates as good" for number in finding.numbers
    ] == named
