"""Packages of vadiff: `vadiff/`, and the top-level `triton_kernels/` as `vadiff.triton_kernels`.

A top-level package named `triton_kernels` would clash with another project's. The rest: pyproject.toml.
"""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["vadiff", "vadiff.*"]),
        *(f"vadiff.{name}" for name in find_packages(include=["triton_kernels", "triton_kernels.*"])),
    ],
    package_dir={"vadiff.triton_kernels": "triton_kernels"},
)
