"""The summary is a table of the groups as they are now."""

from __future__ import annotations

import copy
import io
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import give_grads, leaves, params_of
from torch import nn

from descend import SGD, AdamW

LINEARS = ["0.linear.weight", "1.linear.weight"]


def model() -> nn.Sequential:
    blocks = (nn.ModuleDict({"norm": nn.LayerNorm(4), "linear": nn.Linear(4, 4)}) for _ in range(2))
    return nn.Sequential(*blocks, nn.Linear(4, 6))


def summarized() -> AdamW:
    groups = [("*.bias", dict(weight_decay=0.0)), (re.compile(".*norm.*"), dict(lr=0.5)), (LINEARS, {})]
    return AdamW(model(), lr=0.01, groups=groups)


def table_of(optimizer: AdamW) -> list[str]:
    text = io.StringIO()
    optimizer.summary(text)
    return text.getvalue().splitlines()


def test_summary_is_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    optimizer = summarized()
    assert table_of(optimizer) == [
        "group  pattern                           parameters  numbers  state  per number  formats  options that differ",
        "    0  -                                          1       24    0 B           -  -",
        "    1  *.bias                                     5       22    0 B           -  -        weight_decay=0.0",
        "    2  .*norm.*                                   2        8    0 B           -  -        lr=0.5",
        "    3  0.linear.weight, 1.linear.weight           2       32    0 B           -  -",
        "total                                            10       86    0 B           -  -",
    ]
    give_grads(params_of(optimizer)[1:6], 0)
    optimizer.step()
    assert capsys.readouterr().out == ""
    rows = optimizer.summary()
    assert capsys.readouterr().out.splitlines() == table_of(optimizer)
    assert [row.state_bytes for row in rows] == [0, 22 * 2 * 4 + 5 * 4, 0, 0]
    assert rows[1] == (1, "*.bias", 5, 22, 196, {"weight_decay": 0.0}, {"float32": 176})
    assert rows[1].bytes_per_number == 196 / 22
    optimizer.param_groups[0]["lr"] = torch.tensor(0.25)
    optimizer.param_groups[1]["betas"] = (0.5, 0.5)
    assert [set(row.options) for row in optimizer.summary()] == [{"lr"}, {"weight_decay", "betas"}, {"lr"}, set()]


@pytest.mark.parametrize(
    ("numbers", "shown"), [(100, "404 B"), (1000, "3.9 KiB"), (300_000, "1.1 MiB")], ids=lambda entry: str(entry)
)
def test_summary_shows_sizes_readably(numbers: int, shown: str) -> None:
    optimizer = AdamW([torch.zeros(numbers, dtype=torch.bfloat16, requires_grad=True)])
    optimizer.init_state()
    text = "\n".join(table_of(optimizer))
    assert f"{numbers:,}" in text
    assert shown in text


@pytest.mark.parametrize(
    ("options", "bits", "formats"),
    [
        (dict(state_dtype="8bit"), 32, {"8bit": 2 * (4100 + 4 * 20), "float32": 2 * 4 * 5}),
        (dict(state_dtype={"exp_avg": torch.bfloat16}), 32, {"float32": 4 * 4105, "bfloat16": 2 * 4105}),
        (dict(rounding="compensated"), 16, {"bfloat16": 2 * 2 * 4105, "compensation": 2 * 4105}),
    ],
    ids=lambda value: "",
)
def test_summary_shows_formats_and_bytes_per_number(
    options: dict[str, Any], bits: int, formats: dict[str, int]
) -> None:
    dtype = {16: torch.bfloat16, 32: torch.float32}[bits]
    sizes = [(20, 205), (5,)]  # the second is too small for codes
    optimizer = AdamW([torch.zeros(size, dtype=dtype, requires_grad=True) for size in sizes], **options)
    optimizer.init_state()
    text = io.StringIO()
    [row] = optimizer.summary(text)
    assert row.formats == formats
    assert row.state_bytes == sum(formats.values()) + 2 * 4  # the step counts
    each = f"{row.state_bytes / 4105:.2f} B  {', '.join(formats)}"
    assert [each in line for line in text.getvalue().splitlines()] == [False, True, True]


def test_summary_counts_memory_that_tensors_share_once() -> None:
    optimizer = AdamW([torch.zeros(100, requires_grad=True)])
    both = torch.zeros(2, 100)
    state = {"step": torch.tensor(1.0), "exp_avg": both[0], "exp_avg_sq": both[1]}
    optimizer.load_state_dict(optimizer.state_dict() | {"state": {0: state}})
    optimizer.state[optimizer.param_groups[0]["params"][0]].update(exp_avg=both[0], exp_avg_sq=both[1])
    assert optimizer.summary(io.StringIO())[0].state_bytes == both.nbytes + 4


def test_summary_does_not_count_as_a_look_at_the_state() -> None:
    optimizer = summarized()
    give_grads(params_of(optimizer), 0)
    optimizer.step()
    optimizer.summary()
    assert not optimizer.state.exposed


def through_state_dict(optimizer: AdamW) -> AdamW:
    other = summarized()
    other.load_state_dict(optimizer.state_dict())
    return other


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, copy.copy, lambda optimizer: pickle.loads(pickle.dumps(optimizer)), through_state_dict],
    ids=["deepcopy", "copy", "pickle", "state_dict"],
)
def test_patterns_survive(duplicate: Callable[[Any], Any]) -> None:
    optimizer = summarized()
    assert table_of(duplicate(optimizer)) == table_of(optimizer)
    assert not any("pattern" in group for group in optimizer.state_dict()["param_groups"])


def test_summary_follows_groups_that_are_moved_and_added() -> None:
    optimizer = summarized()
    optimizer.param_groups.reverse()
    optimizer.add_param_group({"params": [("new", leaves([(3,)])[0])], "lr": 7.0})
    assert [row.pattern for row in optimizer.summary()] == [", ".join(LINEARS), ".*norm.*", "*.bias", "", ""]
    optimizer.param_groups[0]["params"] += optimizer.param_groups[2]["params"]
    optimizer.param_groups[0]["param_names"] += optimizer.param_groups[2]["param_names"]
    assert optimizer.summary()[0].pattern == f"{', '.join(LINEARS)}, *.bias"


def test_summary_shows_a_tensor_that_was_filled_in_place() -> None:
    optimizer = AdamW(leaves(), lr=torch.tensor(0.5))
    optimizer.param_groups[0]["lr"].fill_(0.25)
    assert optimizer.summary()[0].options == {"lr": torch.tensor(0.25)}


def test_summary_without_names() -> None:
    assert [row.pattern for row in SGD(leaves()).summary()] == [""]
    assert [row[2:4] for row in SGD([{"params": leaves()}, {"params": leaves([(3,)])}]).summary()] == [(4, 165), (1, 3)]
