"""What is in C, which needs a compiler: without one it is left out, and numpy and standard operators do its work."""

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
    """With those of the flags above that the compiler knows: clang knows few of gcc's, and gcc for x86 not all."""

    def build_extensions(self) -> None:
        self.force = True  # what another compiler, or other flags, made before is no reason to leave it
        known = {flag for flag in (*IN_PAIRS, *AS_WRITTEN) if self._knows(flag)}
        for each in self.extensions:
            each.extra_compile_args += [flag for flag in each.wanted if flag in known]
        super().build_extensions()

    def _knows(self, flag: str) -> bool:
        # Warnings of its own flags, such as a distribution may give, say nothing of this one.
        strict = ["-Werror"] if self._compiles(["-Werror"]) else []
        return self._compiles([*strict, flag])

    def _compiles(self, flags: list[str]) -> bool:
        command = [*self.compiler.compiler_so, *flags, "-fsyntax-only", "-x", "c", "-"]
        try:
            return subprocess.run(command, input=b"int x;\n", capture_output=True, check=False).returncode == 0
        except OSError:  # there is no compiler
            return False


class OptionalExtension(Extension):
    """Left out where there is no compiler."""

    def __init__(self, name: str, sources: list[str], needed: list[str], wanted: list[str]) -> None:
        """`wanted`: flags beside the needed ones, of compilers that know them."""
        headers = glob("ksm_edge/*.h")
        super().__init__(name, sources, depends=headers, optional=True, extra_compile_args=[*needed])
        self.wanted = wanted


setup(
    cmdclass={"build_ext": BuildExtensions},
    ext_modules=[
        OptionalExtension("ksm_edge._native", ["ksm_edge/_native.c"], [*LOOPS, *AS_NUMPY], IN_PAIRS),
        OptionalExtension("ksm_edge._operators", ["ksm_edge/_operators.c", *WIDER], LOOPS, [*IN_PAIRS, *AS_WRITTEN]),
    ],
)
