"""The one thing pyproject.toml cannot say: the native kernels, built where there is a C compiler.

The extension is a plain shared library without Python's headers, loaded with ctypes; where it
cannot be built, installation goes on and the kernels run in PyTorch.
"""

import sys
from pathlib import Path

from setuptools import Extension, setup

native = Extension(
    "outrider.kernels._native",
    sources=sorted(str(path) for path in Path("kernels/csrc").glob("*.c")),
    depends=sorted(str(path) for path in Path("kernels/csrc").glob("*.h")),
    include_dirs=["kernels/csrc"],
    # A product and a sum fuse where the code says so and nowhere else: a loop's vectors and what is
    # left of it must give the same bits.
    extra_compile_args=["-std=gnu11", "-O3", "-ffp-contract=off", "-g0", "-pthread"],
    extra_link_args=["-pthread"],
    libraries=["m"],
    optional=True,
)

setup(ext_modules=[] if sys.platform == "win32" else [native])
