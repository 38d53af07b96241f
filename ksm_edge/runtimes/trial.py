"""Whether this project's operators make on this machine what standard ones make: tried once and kept.

They are compiled where they are installed, and a compiler may make them wrong, as gcc 14.2 for Arm did (see setup.py).
Masks that are learned from wrong gradients are worse ones, and nothing else would tell. So before the first graph with
them, and after every installation, gradients of a few small networks are computed both ways, in a process of its own:
what a wrong operator does to that is no harm here. Their graphs are built by another process before.
"""

from __future__ import annotations

import json
import pickle
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ksm_edge import native
from ksm_edge.autodiff.spec import HALVES, STANDARD, GradientSpec
from ksm_edge.bundle.digest import file_sha256
from ksm_edge.errors import KsmEdgeError
from ksm_edge.resident import give_back, use_compact_heap
from ksm_edge.runtimes import cache

if TYPE_CHECKING:
    from ksm_edge.autodiff.example import Example

# Sums in another order change a number by 3e-6 of the largest beside it, and factors in half precision by 0.01 (x86-64,
# with AVX2 and without). Of mistakes that were made on purpose, such as a lane of a register that is lost, or the pixel
# behind the last whole one, all but one changed some number by 0.008 and more, in half precision by 1.2.
LIMIT, HALF_LIMIT = 1e-4, 0.05
CRASHES = (signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGSEGV, signal.SIGTRAP)
SECONDS = 900  # an emulated board takes tens of them: who takes so many will never end
EXAMPLES = "examples"  # file by which `build_into` hands over to `try_into`; it is gone when that begins


@dataclass(frozen=True)
class Trial:
    """The largest difference of a gradient, relative to the largest number in it; None where there is none, because
    what should have made it failed.
    """

    error: float | None
    half_error: float | None  # with products in half precision; None as well where nobody would use them
    said: str = ""  # by what failed

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
        if error is None:
            return f"trying them fails{self.said and ': '}{self.said}"
        return f"gradients differ by {error:.2g} of the largest"


def trial() -> Trial:
    """Of the operators that are installed here, from the cache; tried first if need be."""
    return cache.found_or_made(_key(), _read, _try_in_child)


def trusted(spec: GradientSpec) -> GradientSpec:
    """The same, without those operators that fail here."""
    return _with_what_passed(spec, trial()) if _needs_any(spec) else spec


def known() -> Trial | None:
    """As `trial`; None where they have not been tried yet."""
    return cache.found(_key(), _read)


def trusted_if_known(spec: GradientSpec) -> GradientSpec | None:
    """As `trusted`; None where they would have to be tried first."""
    if not _needs_any(spec):
        return spec
    found = known()
    return None if found is None else _with_what_passed(spec, found)


def _needs_any(spec: GradientSpec) -> bool:
    """A head alone learns by standard operators, but for products that were asked for."""
    return spec.own and (bool(spec.trained) or spec.products != STANDARD)


def _with_what_passed(spec: GradientSpec, found: Trial) -> GradientSpec:
    is_passed = found.is_passed_in_half if spec.products == HALVES else found.is_passed
    return replace(spec, own=found.is_passed, products=spec.products if is_passed else STANDARD)


def _key() -> str:
    assert native.operators is not None
    return _key_of(native.operators, str(native.running()), str(native.halves()))


@lru_cache  # a plan asks for each of its candidates
def _key_of(operators: str, *loops: str) -> str:
    return cache.machine_key("trial", file_sha256(Path(operators)), *loops)


def build_into(folder: Path) -> None:
    """What there is to run, in this process: the graphs of `trial_networks`, for `try_into` in another one."""
    from ksm_edge.autodiff.trial_networks import NAMES, example

    in_half = native.halves() is not None
    standard = [example(name, own=False) for name in NAMES]
    own = [example(name, own=True) for name in NAMES]
    halved = [example(name, own=True, products=HALVES) for name in NAMES if in_half]
    with open(folder / EXAMPLES, "wb") as file:
        pickle.dump((standard, own, halved), file)


def try_into(folder: Path) -> None:
    """In this process, which has imported neither ONNX Runtime yet nor onnx: with onnx in memory it would take more
    than compiling a graph does.

    What is known is written as it comes, for whoever finds that this process has crashed.
    """
    standard, own, halved = pickle.loads((folder / EXAMPLES).read_bytes())
    (folder / EXAMPLES).unlink()
    give_back()  # what starting took, before ONNX Runtime is loaded
    import onnxruntime  # noqa: F401

    give_back()  # what loading it took
    expected = [_outputs(each) for each in standard]
    _write(Trial(None, None), folder)
    error, said = _judged(own, expected)
    _write(Trial(error, None, said), folder)
    if halved:
        half_error, said_then = _judged(halved, expected)
        _write(Trial(error, half_error, said or said_then), folder)


def _judged(examples: Sequence[Example], expected: Sequence[Mapping[str, np.ndarray]]) -> tuple[float | None, str]:
    """The largest difference, or None and what was said by what failed; KsmEdgeError for lack of memory."""
    try:
        found = [_difference(_outputs(each), right) for each, right in zip(examples, expected, strict=True)]
    except Exception as error:  # ONNX Runtime's own share no other base
        if isinstance(error, MemoryError) or "alloc" in str(error):
            raise KsmEdgeError(f"out of memory: {error}") from error
        return None, str(error).strip().split("\n")[0]
    return float(np.max(found)), ""  # NaN where one of them is


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
    error, half_error = (None if (found := table[name]) is None else float(found) for name in ("error", "half_error"))
    return Trial(error, half_error, str(table["said"]))


def _write(found: Trial, folder: Path) -> None:
    (folder / cache.DESCRIPTION).write_text(json.dumps(asdict(found)))


def _try_in_child(folder: Path) -> None:
    """KsmEdgeError where a process ended before it came to them, or otherwise than by what they are."""
    for step in STEPS:
        if (end := _end_of(step, folder)) is not None:
            how, said, is_theirs = end
            if not (is_theirs and (folder / cache.DESCRIPTION).exists()):  # which is first written when they run
                raise KsmEdgeError("\n".join([f"this project's operators could not be tried: the process {how}", said]))
            _write(replace(_read(folder), said=f"the process {how}"), folder)


def _end_of(step: str, folder: Path) -> tuple[str, str, bool] | None:
    """How a step in a process of its own ended, what that said, and whether what runs there may be why; None: well."""
    try:
        child = cache.child(__name__, step, str(folder), seconds=SECONDS)
    except subprocess.TimeoutExpired:
        return f"took more than {SECONDS} s", "", True
    if not (status := child.returncode):
        return None
    how = f"was ended by signal {-status}, {signal.strsignal(-status)}" if status < 0 else f"ended with {status}"
    return how, child.stderr.strip(), -status in CRASHES


def _main(step: str, folder: str) -> int:
    use_compact_heap()
    return cache.in_child(lambda: STEPS[step](Path(folder)))


STEPS = {"build": build_into, "try": try_into}

if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
