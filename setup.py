"""The one thing pyproject.toml cannot say: native code, where there is a C compiler.

The extensions are plain shared libraries without Python's headers, loaded with ctypes; where they
cannot be built, installation goes on: PyTorch computes, Python reads files, numpy sums.
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

# Reads past the page cache as Linux offers them.
pieces = Extension(
    "outrider.runtime.experts._pieces",
    sources=["runtime/experts/csrc/pieces.c"],
    extra_compile_args=["-std=gnu11", "-O2", "-g0"],
    optional=True,
)

decisions = Extension(
    "outrider.runtime.experts._decisions",
    sources=["runtime/experts/csrc/decisions.c"],
    # As numpy rounds, which does the same where this was not built.
    extra_compile_args=["-std=gnu11", "-O2", "-ffp-contract=off", "-g0"],
    libraries=["m"],
    optional=True,
)

by_platform = {"win32": [], "linux": [native, pieces, decisions]}
setup(ext_modules=by_platform.get(sys.platform, [native, decisions]))
