"""Maps the top-level folders to the package they belong to; all else is in pyproject.toml."""

from setuptools import setup

setup(
    packages=[
        "fusedlstm",
        "fusedlstm.kernels",
        "fusedlstm.kernels.cpu",
        "fusedlstm.kernels.cuda",
        "fusedlstm.benchmarks",
    ],
    package_dir={
        "fusedlstm": "fusedlstm",
        "fusedlstm.kernels": "kernels",
        "fusedlstm.kernels.cpu": "kernels/cpu",
        "fusedlstm.kernels.cuda": "kernels/cuda",
        "fusedlstm.benchmarks": "benchmarks",
    },
)
