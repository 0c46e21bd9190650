"""Builds the packed kernels beside the Python package; everything else is in pyproject.toml.

The library is loaded with ctypes, so it needs neither Python's headers nor torch. Each instruction set has a source
file and flags of its own, which a setuptools extension cannot say by itself. Where there is no compiler, or it fails,
the package is installed without the library and multiplies with torch instead (``layerwise doctor`` says so).
"""

from __future__ import annotations

import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

NATIVE = Path("src/layerwise/kernels/native")
X86 = platform.machine().lower() in ("x86_64", "amd64") and sys.maxsize > 2**32
ARM = platform.machine().lower() in ("aarch64", "arm64") and sys.maxsize > 2**32
FLAGS = {
    "portable.cpp": ["-O2"],  # a third of -O3's time and half of its size
    "avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
    "avx512.cpp": ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512vnni"],
    "neon.cpp": [],
    # Every Mac with such a processor has the extension, and a universal build would not know the flag for both of its.
    "neon_dot.cpp": [] if sys.platform == "darwin" else ["-march=armv8.2-a+dotprod"],
}
DEFINES = ["-DLAYERWISE_X86"] * X86 + ["-DLAYERWISE_ARM"] * ARM
ELSEWHERE = ([] if X86 else ["avx2.cpp", "avx512.cpp"]) + ([] if ARM else ["neon.cpp", "neon_dot.cpp"])
# No -ffast-math and no contraction: what is rounded, and when, is part of what the tests hold.
COMMON = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-Wno-uninitialized",
]
SANITIZE = ["-fsanitize=address", "-fno-omit-frame-pointer", "-O1", "-g1"]
UNDEFINED = ["-fsanitize=undefined", "-fno-sanitize-recover=undefined"]  # minutes in the unrolled loops: not there


class BuildKernels(build_ext):
    """Compiles every source with the flags of its instruction set."""

    def build_extension(self, ext: Extension) -> None:
        if self.compiler.compiler_type != "unix":
            raise CompileError("the kernels are built with a compiler that takes the options of GCC and Clang")
        common = COMMON + DEFINES
        sanitize = SANITIZE if os.environ.get("LAYERWISE_SANITIZE") else []

        def compiled(source: str) -> list[str]:
            name = Path(source).name
            checked = sanitize + (UNDEFINED if sanitize and name not in FLAGS else [])
            flags = common + FLAGS.get(name, []) + checked
            found = self.compiler.compile(
                [source], output_dir=self.build_temp, extra_postargs=flags, depends=ext.depends
            )
            return list(found)

        # Two compilers at a time: the loops of an instruction set take most of a minute each.
        with ThreadPoolExecutor(max_workers=min(2, os.cpu_count() or 1)) as pool:
            objects = [path for found in pool.map(compiled, ext.sources) for path in found]
        libraries = ["dl", "pthread"] if sys.platform == "linux" else []
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(ext.name),
            libraries=libraries,
            extra_postargs=sanitize + (UNDEFINED if sanitize else []),
            target_lang="c++",
            build_temp=self.build_temp,
        )


sources = [path for path in sorted(NATIVE.glob("*.cpp")) if path.name not in ELSEWHERE]
kernels = Extension(
    "layerwise.kernels._native",
    sources=[str(path) for path in sources],
    depends=[str(path) for path in sorted(NATIVE.glob("*.h"))],
    language="c++",
    optional=True,
)
setup(ext_modules=[kernels], cmdclass={"build_ext": BuildKernels})
