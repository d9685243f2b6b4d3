"""Builds the optional extension qdiff_engine._C; everything else is in pyproject.toml."""

import platform
import sys
from glob import glob

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup

# Rounding must be exact: no fast-math, and no fused multiply-add where the arithmetic says one multiply.
# The last two let a clamp be one min and one max; none of these flags changes a rounding.
FLAGS = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-ffinite-math-only", "-fno-signed-zeros"]
if platform.machine() in ("x86_64", "AMD64"):
    FLAGS.append("-mprefer-vector-width=512")


class BuildExtension(build_ext):
    """Adds OpenMP where its symbols resolve to the libgomp that torch brings, so that there is one thread pool."""

    def build_extensions(self):
        if sys.platform == "linux" and "clang" not in str(self.compiler.compiler_cxx):  # clang brings its own pool
            for extension in self.extensions:
                extension.extra_compile_args.append("-fopenmp")
                extension.extra_link_args.append("-fopenmp")
        super().build_extensions()


setup(
    ext_modules=[
        Pybind11Extension(
            "qdiff_engine._C",
            sorted(glob("csrc/*.cpp")),
            depends=sorted(glob("csrc/*.h")),
            cxx_std=17,
            extra_compile_args=FLAGS,
            optional=True,  # without a compiler the engine installs and runs in plain torch, slower
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)
