"""The backend of whole matrices: batches, memory, layouts, and that eager runs what it declines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from cases import MATRICES, MATRIX_CASES, Case, give_grads, params_of
from torch import Tensor

from descend import AdamW, Muon, NorMuon, from_rule
from descend.backends import matrix
from descend.backends.eager import EagerBackend
from descend.core.composition import Additions, composed
from descend.matrix_rules import muon
from descend.ops import elementwise, of_matrices


def leaves(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=random, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def trained(case: Case, params: list[Tensor], backend: str, **options: Any) -> Any:
    optimizer = case.ours(params, **case.options, backend=backend, **options)
    for seed in range(3):
        give_grads(params, seed)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("case", MATRIX_CASES, ids=str)
@pytest.mark.parametrize("options", [{}, dict(split=2), dict(stacked=True)], ids=str)
def test_batches_of_small_matrices_are_the_same_matrices(case: Case, options: dict[str, Any]) -> None:
    shapes = [(4, 6, 5)] * 5 + [(4, 6, 6), (2, 6, 5)] + [(4, 6, 5)] * 2
    ours, eager = (
        trained(case, leaves(shapes, torch.float32), backend, **options, max_norm=1.0)
        for backend in ("matrix", "eager")
    )
    for a, b in zip(params_of(ours), params_of(eager), strict=True):
        torch.testing.assert_close(a, b)
        for name, tensor in eager.state[b].items():
            torch.testing.assert_close(ours.state[a][name], tensor)


@pytest.mark.parametrize("case", MATRIX_CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_step_does_not_depend_on_which_others_have_gradients(case: Case, dtype: torch.dtype) -> None:
    shapes = [(4, 4)] * 3 + [(5, 2)] * 2
    together = leaves(shapes, dtype)
    trained(case, together, "matrix")
    for position in range(5):
        params = leaves(shapes, dtype)
        optimizer = case.ours(params, **case.options, backend="matrix")
        for seed in range(3):
            give_grads(params, seed)
            for other in (*params[:position], *params[position + 1 :]):
                other.grad = None
            optimizer.step()
        assert torch.equal(params[position], together[position])


def test_parameters_with_other_scalars_are_another_batch() -> None:
    params = leaves([(5, 4)] * 4)
    groups: Any = [dict(params=params[:2], lr=0.1), dict(params=params[2:], lr=0.2)]
    optimizer = Muon(groups, weight_decay=0.0)
    before = [param.detach().clone() for param in params]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    moved = [float((param.detach() - old).norm()) for param, old in zip(params, before, strict=True)]
    assert moved == pytest.approx([moved[0], moved[0], 2 * moved[0], 2 * moved[0]])


def test_batches_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix, "LARGEST", 50)
    params = leaves([(5, 4)] * 5)
    assert matrix._batches(params, [0] * 5, True) == [[0, 1], [2, 3], [4]]
    assert matrix._batches(params, [0, 1, 0, 1, 1], True) == [[0, 2], [1, 3], [4]]
    assert matrix._batches(params, [0] * 5, False) == [[0], [1], [2], [3], [4]]
    monkeypatch.setattr(matrix, "SMALL", 19)
    assert matrix._batches(params, [0] * 5, True) == [[0], [1], [2], [3], [4]]


@pytest.mark.parametrize("case", MATRIX_CASES, ids=str)
def test_layouts_of_memory_do_not_matter(case: Case) -> None:
    def odd() -> list[Tensor]:
        plain = leaves([(7, 5), (5, 9), (4, 3, 2, 5)])
        return [
            plain[0].detach().T.contiguous().T.requires_grad_(),
            torch.zeros(5, 18, dtype=torch.float64)[:, ::2].copy_(plain[1].detach()).requires_grad_(),
            plain[2].detach().to(memory_format=torch.channels_last).requires_grad_(),
        ]

    ours, expected = trained(case, odd(), "matrix"), trained(case, leaves([(7, 5), (5, 9), (4, 3, 2, 5)]), "eager")
    for a, b in zip(params_of(ours), params_of(expected), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(maximize=True, max_norm=0.1),
        dict(cautious="update"),
        dict(cautious="decay", ema=0.9),
        dict(cautious="update", ema=0.9),
    ],
    ids=str,
)
@pytest.mark.parametrize("case", MATRIX_CASES, ids=str)
def test_pieces_are_the_same_elements(
    case: Case, options: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matrix, "SMALL", 0)
    monkeypatch.setattr(matrix, "PIECE", 50)
    ours, eager = (trained(case, leaves(MATRICES, dtype), backend, **options) for backend in ("matrix", "eager"))
    for a, b in zip(params_of(ours), params_of(eager), strict=True):
        torch.testing.assert_close(a, b)
        for name, tensor in eager.state[b].items():
            torch.testing.assert_close(ours.state[a][name], tensor)


def test_pieces_replace_only_what_the_launch_owns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix, "PIECE", 7)
    pieces = matrix.Pieces()
    mine, foreign = torch.arange(20.0).view(10, 2), torch.ones(10, 2)
    pieces.owned = [mine]
    before = mine.clone()

    def both(a: Tensor, b: Tensor, factor: float) -> tuple[Tensor, Tensor]:
        return a + factor * b, (a * b).to(torch.bfloat16)

    first, second = pieces(both, mine, foreign, 2.0, replaces=1)
    assert first is mine
    assert torch.equal(mine, before + 2)
    assert torch.equal(second, before.bfloat16())
    assert pieces(both, foreign, mine, 2.0, replaces=1)[0] is not foreign
    assert pieces(both, mine, foreign, 2.0)[0] is not mine
    assert torch.equal(mine, before + 2)
    scale = torch.full((1, 1), 3.0)
    assert torch.equal(pieces(torch.mul, mine, scale), mine * 3)
    assert torch.equal(pieces(torch.mul, mine, torch.ones(10, 1)), mine)


def test_a_rule_that_calls_a_rule_sees_the_old_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix, "PIECE", 50)
    rule, found = composed(muon(), Additions(cautious_update=True)), []
    for backend in (matrix.MatrixBackend(), EagerBackend()):
        (param,) = leaves([(30, 20)])
        give_grads([param], 0)
        scalars = 0.1, 0.1, 0.95, 0.05, 1e-7
        launch = backend.launch(rule, len(scalars), (), [param], [0])
        launch.set_state([[torch.ones_like(param)]])
        launch.set_scalars(0, 1.0, scalars)
        with torch.no_grad():
            launch.run(False, None)
        found.append(param.detach())
    torch.testing.assert_close(*found)


@of_matrices
def keeping(param: Any, grad: Any, previous: Any, lr: Any) -> Any:
    """Gradient descent that keeps the last parameter."""
    return elementwise(torch.sub, param, lr * grad), param


def test_a_rule_may_keep_the_old_parameter() -> None:
    params = leaves([(30, 20)])
    before = params[0].detach().clone()
    optimizer = from_rule(keeping, "Keeping", lr=1.0)(params)
    give_grads(params, 0)
    optimizer.step()
    assert torch.equal(optimizer.state[params[0]]["previous"], before)
    torch.testing.assert_close(params[0].detach(), before - params[0].grad)


class Twice(Tensor):
    pass


def test_eager_runs_what_is_declined() -> None:
    shared = torch.zeros(4, 3)
    params = [
        torch.zeros(4, 3, dtype=torch.float16).requires_grad_(),
        torch.zeros(4, 3).as_subclass(Twice).requires_grad_(),
        shared.requires_grad_(),
        shared.detach().requires_grad_(),
    ]
    optimizer = Muon(params)
    assert [placement.backend for placement in optimizer.backends()] == ["matrix", "eager", "eager", "eager"]
    assert optimizer.backends()[1].reason == "a Twice"
    with pytest.raises(RuntimeError, match=r"backend='matrix' cannot run .*: a Twice"):
        Muon(params, backend="matrix").backends()


@pytest.mark.parametrize("backend", ["cpu", "foreach", "matrix"])
def test_a_backend_for_elements_leaves_matrices_to_this_one(backend: Any) -> None:
    assert Muon(leaves([(3, 2)]), backend=backend).backends()[0].backend == "matrix"
    assert Muon(leaves([(3, 2)]), backend="eager").backends()[0].backend == "eager"
    if backend == "matrix":
        with pytest.raises(RuntimeError, match="no rule of whole matrices"):
            AdamW(leaves([(3, 2)]), backend=backend).backends()


@of_matrices
def unit(param: Any, grad: Any, lr: Any) -> Any:
    """Gradient descent with gradients of norm one."""
    return param - lr * grad / (grad * grad).sum() ** 0.5


def test_rules_that_cannot_be_stacked_run_one_by_one() -> None:
    params = leaves([(3, 2), (3, 2)])
    optimizer = from_rule(unit, "Unit", lr=1.0)(params)
    before = [param.detach().clone() for param in params]
    give_grads(params, 0)
    optimizer.step()
    assert [placement.backend for placement in optimizer.backends()] == ["matrix", "matrix"]
    for param, old in zip(params, before, strict=True):
        assert float((param.detach() - old).norm()) == pytest.approx(1.0)


def test_norms_are_those_of_other_optimizers() -> None:
    norms = []
    for kind in (Muon, NorMuon, AdamW):
        params = leaves([(300, 70), (7, 5)], torch.float32)
        optimizer = kind(params, max_norm=0.5)
        give_grads(params, 0)
        optimizer.step()
        norms.append(optimizer.grad_norm)
    assert norms[0] == norms[1] == norms[2]
