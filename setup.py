"""What is in C, which needs a compiler: without one it is left out, and numpy and standard operators do its work."""

import os
import subprocess
from glob import glob

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# What sqrt and comparisons would tell of numbers that are none nobody asks for, and without it they fit into loops of
# vectors.
LOOPS = ["-O3", "-fno-math-errno", "-fno-trapping-math"]
# A product and a sum are rounded twice, as numpy does it.
AS_NUMPY = ["-ffp-contract=off"]
# Rows of a few floats are copied faster in place than by a call; Lanes are never handed to a function that is called.
AS_WRITTEN = ["-fno-tree-loop-distribute-patterns", "-Wno-psabi"]
# gcc 14.2 for Arm joins loads and stores of registers into pairs, and of eight floats loses four: seen in `contract` of
# _winograd.h.
IN_PAIRS = ["-mno-early-ldp-fusion", "-mno-late-ldp-fusion"]
# The same loops for wider registers are compiled by themselves.
WIDER = sorted([*glob("ksm_edge/_halves_*.c"), *glob("ksm_edge/_loops_*.c")])


class BuildExtensions(build_ext):
    """With those flags that the compiler knows: clang knows few of gcc's, and gcc of others than Arm not all."""

    def build_extensions(self) -> None:
        wanted = {flag for each in self.extensions for flag in each.extra_compile_args}
        known = {flag for flag in wanted if self._compiles_with(flag)}
        for each in self.extensions:
            each.extra_compile_args = [flag for flag in each.extra_compile_args if flag in known]
        super().build_extensions()

    def _compiles_with(self, flag: str) -> bool:
        command = [*self.compiler.compiler_so, "-Werror", flag, "-fsyntax-only", "-x", "c", os.devnull]
        try:
            return subprocess.run(command, capture_output=True, check=False).returncode == 0
        except OSError:  # there is no compiler
            return False


def extension(name: str, sources: list[str], flags: list[str]) -> Extension:
    headers = glob("ksm_edge/*.h")
    return Extension(name, sources, depends=headers, optional=True, extra_compile_args=[*LOOPS, *IN_PAIRS, *flags])


setup(
    cmdclass={"build_ext": BuildExtensions},
    ext_modules=[
        extension("ksm_edge._native", ["ksm_edge/_native.c"], AS_NUMPY),
        extension("ksm_edge._operators", ["ksm_edge/_operators.c", *WIDER], AS_WRITTEN),
    ],
)
