"""Maps the top-level folders to the package they belong to; all else is in pyproject.toml."""

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildPy(build_py):
    """Leaves out the suites for pytest, which run from a checkout."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        """The modules of a package, each with the package and the file."""
        found = super().find_package_modules(package, package_dir)
        return [entry for entry in found if entry[1] != "conftest" and not entry[1].startswith("test_")]


setup(
    cmdclass={"build_py": BuildPy},
    packages=[
        "fusedlstm",
        "fusedlstm.torch",
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
