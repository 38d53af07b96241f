"""What is in C, which needs a compiler: without one it is left out, and numpy and standard operators do its work."""

from glob import glob

from setuptools import Extension, setup

# What sqrt and comparisons would tell of numbers that are none nobody asks for, and without it they fit into loops of
# vectors.
LOOPS = ["-O3", "-fno-math-errno", "-fno-trapping-math"]
# A product and a sum are rounded twice, as numpy does it.
AS_NUMPY = ["-ffp-contract=off"]
# Rows of a few floats are copied faster in place than by a call; Lanes are never handed to a function that is called.
AS_WRITTEN = ["-fno-tree-loop-distribute-patterns", "-Wno-psabi"]
# The same loops for wider registers are compiled by themselves.
WIDER = sorted([*glob("ksm_edge/_halves_*.c"), *glob("ksm_edge/_loops_*.c")])


def extension(name: str, sources: list[str], flags: list[str]) -> Extension:
    headers = glob("ksm_edge/*.h")
    return Extension(name, sources, depends=headers, optional=True, extra_compile_args=[*LOOPS, *flags])


setup(
    ext_modules=[
        extension("ksm_edge._native", ["ksm_edge/_native.c"], AS_NUMPY),
        extension("ksm_edge._operators", ["ksm_edge/_operators.c", *WIDER], AS_WRITTEN),
    ]
)
