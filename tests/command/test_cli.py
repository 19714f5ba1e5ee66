"""The entry point: what the shell sees."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.parametrize("option", ["--version", "--help"])
def test_reader_that_has_gone_is_no_error_to_read(option: str, buffered: bool) -> None:
    read, write = os.pipe()
    os.close(read)
    flags = [] if buffered else ["-u"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, *flags, "-m", "descend", option]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, env=environment, check=False, timeout=60)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, b"")
