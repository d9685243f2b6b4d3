"""Files and folders that are written whole or not at all, whatever interrupts the writing.

A temporary sibling ``.NAME.saving-xxxxxxxx`` is written, synced and moved into place. It is locked while its writer
lives, so that the next save can tell a leftover of a killed one, and remove it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_NO_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM)


def write_file(path: str | os.PathLike[str], data: bytes) -> None:
    """Make ``path`` hold ``data``: after a crash it is the old file or the new one, never a part."""
    target = Path(os.path.realpath(path))
    remove_leftovers(target)
    temporary = _temporary(target)
    try:
        with open(temporary, "xb") as file:
            _lock(file.fileno())
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, target)
        _sync_folder(target.parent)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


@contextlib.contextmanager
def replace_folder(folder: str | os.PathLike[str], names: frozenset[str]) -> Iterator[Path]:
    """Yield an empty folder to write into; it becomes ``folder`` when the block ends, and vanishes if it raises.

    Args:
        folder: absent, empty, or a folder that holds exactly the files ``names``, which is replaced.
        names: the files that the block writes.

    Raises:
        FileExistsError: ``folder`` is a file, holds anything else, or is the working folder or a mount point.
    """
    target = Path(os.path.realpath(folder))
    check_replaceable(target, names)
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target)
    temporary = _temporary(target)
    os.mkdir(temporary)
    descriptor = None
    try:
        descriptor = os.open(temporary, os.O_RDONLY)
        _lock(descriptor)
        yield temporary
        for name in sorted(names):
            with open(temporary / name, "rb") as file:
                os.fsync(file.fileno())
        os.fsync(descriptor)
        check_replaceable(target, names)
        _move_into_place(temporary, target)
        _sync_folder(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if descriptor is not None:
            os.close(descriptor)


def check_replaceable(target: Path, names: frozenset[str]) -> None:
    """Raise FileExistsError unless ``target`` is absent, or a folder to replace: empty, or with exactly ``names``."""
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise FileExistsError(f"{target} is a file, not a folder: choose another place")
    if os.path.ismount(target) or _is_working_folder(target):
        raise FileExistsError(f"{target} is the working folder or a mount point, which stays: name a folder in it")
    with os.scandir(target) as entries:
        found = {entry.name: entry.is_file() for entry in entries}
    if found and (set(found) != names or not all(found.values())):
        other = min(set(found) - names, default="")
        detail = f"it holds {other!r}" if other else f"it lacks some of {', '.join(sorted(names))}"
        raise FileExistsError(f"{target} is neither empty nor an artifact ({detail}): choose another folder")


def _is_working_folder(target: Path) -> bool:
    try:
        return os.path.samefile(target, os.curdir)
    except OSError:  # one that this process may not enter, or that is gone
        return False


def remove_folder(folder: str | os.PathLike[str]) -> None:
    """Delete a folder and all in it: after a crash its name stands for the whole of it or for nothing."""
    target = Path(os.path.realpath(folder))
    remove_leftovers(target)
    temporary = _temporary(target)
    os.rename(target, temporary)
    shutil.rmtree(temporary)


def previous_of(folder: str | os.PathLike[str]) -> Path:
    """Where the old folder waits while a new one takes its place, on systems that cannot exchange the two."""
    target = Path(os.path.realpath(folder))
    return target.with_name(f"{target.name}.previous")


def remove_leftovers(target: Path) -> None:
    """Remove the temporary files and folders of killed saves of ``target``; those of living ones are locked."""
    pattern = re.compile(re.escape(f".{target.name}.saving-") + "[0-9a-f]{8}")
    with os.scandir(target.parent) as entries:
        found = [Path(entry.path) for entry in entries if pattern.fullmatch(entry.name)]
    for path in found:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:  # gone meanwhile, or not ours
            continue
        try:
            if not _lock(descriptor):
                continue
            if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        finally:
            os.close(descriptor)


def open_regular(path: str | Path, folder: int | None = None) -> BinaryIO:
    """Open a regular file (or a link to one) for reading; never waits on a pipe, never reads a device.

    Args:
        folder: descriptor of the folder that a relative ``path`` starts from; the working folder by default.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK, dir_fd=folder)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError("not a regular file")
    return os.fdopen(descriptor, "rb")


def open_together(folder: str | os.PathLike[str], names: frozenset[str]) -> dict[str, BinaryIO]:
    """Open the files ``names`` of a folder that another process may be replacing: all of the old one, or of the new.

    They are opened through the folder's descriptor, so they are of one folder whatever its name comes to mean. While
    that is open no new folder can have its inode number: one that fills or vanishes meanwhile is told from one that
    lacks a file.

    Raises:
        FileNotFoundError: neither ``folder`` nor what an interrupted save left as ``folder.previous`` is there.
        ValueError: a file is missing, or is not a regular file.
    """
    for _ in range(20):
        for source in (Path(folder), previous_of(folder)):
            with contextlib.ExitStack() as stack, contextlib.suppress(FileNotFoundError):
                descriptor = os.open(source, os.O_RDONLY | os.O_DIRECTORY)
                try:
                    files, missing = _open_within(descriptor, names, stack)
                    if not os.path.samestat(os.fstat(descriptor), os.stat(source)):
                        break
                finally:
                    os.close(descriptor)
                if missing is not None:
                    raise ValueError(f"{missing}: the file is missing from {source}")
                stack.pop_all()
                return files
    raise FileNotFoundError(f"{folder}: there is no such folder")


def _open_within(
    folder: int, names: frozenset[str], stack: contextlib.ExitStack
) -> tuple[dict[str, BinaryIO], str | None]:
    """(the files that are there, the first name that is not) of a folder's descriptor."""
    files, missing = {}, None
    for name in sorted(names):
        try:
            files[name] = stack.enter_context(open_regular(name, folder))
        except FileNotFoundError:
            missing = missing or name
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return files, missing


def read_at_most(file: BinaryIO, limit: int) -> bytes:
    """The whole file; raises ValueError before reading when it is longer than ``limit`` bytes."""
    size = os.fstat(file.fileno()).st_size
    if size > limit:
        raise ValueError(f"is {size} bytes long, which is over the limit of {limit}")
    return file.read(size)


def _temporary(target: Path) -> Path:
    return target.with_name(f".{target.name}.saving-{secrets.token_hex(4)}")


def _lock(descriptor: int) -> bool:
    """Lock without waiting; False where someone else holds it or the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _move_into_place(temporary: Path, target: Path) -> None:
    """Rename ``temporary`` to ``target``; what was there is called ``temporary`` afterwards."""
    if not target.exists() or not any(target.iterdir()):
        os.rename(temporary, target)
    elif not _exchange(temporary, target):
        _step_aside(temporary, target)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two folders in one step; False where the system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), ctypes.c_uint(_RENAME_EXCHANGE)) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(a), None, str(b))


def _step_aside(temporary: Path, target: Path) -> None:
    """Swap two folders in three steps, between which the old one is whole as ``NAME.previous``."""
    previous = previous_of(target)
    if os.path.lexists(previous):
        # it may be the user's own copy, so it is never removed
        raise FileExistsError(f"{previous} is in the way (an interrupted save, or a copy of yours): move it away")
    os.rename(target, previous)
    try:
        os.rename(temporary, target)
    except BaseException:
        os.rename(previous, target)
        raise
    os.rename(previous, temporary)
