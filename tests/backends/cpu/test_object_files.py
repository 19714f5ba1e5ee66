"""Object code outlives what made it, failures leave the compiler usable, and no file is trusted that others wrote."""

from __future__ import annotations

import ctypes
import hashlib
import multiprocessing
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from processes import needs_fork

from descend.backends.cpu import object_files, private_files

FAIL_THEN_GO_ON = """
import gc, torch, descend
from descend import rules
from descend.backends.cpu import kernels, object_files

def impossible(param, grad, lr):
    return param - lr * torch.tanh(grad)

weight = torch.ones(3, requires_grad=True)
weight.grad = torch.ones(3)
Impossible = descend.from_rule(impossible, "Impossible")
for _ in range(3):
    try:
        Impossible([weight]).step()
    except descend.RuleError:
        gc.collect()
    float32 = torch.float32
    object_files.machine_assembly(kernels.update_kernel(rules.sgd, 2, (float32, float32), float32))
    descend.AdamW([weight], max_norm=1.0).step()
print("survived")
"""


def test_failed_compilation_leaves_the_compiler_usable() -> None:
    # In a process of its own: what this guards against is a use after free.
    ran = subprocess.run([sys.executable, "-W", "error", "-c", FAIL_THEN_GO_ON], capture_output=True, text=True)
    assert ran.stdout.strip() == "survived", ran.stderr


FREED = """
import torch, descend
for backend in ("cpu", "eager"):
    for freed in ("weight", "gradient"):
        weight = torch.ones(50, requires_grad=True)
        weight.grad = torch.ones(50)
        optimizer = descend.AdamW([("weight", weight)], backend=backend)
        optimizer.step()
        (weight if freed == "weight" else weight.grad).untyped_storage().resize_(0)
        try:
            optimizer.step()
        except RuntimeError as error:
            print(backend, freed, optimizer.state_dict()["state"][0]["step"].item(), error)
"""


def test_freed_memory_is_an_error() -> None:
    # In a process of its own: torch's optimizers end it.
    ran = subprocess.run([sys.executable, "-W", "error", "-c", FREED], capture_output=True, text=True)
    lines = iter(ran.stdout.splitlines())
    for backend in ("cpu", "eager"):
        for freed in ("weight", "gradient"):
            assert next(lines, "").startswith(f"{backend} {freed} 1.0 AdamW: weight: the memory of it"), ran


# Which files are loaded.

