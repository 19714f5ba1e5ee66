"""Where a monitor writes: files, dictionaries and loggers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import give_grads, params_of
from torch import nn

from descend import SGD, Monitor
from descend.diagnostics.monitoring.writers import JsonLines, read_json_lines, writer


def watched(steps: int = 2, **options: Any) -> Monitor:
    optimizer = SGD(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)))
    monitor = Monitor(optimizer, every=1, **options)
    for seed in range(steps):
        give_grads(params_of(optimizer), seed)
        optimizer.step()
    return monitor


def test_everything_gets_the_same_metrics(tmp_path: Path) -> None:
    class Run:
        def __init__(self) -> None:
            self.logged: list[Any] = []

        def log(self, metrics: dict[str, float], step: int) -> None:
            self.logged.append((metrics, step))

    class Logger(Run):
        def log_metrics(self, metrics: dict[str, float], step: int) -> None:
            self.logged.append((metrics, step))

    class SummaryWriter:
        def __init__(self) -> None:
            self.scalars: list[Any] = []

        def add_scalar(self, name: str, value: float, step: int) -> None:
            self.scalars.append((name, value, step))

    calls: list[Any] = []
    columns: dict[str, list[float]] = {}
    board, run, logger, path = SummaryWriter(), Run(), Logger(), tmp_path / "metrics.jsonl"
    to = [path, str(path.with_name("other")), columns, board, run, logger, lambda *call: calls.append(call)]
    monitor = watched(to=to)
    assert [step for _, step in calls] == [1, 2]
    metrics, _ = calls[-1]
    read = monitor.read()
    assert metrics["grad_norm"] == read["grad_norm"]
    assert metrics["update_ratio/1"] == read["layers"]["1"]["update_ratio"]
    assert run.logged == logger.logged == calls
    assert board.scalars == [(name, value, step) for metrics, step in calls for name, value in metrics.items()]
    assert columns["step"] == [1, 2]
    assert columns["grad_norm/0"] == [metrics["grad_norm/0"] for metrics, _ in calls]
    lines = [{"step": step, **metrics} for metrics, step in calls]
    assert [*read_json_lines(path)] == [*read_json_lines(path.with_name("other"))] == lines


def test_parameters_are_written_if_wanted() -> None:
    columns: dict[str, list[float]] = {}
    watched(to=columns, detail="params")
    assert "grad_norm/1.bias" in columns
    assert "grad_norm/1" not in columns


def test_a_torn_line_is_left_alone_and_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "a": 2.0}\n{"step": 2, "a"')
    JsonLines(path)({"a": math.nan, "b": 3.0}, 3)
    JsonLines(path)({"a": 4.0}, 4)
    assert path.read_text().splitlines()[1] == '{"step": 2, "a"'
    assert [*read_json_lines(path)] == [{"step": 1, "a": 2.0}, {"step": 3, "a": None, "b": 3.0}, {"step": 4, "a": 4.0}]
    for line in path.read_text().splitlines()[2:]:
        json.loads(line, parse_constant=lambda text: pytest.fail(f"{text} is not JSON"))


def test_columns_of_a_dictionary_stay_equally_long() -> None:
    columns: dict[str, Any] = {}
    write = writer(columns)
    write({"a": 1.0}, 1)
    write({"b": 2.0}, 2)
    assert columns["step"] == [1, 2]
    assert columns["a"][0] == 1.0
    assert math.isnan(columns["a"][1])
    assert math.isnan(columns["b"][0])


def test_a_file_that_cannot_be_written_is_an_error_before_training(tmp_path: Path) -> None:
    optimizer = SGD([torch.ones(1, requires_grad=True)])
    with pytest.raises(OSError, match="missing"):
        Monitor(optimizer, to=tmp_path / "missing" / "metrics.jsonl")
    assert optimizer.observer is None
