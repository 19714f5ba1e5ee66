"""What the times were measured on, and when."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from descend import __version__


@dataclass(frozen=True)
class Machine:
    """A computer, the programs on it, and the time.

    Args:
        processor: its name, as the system has it.
        cores: how many logical cores this process may use.
        system: name and version of the operating system.
        versions: of Python, descend, torch and Numba.
        date: of the measurement, in UTC.
        load: processes that ran in the minute before, on average; None where the system does not say.
    """

    processor: str
    cores: int
    system: str
    versions: dict[str, str]
    date: str
    load: float | None = None

    @classmethod
    def this(cls) -> Machine:
        """Describe the computer that runs this process; torch is not imported."""
        affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
        return cls(
            processor=processor(),
            cores=len(affinity(0)) if affinity else os.cpu_count() or 1,
            system=f"{platform.system()} {platform.release()}",
            versions={
                "Python": platform.python_version(),
                "descend": __version__,
                **{package: _version(package) for package in ("torch", "numba")},
            },
            date=datetime.now(timezone.utc).strftime("%Y-%m-%d"),
            load=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        )

    @property
    def is_busy(self) -> bool:
        """Whether other programs kept all cores busy."""
        return self.load is not None and self.load >= self.cores


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Return the processor's name; that of its architecture if the system does not say more.

    Args:
        cpuinfo: Linux's list of processors.
    """
    try:
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                return " ".join(value.split())
    except OSError:
        pass
    if platform.system() == "Darwin":
        command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        try:
            name = subprocess.run(command, capture_output=True, text=True, check=True, timeout=5).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            name = ""
        if name:
            return name
    return platform.processor() or platform.machine() or "unknown processor"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
