"""Statistics and step sizes agree with NumPy, in one piece and in many."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from inspecting import model, of, train

import descend
from descend.diagnostics.inspection import statistics as numbers
from descend.diagnostics.inspection import stored
from descend.diagnostics.inspection.statistics import Histogram, statistics, stuck, zero_rows


@pytest.fixture(params=[1 << 20, 64], ids=["whole", "pieces"])
def piece(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(stored, "PIECE", request.param)
    return int(request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (1000,), (37, 41), (2, 300, 3), (1, 1, 500)])
def test_statistics_match_numpy(piece: int, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    random = torch.Generator().manual_seed(3)
    tensor = torch.randn(shape, generator=random).to(dtype)
    tensor = torch.where(tensor.abs() < 0.3, 0.0, tensor)
    if tensor.numel() > 1:
        tensor.view(-1)[::17] = float("nan")
        tensor.view(-1)[5::19] = -float("inf")
        tensor.view(-1)[6] = torch.finfo(dtype).tiny / 4
    values = tensor.double().numpy().ravel()
    finite = values[np.isfinite(values)]
    found = statistics([stored.stored(tensor)])
    assert found is not None
    assert found.numel == values.size
    assert found.norm == pytest.approx(np.linalg.norm(finite), rel=1e-12)
    assert (found.smallest, found.largest) == (finite.min(), finite.max())
    assert found.zeros == (finite == 0).sum()
    assert found.nans == np.isnan(values).sum()
    assert found.infs == np.isinf(values).sum()
    assert found.negatives == (finite < 0).sum()
    assert found.subnormals == int(tensor.numel() > 1)


def test_statistics_of_other_tensors(piece: int) -> None:
    transposed = torch.arange(1200.0).reshape(30, 40).t()
    found = statistics([stored.stored(transposed), stored.stored(torch.tensor([3 + 4j]))])
    assert found is not None
    assert found.numel == 1202
    assert found.norm == pytest.approx(np.sqrt((np.arange(1200.0) ** 2).sum() + 25))
    assert statistics([stored.stored(torch.ones(3, device="meta"))]) is None
    empty = statistics([stored.stored(torch.ones(0, 4))])
    assert empty is not None
    assert (empty.norm, empty.smallest, empty.largest) == (0.0, None, None)
    huge = statistics([stored.stored(torch.full((4,), 1e300, dtype=torch.float64))])
    assert huge is not None
    assert huge.norm == pytest.approx(2e300)


def test_pieces_are_bounded_and_in_order(piece: int) -> None:
    tensor = torch.arange(5000).reshape(2, 500, 5).transpose(0, 1)
    found = list(stored.pieces(tensor))
    assert max(part.numel() for part in found) <= piece
    assert torch.equal(torch.cat(found), tensor.reshape(-1))


def test_quantiles_match_numpy() -> None:
    values = np.exp(np.random.default_rng(0).normal(size=50_000) * 20)
    histogram = Histogram()
    for part in np.array_split(values, 7):
        histogram.add(torch.from_numpy(part.copy()))
    at = (0.01, 0.25, 0.5, 0.75, 0.99)
    expected = np.quantile(values, at, method="inverted_cdf")
    np.testing.assert_allclose(histogram.quantiles(at), expected, rtol=0.002)


def test_rows_and_decay_match_numpy(piece: int) -> None:
    matrix = torch.randn(500, 3)
    matrix[10:40] = 0
    assert zero_rows(matrix) == 30
    values = torch.rand(3000).bfloat16()
    ours, alive = stuck(values, 0.003)
    expected = (values.double() * 0.997).bfloat16() == values
    assert (ours, alive) == (int((expected & (values != 0)).sum()), int((values != 0).sum()))
    assert 0 < ours < alive
    assert numbers.stuck(torch.rand(3000).bfloat16() + 1e-3, 0.001)[0] == 3000


def effective(second: Any, lr: float, beta2: float, eps: float, step: int) -> Any:
    return lr / (np.sqrt(second.double().numpy().ravel() / (1 - beta2**step)) + eps)


@pytest.mark.parametrize(
    ("make", "options", "second"),
    [
        (torch.optim.AdamW, dict(lr=0.02, betas=(0.8, 0.95), eps=1e-3), "exp_avg_sq"),
        (torch.optim.Adam, dict(amsgrad=True), "max_exp_avg_sq"),
        (descend.NAdam, dict(lr=0.1), "exp_avg_sq"),
        (descend.AdamWScheduleFree, dict(lr=0.01, warmup_steps=7), "exp_avg_sq"),
    ],
)
def test_step_sizes_match_numpy(make: Any, options: Any, second: str, tmp_path: Path) -> None:
    net = model()
    optimizer = make(net.parameters(), **options)
    train(net, optimizer, steps=6)
    state = optimizer.state_dict()
    group = state["param_groups"][0]
    examination, _ = of(tmp_path / "state.pt", state)
    lr = group["lr"] * (6 / 7 if make is descend.AdamWScheduleFree else 1)
    expected = [
        effective(content[second], lr, group["betas"][1], group["eps"], 6) for content in state["state"].values()
    ]
    at = (0.01, 0.25, 0.5, 0.75, 0.99)
    for measured, sizes in zip(examination.measures, expected, strict=True):
        assert measured.step_sizes == pytest.approx(np.quantile(sizes, at, method="inverted_cdf"), rel=0.003)
    total = np.quantile(np.concatenate(expected), at, method="inverted_cdf")
    assert examination.group_step_sizes[0] == pytest.approx(total, rel=0.003)


@pytest.mark.parametrize(
    ("make", "momentum"), [(torch.optim.RAdam, 0), (torch.optim.RMSprop, 0), (torch.optim.Adagrad, 0)]
)
def test_step_sizes_are_the_update_for_an_average_of_one(make: Any, momentum: float, tmp_path: Path) -> None:
    """The step that torch takes, divided by its averaged gradient, is the step size of the state it leaves."""
    weight = torch.nn.Parameter(torch.zeros(500, dtype=torch.float64))
    options = dict(lr=0.1, betas=(0.0, 0.9), eps=1e-3) if make is torch.optim.RAdam else dict(lr=0.1, eps=1e-3)
    optimizer = make([weight], **options)
    for step in range(40):
        weight.grad = torch.randn(500, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        before = weight.detach().clone()
        optimizer.step()
    sizes = ((before - weight.detach()) / weight.grad).numpy()
    examination, _ = of(tmp_path / "state.pt", optimizer.state_dict())
    expected = np.quantile(sizes, (0.01, 0.25, 0.5, 0.75, 0.99), method="inverted_cdf")
    assert examination.measures[0].step_sizes == pytest.approx(expected, rel=0.003)
