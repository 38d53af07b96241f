"""The loops in C, which need a compiler; without one they are left out and numpy runs in their place."""

from setuptools import Extension, setup

# A product and a sum are rounded twice, as numpy does it. What sqrt and comparisons would tell of numbers that are none
# nobody asks for, and without it they fit into loops of vectors.
FLAGS = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]

# Nobody compares these bit by bit.
OPERATOR_FLAGS = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-fno-tree-loop-distribute-patterns", "-Wno-psabi"]

setup(
    ext_modules=[
        Extension("ksm_edge._native", ["ksm_edge/_native.c"], optional=True, extra_compile_args=FLAGS),
        # No Python module, but a library for ONNX Runtime: see ksm_edge/native.py.
        Extension("ksm_edge._operators", ["ksm_edge/_operators.c"], optional=True, extra_compile_args=OPERATOR_FLAGS),
    ]
)
