"""The engines: the reference in NumPy, the CPU kernels and the CUDA kernels."""

import os

# Buffers that nothing initialises are filled with NaN, to find out who reads them.
POISON = bool(os.environ.get("FUSEDLSTM_POISON"))
