"""The loops in C, which need a compiler; without one they are left out and numpy runs in their place."""

from setuptools import Extension, setup

# A product and a sum are rounded twice, as numpy does it. What sqrt and comparisons would tell of numbers that are none
# nobody asks for, and without it they fit into loops of vectors.
FLAGS = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]

setup(ext_modules=[Extension("ksm_edge._native", ["ksm_edge/_native.c"], optional=True, extra_compile_args=FLAGS)])
