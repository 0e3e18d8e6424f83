"""What pyproject.toml cannot say: which folder is which package, and where the repository is.

Links in the metadata, and those of the README on the page of the package, are to the repository whose
workflow builds it; elsewhere there are none, and the README is as it is.
"""

import os
import re
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildPy(build_py):
    """Leaves out the suites for pytest, which run from a checkout."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        """The modules of a package, each with the package and the file."""
        found = super().find_package_modules(package, package_dir)
        return [entry for entry in found if entry[1] != "conftest" and not entry[1].startswith("test_")]


def repository() -> str:
    """The address of the repository, empty where no workflow runs."""
    name = os.environ.get("GITHUB_REPOSITORY")
    return f"{os.environ.get('GITHUB_SERVER_URL', 'https://github.com')}/{name}" if name else ""


def readme(address: str) -> str:
    """The README, with links that lead to the repository also from elsewhere."""
    text = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
    if not address:
        return text
    text = re.sub(r"(!\[[^\]]*\]\()(?!https?:)", rf"\1{address}/raw/main/", text)
    return re.sub(r"(?<!!)(\[[^\]]*\]\()(?!https?:|#)", rf"\1{address}/blob/main/", text)


def links(address: str) -> dict[str, str]:
    """What the page of the package links to."""
    if not address:
        return {}
    return {
        "Source": address,
        "Documentation": f"{address}/blob/main/docs/index.md",
        "Changelog": f"{address}/blob/main/CHANGELOG.md",
        "Issues": f"{address}/issues",
    }


setup(
    long_description=readme(repository()),
    long_description_content_type="text/markdown",
    project_urls=links(repository()),
    cmdclass={"build_py": BuildPy},
    packages=[
        "fusedlstm",
        "fusedlstm.torch",
        "fusedlstm.kernels",
        "fusedlstm.kernels.cpu",
        "fusedlstm.kernels.cuda",
        "fusedlstm.onnx",
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
