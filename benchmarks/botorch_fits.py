"""Fit Gaussian processes with BoTorch: evaluations and final likelihood of our optimizer and of SciPy's.

    pip install 'descend[botorch]'
    python benchmarks/botorch_fits.py [--only PATTERN] [--seeds N]

Every model is fitted from the same start by `fit_gpytorch_mll_descend` and by BoTorch's own
`fit_gpytorch_mll_scipy`, with the defaults of both; evaluations of the loss with its gradient are
counted in the closure. The loss is the negative marginal log likelihood for each datum. A fit is
worse if its loss is higher by more than 1e-6: SciPy stops where an iteration gains less than 2e-9.
"""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from botorch.models import MultiTaskGP, SingleTaskGP
from botorch.models.transforms import Normalize, Standardize
from botorch.optim.closures import get_loss_closure_with_grads
from botorch.optim.fit import fit_gpytorch_mll_scipy
from botorch.test_functions import Ackley, Branin, Griewank, Hartmann, Levy, Rastrigin, Rosenbrock, StyblinskiTang
from gpytorch.kernels import MaternKernel, RBFKernel, ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood
from gpytorch.mlls import ExactMarginalLogLikelihood
from torch import Tensor

from descend.fit.botorch import fit_gpytorch_mll_descend

WORSE = 1e-6


class Data(NamedTuple):
    """Inputs in the unit cube, values, and a generator for what else is random."""

    x: Tensor
    y: Tensor
    generator: torch.Generator


