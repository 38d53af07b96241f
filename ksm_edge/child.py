"""Commands that run a part of this package in a process of its own."""

from __future__ import annotations

import sys
from pathlib import Path

_ROOT = str(Path(__file__).resolve().parents[1])


def module_command(module: str, *words: str) -> list[str]:
    """`python -m MODULE WORDS`: of this very package, also where it is not installed, and of nothing in the working
    directory, which `python -m` would look into first.
    """
    code = (
        f"import runpy, sys; sys.path[:] = [{_ROOT!r}, *filter(None, sys.path)]; "
        f"runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    )
    return [sys.executable, "-c", code, *words]
