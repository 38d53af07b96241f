"""What a stranger installs: one package, with the board profiles, the recipes and the embedded backbone inside."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from ksm_edge import native

ROOT = Path(__file__).parents[1]
# What it brings is asked here, and not how fast that is: optimising takes gcc most of a minute.
QUICK_CC = f"""#!/bin/sh
for word; do shift; [ "$word" = -O3 ] || set -- "$@" "$word"; done
exec {sysconfig.get_config_var("CC")} "$@"
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    # A copy, because building leaves folders behind in the tree it is run in.
    for name in ("ksm_edge", "export", "devices"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("setup.cfg", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    compiler = tmp_path_factory.mktemp("compiler") / "cc"
    compiler.write_text(QUICK_CC)
    compiler.chmod(0o755)
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "CC": str(compiler)})
    return zipfile.ZipFile(next(out.glob("*.whl")))


def test_the_only_top_level_name_is_ksm_edge(wheel: zipfile.ZipFile) -> None:
    (path,) = (name for name in wheel.namelist() if name.endswith("top_level.txt"))
    assert wheel.read(path).decode().split() == ["ksm_edge"]
    assert {name.split("/")[0].partition("-")[0] for name in wheel.namelist()} == {"ksm_edge"}


def test_it_brings_every_module_and_data_file_of_the_checkout(wheel: zipfile.ZipFile) -> None:
    folders = {"ksm_edge": "ksm_edge", "export": "ksm_edge/recipes", "devices": "ksm_edge/devices"}
    expected = {
        f"{packaged}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, packaged in folders.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix in (".py", ".toml", ".onnx", ".safetensors", ".json", ".typed")
    }
    assert expected <= set(wheel.namelist())


def test_it_brings_what_is_compiled_and_not_its_source(wheel: zipfile.ZipFile) -> None:
    if native.loops is None or native.operators is None:
        pytest.skip("nothing is compiled: there was no C compiler")
    compiled = {Path(native.loops.__file__ or "").name, Path(native.operators).name}
    assert compiled <= {Path(name).name for name in wheel.namelist()}
    assert not any(name.endswith((".c", ".h")) for name in wheel.namelist())
