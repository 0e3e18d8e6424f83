"""With this folder on PYTHONPATH a process has a GPU, of sorts: see cuda_stand_in.py.

BREAK_KERNELS in the environment spoils those whose name or PTX it matches: "PATTERN=hang", "PATTERN=exit" or
"PATTERN=wrong", which swaps two operands of every product.
"""

import os
import re
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import cuda_stand_in


def _broken(text: str) -> str:
    pattern, _, how = os.environ.get("BREAK_KERNELS", "").rpartition("=")
    if not pattern or not re.search(pattern, text):
        return text
    if how == "hang":
        time.sleep(3600)
    if how == "exit":
        os._exit(3)
    return re.sub(r"(mma\.sync[^{]*\{[^}]*\}, \{)(%r\d+), ?(%r\d+),", r"\1\3, \2,", text)


cuda_stand_in.broken = _broken
cuda_stand_in.install()
