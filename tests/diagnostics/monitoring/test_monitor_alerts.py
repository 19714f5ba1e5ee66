"""Alerts of a monitor: when they come, when they do not, and what happens then."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch

from descend import SGD, AdamW, Monitor, in_backward
from descend.diagnostics.monitoring.alerts import Alert, MonitorError, MonitorWarning


def run(grads: list[float], rates: list[float] | None = None, **options: Any) -> Monitor:
    """Step two parameters with these gradients, the second's ten times as large and always the same way."""
    first, second = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    optimizer = SGD([("a.first", first), ("a.second", second)], lr=0.01)
    monitor = Monitor(optimizer, every=1, **options)
    for index, value in enumerate(grads):
        if rates is not None:
            optimizer.param_groups[0]["lr"] = rates[index]
        first.grad, second.grad = torch.full((3,), value), torch.full((3,), 10.0)
        optimizer.step()
    return monitor


def silent(grads: list[float], rates: list[float] | None = None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(grads, rates).alerts == []


def test_a_spike_names_the_parameter_and_the_step() -> None:
    with pytest.warns(MonitorWarning, match=r"^a\.first: at step 11 its gradient norm is 10 times the median and"):
        monitor = run([1.0] * 10 + [10.0, 1.0], on="spike")
    assert [alert[:3] for alert in monitor.alerts] == [("spike", 11, ("a.first",))]


def test_a_norm_that_blows_up_step_by_step_is_a_spike() -> None:
    with pytest.warns(MonitorWarning, match=r"^a\.first: at step 20 its gradient norm is 57\.7 times the median"):
        run([1.5**step for step in range(20)], on="spike")


def test_noise_growth_and_decay_are_no_spikes() -> None:
    random = torch.Generator().manual_seed(0)
    noise = torch.empty(200).log_normal_(0.0, 0.5, generator=random).tolist()
    silent(noise)
    silent([1.02**step for step in range(200)])
    silent([100.0 * 0.9**step for step in range(100)])
    silent([1.2**step for step in range(100)])  # so Rprop's steps grow
    silent([1.0] * 10 + [4.0, 7.9])
    silent([1.0] * 9 + [100.0])  # there are too few to compare with


def test_learning_rates_that_warm_up_or_restart_are_no_spikes() -> None:
    silent([1.0] * 60, [0.001 * step for step in range(60)])
    silent([1.0] * 60, [1e-2 * (1 + math.cos(math.pi * (step % 20) / 20)) for step in range(60)])


def test_a_spike_is_told_of_once_until_it_has_passed() -> None:
    seen: list[Alert] = []
    run([1.0] * 10 + [10.0, 21.0, 12.0] + [1.0] * 3 + [43.0], on={"spike": seen.append})
    assert [alert.step for alert in seen] == [11, 17]


def test_updates_of_adam_that_leap_are_seen_without_a_leap_of_the_gradient() -> None:
    weight = torch.ones(50, requires_grad=True)
    optimizer = AdamW([("weight", weight)], lr=1e-3, betas=(0.9, 0.9))
    seen: list[Alert] = []
    monitor = Monitor(optimizer, every=1, on={"spike": seen.append})
    for step in range(12):
        weight.grad = torch.full((50,), (-1.0) ** step)
        if step == 10:
            optimizer.param_groups[0]["eps"] = 1e-8
            optimizer.state[weight]["exp_avg_sq"].mul_(1e-6)  # as after a loss of precision
            optimizer.state[weight]["exp_avg"].fill_(10.0)
        optimizer.step()
    assert [alert.step for alert in seen] == [11]
    assert seen[0].message.startswith("weight: at step 11 its update norm is ")
    assert monitor.alerts == seen


def test_a_parameter_without_a_gradient_is_dead_after_five_samples() -> None:
    with pytest.warns(
        MonitorWarning, match=r"a\.first: the gradient was zero in 5 samples in a row, the last at step 7"
    ):
        monitor = run([1.0, 1.0] + [0.0] * 20, on="dead")
    assert [alert.step for alert in monitor.alerts] == [7]
    with pytest.warns(MonitorWarning):
        assert [alert.step for alert in run([0.0] * 5 + [1.0] + [0.0] * 5, on="dead").alerts] == [5, 11]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_inf_are_told_of_once(value: float) -> None:
    with pytest.warns(MonitorWarning, match=r"^a\.first: NaN or Inf at step 3\.$"):
        monitor = run([1.0, 1.0, value, 1.0], on="nonfinite")
    assert len(monitor.alerts) == 1


def test_nan_spoils_no_median() -> None:
    weight = torch.ones(3, requires_grad=True)
    optimizer = SGD([weight], nonfinite="skip")
    monitor = Monitor(optimizer, every=1, on={"spike": lambda alert: None})
    for value in [1.0] * 10 + [math.nan] * 3 + [10.0]:
        weight.grad = torch.full((3,), value)
        optimizer.step()
    assert {alert.kind for alert in monitor.alerts} == {"spike"}


def test_raising_leaves_a_step_that_was_taken() -> None:
    weight = torch.ones(2, requires_grad=True)
    optimizer = SGD([("weight", weight)], lr=1.0)
    monitor = Monitor(optimizer, every=1, on={"nonfinite": "raise"})
    weight.grad = torch.tensor([math.inf, 1.0])
    with pytest.raises(MonitorError, match="weight: NaN or Inf at step 1"):
        optimizer.step()
    assert weight[1] == 0
    assert monitor.step == 1
    weight.grad = torch.ones(2)
    optimizer.step()  # told of once
    assert monitor.read()["step"] == 2


def test_raising_inside_backward_leaves_the_count_right() -> None:
    weight = torch.ones(2, requires_grad=True)
    optimizer = SGD([("weight", weight)], lr=0.0)
    monitor = Monitor(optimizer, every=1, on={"nonfinite": "raise"})
    with in_backward(optimizer):
        for value in (1.0, math.inf, 1.0):
            (weight * value).sum().backward()
            try:
                optimizer.step()
            except MonitorError as error:
                assert (monitor.step, str(error)) == (2, "weight: NaN or Inf at step 2.")
    assert (monitor.step, monitor.skipped, len(monitor.alerts)) == (3, 0, 1)


def test_inside_backward_updates_are_compared_at_the_rate_they_were_taken_with() -> None:
    weight = torch.ones(2, requires_grad=True)
    optimizer = SGD([weight], lr=0.1)
    monitor = Monitor(optimizer, every=1, on={"spike": lambda alert: None})
    in_backward(optimizer)
    for step in range(20):  # without optimizer.step(), a step ends when the next gradient comes
        weight.sum().backward()
        if step == 14:
            optimizer.param_groups[0]["lr"] = 1e-3
    assert monitor.step == 19
    assert monitor.alerts == []


def test_many_names_are_cut_short_worst_first() -> None:
    params = [(f"p{i}", torch.ones(2, requires_grad=True)) for i in range(6)]
    optimizer = SGD(params)
    monitor = Monitor(optimizer, every=1, on={"spike": lambda alert: None})
    for step in range(11):
        for index, (_, param) in enumerate(params):
            param.grad = torch.full((2,), 10.0 + index if step == 10 else 1.0)
        optimizer.step()
    (alert,) = monitor.alerts
    assert alert.message.startswith("p5, p4, p3 and 3 more: at step 11 its gradient norm is 15 times the median")
    assert alert.names == ("p5", "p4", "p3", "p2", "p1", "p0")


def test_alerts_that_nobody_asked_for_do_not_come() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run([1.0] * 10 + [math.nan], on=()).alerts == []
        assert run([1.0] * 10 + [100.0], on=["dead", "nonfinite"]).alerts == []
