"""The least-squares problems: their formulas and data are what they should be, and `least_squares` solves NIST's."""

from __future__ import annotations

import math

import fit_race
import pytest
import torch
from problems import fits, nist
from problems.fit import Fit, slots_sorted
from torch import Tensor

from descend import least_squares

CERTIFIED = fits.certified()
FREE, BOUNDED = fits.unconstrained(), fits.bounded()
ALL = [*CERTIFIED, *FREE, *BOUNDED, *fits.validation()]
# Torch's own forward mode calls torch.jit.script, of which torch warns.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning"),
    pytest.mark.filterwarnings(
        "ignore:There is a performance drop because we have not yet implemented the batching rule"
    ),
]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """The problems are small: threads only wait for each other. They are restored by ``conftest.py``."""
    torch.set_num_threads(1)


def each(problems: list[Fit]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("fit", problems, ids=lambda fit: fit.name)


def jacobian(fit: Fit, x: Tensor) -> Tensor:
    return torch.func.jacrev(fit.residuals)(x)


def formulas(problems: list[Fit]) -> list[Fit]:
    """One problem of each formula."""
    return list({fit.name.split("-")[0]: fit for fit in reversed(problems)}.values())


@each(formulas(CERTIFIED))
def test_certified_values_have_the_certified_sum_of_squares(fit: Fit) -> None:
    assert fit.certified is not None
    total = fit.residuals(fit.certified.values).square().sum().item()
    if fit.name.startswith("Lanczos1"):  # 1e-25: the certified digits of the parameters leave 1e-21
        assert total < 1e-20
    else:
        assert total == pytest.approx(fit.certified.sum_of_squares, rel=1e-9)


@each(formulas(CERTIFIED))
def test_certified_deviations_are_those_of_the_model(fit: Fit) -> None:
    assert fit.certified is not None
    rows = jacobian(fit, fit.certified.values)
    variance = fit.certified.sum_of_squares / (len(rows) - rows.shape[1])
    deviations = (torch.linalg.inv(rows.T @ rows).diagonal() * variance).sqrt()
    torch.testing.assert_close(deviations, fit.certified.deviations, rtol=1e-6, atol=0)


def test_there_are_27_data_sets_with_two_starts_each() -> None:
    assert len(nist.tables()) == len(nist.MODELS) == 27
    assert len(CERTIFIED) == 54
    assert sum(len(table["y"]) for table in nist.tables().values()) == 2176


@each(formulas(CERTIFIED))
def test_digits_count_what_agrees(fit: Fit) -> None:
    certified = fit.certified
    assert certified is not None
    assert certified.digits(certified.values) == 15
    assert certified.digits(certified.values * (1 + 1e-4)) == pytest.approx(4, abs=0.01)
    assert certified.digits(certified.values * math.nan) == 0
    assert certified.digits(certified.values + math.inf) == 0


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("Gauss1-1", lambda b: b[[0, 1, 5, 6, 7, 2, 3, 4]] * torch.tensor([1, 1, 1, 1, -1, 1, 1, -1.0]).double()),
        ("Lanczos2-1", lambda b: b[[4, 5, 0, 1, 2, 3]]),
        ("MGH17-1", lambda b: b[[0, 2, 1, 4, 3]]),
        ("ENSO-1", lambda b: b[[0, 1, 2, 6, 7, 8, 3, 4, 5]] * torch.tensor([1, 1, 1, -1, 1, -1, 1, 1, 1.0]).double()),
        ("Eckerle4-1", lambda b: b * torch.tensor([-1, -1, 1.0]).double()),
    ],
)
def test_equivalent_parameters_are_right(name: str, change) -> None:
    fit = next(fit for fit in CERTIFIED if fit.name == name)
    assert fit.certified is not None
    other = change(fit.certified.values)
    torch.testing.assert_close(fit.residuals(other), fit.residuals(fit.certified.values))
    assert fit.certified.digits(other) > 14


def test_slots_are_sorted_by_their_first_parameter() -> None:
    x = torch.tensor([9.0, 3.0, 30.0, 1.0, 10.0])
    assert slots_sorted(x, [(1, 2), (3, 4)]).tolist() == [9, 1, 10, 3, 30]


@each(formulas([*CERTIFIED, *FREE, *BOUNDED]))
def test_jacobian_is_the_same_forward_and_backward(fit: Fit) -> None:
    forward = fit_race.exact_jacobian(fit, fit.x0)
    scale = forward.abs().max().clamp(min=1)
    torch.testing.assert_close(jacobian(fit, fit.x0) / scale, forward / scale, rtol=1e-9, atol=1e-12)
    h = 1e-6 * fit.x0.abs().clamp(min=1e-3)
    direction = torch.where(torch.arange(len(h)) % 2 == 0, h, -h)
    difference = (fit.residuals(fit.x0 + direction) - fit.residuals(fit.x0 - direction)) / 2
    allowed = 1e-4 * (forward.abs() @ h).max() + 1e-9 * fit.residuals(fit.x0).abs().max() + 1e-12
    assert float((difference - forward @ direction).abs().max()) <= float(allowed)


