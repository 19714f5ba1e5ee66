"""The page that a monitor writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from descend import AdamW, Monitor
from descend.reporting.errors import UsageError

HOSTILE = "</script><b>x"


def trained(steps: int = 60) -> Monitor:
    model = nn.Sequential(nn.Embedding(30, 8), nn.Linear(8, 16), nn.Linear(16, 4))
    names = [(name.replace("2.", f"{HOSTILE}."), param) for name, param in model.named_parameters()]
    monitor = Monitor(AdamW(names, lr=1e-2), every=2, on={"spike": lambda alert: None})
    for step in range(steps):
        tokens = torch.randint(0, 20, (16,))
        loss = nn.functional.cross_entropy(model(tokens), tokens % 4) * (1000 if step == 41 else 1)
        monitor.optimizer.zero_grad()
        loss.backward()
        monitor.optimizer.step()
    return monitor


def test_the_page_says_what_was_seen(tmp_path: Path) -> None:
    text = trained().report(tmp_path / "monitor.html").read_text(encoding="utf-8")
    for fact in ("30 samples of 3 layers, steps 2 to 60; 1 alert", "update-to-weight ratio", "Dead rows", "step 42"):
        assert fact in text
    assert HOSTILE not in text


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    monitor, path = trained(4), tmp_path / "monitor.html"
    with pytest.raises(UsageError, match=r"there is no layer 'l'; .*there are 0, 1"):
        monitor.report(path, layers=["l"])
    with pytest.raises(UsageError, match="there is no folder"):
        monitor.report(tmp_path / "missing" / "monitor.html")
    assert not path.exists()
    monitor.report(str(path), layers=["1"])
    with pytest.raises(UsageError, match="exists; pass overwrite=True"):
        monitor.report(path)
    monitor.report(path, overwrite=True)
    with pytest.raises(UsageError, match="there is no sample yet"):
        Monitor(AdamW([torch.ones(1, requires_grad=True)])).report(path)


def test_the_page_opens_in_a_browser(tmp_path: Path, browser: object) -> None:
    path = trained().report(tmp_path / "monitor.html")
    for width, scheme in ((1280, "light"), (390, "dark")):
        browser.open(path, width=width, scheme=scheme)  # type: ignore[attr-defined]
        assert browser.errors() == []  # type: ignore[attr-defined]
        assert browser.requests() == []  # type: ignore[attr-defined]
        assert browser.run("return document.documentElement.scrollWidth") <= width  # type: ignore[attr-defined]
        drawn = browser.run("return document.querySelectorAll('.chart .main-svg').length")  # type: ignore[attr-defined]
        assert drawn > 0
        assert "of 3 layers" in browser.run("return document.body.innerText")  # type: ignore[attr-defined]
