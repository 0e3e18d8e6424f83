"""Files that threads and processes share."""

from __future__ import annotations

import os
import secrets
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

if sys.platform == "win32":
    import msvcrt

    def _lock(file: int) -> None:
        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)

else:
    import fcntl

    def _lock(file: int) -> None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def write_whole(path: Path, content: bytes, mode: int | None = None) -> None:
    """Write a file such that no reader, nor a crash, ever meets half of it.

    Of threads and processes that write the same file, the last one's content stays.  A link stays one: the
    file that it points to is written.  A file that was there before hands on its mode, owner and group; what
    is no file, such as a pipe or ``/dev/null``, is written to and not replaced.  With a `mode` the file is a
    new one of that mode, less what the process's mask takes away, whatever was there.

    Raises:
        OSError: if it cannot be written; the file is as it was.
    """
    try:
        if mode is not None:
            _replace(path, content, None, mode)
            return
        target = Path(os.path.realpath(path))
        before = _status(target)
        if before is None or stat.S_ISREG(before.st_mode):
            _replace(target, content, before, 0o666)
        else:
            target.write_bytes(content)
    except OSError as error:  # with the name that the caller knows
        raise OSError(error.errno, error.strerror, str(path)) from error


def _status(path: Path) -> os.stat_result | None:
    with suppress(FileNotFoundError):
        return path.stat()
    return None


def _replace(path: Path, content: bytes, before: os.stat_result | None, mode: int) -> None:
    partial = path.with_name(f".fusedlstm-{secrets.token_hex(8)}.part")  # short, whatever the name is
    # until it has the mode of the file before it, nobody else may read it
    first = mode if before is None else 0o600
    descriptor = os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_BINARY", 0), first)
    try:
        with open(descriptor, "wb") as file:
            if before is not None and hasattr(os, "fchown"):
                _give_access(file.fileno(), before)
            file.write(content)
        partial.replace(path)
    finally:
        with suppress(OSError):  # as a rule it is gone
            partial.unlink()


def _give_access(descriptor: int, before: os.stat_result) -> None:
    """Owner, group and mode of the file before; if the first two cannot be given, no right to the group."""
    mode, made = stat.S_IMODE(before.st_mode), os.fstat(descriptor)
    if (made.st_uid, made.st_gid) != (before.st_uid, before.st_gid):
        try:
            os.fchown(descriptor, before.st_uid, before.st_gid)
        except OSError:
            mode &= ~stat.S_IRWXG
    os.fchmod(descriptor, mode)


def check_writable(path: str | os.PathLike[str]) -> None:
    """See, before any work is done, that a file can be there.

    Raises:
        FileNotFoundError: if its folder does not exist.
        IsADirectoryError: if it is a folder itself.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(f"{path} is a folder: give the name of a file")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {target.parent} to write {target.name} in")


@contextmanager
def alone(path: Path, patience: float) -> Iterator[None]:
    """Wait while other processes are in here with the same path of a file, for so many seconds at most.

    To save work, not to be right: where no file can be locked, nobody waits.  A process that is forked while
    this one is in here keeps the others waiting.
    """
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError:
        yield
        return
    try:
        end = time.monotonic() + patience
        while time.monotonic() < end:
            try:
                _lock(file)
                break
            except (BlockingIOError, PermissionError):  # another is in here, on POSIX and on Windows
                time.sleep(0.05)
            except OSError:
                break
        yield
    finally:
        os.close(file)
