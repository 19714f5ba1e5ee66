"""How much memory a process may still allocate, read from Linux's files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

# Of each version of control groups: folder of the hierarchy, limit, usage, and the name of reclaimable cache in
# memory.stat.
_V1 = Path("sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
_V2 = Path("sys/fs/cgroup"), "memory.max", "memory.current", "inactive_file"


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that can be allocated without swapping, in this process's control groups too; 0 if the system does not say.

    Args:
        root: where ``proc`` and ``sys`` are.
    """
    try:
        system = _table(root / "proc/meminfo")["MemAvailable:"] * 1024
    except (OSError, KeyError, ValueError):
        return 0
    return max(0, min((system, *_left_in_control_groups(root))))


def _left_in_control_groups(root: Path) -> Iterator[int]:
    """What the limit of each control group above this process leaves."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        hierarchy, limit, usage, cache = _V1 if controllers else _V2
        # A container may see the path that the host uses, and its own group at the top of the hierarchy.
        for group in (PurePosixPath(path), *PurePosixPath(path).parents):
            folder = root / hierarchy / group.relative_to("/")
            try:
                left = int((folder / limit).read_text()) - int((folder / usage).read_text())
                yield left + _table(folder / "memory.stat").get(cache, 0)
            except (OSError, ValueError):  # no such group, or no limit ("max")
                continue


def _table(path: Path) -> dict[str, int]:
    """A file of lines that begin with a name and a number."""
    words = (line.split() for line in path.read_text().splitlines())
    return {name: int(number) for name, number, *_ in words}
