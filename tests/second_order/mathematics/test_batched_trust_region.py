"""Models, steps and quartics of many problems are those of single ones."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from descend.second_order.mathematics import arrays, batched_trust_region, dense_steps
from descend.second_order.mathematics.batched_trust_region import DenseModels
from descend.second_order.mathematics.dense_steps import equilibrating
from descend.second_order.mathematics.quartic import first_minima, first_minimum
from descend.second_order.mathematics.trust_region import DenseModel


def cases(numel: int) -> tuple[Tensor, Tensor]:
    """Hessians and gradients: definite, indefinite, singular, zero, diagonal with the hard case, far from 1."""
    generator = torch.Generator().manual_seed(numel)
    root = torch.randn(12, numel, numel, generator=generator, dtype=torch.float64)
    grads = torch.randn(12, numel, generator=generator, dtype=torch.float64)
    hessians = root @ root.mT
    hessians[4:8] = root[4:8] + root[4:8].mT
    hessians[8] = grads[8, :, None] * grads[8]  # of rank one, the gradient in its range
    hessians[9] = 0
    hessians[10] = torch.diag(torch.linspace(-1, 2, numel, dtype=torch.float64))
    grads[10, 0] = 0.0
    hessians[11] = 1e-100 * hessians[11]
    grads[3] *= 1e80
    return hessians, grads


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("numel", [1, 2, 5])
def test_steps_are_those_of_single_models(numel: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hessians, grads = cases(numel)
    scale, radii = equilibrating(hessians), (1e-3, 0.5, 3.0, 1e6)
    scaled = hessians / scale[:, :, None] / scale[:, None, :], grads / scale
    alone = [[DenseModel(*one).step(radius) for one in zip(*scaled, strict=True)] for radius in radii]
    convert = arrays.array_of if kind == "numpy" else torch.Tensor.detach
    for module in (arrays, batched_trust_region, dense_steps):
        monkeypatch.setattr(module, "array_of", convert)
    models = DenseModels(convert(grads))
    rows = convert(torch.arange(12))
    with np.errstate(all="ignore"):
        models.renew(rows, convert(hessians), convert(grads))
        for radius, singles in zip(radii, alone, strict=True):
            trial = models.step(rows, convert(torch.full((12,), radius, dtype=torch.float64)))
            for i, one in enumerate(singles):
                assert bool(trial.on_boundary[i]) == one.on_boundary
                assert bool(trial.negative_curvature[i]) == one.negative_curvature
                assert float(trial.norm[i]) == pytest.approx(one.norm, rel=1e-9)
                assert float(trial.decrease[i]) == pytest.approx(one.decrease, rel=1e-9)
                step = torch.as_tensor(trial.step)[i] * scale[i]
                near = torch.allclose(step, one.step, rtol=1e-6, atol=1e-9 * one.norm)
                # The hard case has two solutions, and where the model is flat any step.
                assert near or (hessians[i] @ (step - one.step)).abs().max() <= 3 * radius or i in (9, 10)


def test_models_that_are_kept_are_the_same() -> None:
    hessians, grads = cases(3)
    models, rows, radius = DenseModels(grads.numpy()), np.arange(12), np.full(12, 0.7)
    with np.errstate(all="ignore"):
        models.renew(rows, hessians.numpy(), grads.numpy())
        before = models.step(rows, radius)
        models.keep(np.array([11, 2, 5]))
        after = models.step(np.arange(3), radius[:3])
    for one, other in zip(before, after, strict=True):
        assert np.array_equal(one[[11, 2, 5]], other)


def test_scales_equilibrate() -> None:
    hessians, _ = cases(4)
    scale = equilibrating(hessians)
    assert torch.allclose(scale.log().sum(1), torch.zeros(12, dtype=torch.float64), atol=1e-12)
    largest = (hessians / scale[:, :, None] / scale[:, None, :]).abs().amax(2)
    nonzero = largest[[0, 1, 2, 3, 4, 5, 6, 7, 11]]
    assert (nonzero.amax(1) / nonzero.amin(1)).max() < 1.2
    assert torch.equal(scale[9], torch.ones(4, dtype=torch.float64))


def from_roots(fall: float, slope_before: float, curvature: float, slope: float) -> tuple[float, float]:
    """The first minimum of the quartic with these numbers by NumPy's zeros of its slope; NaN without one."""
    t4, t3 = np.linalg.solve([[1, 1], [4, 3]], [-fall - slope_before - curvature / 2, slope - slope_before - curvature])
    zeros = np.roots([4 * t4, 3 * t3, curvature, slope_before])
    minima = zeros.real[(abs(zeros.imag) <= 1e-7 * abs(zeros)) & (zeros.real > 0)]
    if not len(minima):
        return math.nan, math.nan
    t = minima.min()
    return t, -np.polyval([t4, t3, curvature / 2, slope_before, 0], t)


def test_minima_of_quartics_are_those_from_the_roots_of_their_slopes() -> None:
    generator = np.random.default_rng(3)
    fall, curvature, slope = generator.normal(size=(3, 3000)) * [[1], [3], [1]]
    before = -np.exp(generator.normal(size=3000))
    before[:3] = 0.0, 1.0, math.nan
    fall[5:7] = math.inf, math.nan
    curvature[20:30], slope[20:30] = 0.0, before[20:30]  # linear if fall is -slope
    fall[20:30] = -before[20:30]
    with np.errstate(all="ignore"):
        times, falls = first_minima(fall, before, curvature, slope)
    assert np.isnan(times[[0, 1, 2, 5, 6, *range(20, 30)]]).all()
    for i in range(30, 3000):
        expected = from_roots(fall[i], before[i], curvature[i], slope[i])
        assert (times[i], falls[i]) == pytest.approx(expected, rel=1e-6, abs=1e-9 * abs(before[i]), nan_ok=True), i
    for i in (1, 5, 20, 40, 41, 42):
        alone = first_minimum(fall[i], before[i], curvature[i], slope[i])
        assert (alone or (math.nan, math.nan)) == pytest.approx((times[i], falls[i]), nan_ok=True)
