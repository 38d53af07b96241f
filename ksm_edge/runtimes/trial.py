"""Whether this project's operators make on this machine what standard ones make: tried once and kept.

They are compiled where they are installed, and a compiler may make them wrong, as gcc 14.2 for Arm did (see setup.py).
Masks that are learned from wrong gradients are worse ones, and nothing else would tell. So before the first graph with
them, and after every installation, the gradients of one small network are computed both ways, in a process of its own:
what a wrong operator does to it is no harm here.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ksm_edge import native
from ksm_edge.autodiff.spec import GradientSpec
from ksm_edge.bundle.digest import file_sha256
from ksm_edge.errors import KsmEdgeError
from ksm_edge.resident import give_back, use_compact_heap
from ksm_edge.runtimes import cache

if TYPE_CHECKING:
    from ksm_edge.autodiff.trial_network import Example

# Sums in another order change a number by 4e-5 of the largest, and factors in half precision by 0.005 (x86-64, AVX2).
# A lane that is lost, or a border of an image, changes some number by a twentieth and more.
LIMIT, HALF_LIMIT = 1e-3, 0.05
CRASHES = (signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGSEGV)


@dataclass(frozen=True)
class Trial:
    """The largest difference of a gradient, relative to the largest number in it; infinite where trying crashed."""

    error: float
    half_error: float  # with products in half precision

    @property
    def is_passed(self) -> bool:
        """Whether the operators may be used at all."""
        return self.error <= LIMIT  # which no NaN is

    @property
    def is_passed_in_half(self) -> bool:
        """Whether those that multiply in half precision may be."""
        return self.is_passed and self.half_error <= HALF_LIMIT

    def __str__(self) -> str:
        """What came of them."""
        if self.error == float("inf"):
            return "a process crashes that tries them"
        error = self.half_error if self.is_passed else self.error
        return f"gradients by them are off by {error:.2g} of the largest"


CRASHED = Trial(float("inf"), float("inf"))


def trial() -> Trial:
    """Of the operators that are installed here, from the cache; tried first if need be."""
    assert native.operators is not None
    loops = native.running(), native.halves()
    key = cache.machine_key("trial", file_sha256(Path(native.operators)), *map(str, loops))
    return cache.found_or_made(key, _read, _try_in_child)


def trusted(spec: GradientSpec) -> GradientSpec:
    """The same, without those operators that fail here."""
    if not (spec.own and spec.trained):  # else there are none in it
        return spec
    found = trial()
    half_products = spec.half_products and found.is_passed_in_half
    return replace(spec, own=found.is_passed, half_products=half_products)


def tried() -> Trial:
    """In this process, where nothing has imported ONNX Runtime yet: that comes when the graphs have been built."""
    from ksm_edge.autodiff.trial_network import example, spec

    ways = [spec(own=False), spec(own=True)]
    if native.halves() is not None:
        ways.append(spec(own=True, half_products=True))
    given = [example(way) for way in ways]
    give_back()  # what building took, before ONNX Runtime is loaded
    import onnxruntime  # noqa: F401

    give_back()  # what loading it took
    expected, *found = map(_outputs, given)
    error, half_error = [*(_difference(outputs, expected) for outputs in found), 0.0][:2]
    return Trial(error, half_error)


def _difference(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> float:
    """NaN where one of the numbers found is none."""
    errors = [np.abs(found[name] - array).max() / np.abs(array).max() for name, array in expected.items()]
    return float(np.max(errors))


def _outputs(example: Example) -> dict[str, np.ndarray]:
    import onnxruntime as ort

    from ksm_edge.runtimes.onnxruntime import gradient_session_options

    options = gradient_session_options(1)
    options.enable_cpu_mem_arena = False  # it takes more than these need
    # An OrtValue shares its array's memory.
    values = [ort.OrtValue.ortvalue_from_numpy(array) for array in example.externals.values()]
    options.add_external_initializers(list(example.externals), values)
    session = ort.InferenceSession(example.model, options, providers=["CPUExecutionProvider"])
    give_back()  # a session's making takes as much as its run
    found = session.run(list(example.outputs), example.inputs)
    del session
    give_back()
    return dict(zip(example.outputs, found, strict=True))


def _read(folder: Path) -> Trial:
    """One of `cache.NOT_WHOLE` where that is not what `_write` wrote."""
    table = json.loads((folder / cache.DESCRIPTION).read_text())
    return Trial(**{name: float(error) for name, error in table.items()})


def _write(found: Trial, folder: Path) -> None:
    (folder / cache.DESCRIPTION).write_text(json.dumps(asdict(found)))


def _try_in_child(folder: Path) -> None:
    child = cache.child(__name__, str(folder))
    if -child.returncode in CRASHES:
        _write(CRASHED, folder)
    elif child.returncode:
        raise KsmEdgeError(f"this project's operators could not be tried:\n{child.stderr.strip()}")


def _main(folder: str) -> int:
    use_compact_heap()
    return cache.in_child(lambda: _write(tried(), Path(folder)))


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
