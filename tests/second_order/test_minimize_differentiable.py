"""`minimize(..., differentiable=True)`: derivatives of solutions, or an error."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from minimize_cases import one_thread, vector  # noqa: F401
from torch import Tensor, nn
from torch.autograd import forward_ad, gradcheck

from descend import minimize
from descend.second_order.solvers import implicit_function

# torch imports what is deprecated when forward-mode differentiation begins.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")

TIGHT = 1e-12  # gradcheck's differences amplify an error of the solution by a million


def parameter(*numbers: float) -> Tensor:
    return vector(*numbers).requires_grad_()


def matrix(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


INPUTS = matrix(6, 4)


def misfit(x: Tensor, targets: Tensor, log_weight: Tensor) -> Tensor:
    """Not quadratic, strictly convex."""
    return (INPUTS @ x - targets).square().sum() + log_weight.exp() * x.square().sum() + (x**4).sum()


def fitted(targets: Tensor, log_weight: Tensor, **options: Any) -> Tensor:
    options = {"tol": TIGHT, **options}
    x0 = torch.zeros(4, dtype=torch.float64)
    return minimize(misfit, x0, args=(targets, log_weight), differentiable=True, **options).x


def inputs() -> tuple[Tensor, Tensor]:
    return matrix(6, 1, seed=1)[:, 0].requires_grad_(), torch.tensor(0.3, dtype=torch.float64, requires_grad=True)


@pytest.fixture(params=["dense", "products"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The Hessian factorized, or multiplied by."""
    if request.param == "products":
        monkeypatch.setattr(implicit_function, "MAX_DENSE", -1)
    return str(request.param)


# Right derivatives.


@pytest.mark.parametrize("method", ["bfgs", "l-bfgs", "newton", "newton-cg"])
def test_derivatives_match_differences(method: Any) -> None:
    assert gradcheck(lambda *args: fitted(*args, method=method), inputs(), atol=1e-6)


def test_derivatives_with_bounds_match_differences(way: str) -> None:
    x = fitted(*inputs(), bounds=(-0.1, 0.1))
    assert 0 < int((x.abs() == 0.1).sum()) < 4
    assert gradcheck(lambda *args: fitted(*args, bounds=(-0.1, 0.1)), inputs(), atol=1e-6, check_forward_ad=True)


