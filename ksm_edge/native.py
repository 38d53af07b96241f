"""The loops in C of _native.c, or None where the package was installed without a C compiler.

Each has a form in numpy beside its caller, which then runs in its place and gives the same bits; of scores' Adam it
gives the same to a millionth.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType


def _loops() -> ModuleType | None:
    try:
        return import_module("ksm_edge._native")
    except ImportError:
        return None


loops = _loops()
