"""`fit_gpytorch_mll_descend` fits BoTorch's models, as `fit_gpytorch_mll` expects of an optimizer."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("botorch")

from botorch.exceptions.warnings import OptimizationWarning
from botorch.fit import fit_gpytorch_mll
from botorch.models import SingleTaskGP
from botorch.models.transforms import Standardize
from botorch.optim.closures import get_loss_closure_with_grads
from botorch.optim.core import OptimizationResult, OptimizationStatus
from botorch.optim.fit import fit_gpytorch_mll_scipy
from gpytorch.kernels import MaternKernel, ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood
from gpytorch.mlls import ExactMarginalLogLikelihood
from linear_operator.utils.errors import NanError, NotPSDError

from descend.fit.botorch import fit_gpytorch_mll_descend

pytestmark = pytest.mark.filterwarnings("ignore:.*(double precision|not contained|not standardized)")
FIT = fit_gpytorch_mll_descend


def likelihood(*, has_priors: bool = True, dtype: torch.dtype = torch.float64, n_outputs: int = 1) -> Any:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(20, 2, generator=generator, dtype=torch.float64)
    y = torch.stack([torch.sin(6 * x[:, 0] + i) + x[:, 1] for i in range(n_outputs)], dim=1)
    y = y + 0.1 * torch.randn(y.shape, generator=generator, dtype=y.dtype)
    options: dict[str, Any] = {}
    if not has_priors:
        options = dict(covar_module=ScaleKernel(MaternKernel(ard_num_dims=2)), likelihood=GaussianLikelihood())
    model = SingleTaskGP(x.to(dtype), y.to(dtype), outcome_transform=Standardize(n_outputs), **options)
    return ExactMarginalLogLikelihood(model.likelihood, model).train()


def values(mll: Any) -> Tensor:
    return torch.cat([param.detach().reshape(-1) for param in mll.parameters()])


class Closure:
    """The loss and its gradients, with a count, a record, and errors on demand."""

    def __init__(self, mll: Any, errors: dict[int, Exception] | None = None) -> None:
        parameters = {name: param for name, param in mll.named_parameters() if param.requires_grad}
        self.evaluate = get_loss_closure_with_grads(mll, parameters=parameters)
        self.mll, self.errors = mll, errors or {}
        self.losses: list[float] = []
        self.points: list[Tensor] = []

    def __call__(self, **options: Any) -> Any:
        self.points.append(values(self.mll))
        self.losses.append(math.nan)
        if len(self.losses) in self.errors:
            raise self.errors[len(self.losses)]
        loss, grads = self.evaluate(**options)
        self.losses[-1] = loss.item()
        return loss, grads


@pytest.mark.parametrize("options", [dict(), dict(has_priors=False), dict(n_outputs=2)], ids=str)
def test_optimum_is_scipys_for_fewer_evaluations(options: dict[str, Any]) -> None:
    ours, theirs = Closure(likelihood(**options)), Closure(likelihood(**options))
    result, reference = FIT(ours.mll, closure=ours), fit_gpytorch_mll_scipy(theirs.mll, closure=theirs)
    assert type(result) is OptimizationResult
    assert result.status is OptimizationStatus.SUCCESS
    assert result.fval == pytest.approx(reference.fval, abs=1e-6)
    assert result.fval == min(ours.losses)
    assert torch.equal(values(ours.mll), ours.points[ours.losses.index(result.fval)])
    assert len(ours.losses) <= len(theirs.losses)
    assert result.step > 0
    assert result.runtime > 0


def test_single_precision_is_fitted() -> None:
    reference = fit_gpytorch_mll_scipy(likelihood())
    assert FIT(likelihood(dtype=torch.float32)).fval == pytest.approx(reference.fval, abs=1e-4)


def test_fit_gpytorch_mll_takes_it() -> None:
    mll = likelihood()
    kwargs = {"options": {"gtol": 1e-7}}
    assert fit_gpytorch_mll(mll, optimizer=FIT, optimizer_kwargs=kwargs) is mll
    assert not mll.training
    reference = fit_gpytorch_mll(likelihood())
    for name, value in reference.state_dict().items():
        assert torch.allclose(mll.state_dict()[name], value, rtol=1e-2, atol=1e-3), name


def test_best_of_all_attempts_is_found() -> None:
    torch.manual_seed(0)
    mll = fit_gpytorch_mll(likelihood(), optimizer=FIT, max_attempts=3, pick_best_of_all_attempts=True)
    assert not mll.training


def test_bounds_are_those_of_constraints_and_the_callers() -> None:
    closure = Closure(likelihood())
    name = next(name for name, _ in closure.mll.named_parameters() if "lengthscale" in name)
    plain = FIT(likelihood()).fval
    result = FIT(closure.mll, closure=closure, bounds={name: (None, 0.25), "unknown": (1, 0)})
    lengthscales = dict(closure.mll.named_parameters())[name].detach()
    assert result.status is OptimizationStatus.SUCCESS
    assert result.fval > plain + 1e-3
    assert float(lengthscales.max()) == 0.25
    spans = [span for param in closure.mll.parameters() for span in [param.numel()]]
    names = [key for key, _ in closure.mll.named_parameters()]
    offset = sum(spans[: names.index(name)])
    assert all(float(point[offset : offset + 2].max()) <= 0.25 for point in closure.points[1:])


def test_only_the_given_parameters_move() -> None:
    mll = likelihood()
    before = {name: param.detach().clone() for name, param in mll.named_parameters()}
    chosen = {name: param for name, param in mll.named_parameters() if "lengthscale" in name}
    FIT(mll, parameters=chosen)
    assert [name for name, param in mll.named_parameters() if not torch.equal(param, before[name])] == list(chosen)


def test_frozen_parameters_stay() -> None:
    mll = likelihood()
    frozen = next(mll.parameters()).requires_grad_(False)
    before = frozen.clone()
    assert FIT(mll).status is OptimizationStatus.SUCCESS
    assert torch.equal(frozen, before)


@pytest.mark.parametrize("error", [NotPSDError("not"), NanError("nan"), torch.linalg.LinAlgError("failed")])
def test_numerical_errors_are_walls(error: Exception) -> None:
    closure = Closure(likelihood(), {2: error, 9: error})
    result = FIT(closure.mll, closure=closure)
    assert result.status is OptimizationStatus.SUCCESS
    assert result.fval == pytest.approx(FIT(likelihood()).fval, abs=1e-6)
    distance = [float((point - closure.points[0]).norm()) for point in closure.points[1:3]]
    assert distance[1] < distance[0]  # a shorter step


def test_errors_at_the_start_are_botorchs_affair() -> None:
    closure = Closure(likelihood(), {1: NotPSDError("not")})
    with pytest.raises(NotPSDError):
        FIT(closure.mll, closure=closure)
    closure = Closure(likelihood(), {1: NanError("nan")})
    with pytest.warns(OptimizationWarning, match="fit_gpytorch_mll_descend: The function or its gradient is NaN"):
        result = FIT(closure.mll, closure=closure)
    assert result.status is OptimizationStatus.FAILURE
    closure = Closure(likelihood(), {1: NotPSDError("not")})  # which fit_gpytorch_mll catches
    assert not fit_gpytorch_mll(closure.mll, closure=closure, optimizer=FIT).training


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_other_errors_leave_the_best_point(error: type[BaseException]) -> None:
    closure = Closure(likelihood(), {6: error()})  # type: ignore[dict-item]
    with pytest.raises(error):
        FIT(closure.mll, closure=closure)
    best = min(loss for loss in closure.losses if not math.isnan(loss))
    assert torch.equal(values(closure.mll), closure.points[closure.losses.index(best)])


@pytest.mark.parametrize("options", [dict(maxiter=3), dict(maxfun=5), dict(maxfun=1), dict(maxiter=0)])
def test_limits_are_hard(options: dict[str, int]) -> None:
    closure = Closure(likelihood())
    result = FIT(closure.mll, closure=closure, options=options)
    assert result.status is OptimizationStatus.STOPPED
    assert result.step <= options.get("maxiter", 99)
    assert len(closure.losses) <= options.get("maxfun", 99)
    assert result.fval == min(closure.losses)


def test_ftol_ends_a_run_where_it_is_given() -> None:
    coarse, fine = FIT(likelihood(), options=dict(ftol=1e-2)), FIT(likelihood())
    assert coarse.status is OptimizationStatus.SUCCESS
    assert coarse.step < fine.step
    assert coarse.fval > fine.fval


def test_timeout_stops_after_an_iteration() -> None:
    result = FIT(likelihood(), timeout_sec=0.0)
    assert (result.status, result.step) == (OptimizationStatus.STOPPED, 1)
    assert result.message.startswith("Optimization timed out after ")


def test_callback_sees_each_iterate_and_stops() -> None:
    closure, seen = Closure(likelihood()), []

    def callback(parameters: dict[str, Tensor], result: OptimizationResult) -> None:
        assert list(parameters) == [name for name, _ in closure.mll.named_parameters()]
        assert result.status is OptimizationStatus.RUNNING
        assert values(closure.mll).tolist() in [point.tolist() for point in closure.points]
        assert result.fval in closure.losses
        seen.append(result.step)
        if len(seen) == 4:
            raise StopIteration

    result = FIT(closure.mll, closure=closure, callback=callback)
    assert seen == [1, 2, 3, 4]
    assert (result.status, result.step) == (OptimizationStatus.STOPPED, 4)


def test_closure_gets_its_arguments() -> None:
    mll, got = likelihood(), []
    evaluate = Closure(mll)

    def closure(weight: float) -> Any:
        got.append(weight)
        return evaluate()

    FIT(mll, closure=closure, closure_kwargs={"weight": 2.0}, options={"maxiter": 1})
    assert set(got) == {2.0}


@pytest.mark.parametrize(
    "options", [dict(gtol=-1), dict(maxfun=0), dict(maxiter=1.5), dict(ftol=math.nan), dict(typo=1), dict(maxcor="a")]
)
def test_wrong_options_are_named_before_anything_is_evaluated(options: dict[str, Any]) -> None:
    closure = Closure(likelihood())
    with pytest.raises(ValueError, match=f"fit_gpytorch_mll_descend: option.* {next(iter(options))}"):
        FIT(closure.mll, closure=closure, options=options)
    assert not closure.losses