def test_derivatives_by_bounds_match_differences(way: str) -> None:
    lower, upper = parameter(-0.1, -0.1, -0.1, -0.2), torch.tensor(0.1, dtype=torch.float64, requires_grad=True)

    def solve(targets: Tensor, log_weight: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
        return fitted(targets, log_weight, bounds=(lower, upper))

    assert gradcheck(solve, (*inputs(), lower, upper), atol=1e-6, check_forward_ad=True)


def test_forward_derivatives_match_differences(way: str) -> None:
    assert gradcheck(fitted, inputs(), atol=1e-6, check_forward_ad=True)


def test_jacobians_by_batches_match_single_ones() -> None:
    for strategy in ("reverse-mode", "forward-mode"):
        batched = torch.autograd.functional.jacobian(fitted, inputs(), vectorize=True, strategy=strategy)
        single = torch.autograd.functional.jacobian(fitted, inputs())
        assert all(map(torch.allclose, batched, single))


def ridge(weights: Tensor, inputs: Tensor, targets: Tensor, strength: Tensor) -> Tensor:
    return (inputs @ weights - targets).square().sum() + strength * weights.square().sum()


def ridge_solution(inputs: Tensor, targets: Tensor, strength: Tensor) -> Tensor:
    gram = inputs.T @ inputs + strength * torch.eye(inputs.shape[1]).to(inputs)
    return torch.linalg.solve(gram, inputs.T @ targets)


@pytest.mark.parametrize(("dtype", "numel"), [(torch.float32, 5), (torch.float64, 5), (torch.float64, 230)])
def test_ridge_regression_matches_its_solution(dtype: torch.dtype, numel: int) -> None:
    def gradients(solve: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        args = [matrix(300, numel).to(dtype), matrix(300, 1)[:, 0].to(dtype), torch.tensor(10.0, dtype=dtype)]
        args = [arg.requires_grad_() for arg in args]
        return torch.autograd.grad(solve(*args).square().sum(), args)

    def solve(*args: Tensor) -> Tensor:
        x0 = torch.zeros(numel, dtype=dtype)
        return minimize(ridge, x0, args=args, tol=1e-6 if dtype == torch.float32 else 1e-10, differentiable=True).x

    for found, expected in zip(gradients(solve), gradients(ridge_solution), strict=True):
        assert found.dtype == dtype
        assert torch.allclose(found, expected, rtol=1e-3 if dtype == torch.float32 else 1e-7, atol=1e-7)


def test_quadratic_with_bounds_matches_its_solution() -> None:
    # The second variable is held at its bound b, so x1 = c1 - (b - c2) / 2.
    center, bound = parameter(1.0, 3.0), torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    hessian = torch.tensor([[2.0, 1.0], [1.0, 4.0]], dtype=torch.float64)

    def fun(x: Tensor) -> Tensor:
        return (x - center) @ hessian @ (x - center) / 2

    x = minimize(fun, vector(0.0, 0.0), bounds=(None, [None, bound][1]), tol=1e-12, differentiable=True).x
    assert torch.allclose(x, vector(1.5, 2.0))
    x[0].backward()
    assert torch.allclose(center.grad, vector(1.0, 0.5))  # type: ignore[arg-type]
    assert torch.allclose(bound.grad, torch.tensor(-0.5, dtype=torch.float64))  # type: ignore[arg-type]


# Whatever fun depends on.


def test_tensors_closed_over_get_gradients() -> None:
    raw = parameter(0.2, -0.4)
    center = raw.exp()  # not a leaf: its graph is the caller's
    batch_norm = nn.BatchNorm1d(2, affine=False).double().eval()
    batch_norm.running_mean = parameter(0.5, 0.25)  # a buffer

    def fun(x: Tensor) -> Tensor:
        return (x - center - batch_norm.running_mean).square().sum()  # type: ignore[operator]

    loss = minimize(fun, vector(0.0, 0.0), differentiable=True).x @ vector(1.0, 2.0)
    loss.backward()
    assert torch.allclose(raw.grad, vector(1.0, 2.0) * raw.exp())  # type: ignore[arg-type]
    assert torch.allclose(batch_norm.running_mean.grad, vector(1.0, 2.0))  # type: ignore[arg-type, union-attr]


def test_modules_called_by_fun_get_gradients() -> None:
    torch.manual_seed(0)
    features, head = nn.Linear(3, 2).double(), nn.Linear(2, 1).double()
    x, y = matrix(20, 3), matrix(20, 1)

    def solve(*parameters: Tensor) -> Tensor:
        names = dict(zip(("weight", "bias"), parameters, strict=True))

        def fun(weights: dict[str, Tensor]) -> Tensor:
            hidden = torch.func.functional_call(features, names, (x,)).tanh()
            prediction = torch.func.functional_call(head, weights, (hidden,))
            return (prediction - y).square().sum() + sum(weight.square().sum() for weight in weights.values())

        start = {name: value.detach() for name, value in head.named_parameters()}
        solution = minimize(fun, start, tol=TIGHT, differentiable=True).x
        assert list(solution) == ["weight", "bias"]
        return solution["weight"].sum() + solution["bias"].square().sum()

    assert gradcheck(solve, tuple(features.parameters()), atol=1e-6)
    assert all(weight.grad is None for weight in head.parameters())


def test_args_may_be_structures() -> None:
    options = {"center": [parameter(1.0), parameter(2.0)], "name": "bowl"}
    x = minimize(
        lambda x, o: sum((part - c).square().sum() for part, c in zip(x, o["center"], strict=True)),
        [vector(0.0), vector(0.0).float()],
        args=(options,),
        tol=1e-6,
        differentiable=True,
    ).x
    (x[0] + 3 * x[1]).sum().backward()
    assert [x[0].dtype, x[1].dtype] == [torch.float64, torch.float32]
    assert torch.allclose(options["center"][0].grad, vector(1.0))  # type: ignore[union-attr, arg-type]
    assert torch.allclose(options["center"][1].grad, vector(3.0))  # type: ignore[union-attr, arg-type]


def test_complex_solutions_match_differences() -> None:
    def solve(center: Tensor) -> Tensor:
        def fun(z: Tensor) -> Tensor:
            return (z - center).abs().square().sum() + (z.abs() ** 4).sum()

        return minimize(fun, torch.zeros(2, dtype=torch.complex128), tol=TIGHT, differentiable=True).x

    assert gradcheck(solve, torch.tensor([1 + 2j, -0.5j], dtype=torch.complex128, requires_grad=True), atol=1e-6)


@pytest.mark.parametrize("given", ["jac", "value and gradient", "jac and hvp"])
def test_derivatives_by_the_caller_are_used(given: str) -> None:
    def jac(x: Tensor, center: Tensor) -> Tensor:
        return 2 * (x - center) + 4 * x**3

    def fun(x: Tensor, center: Tensor) -> Any:
        value = (x.detach() - center.detach()).square().sum() + (x.detach() ** 4).sum()
        return (value, jac(x, center)) if given == "value and gradient" else value

    def hvp(x: Tensor, v: Tensor, center: Tensor) -> Tensor:
        return 2 * v + 12 * x**2 * v

    options: dict[str, Any] = {
        "jac": {"jac": jac},
        "value and gradient": {"jac": True},
        "jac and hvp": {"jac": jac, "hvp": hvp, "method": "newton-cg"},
    }[given]

    def solve(center: Tensor) -> Tensor:
        return minimize(fun, vector(0.0, 0.0), args=(center,), tol=TIGHT, differentiable=True, **options).x

    assert gradcheck(solve, parameter(1.0, -2.0), atol=1e-6)


def test_solution_without_parameters_requires_no_gradient() -> None:
    x = fitted(*(tensor.detach() for tensor in inputs()))
    assert not x.requires_grad
    shift = parameter(1.0)  # the value depends on it, the solution does not
    assert not minimize(lambda x: (x.square() + shift).sum(), vector(1.0), differentiable=True).x.requires_grad


def test_solution_is_the_one_without_derivatives() -> None:
    calls = []

    def fun(*args: Tensor) -> Tensor:
        calls.append(args[0])
        return misfit(*args)

    x0, args = torch.zeros(4, dtype=torch.float64), inputs()
    plain = minimize(fun, x0, args=args)
    n_plain = len(calls)
    result = minimize(fun, x0, args=args, differentiable=True)
    assert torch.equal(plain.x, result.x)
    assert (plain.fun, plain.status, plain.n_iter) == (result.fun, result.status, result.n_iter)
    assert result.n_eval == len(calls) - n_plain == plain.n_eval + 1
    assert not any(tensor.requires_grad for tensor in (plain.x, plain.grad, result.grad))


def test_gradients_are_recorded_as_torch_does() -> None:
    with torch.no_grad():
        assert not fitted(*inputs()).requires_grad
    with torch.inference_mode():
        assert not fitted(*inputs()).requires_grad
    with torch.no_grad(), torch.enable_grad():
        assert fitted(*inputs()).requires_grad
    with torch.no_grad(), forward_ad.dual_level():
        targets, log_weight = (tensor.detach() for tensor in inputs())
        dual = fitted(forward_ad.make_dual(targets, torch.ones_like(targets)), log_weight)
        assert forward_ad.unpack_dual(dual).tangent is not None


def test_graph_is_used_up_as_torch_does() -> None:
    args = inputs()
    loss = fitted(*args).sum()
    loss.backward(retain_graph=True)
    first = [arg.grad.clone() for arg in args]  # type: ignore[union-attr]
    loss.backward()
    assert all(torch.allclose(arg.grad, 2 * grad) for arg, grad in zip(args, first, strict=True))  # type: ignore
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_changed_tensors_are_noticed() -> None:
    scale = parameter(2.0)
    loss = minimize(lambda x: (scale * x - 1).square().sum(), vector(0.0), differentiable=True).x.sum()
    with torch.no_grad():
        scale.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_graph_is_freed_with_the_solution() -> None:
    args = inputs()

    def fun(x: Tensor) -> Tensor:
        return misfit(x, *args)

    gc.collect()
    gc.disable()
    try:
        kept = weakref.ref(fun)
        x = minimize(fun, torch.zeros(4, dtype=torch.float64), differentiable=True).x
        x.sum().backward()
        del fun
        assert kept() is not None
        del x
        assert kept() is None
    finally:
        gc.enable()


# Use in an outer problem.


def test_bilevel_ridge_regression_finds_the_best_strength() -> None:
    x, y = matrix(30, 8), matrix(30, 1)[:, 0]

    def validation(weights: Tensor) -> Tensor:
        return (x[20:] @ weights - y[20:]).square().mean()

    def inner(log_strength: Tensor) -> Tensor:
        start = torch.zeros(8, dtype=torch.float64)
        return minimize(ridge, start, args=(x[:20], y[:20], log_strength.exp()), tol=1e-9, differentiable=True).x

    start = torch.tensor(0.0, dtype=torch.float64)
    found = minimize(lambda log_strength: validation(inner(log_strength)), start)
    expected = minimize(lambda log_strength: validation(ridge_solution(x[:20], y[:20], log_strength.exp())), start)
    assert found.success
    assert torch.allclose(found.x, expected.x, atol=1e-5)
    assert found.fun < float(validation(inner(start)))


def test_bilevel_logistic_regression_learns_by_torch_optimizers() -> None:
    x = matrix(40, 5)
    labels = (x[:, 0] + 0.5 * matrix(40, 1, seed=2)[:, 0] > 0).double()
    log_strengths = torch.zeros(5, dtype=torch.float64, requires_grad=True)  # one for each weight
    optimizer = torch.optim.Adam([log_strengths], lr=0.3)
    losses = []
    for _ in range(8):

        def fun(weights: Tensor) -> Tensor:
            loss = nn.functional.binary_cross_entropy_with_logits(x[:25] @ weights, labels[:25])
            return loss + (log_strengths.exp() * weights.square()).mean()

        weights = minimize(fun, torch.zeros(5, dtype=torch.float64), differentiable=True).x
        loss = nn.functional.binary_cross_entropy_with_logits(x[25:] @ weights, labels[25:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    assert log_strengths[0] < 0  # the input that matters


def test_value_has_the_gradient_of_the_envelope_theorem() -> None:
    args = inputs()
    x = fitted(*args)
    for solution in (x, x.detach()):
        gradients = torch.autograd.grad(misfit(solution, *args), args)
        step = 1e-5
        with torch.no_grad():
            ends = [misfit(fitted(args[0], args[1] + sign * step), args[0], args[1] + sign * step) for sign in (1, -1)]
        assert torch.allclose(gradients[1], (ends[0] - ends[1]) / (2 * step), rtol=1e-7)


# Errors instead of wrong derivatives.


def refuses(x: Tensor, message: str) -> None:
    assert x.requires_grad
    with pytest.raises(RuntimeError, match=f"minimize: the solution cannot be differentiated: .*{message}"):
        x.sum().backward()


@pytest.mark.parametrize("limit", [{"max_iter": 1}, {"max_eval": 3}, {"callback": lambda progress: True}])
def test_unfinished_solutions_are_refused(limit: dict[str, Any]) -> None:
    args = inputs()
    result = minimize(misfit, torch.zeros(4, dtype=torch.float64), args=args, differentiable=True, **limit)
    assert not result.success
    assert result.n_eval <= limit.get("max_eval", 100)
    refuses(result.x, f"status '{result.status}'.*result.success")
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(args[1], torch.ones_like(args[1]))
        with pytest.raises(RuntimeError, match="stopped with status"):
            minimize(misfit, torch.zeros(4, dtype=torch.float64), args=(args[0], dual), differentiable=True, **limit)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_solutions_that_are_not_finite_are_refused(value: float) -> None:
    center = parameter(1.0)
    result = minimize(lambda x: (x - center).square().sum() + value, vector(0.0), differentiable=True)
    assert result.status == "non_finite"
    refuses(result.x, "status 'non_finite'")


FLAT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": lambda x, p: (x.sum() - p).square(),  # a valley
    "quartic": lambda x, p: ((x - p) ** 4).sum(),
    "missing variable": lambda x, p: (x[:1] - p).square().sum(),
    "saddle": lambda x, p: (x[0] - p[0]).square() + x[1].square() * p[0] - x[2].square(),
    "maximum": lambda x, p: -(x - p).square().sum(),
}


@pytest.mark.parametrize("name", FLAT)
def test_minima_that_are_not_isolated_are_refused(name: str, way: str) -> None:
    start = vector(1.0, 0.0, 0.0) if name == "saddle" else vector(1.0, 1.0, 1.0)
    p = parameter(1.0)
    result = minimize(FLAT[name], start, args=(p,), differentiable=True)
    assert result.success
    x = result.x
    with pytest.raises(RuntimeError, match=r"its Hessian is .*(singular|not positive definite).*add a small"):
        (x @ vector(1.0, 2.0, 3.0)).backward()


@pytest.mark.parametrize("shift", [0.0, 1e-15, -1e-15])
def test_kinks_at_bounds_are_refused(shift: float, way: str) -> None:
    center = parameter(1.0 + shift, 5.0)  # the first variable is at its bound, which hardly holds it
    hessian = torch.tensor([[2.0, 1.0], [1.0, 4.0]], dtype=torch.float64)

    def fun(x: Tensor) -> Tensor:
        return (x - center) @ hessian @ (x - center) / 2 + (x - center).pow(4).sum()

    result = minimize(fun, vector(4.0, 4.0), bounds=(1.0, None), differentiable=True)
    assert result.success
    refuses(result.x, "position 0 .* kink")


def test_solutions_too_inaccurate_for_their_bounds_are_refused() -> None:
    # Converged at the start, x = 0.5: according to the gradient's sign free, though the minimum is at the bound.
    center = parameter(-1.0)
    result = minimize(
        lambda x: 1e-3 * (x - center).square().sum(), vector(0.5), bounds=(0, None), tol=1e-2, differentiable=True
    )
    assert result.success
    assert result.x == 0.5
    refuses(result.x, "position 0 .*Lower tol")
    x = minimize(
        lambda x: 1e-3 * (x - center).square().sum(), vector(0.5), bounds=(0, None), tol=1e-6, differentiable=True
    ).x
    x.sum().backward()
    assert center.grad == 0


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_solutions_as_good_as_at_their_bounds_are_held(sign: float) -> None:
    theta = parameter(1.0)

    def fun(x: Tensor) -> Tensor:
        return (sign * theta * x).sum() + 0.5 * x.square().sum()

    bounds = (0.0, None) if sign > 0 else (None, 0.0)
    result = minimize(fun, vector(sign * 1e-9), bounds=bounds, differentiable=True)
    assert result.x == sign * 1e-9  # converged at the start
    result.x.sum().backward()
    assert theta.grad == 0


def test_bounds_that_hardly_hold_are_refused() -> None:
    center = parameter(0.0)
    result = minimize(lambda x: (x - center).square().sum(), vector(1e-9), bounds=(0.0, None), differentiable=True)
    assert result.x == 1e-9  # as the gradient 2e-9 is more than the distance, the bound holds x
    refuses(result.x, "position 0 .* kink")


def test_bounds_alone_get_gradients() -> None:
    lower = parameter(1.0, -1.0)
    x = minimize(lambda x: x.square().sum(), vector(2.0, 2.0), bounds=(lower, None), differentiable=True).x
    (x @ vector(3.0, 4.0)).backward()
    assert lower.grad.tolist() == [3.0, 0.0]  # type: ignore[union-attr]


def test_fixed_variables_are_constants() -> None:
    center = parameter(0.3)  # where the gradient is zero
    x = minimize(lambda x: (x - center).square().sum(), vector(0.0), bounds=(0.3, 0.3), differentiable=True).x
    x.sum().backward()
    assert center.grad == 0
    args = inputs()
    x = fitted(*args, bounds=(vector(0.3, -1, -1, -1), vector(0.3, 1, 1, 1)))
    assert gradcheck(
        lambda *args: fitted(*args, bounds=(vector(0.3, -1, -1, -1), vector(0.3, 1, 1, 1))), args, atol=1e-6
    )
    assert not any(gradient.any() for gradient in torch.autograd.grad(x[0], args))


def test_second_derivatives_are_refused() -> None:
    args = inputs()
    for loss in (fitted(*args).sum(), fitted(*args).square().sum()):
        gradients = torch.autograd.grad(loss, args, create_graph=True)
        assert all(torch.isfinite(gradient).all() for gradient in gradients)
        for gradient in gradients:
            with pytest.raises(RuntimeError, match="cannot be differentiated again"):
                torch.autograd.grad(gradient.sum(), args, allow_unused=True, retain_graph=True)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(args[1], torch.ones_like(args[1]))
        tangent = forward_ad.unpack_dual(fitted(args[0], dual)).tangent
        with pytest.raises(RuntimeError, match="cannot be differentiated again"):
            tangent.sum().backward()


def test_functions_without_second_derivatives_are_refused() -> None:
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.square()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            (x,) = ctx.saved_tensors
            return _first_only(2 * x * grad)

    class First(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            raise RuntimeError("no second derivative")

    def _first_only(x: Tensor) -> Tensor:
        return First.apply(x)

    center = parameter(1.0)
    x = minimize(lambda x: Square.apply(x - center).sum(), vector(0.0), differentiable=True).x
    with pytest.raises(RuntimeError, match="minimize: fun cannot be differentiated twice"):
        x.sum().backward()


@pytest.mark.slow  # torch.compile
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # which torch.compile reads
def test_compiled_functions_are_refused() -> None:
    center = parameter(1.0)
    compiled = torch.compile(lambda x, c: (x - c).square().sum() + (x**4).sum(), backend="aot_eager")
    x = minimize(lambda x: compiled(x, center) + 0.1 * x.square().sum(), vector(0.0), differentiable=True).x
    refuses(x, r"torch.compile.* no second derivatives")


def test_nan_from_outside_stays_nan(way: str) -> None:
    args = inputs()
    gradients = torch.autograd.grad(fitted(*args).sum() * float("nan"), args)
    assert all(torch.isnan(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("kind", ["module", "parameter"])
def test_parameters_in_place_are_refused(kind: str) -> None:
    module, calls = nn.Linear(2, 1), []
    x0 = module if kind == "module" else module.weight
    with pytest.raises(ValueError, match=r"differentiable=True needs plain tensors, .*nn.Parameter.*functional_call"):
        minimize(lambda x: calls.append(x), x0, differentiable=True)
    assert not calls


def test_wrong_options_are_refused() -> None:
    with pytest.raises(TypeError, match="differentiable must be True or False, got 'yes'"):
        minimize(misfit, vector(0.0), differentiable="yes")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_eval must be an integer >= 2, got 1"):
        minimize(misfit, vector(0.0), max_eval=1, differentiable=True)


def test_gradients_from_jac_that_autograd_cannot_see_are_refused_at_once() -> None:
    calls = []

    def fun(x: Tensor, center: Tensor) -> Tensor:
        calls.append(x)
        return (x - center).square().sum()

    with pytest.raises(RuntimeError, match="autograd cannot see how the gradient from jac depends on x"):
        minimize(
            fun,
            vector(0.0),
            jac=lambda x, c: 2 * (x.detach() - c.detach()),
            args=(parameter(1.0),),
            differentiable=True,
        )
    assert len(calls) == 1
