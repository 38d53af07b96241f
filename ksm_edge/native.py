"""What is written in C, or None where the package was installed without a C compiler, or with one that made it wrong.

`loops`, of _native.c: each has a form in numpy beside its caller, which then runs in its place and gives the same bits;
of scores' Adam it gives the same to a millionth, of sums to a millionth of what is summed. Answers that it must give
are asked for when it is loaded.
`operators`, of _operators.c: the library that gives ONNX Runtime this project's own operators. Without it a gradient
graph is made of standard ones, and takes longer. What these make is tried by ksm_edge.runtimes.trial.
"""

from __future__ import annotations

import warnings
from importlib import import_module
from types import ModuleType

from ksm_edge import known_answers


def _loops() -> ModuleType | None:
    try:
        found = import_module("ksm_edge._native")
    except ImportError:
        return None
    return trusted(found)


def trusted(loops: ModuleType) -> ModuleType | None:
    """The same; None, with a warning, where it answers wrongly."""
    wrong = known_answers.wrong(loops)
    if wrong:
        warnings.warn(
            f"{loops.__file__}: not the right numbers from {', '.join(wrong)}. It was compiled wrong, or for another "
            "version: install the package again. Till then numpy does the work of all its loops, which takes longer",
            RuntimeWarning,
            stacklevel=2,
        )
    return None if wrong else loops


def _operators() -> str | None:
    try:
        return import_module("ksm_edge._operators").__file__
    except ImportError:  # not compiled, or for another machine
        return None


loops, operators = _loops(), _operators()


def halves() -> str | None:
    """By which instructions this processor multiplies numbers in half precision, and faster than float32; or None."""
    if operators is None:
        return None
    first = str(import_module("ksm_edge._operators").halves()[0])
    return None if first == "plain" else first


def multiplies_faster() -> bool:
    """Whether the operators multiply matrices in float32 faster than ONNX Runtime does: with AVX2 (AMD Zen 3)."""
    return running() == "avx2"


def running() -> str | None:
    """Which of the operators' loops run on this processor: sums come in another order in each of them."""
    return None if operators is None else str(import_module("ksm_edge._operators").running())
