"""Files that nobody but this user, or root, can have written: what is in them is run as native code.

Owner and mode are read from descriptors that are already open, and files are opened relative to the checked folder.
A check of a path would say nothing about what the path leads to a moment later.

Windows has neither owners nor modes of this kind. There the folder is in the user's profile, which is private.
"""

from __future__ import annotations

import os
import stat
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: processes do not wait for each other there
    fcntl = None  # type: ignore[assignment]

LARGEST = 1 << 24  # bytes read of a file; a kernel has some 10,000
LOCKS = "locks"  # a file of no bytes: each number that is locked is the place of a byte
PATIENCE = 60.0  # seconds; a process that was stopped while it held a lock holds nobody up for longer

_HAS_OWNERS = hasattr(os, "geteuid")
# Opening a symbolic link fails, and opening a FIFO does not wait for somebody to write.
_FLAGS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)


def read(path: Path) -> bytes | None:
    """Up to ``LARGEST`` bytes of ``path``; None unless it is a regular file that only this user or root can write."""
    try:
        with _open_folder(path.parent) as folder, open(_name(path), "rb", opener=_opener(folder)) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                return None
            _refuse_others(path, status)
            return file.read(LARGEST)
    except OSError:
        return None


def write(path: Path, content: bytes) -> None:
    """Replace ``path`` at once by a file with ``content``. Do nothing where its folder cannot be written or trusted."""
    with suppress(OSError), _open_folder(path.parent) as folder:
        name = _name(path)
        temporary = f"{name}.{os.urandom(8).hex()}"
        try:
            with open(temporary, "xb", opener=_opener(folder)) as file:
                file.write(content)
            os.replace(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:  # a full disk, or Ctrl-C
            with suppress(OSError):
                os.unlink(temporary, dir_fd=folder)
            raise


@contextmanager
def alone(folder: Path, number: int) -> Iterator[None]:
    """Wait until no other process is in here with the same folder and number, at most ``PATIENCE``.

    Do not wait where the folder cannot be written or trusted, or files cannot be locked.
    """
    with _open_locks(folder) as file:
        if file is not None:
            _lock(file, number)
        yield


@contextmanager
def _open_locks(folder: Path) -> Iterator[int | None]:
    """The descriptor of the file ``LOCKS``, or None. The end of a process, too, gives its locks back."""
    file = None
    with suppress(OSError), _open_folder(folder) as descriptor:
        if fcntl is not None:
            file = _opener(descriptor)(_name(folder / LOCKS), os.O_RDWR | os.O_CREAT)
    try:
        yield file
    finally:
        if file is not None:
            os.close(file)


def _lock(file: int, number: int) -> None:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
            return
        except (BlockingIOError, PermissionError):  # EAGAIN or EACCES: somebody has it
            time.sleep(0.01)
        except OSError:
            return


@contextmanager
def _open_folder(path: Path) -> Iterator[int | None]:
    """Make ``path`` if there is no such folder, and yield its descriptor; None on Windows, which has none."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not _HAS_OWNERS:
        yield None
        return
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _refuse_others(path, os.fstat(folder))
        yield folder
    finally:
        os.close(folder)


def _name(path: Path) -> str:
    """What to call ``path`` in its open folder."""
    return path.name if _HAS_OWNERS else str(path)


def _opener(folder: int | None) -> Callable[[str, int], int]:
    """An opener for ``open``, in ``folder``. New files are private."""
    return lambda name, flags: os.open(name, flags | _FLAGS, mode=0o600, dir_fd=folder)


def _refuse_others(path: Path, status: os.stat_result) -> None:
    """Warn and raise PermissionError if somebody other than this user and root can have written ``path``."""
    if not _HAS_OWNERS:
        return
    if status.st_uid not in (0, os.geteuid()):
        fault, remedy = f"belongs to user {status.st_uid}", "set"
    elif status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        fault, remedy = "can be written by other users", "make it private (chmod go-w), or set"
    else:
        return
    warnings.warn(
        f"descend: {path} {fault}, so that no kernel is loaded from it. To cache kernels, {remedy} DESCEND_CACHE_DIR "
        "to a folder of your own.",
        stacklevel=2,
    )
    raise PermissionError(path)
