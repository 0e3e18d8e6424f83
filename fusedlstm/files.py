"""Files that threads and processes share."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from pathlib import Path


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
