"""The device side never needs torch: each of its modules is imported where torch cannot be."""

from __future__ import annotations

import pkgutil
import subprocess
import sys

import ksm_edge

# Stands for an environment without them: an import of any raises, wherever it is written.
BLOCK = """
import sys
class Wall:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in ('torch', 'torchvision', 'executorch', 'onnxscript'):
            raise ImportError(f'{name} is not for the device side')
sys.meta_path.insert(0, Wall())
import importlib
for name in sys.argv[1:]:
    importlib.import_module(name)
"""


def import_without_torch(*names: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", BLOCK, *names], capture_output=True, text=True, check=False)


def device_modules() -> list[str]:
    found = [module.name for module in pkgutil.walk_packages(ksm_edge.__path__, "ksm_edge.")]
    return [name for name in found if not name.startswith("ksm_edge.exporter")]


def test_every_device_side_module_is_imported_without_torch() -> None:
    names = device_modules()
    assert "ksm_edge.runtimes.onnxruntime" in names
    done = import_without_torch(*names)
    assert done.returncode == 0, done.stderr


def test_that_check_can_fail() -> None:
    done = import_without_torch("ksm_edge", "torch")
    assert done.returncode != 0
    assert "torch is not for the device side" in done.stderr
