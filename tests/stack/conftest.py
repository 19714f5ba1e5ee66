"""Small programs on one thread: with more, torch waits for threads at every sparse step."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread(clean_torch: None) -> None:
    torch.set_num_threads(1)
