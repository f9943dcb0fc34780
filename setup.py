"""The compiled part of the package; everything else is in pyproject.toml."""

import os
import sys

from setuptools import setup

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from build_backend.extension import command, extension

setup(
    license="Apache-2.0",
    ext_modules=[extension()],
    cmdclass={"build_ext": command()},
)
