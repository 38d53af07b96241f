"""The runtimes a backbone can run in, by name; each is a module that is imported when it is asked for."""

from __future__ import annotations

import importlib
from typing import cast

from ksm_edge.errors import UnsupportedError, UsageError
from ksm_edge.runtimes.base import Runtime

RUNTIMES = {
    "executorch": "ksm_edge.runtimes.executorch",
    "onnxruntime": "ksm_edge.runtimes.onnxruntime",
    "pytorch": "ksm_edge.runtimes.pytorch",
    "reference": "ksm_edge.runtimes.reference",
}
DEFAULT = "onnxruntime"


def load_runtime(name: str = DEFAULT) -> Runtime:
    """The runtime of that name; UsageError if there is none, UnsupportedError if it cannot run here."""
    if name not in RUNTIMES:
        raise UsageError(f"runtime {name!r} is not known: choose from {', '.join(RUNTIMES)}")
    runtime = cast(Runtime, importlib.import_module(RUNTIMES[name]))
    if (reason := runtime.available()) is not None:
        raise UnsupportedError(f"runtime {name!r} cannot run here: {reason}")
    return runtime