def sample(function: Any, number: int, seed: int, noise: float = 0.0) -> Data:
    """Values of a synthetic function at random points, with noise relative to their spread."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(number, function.dim, generator=generator, dtype=torch.float64)
    low, high = function.bounds.double()
    y = function(low + (high - low) * x).unsqueeze(-1)
    return Data(x, y + noise * y.std() * torch.randn(y.shape, generator=generator, dtype=y.dtype), generator)


def single(data: Data, **options: Any) -> SingleTaskGP:
    return SingleTaskGP(data.x, data.y, outcome_transform=Standardize(1), **options)


def without_priors(data: Data) -> SingleTaskGP:
    kernel = ScaleKernel(MaternKernel(nu=2.5, ard_num_dims=data.x.shape[1]))
    return single(data, covar_module=kernel, likelihood=GaussianLikelihood())


def smooth(data: Data) -> SingleTaskGP:
    """A squared exponential kernel without priors: the worst conditioned."""
    kernel = ScaleKernel(RBFKernel(ard_num_dims=data.x.shape[1]))
    return single(data, covar_module=kernel, likelihood=GaussianLikelihood())


def normalized(data: Data) -> SingleTaskGP:
    wide = data._replace(x=1000 * data.x - 300)
    return single(wide, input_transform=Normalize(data.x.shape[1]))


def fixed_noise(data: Data) -> SingleTaskGP:
    return single(data, train_Yvar=torch.full_like(data.y, 1e-3) * data.y.var())


def heteroskedastic(data: Data) -> SingleTaskGP:
    spread = torch.rand(data.y.shape, generator=data.generator, dtype=data.y.dtype)
    return single(data, train_Yvar=(0.01 + 0.3 * spread**2) * data.y.var())


def duplicated(data: Data) -> SingleTaskGP:
    """Each point four times: a singular kernel matrix but for the noise."""
    return single(data._replace(x=data.x.repeat(4, 1), y=data.y.repeat(4, 1)))


def two_tasks(data: Data) -> MultiTaskGP:
    task = (torch.arange(len(data.x)) % 2).double().unsqueeze(-1)
    y = torch.where(task == 0, data.y, 0.5 * data.y + 0.1 * data.y.std() * data.x[:, :1])
    return MultiTaskGP(torch.cat([data.x, task], dim=1), (y - y.mean()) / y.std(), task_feature=-1)


def two_outputs(data: Data) -> SingleTaskGP:
    y = torch.cat([data.y, data.x.sum(1, keepdim=True).sin()], dim=1)
    return SingleTaskGP(data.x, y, outcome_transform=Standardize(2))


def single_precision(data: Data) -> SingleTaskGP:
    return single(data._replace(x=data.x.float(), y=data.y.float()))


class Case(NamedTuple):
    """A model of data."""

    name: str
    function: Any
    number: int
    noise: float
    model: Callable[[Data], Any]


CASES = (
    Case("branin", Branin(), 30, 0.05, single),
    Case("branin, noise-free", Branin(), 60, 0.0, single),
    Case("hartmann", Hartmann(6), 40, 0.1, single),
    Case("ackley", Ackley(4), 50, 0.0, single),
    Case("levy, noisy", Levy(3), 40, 0.3, single),
    Case("rastrigin", Rastrigin(5), 60, 0.1, single),
    Case("styblinski, 12 points in 10 dimensions", StyblinskiTang(10), 12, 0.0, single),
    Case("rosenbrock, no priors", Rosenbrock(5), 40, 0.05, without_priors),
    Case("branin, no priors, noise-free", Branin(), 40, 0.0, without_priors),
    Case("griewank, squared exponential", Griewank(2), 50, 0.0, smooth),
    Case("hartmann, normalized inputs", Hartmann(3), 30, 0.1, normalized),
    Case("ackley, fixed noise", Ackley(3), 40, 0.05, fixed_noise),
    Case("levy, heteroskedastic", Levy(4), 50, 0.2, heteroskedastic),
    Case("branin, each point four times", Branin(), 12, 0.1, duplicated),
    Case("hartmann, two tasks", Hartmann(3), 40, 0.1, two_tasks),
    Case("branin, 5 points", Branin(), 5, 0.0, single),
    Case("hartmann, two outputs", Hartmann(3), 30, 0.1, two_outputs),
    Case("branin, float32", Branin(), 30, 0.05, single_precision),
)


class Outcome(NamedTuple):
    """The loss reached, how often it was evaluated, and what the optimizer said."""

    loss: float
    evaluations: int
    status: str


def fit(optimizer: Callable[..., Any], case: Case, seed: int) -> Outcome:
    """Build the model and fit it once."""
    torch.manual_seed(seed)  # some models begin at random
    model = case.model(sample(case.function, case.number, seed, case.noise))
    mll = ExactMarginalLogLikelihood(model.likelihood, model).train()
    parameters = {name: param for name, param in mll.named_parameters() if param.requires_grad}
    evaluate = get_loss_closure_with_grads(mll, parameters=parameters)
    count = 0

    def closure() -> Any:
        nonlocal count
        count += 1
        return evaluate()

    status = optimizer(mll, closure=closure).status.name
    evaluations = count
    return Outcome(float(evaluate()[0]), evaluations, status)  # the module is left at what was found


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Evaluations and likelihood of GP fits, against SciPy's L-BFGS-B.")
    parser.add_argument("--only", metavar="PATTERN", default="*", help="cases whose names match, as in 'branin*'")
    parser.add_argument("--seeds", metavar="N", type=int, default=4, help="data sets for each case; default: 4")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(f"{'':<42}{'loss':>13}{'SciPy':>13}{'ours - SciPy':>14}{'evaluations':>13}{'SciPy':>7}")
    logs, gaps = [], []
    for case in CASES:
        if not fnmatchcase(case.name, arguments.only):
            continue
        for seed in range(arguments.seeds):
            ours, theirs = fit(fit_gpytorch_mll_descend, case, seed), fit(fit_gpytorch_mll_scipy, case, seed)
            gaps.append(ours.loss - theirs.loss)
            logs.append(math.log(ours.evaluations / theirs.evaluations))
            failures = [f"{name}: {outcome.status}" for name, outcome in (("ours", ours), ("SciPy", theirs))]
            notes = "  ".join(text for text in failures if not text.endswith("SUCCESS"))
            print(
                f"{case.name:<39}{seed:>3}{ours.loss:>13.7f}{theirs.loss:>13.7f}{gaps[-1]:>14.1e}"
                f"{ours.evaluations:>13}{theirs.evaluations:>7}  {notes}",
                flush=True,
            )
    print(
        f"\n{len(gaps)} fits: ours better by more than {WORSE:g} in {sum(gap < -WORSE for gap in gaps)}, worse in "
        f"{sum(gap > WORSE for gap in gaps)}; largest gap {max(gaps):.1e}.\n"
        f"Evaluations: geometric mean of ours / SciPy's {math.exp(sum(logs) / len(logs)):.3f}, ours fewer in "
        f"{sum(log < 0 for log in logs)}."
    )


if __name__ == "__main__":
    main()
