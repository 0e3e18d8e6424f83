"""Files that threads and processes share."""

from __future__ import annotations

import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path


def write_whole(path: Path, content: bytes) -> None:
    """Write a file such that no reader, nor a crash, ever meets half of it.

    Of threads and processes that write the same file, the last one's content stays.  A link stays one: the
    file that it points to is written.  A file that was there before hands on its mode, owner and group; what
    is no file, such as a pipe or ``/dev/null``, is written to and not replaced.

    Raises:
        OSError: if it cannot be written; the file is as it was.
    """
    try:
        target = Path(os.path.realpath(path))
        before = _status(target)
        if before is None or stat.S_ISREG(before.st_mode):
            _replace(target, content, before)
        else:
            target.write_bytes(content)
    except OSError as error:  # with the name that the caller knows
        raise OSError(error.errno, error.strerror, str(path)) from error


def _status(path: Path) -> os.stat_result | None:
    with suppress(FileNotFoundError):
        return path.stat()
    return None


def _replace(path: Path, content: bytes, before: os.stat_result | None) -> None:
    partial = path.with_name(f".fusedlstm-{secrets.token_hex(8)}.part")  # short, whatever the name is
    # until it has the mode of the file before it, nobody else may read it
    mode = 0o666 if before is None else 0o600
    descriptor = os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_BINARY", 0), mode)
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


def cuda_kernels() -> Path:
    """The folder of compiled CUDA kernels."""
    return Path(os.environ.get("FUSEDLSTM_CACHE", Path.home() / ".cache" / "fusedlstm"))
