"""The package list; everything else is in pyproject.toml.

The graph passes live in ``passes/`` at the top of the repository and are packaged as ``slimfit_fx.passes``.
"""

from setuptools import find_packages, setup

engine = find_packages(include=["slimfit_fx", "slimfit_fx.*"])
passes = [f"slimfit_fx.{name}" for name in find_packages(include=["passes", "passes.*"])]

setup(packages=engine + passes, package_dir={"slimfit_fx": "slimfit_fx", "slimfit_fx.passes": "passes"})
