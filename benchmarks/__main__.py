"""`python -m fusedlstm.benchmarks` is `fusedlstm bench`."""

import sys

from fusedlstm.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
