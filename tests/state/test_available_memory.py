"""Available memory, from the files that Linux shows."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from descend.state.available_memory import available_memory

GB = 10**9
MEMINFO = (
    "MemTotal:       24684096 kB\nMemFree:         1000 kB\nMemAvailable:   20000000 kB\nHugePages_Total:       0\n"
)


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def limits_of_version_1(path: str, limit: int, usage: int, cache: int) -> dict[str, str]:
    return {
        f"sys/fs/cgroup/memory{path}/memory.limit_in_bytes": f"{limit}\n",
        f"sys/fs/cgroup/memory{path}/memory.usage_in_bytes": f"{usage}\n",
        f"sys/fs/cgroup/memory{path}/memory.stat": f"cache 0\ninactive_file 1\ntotal_inactive_file {cache}\n",
    }


def limits_of_version_2(path: str, limit: int | str, usage: int, cache: int) -> dict[str, str]:
    return {
        f"sys/fs/cgroup{path}/memory.max": f"{limit}\n",
        f"sys/fs/cgroup{path}/memory.current": f"{usage}\n",
        f"sys/fs/cgroup{path}/memory.stat": f"anon 5\ninactive_file {cache}\n",
    }


def in_groups(text: str, *limits: dict[str, str]) -> dict[str, str]:
    files = {"proc/meminfo": MEMINFO, "proc/self/cgroup": text}
    for each in limits:
        files |= each
    return files


CASES = {
    "nothing": ({}, 0),
    "no MemAvailable": ({"proc/meminfo": "MemTotal: 5 kB\n"}, 0),
    "not numbers": ({"proc/meminfo": "MemAvailable: many kB\n"}, 0),
    "no groups": ({"proc/meminfo": MEMINFO}, 20_480_000_000),
    "version 2": (in_groups("0::/a\n", limits_of_version_2("/a", 8 * GB, 3 * GB, GB)), 6 * GB),
    "version 2, no limit": (in_groups("0::/a\n", limits_of_version_2("/a", "max", 3 * GB, GB)), 20_480_000_000),
    "version 2, a limit above": (
        in_groups("0::/a/b\n", limits_of_version_2("/a/b", "max", 1, 0), limits_of_version_2("/a", 4 * GB, 3 * GB, 0)),
        GB,
    ),
    "version 2, the path of the host": (in_groups("0::/host/a\n", limits_of_version_2("", 2 * GB, 0, 0)), 2 * GB),
    "version 1": (in_groups("5:cpu:/c\n4:memory:/a\n", limits_of_version_1("/a", 8 * GB, 3 * GB, GB)), 6 * GB),
    "version 1, with others": (in_groups("4:cpu,memory:/a\n", limits_of_version_1("/a", GB, 0, 0)), GB),
    "version 1, no limit": (
        in_groups("4:memory:/a\n", limits_of_version_1("/a", 2**63 - 4096, 3 * GB, 0)),
        20_480_000_000,
    ),
    "limit exceeded": (in_groups("0::/a\n", limits_of_version_2("/a", GB, 2 * GB, 0)), 0),
    "the system has less": (in_groups("0::/a\n", limits_of_version_2("/a", 90 * GB, 0, 0)), 20_480_000_000),
    "other controllers": (
        in_groups("5:cpu:/a\n1:name=systemd:/a\n", limits_of_version_1("/a", 1, 0, 0)),
        20_480_000_000,
    ),
}


@pytest.mark.parametrize(("files", "expected"), CASES.values(), ids=CASES)
def test_available_memory_is_what_system_and_groups_leave(files: dict[str, str], expected: int, tmp_path: Path) -> None:
    assert available_memory(write(tmp_path, files)) == expected


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_this_system_says_what_is_available() -> None:
    assert available_memory() > 2**20
