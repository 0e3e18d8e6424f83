"""Files that threads and processes share."""

from __future__ import annotations

import os
import sys
import threading
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


def write_whole(path: Path, content: bytes, mode: int = 0o666) -> None:
    """Write a file such that no reader, nor a crash, ever meets half of it.

    Of threads and processes that write the same file, the last one's content stays.  `mode` is that of a new
    file, less what the process's mask takes away.

    Raises:
        OSError: if it cannot be written; the file is as it was.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.part")
    try:
        with open(partial, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            file.write(content)
        partial.replace(path)
    except OSError as error:  # with the name that the caller knows
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with suppress(OSError):  # as a rule it is gone, or never was there
            partial.unlink()


def check_writable(path: str | os.PathLike[str]) -> None:
    """See, before any work is done, that a file can be there.

    Raises:
        FileNotFoundError: if its folder does not exist.
        IsADirectoryError: if it is a folder itself.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: give the name of a file")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.absolute().parent} to write {path.name} in")


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
