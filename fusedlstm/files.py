"""Files that threads and processes share."""

from __future__ import annotations

import os
import threading
from pathlib import Path


def write_whole(path: Path, content: bytes) -> None:
    """Write a file such that no reader, nor a crash, ever meets half of it.

    Of threads and processes that write the same file, the last one's content stays.

    Raises:
        OSError: if it cannot be written; the file is as it was.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.part")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def cuda_kernels() -> Path:
    """The folder of compiled CUDA kernels."""
    return Path(os.environ.get("FUSEDLSTM_CACHE", Path.home() / ".cache" / "fusedlstm"))
