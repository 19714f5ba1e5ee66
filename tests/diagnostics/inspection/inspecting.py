"""What the tests of ``descend inspect`` share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from descend.diagnostics.inspection.examination import Examination, examine
from descend.diagnostics.inspection.files import open_checkpoint
from descend.diagnostics.inspection.findings import Finding, findings_of
from descend.diagnostics.inspection.optimizers import find_optimizers


def inspected(path: Path) -> tuple[Examination, dict[str, Finding]]:
    """The only optimizer of a checkpoint, and what was found by kind."""
    (saved,) = find_optimizers(open_checkpoint(path).content)
    examination = examine(saved)
    return examination, {finding.kind: finding for finding in findings_of(examination)}


def of(path: Path, content: Any) -> tuple[Examination, dict[str, Finding]]:
    """Save ``content`` and inspect the file."""
    torch.save(content, path)
    return inspected(path)


def model(seed: int = 0) -> torch.nn.Sequential:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.LayerNorm(8), torch.nn.Tanh(), torch.nn.Linear(8, 4))


def train(net: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3, seed: int = 0) -> None:
    """Take steps on random data."""
    random = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        net(torch.randn(16, 6, generator=random)).square().mean().backward()
        optimizer.step()


def trained(steps: int = 3, **options: Any) -> dict[str, Any]:
    """The state of an ``Adam`` with names that has taken steps."""
    net = model()
    optimizer = torch.optim.Adam(net.named_parameters(), **options)
    train(net, optimizer, steps)
    return optimizer.state_dict()


def where(finding: Finding) -> list[str]:
    """The places of a finding."""
    return [case.where for case in finding.cases]
