"""The report's curves end at the table's numbers, and say where they coincide."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
from report_runs import diverged, rich, run, seeds

from descend.compare.results.coincide import pairs
from descend.compare.results.curves import held_out_curve, loss_curve, raw_curve, thin
from descend.compare.results.series import Setting, gather


@pytest.mark.parametrize("axis", ["steps", "time", "evaluations"])
@pytest.mark.parametrize("steps", [1, 5, 60, 1000])
def test_curve_ends_at_the_final_loss(axis: str, steps: int) -> None:
    one = run("a", steps=steps)
    curve = loss_curve(Setting(0.1, [one]), axis)
    assert curve.middle[-1] == pytest.approx(one.final_loss, rel=1e-12)
    assert curve.x[-1] == {"steps": steps, "time": one.seconds[-1], "evaluations": steps}[axis]


def test_curve_over_seeds_is_their_median_between_two_of_them() -> None:
    runs = seeds("a", (0.1, 0.2, 0.3, 0.4))
    curve = loss_curve(Setting(0.1, runs), "steps")
    finals = [one.final_loss or math.nan for one in runs]
    assert curve.middle[-1] == pytest.approx(statistics.median(finals))
    assert curve.low[-1] in finals
    assert curve.high[-1] in finals
    assert (curve.low <= curve.middle).all()
    assert (curve.middle <= curve.high).all()


def test_diverged_seed_counts_as_infinite_from_there() -> None:
    most = loss_curve(Setting(0.1, [run("a", 0), diverged("a", at=3, seed=1), diverged("a", at=3, seed=2)]), "steps")
    assert most.x[-1] == 2
    few = loss_curve(Setting(0.1, [run("a", 0), run("a", 1, 0.2), diverged("a", at=3, seed=2)]), "steps")
    assert few.x[-1] == 60
    assert np.isinf(few.high[2:]).all()
    assert few.middle[-1] == pytest.approx(run("a", 1, 0.2).final_loss)


def test_run_that_stopped_keeps_its_last_loss() -> None:
    short = run("a", 0, steps=10, stopped="enough")
    curve = loss_curve(Setting(0.1, [short, run("a", 1)]), "steps")
    assert len(curve.x) == 60
    assert short.final_loss in (curve.low[-1], curve.high[-1])


def test_time_is_that_of_runs_alone() -> None:
    shared = run("a", 0, step_seconds=9.0, alone=False)
    assert loss_curve(Setting(0.1, [shared, run("a", 1)]), "time").x[-1] < 1
    assert loss_curve(Setting(0.1, [shared]), "time").x[-1] > 500


def test_raw_losses_are_not_smoothed() -> None:
    one = run("a")
    x, y = raw_curve(Setting(0.1, [one]), "steps")
    assert y.tolist() == list(one.losses)
    assert x.tolist() == list(range(1, 61))


def test_held_out_curve_has_the_steps_that_were_measured() -> None:
    curve = held_out_curve(Setting(0.1, seeds("a", (0.1, 0.3, 0.2))), lambda one: one.test_losses)
    assert curve.x.tolist() == [30, 60]
    assert curve.middle[0] == pytest.approx(0.4)


@pytest.mark.parametrize("count", [0, 1, 2, 299, 300, 301, 12345])
def test_thinned_curves_keep_their_ends(count: int) -> None:
    kept = thin(count)
    assert len(kept) <= 300
    assert not count or (kept[0], kept[-1]) == (0, count - 1)
    assert (np.diff(kept) > 0).all()


def test_curves_that_cannot_be_told_apart_are_paired_with_their_difference() -> None:
    series = gather(rich()[1])
    [pair] = pairs(series)
    assert (pair.first.label, pair.second.label) == ("adamw", "torch.adamw")
    assert pair.largest == pytest.approx(1e-8, rel=0.2)
    assert len(pair.differences) == 60


def test_curves_that_part_at_one_step_are_not_paired() -> None:
    one, other = run("a"), run("b")
    other.losses = [*other.losses[:30], 20 * other.losses[30], *other.losses[31:]]
    assert pairs(gather([one, other])) == []
    assert pairs(gather([one, run("b", seed=1)])) == []
    assert pairs(gather([one, run("b", steps=59)])) == []


def test_equal_curves_differ_by_nothing() -> None:
    [pair] = pairs(gather([run("a"), run("b")]))
    assert pair.largest == 0


def test_tuning_runs_are_no_results_but_show_what_rates_do() -> None:
    runs = [run("a", lr=0.01), *(run("a", seed=1000, lr=lr, tuning=True) for lr in (0.001, 0.01, 0.1))]
    [one] = gather(runs)
    assert [setting.lr for setting in one.settings] == [0.01]
    assert [setting.lr for setting in one.swept] == [0.001, 0.01, 0.1]
    assert one.best.runs == runs[:1]