STORE = """
define void @descend_kernel(i64 %address) {{
  %pointer = inttoptr i64 %address to ptr
  store i64 {number}, ptr %pointer
  ret void
}}
"""
needs_owners = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="files have no owners here")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache, not yet made."""
    path = tmp_path / "kernels"
    monkeypatch.setenv("DESCEND_CACHE_DIR", str(path))
    return path


def compiles(number: int, name: str = "kernel") -> bool:
    """Load and check the kernel that stores ``number``, as a new process would. Return whether it was compiled."""
    compiled = []

    def compile_to_llvm() -> str:
        compiled.append(number)
        return STORE.format(number=number)

    object_files._loaded.pop(str(number), None)
    address = object_files.load(name, str(number), compile_to_llvm)
    stored = ctypes.c_int64()
    object_files.call(address, ctypes.addressof(stored))
    assert stored.value == number
    return bool(compiled)


def file_of(number: int, folder: Path) -> Path:
    """The file of a kernel that was not in ``folder`` before."""
    before = files(folder) if folder.exists() else set()
    assert compiles(number)
    (path,) = files(folder) - before
    return path


def files(folder: Path) -> set[Path]:
    """What is in the folder, without the file that locks are taken of."""
    return set(folder.iterdir()) - {folder / private_files.LOCKS}


def test_file_of_another_kernel_is_compiled_again(folder: Path) -> None:
    one, two = file_of(1, folder), file_of(2, folder)
    one.write_bytes(two.read_bytes())
    assert compiles(1)
    assert not compiles(1)


HEADERS = {
    "nested": b"[" * 100_000 + b"\n",
    "no line": b"x" * 100_000,
    "not text": b"\xff\xfe\n\xff\n",
    "symbols are numbers": f'{{"sha256": "{hashlib.sha256().hexdigest()}", "symbols": [1]}}\n'.encode(),
    "empty": b"",
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_hostile_header_is_compiled_again(header: bytes, folder: Path) -> None:
    file_of(1, folder).write_bytes(header)
    assert compiles(1)
    assert not compiles(1)


def test_changed_list_of_symbols_is_compiled_again(folder: Path) -> None:
    path = file_of(1, folder)
    checksum, _, code = path.read_bytes().split(b"\n", 2)
    path.write_bytes(b"\n".join([checksum, b"malloc", code]))
    assert compiles(1)


def test_huge_file_is_compiled_again(folder: Path) -> None:
    os.truncate(file_of(1, folder), 1 << 40)  # sparse: it takes no room on the disk
    assert compiles(1)
    assert not compiles(1)


def as_fifo(path: Path) -> None:
    os.mkfifo(path)


def as_folder(path: Path) -> None:
    path.mkdir()


def as_link_to_itself(path: Path) -> None:
    path.symlink_to(path)


@needs_owners
@pytest.mark.parametrize("make", [as_fifo, as_folder, as_link_to_itself])
def test_what_is_no_file_is_compiled_again(make: Callable[[Path], None], folder: Path) -> None:
    path = file_of(1, folder)
    path.unlink()
    make(path)
    assert compiles(1)


@needs_owners
def test_link_is_not_followed(folder: Path, tmp_path: Path) -> None:
    path, outside = file_of(1, folder), tmp_path / "outside"
    content = path.read_bytes()
    path.rename(outside)
    path.symlink_to(outside)
    assert compiles(1)
    assert not path.is_symlink()
    assert outside.read_bytes() == content
    assert not compiles(1)


@needs_owners
def test_folder_and_files_are_private(folder: Path) -> None:
    umask = os.umask(0)
    try:
        path = file_of(1, folder)
    finally:
        os.umask(umask)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert path.stat().st_mode & 0o777 == 0o600


@needs_owners
@pytest.mark.parametrize("mode", [0o770, 0o702, 0o1777], ids=oct)
def test_folder_that_others_may_write_is_not_used(mode: int, folder: Path) -> None:
    file_of(1, folder)
    folder.chmod(mode)
    for number in (1, 2):
        with pytest.warns(UserWarning, match=f"{folder} can be written by other users.*chmod go-w"):
            assert compiles(number)
    assert len(files(folder)) == 1
    folder.chmod(0o755)
    assert not compiles(1)


@needs_owners
def test_folder_that_is_not_used_is_one_warning(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o777)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        assert all(compiles(number) for number in range(3))
    assert len(caught) == 1


@needs_owners
@pytest.mark.parametrize("mode", [0o620, 0o602], ids=oct)
def test_file_that_others_may_write_is_compiled_again(mode: int, folder: Path) -> None:
    path = file_of(1, folder)
    path.chmod(mode)
    with pytest.warns(UserWarning, match=f"{path} can be written by other users"):
        assert compiles(1)
    assert not compiles(1)


@pytest.fixture
def give_away(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Give a path to another user. Only root can; anybody else becomes another user, who does not own the path."""

    def give(path: Path) -> None:
        if os.geteuid() == 0:
            os.chown(path, 4321, -1)
        else:
            monkeypatch.setattr(os, "geteuid", lambda: 4321)

    return give


@needs_owners
def test_folder_of_another_user_is_not_used(folder: Path, give_away: Callable[[Path], None]) -> None:
    file_of(1, folder)
    give_away(folder)
    for number in (1, 2):
        with pytest.warns(UserWarning, match=f"{folder} belongs to user .* set DESCEND_CACHE_DIR"):
            assert compiles(number)
    assert len(files(folder)) == 1


@needs_owners
@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() != 0, reason="only root can give a file away")
def test_file_of_another_user_is_compiled_again(folder: Path) -> None:
    path = file_of(1, folder)
    os.chown(path, 4321, -1)
    with pytest.warns(UserWarning, match=f"{path} belongs to user 4321"):
        assert compiles(1)
    assert path.stat().st_uid == 0
    assert not compiles(1)


@needs_owners
@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() != 0, reason="only root owns files of root")
def test_files_of_root_are_trusted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file_of(1, folder)
    monkeypatch.setattr(os, "geteuid", lambda: 4321)
    assert not compiles(1)


@needs_owners
def test_new_folder_in_one_that_everybody_may_write_is_used(folder: Path) -> None:
    folder.parent.chmod(0o1777)  # as /tmp is
    assert compiles(1)
    assert not compiles(1)
    assert folder.stat().st_mode & 0o777 == 0o700


