"""`python -m fusedlstm.benchmarks` is `fusedlstm bench`."""

import sys

from .runner import main

if __name__ == "__main__":
    sys.exit(main())
