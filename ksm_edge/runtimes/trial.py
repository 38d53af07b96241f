"""Whether this project's operators make on this machine what standard ones make: tried once and kept.

They are compiled where they are installed, and a compiler may make them wrong, as gcc 14.2 for Arm did (see setup.py).
Masks that are learned from wrong gradients are worse ones, and nothing else would tell. So before the first graph with
them, and after every installation, gradients of a few small networks are computed both ways, in a process of its own:
what a wrong operator does to that is no harm here.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
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
    from ksm_edge.autodiff.trial_networks import Example

# Sums in another order change a number by 3e-6 of the largest beside it, and factors in half precision by 0.01 (x86-64,
# with AVX2 and without). Of mistakes that were made on purpose, such as half of a register that is lost, or the pixel
# behind the last whole one, each changed some number by 0.008 and more, in half precision by 0.3.
LIMIT, HALF_LIMIT = 1e-4, 0.05
CRASHES = (signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGSEGV)
SECONDS = 900  # an emulated board takes tens of them: who takes so many will never end


@dataclass(frozen=True)
class Trial:
    """The largest difference of a gradient, relative to the largest number in it; None where there is none, because
    what should have made it failed.
    """

    error: float | None
    half_error: float | None  # with products in half precision; None as well where nobody would use them

    @property
    def is_passed(self) -> bool:
        """Whether the operators may be used at all."""
        return self.error is not None and self.error <= LIMIT  # which no NaN is

    @property
    def is_passed_in_half(self) -> bool:
        """Whether those that multiply in half precision may be."""
        return self.is_passed and self.half_error is not None and self.half_error <= HALF_LIMIT

    def __str__(self) -> str:
        """What is wrong."""
        error = self.half_error if self.is_passed else self.error
        return "trying them fails" if error is None else f"gradients differ by {error:.2g} of the largest"


def trial() -> Trial:
    """Of the operators that are installed here, from the cache; tried first if need be."""
    return cache.found_or_made(_key(), _read, _try_in_child)


def trusted(spec: GradientSpec) -> GradientSpec:
    """The same, without those operators that fail here."""
    return _with_what_passed(spec, trial()) if _needs_any(spec) else spec


def trusted_if_known(spec: GradientSpec) -> GradientSpec | None:
    """The same; None where they would have to be tried first."""
    if not _needs_any(spec):
        return spec
    found = cache.found(_key(), _read)
    return None if found is None else _with_what_passed(spec, found)


def _needs_any(spec: GradientSpec) -> bool:
    """A head alone learns by standard operators, but for products in half precision."""
    return spec.own and (bool(spec.trained) or spec.half_products)


def _with_what_passed(spec: GradientSpec, found: Trial) -> GradientSpec:
    half_products = spec.half_products and found.is_passed_in_half
    return replace(spec, own=found.is_passed, half_products=half_products)


def _key() -> str:
    assert native.operators is not None
    loops = native.running(), native.halves()
    return cache.machine_key("trial", file_sha256(Path(native.operators)), *map(str, loops))


def try_into(folder: Path) -> None:
    """In this process, where nothing has imported ONNX Runtime yet: that comes when the graphs have been built.

    What is known is written as it comes, for whoever finds that this process has crashed.
    """
    from ksm_edge.autodiff.trial_networks import NAMES, example

    ways = [{"half_products": False}] + ([] if native.halves() is None else [{"half_products": True}])
    standard = [example(name, own=False) for name in NAMES]
    own = [[example(name, own=True, **way) for name in NAMES] for way in ways]
    give_back()  # what building took, before ONNX Runtime is loaded
    import onnxruntime  # noqa: F401

    give_back()  # what loading it took
    expected = [_outputs(each) for each in standard]
    errors: list[float | None] = [None, None]
    _write(errors, folder)
    for number, examples in enumerate(own):
        with suppress(Exception):  # ONNX Runtime's own share no other base
            differences = [_difference(_outputs(each), right) for each, right in zip(examples, expected, strict=True)]
            errors[number] = float(np.max(differences))
        _write(errors, folder)


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
    errors = [table[name] for name in ("error", "half_error")]
    return Trial(*(None if error is None else float(error) for error in errors))


def _write(errors: list[float | None], folder: Path) -> None:
    (folder / cache.DESCRIPTION).write_text(json.dumps(asdict(Trial(*errors))))


def _try_in_child(folder: Path) -> None:
    """KsmEdgeError where the process ended before it came to them, or otherwise than by what they are."""
    try:
        child = cache.child(__name__, str(folder), seconds=SECONDS)
    except subprocess.TimeoutExpired:
        status, said = -signal.SIGABRT, ""
    else:
        status, said = child.returncode, child.stderr.strip()
    has_come_to_them = (folder / cache.DESCRIPTION).exists()
    if status == 0 or (has_come_to_them and -status in CRASHES):
        return
    end = signal.Signals(-status).name if status < 0 else f"exit status {status}"
    raise KsmEdgeError("\n".join([f"this project's operators could not be tried: the process ended by {end}", said]))


def _main(folder: str) -> int:
    use_compact_heap()
    return cache.in_child(lambda: try_into(Path(folder)))


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