def test_folder_may_be_reached_through_a_link(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    folder.symlink_to(tmp_path / "elsewhere")
    assert compiles(1)
    assert not compiles(1)


def test_relative_folder_is_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DESCEND_CACHE_DIR", "kernels")
    assert compiles(1)
    assert not compiles(1)
    assert len(files(tmp_path / "kernels")) == 1


@pytest.mark.parametrize("base", ["", "relative"])
def test_cache_home_that_is_not_absolute_is_ignored(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DESCEND_CACHE_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", base)
    monkeypatch.setattr(sys, "platform", "linux")
    assert object_files.cache_directory() == tmp_path / ".cache" / "descend"


def test_folder_that_is_a_file_is_no_error(folder: Path) -> None:
    folder.write_text("mine")
    assert compiles(1)
    assert folder.read_text() == "mine"


def test_folder_below_a_file_is_no_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.touch()
    monkeypatch.setenv("DESCEND_CACHE_DIR", str(folder / "below"))
    assert compiles(1)


@pytest.mark.parametrize("name", ["../../out", "/out", "a" * 1000, "<lambda>"], ids=range(4))
def test_any_name_makes_a_file_in_the_folder(name: str, folder: Path) -> None:
    assert compiles(1, name)
    assert not compiles(1, name)
    assert len(files(folder)) == 1


def test_platform_without_owners_caches(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "geteuid", raising=False)
    monkeypatch.setattr(private_files, "_HAS_OWNERS", False)
    monkeypatch.chdir(tmp_path)
    assert compiles(1)
    assert not compiles(1)
    assert list(tmp_path.iterdir()) == [folder]


def test_readers_see_whole_files_while_others_write(tmp_path: Path) -> None:
    path, versions = tmp_path / "kernel.o", [bytes([i]) * 100_000 for i in range(4)]
    private_files.write(path, versions[0])

    def write_and_read(version: bytes) -> set[bytes | None]:
        seen = set()
        for _ in range(50):
            private_files.write(path, version)
            seen.add(private_files.read(path))
        return seen

    with ThreadPoolExecutor(4) as pool:
        seen = set().union(*pool.map(write_and_read, versions))
    assert seen <= set(versions)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_failed_write_leaves_no_file(error: type[BaseException], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    path = file_of(1, folder)
    monkeypatch.setattr(os, "replace", fail)
    if error is OSError:
        assert compiles(2)
    else:
        with pytest.raises(KeyboardInterrupt):
            compiles(2)
    assert files(folder) == {path}


# Processes that need the same kernel at the same time.

needs_locks = pytest.mark.skipif(private_files.fcntl is None, reason="files cannot be locked here")


def in_another(work: Callable[[], Any]) -> Any:
    """A forked process that does ``work``, started."""
    process = multiprocessing.get_context("fork").Process(target=work)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks in processes with threads, from Python 3.12 on
        process.start()
    return process


def wait_for(path: Path) -> None:
    for _ in range(3000):
        if path.exists():
            return
        time.sleep(0.01)
    raise AssertionError(f"{path} has not come")


@needs_fork
@needs_locks
def test_another_process_waits_for_its_kernel_and_no_other(folder: Path, tmp_path: Path) -> None:
    def enter_both() -> None:
        for number in (8, 7):
            with private_files.alone(folder, number):
                (tmp_path / str(number)).touch()

    with private_files.alone(folder, 7):
        process = in_another(enter_both)
        wait_for(tmp_path / "8")
        time.sleep(0.2)
        assert not (tmp_path / "7").exists()
    process.join()
    assert (tmp_path / "7").exists()


@needs_fork
@needs_locks
def test_kernel_that_another_process_has_compiled_meanwhile_is_loaded(folder: Path, tmp_path: Path) -> None:
    """Both need it at once: the one that waits finds it."""
    made = tmp_path / "made"

    def compile_slowly() -> str:
        (tmp_path / "begun").touch()
        wait_for(made)
        return STORE.format(number=1)

    object_files._loaded.pop("1", None)
    process = in_another(lambda: object_files.load("kernel", "1", compile_slowly))
    wait_for(tmp_path / "begun")
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(compiles, 1)
        time.sleep(0.2)
        made.touch()
        assert not found.result()
    process.join()


@needs_fork
@needs_locks
def test_process_that_hangs_holds_nobody_up(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hang() -> None:
        with private_files.alone(folder, 7):
            (tmp_path / "held").touch()
            time.sleep(60)

    monkeypatch.setattr(private_files, "PATIENCE", 0.1)
    process = in_another(hang)
    wait_for(tmp_path / "held")
    with private_files.alone(folder, 7):
        assert process.is_alive()
    process.kill()
    process.join()