def test_starts_are_finite_in_both_precisions_and_inside_the_bounds() -> None:
    for fit in ALL:
        residuals, single = fit.residuals(fit.x0), fit.residuals(fit.x0.float())
        assert residuals.dim() == single.dim() == 1
        assert (residuals.dtype, single.dtype) == (torch.float64, torch.float32)
        assert bool(residuals.isfinite().all()), fit.name
        assert len(residuals) >= len(fit.x0), fit.name
        assert not fit_race.is_outside(fit, fit.x0), fit.name


def test_names_are_unique() -> None:
    assert len({fit.name for fit in ALL}) == len(ALL)


# The finish.


def test_finish_is_the_certified_solution() -> None:
    fit = CERTIFIED[0]
    counter = fit_race.FitCounter(fit, budget=9)
    counter.residuals(fit.x0)
    assert fit.certified is not None
    with pytest.raises(fit_race.Finish):
        counter.residuals(fit.certified.values)
    assert (counter.solved, counter.cost) == (True, 2)


def test_finish_is_stationary_in_any_units_and_with_bounds() -> None:
    matrix = torch.tensor([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]], dtype=torch.float64)
    y = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    lower = torch.tensor([0.0, -9.0], dtype=torch.float64)
    fit = Fit("line", lambda x: matrix.to(x) @ x - y.to(x), lower + 1, lower, lower + 99)
    solution = torch.tensor([0.0, float(matrix[:, 1] @ y / matrix[:, 1].square().sum())], dtype=torch.float64)

    def measure(fit: Fit, x: Tensor) -> float:
        return fit_race.stationarity(fit, x, fit.residuals(x), fit_race.exact_jacobian(fit, x))

    assert measure(fit, solution) < 1e-12
    assert measure(fit._replace(lower=None, upper=None), solution) > 0.1
    assert measure(fit, solution + 0.01) > 1e-3
    units = torch.tensor([1e-6, 1e6], dtype=torch.float64)
    scaled = fit._replace(
        residuals=lambda x: 1e3 * fit.residuals(x / units), lower=lower * units, upper=(lower + 99) * units
    )
    assert measure(scaled, (solution + 0.01) * units) == pytest.approx(measure(fit, solution + 0.01))


def test_point_where_the_model_has_faded_is_no_finish() -> None:
    fit = Fit("fading", lambda x: torch.exp(-x) * torch.ones(3).to(x) - 1, torch.ones(1, dtype=torch.float64))
    counter = fit_race.FitCounter(fit, budget=9)
    counter.residuals(torch.tensor([-1000.0], dtype=torch.float64))  # infinite
    counter.residuals(torch.tensor([800.0], dtype=torch.float64))
    assert not counter.solved
    with pytest.raises(fit_race.Finish):
        counter.residuals(torch.zeros(1, dtype=torch.float64))
    assert counter.solved


def test_budget_bounds_and_repeats_are_counted() -> None:
    fit = next(fit for fit in BOUNDED if fit.name == "decay-3")
    counter = fit_race.FitCounter(fit, budget=3)
    for _ in range(3):
        counter.residuals(fit.x0)
        counter.jacobian(fit.x0)
    assert (counter.n_residuals, counter.n_jacobians, counter.outside) == (1, 1, False)
    counter.residuals(fit.x0 - 9)
    assert counter.outside
    with pytest.raises(fit_race.Finish):
        counter.jacobian(fit.x0 - 9)
    assert not counter.solved


# The solver.

HARD = {"BoxBOD-1", "MGH09-1", "MGH10-1", "MGH17-1", "Bennett5-1", "Eckerle4-1", "Rat43-1", "Lanczos1-1", "Nelson-1"}


@each([fit for fit in CERTIFIED if fit.name in HARD or fit.name.endswith("-2")])
def test_certified_values_are_found(fit: Fit) -> None:
    check_certified(fit)


@pytest.mark.slow
@each([fit for fit in CERTIFIED if fit.name not in HARD and fit.name.endswith("-1")])
def test_certified_values_are_found_from_the_other_starts(fit: Fit) -> None:
    check_certified(fit)


def check_certified(fit: Fit) -> None:
    """The solver finds the certified values, says so, and estimates the certified deviations."""
    assert fit.certified is not None
    result = least_squares(fit.residuals, fit.x0)
    assert fit.certified.digits(result.x) >= 5
    assert fit.name.startswith("Lanczos") or result.success
    if not fit.name.startswith("Lanczos1"):
        canonical = fit.certified.canonical(result.x.clone())
        if torch.allclose(canonical, result.x):  # else they are those of parameters in other places
            torch.testing.assert_close(result.standard_errors, fit.certified.deviations, rtol=1e-3, atol=0)
