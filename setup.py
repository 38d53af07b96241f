"""The loops in C, which need a compiler; without one they are left out and numpy runs in their place."""

from setuptools import Extension, setup

setup(ext_modules=[Extension("ksm_edge._native", ["ksm_edge/_native.c"], optional=True, extra_compile_args=["-O3"])])
