"""What is in C with a mistake in it, as a compiler might make one."""

from __future__ import annotations

import shutil
import subprocess
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import pytest

from ksm_edge import native

PACKAGE = Path(native.__file__).parent


def compiled(sources: Sequence[str], folder: Path, name: str, text: str, other: str) -> Path:
    """The library of some sources, made for every processor alike, with one text in place of another in `name`."""
    include = sysconfig.get_path("include")
    if not (shutil.which("cc") and Path(include, "Python.h").exists()):
        pytest.skip("no C compiler here, or no headers of Python")
    for path in (*(PACKAGE / source for source in sources), *PACKAGE.glob("*.h")):
        shutil.copy(path, folder)
    (folder / "_wider.h").write_text("")
    changed = folder / name
    assert changed.read_text().count(text) == 1
    changed.write_text(changed.read_text().replace(text, other))
    library = folder / "library.so"
    flags = ["-shared", "-fPIC", "-O0", "-ffp-contract=off", "-w", "-DWIDER=", f"-I{include}"]
    subprocess.run(["cc", *flags, "-o", library, *(folder / source for source in sources), "-lm"], check=True)
    return library
