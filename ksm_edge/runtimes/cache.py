"""What ONNX Runtime makes of a graph on this machine, made once and kept.

Making it takes the onnx package and the optimiser some 50 MiB that running it does not need, so that happens in a
process of its own. What ONNX Runtime writes fits the processor it was written on, so the key names both; it never
becomes part of a bundle.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable
from contextlib import ExitStack, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

from ksm_edge.bundle.layers import Bundle
from ksm_edge.child import module_command
from ksm_edge.errors import KsmEdgeError, UnsupportedError
from ksm_edge.resources import cache_folder

DAY = 86_400  # seconds
KEPT = 24  # graphs in the cache, of a megabyte and more: an SD card is not to fill up with those of old releases
# A folder for each: the graph, its larger constants if it has any, and what describes them.
GRAPH, CONSTANTS, DESCRIPTION = "graph.onnx", "constants", "graph.json"
NOT_WHOLE = (OSError, ValueError, KeyError, TypeError, RecursionError)  # not there, or a power cut came between

T = TypeVar("T")


def found(key: str, read: Callable[[Path], T]) -> T | None:
    """What is kept under that key, read by `read`; None where that raises one of NOT_WHOLE."""
    target = _place(key)
    try:
        result = read(target)
    except NOT_WHOLE:
        return None
    with suppress(OSError):  # a cache that may only be read
        os.utime(target)  # used last
    return result


def found_or_made(key: str, read: Callable[[Path], T], make: Callable[[Path], None]) -> T:
    """The same, made by `make` in an empty folder first if need be."""
    if (result := found(key, read)) is not None:
        return result
    target = _place(key)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = tempfile.TemporaryDirectory(dir=target.parent, prefix=".new-")
    except OSError as error:
        raise KsmEdgeError(
            f"the cache folder {target.parent} cannot be written: {error.strerror}; give another one as KSM_EDGE_CACHE"
        ) from error
    with beside as folder:
        new = Path(folder, "graph")
        new.mkdir()
        make(new)
        if (result := found(key, read)) is not None:  # another process was quicker
            return result
        with suppress(FileNotFoundError):  # what is there is not whole
            os.rename(target, Path(folder, "damaged"))
        with suppress(OSError):  # another process was quicker even now
            os.rename(new, target)
    _evict(target)
    return read(target)


def hold(folder: Path, holder: object) -> None:
    """Keep `folder` from being evicted, by any process, while `holder` lives. OSError where it is not there."""
    file = open(folder / DESCRIPTION)  # noqa: SIM115 - closed with its holder
    weakref.finalize(holder, file.close)
    with suppress(OSError):  # a file system without locks
        fcntl.flock(file, fcntl.LOCK_SH)


def _remove_unless_held(folder: Path) -> None:
    with ExitStack() as until_removed:
        try:
            file = until_removed.enter_context(open(folder / DESCRIPTION))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        except OSError:  # half a graph, or a file system without locks
            pass
        shutil.rmtree(folder, ignore_errors=True)


def key_of(bundle: Bundle, *parts: str) -> str:
    """One key per backbone, processor, runtime and state of our own code, and per `parts`."""
    # The digest is over weights alone: the same ones may end at other features, or stand in another graph.
    graph = hashlib.sha256(bundle.graph_path.read_bytes()).hexdigest()
    return machine_key(bundle.digest, graph, repr(bundle.layers), *parts)


def machine_key(*parts: str) -> str:
    """The same without a backbone."""
    machine = [_runtime(), platform.machine(), _processor()]
    package = Path(__file__).parents[1]
    sources = [*sorted((package / "autodiff").glob("*.py")), *sorted(Path(__file__).parent.glob("*.py"))]
    texts = [*parts, *machine, *(source.read_text() for source in sources)]
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:32]


def make_in_child(module: str, bundle: Bundle, folder: Path, given: str = "") -> None:
    """Run MODULE with BUNDLE and FOLDER, and `given` as its input; what it says on failure is raised here."""
    made = child(module, str(bundle.path), str(folder), given=given)
    if made.returncode == UnsupportedError.exit_code:
        raise UnsupportedError(made.stderr.strip())
    if made.returncode:
        raise KsmEdgeError(f"{module}: nothing was made of {bundle.path}:\n{made.stderr.strip()}")


def child(module: str, *words: str, given: str = "", seconds: float | None = None) -> subprocess.CompletedProcess[str]:
    """What became of a process that ran MODULE with WORDS, and with `given` as its input.

    Raises subprocess.TimeoutExpired when it has not ended after so many seconds, and been killed.
    """
    command = module_command(module, *words)
    return subprocess.run(command, input=given, text=True, capture_output=True, check=False, timeout=seconds)


def in_child(make: Callable[[], object]) -> int:
    """The exit status of that process: `make`, with its errors said."""
    try:
        make()
    except KsmEdgeError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except OSError as error:  # the disk filled up meanwhile
        print(f"{error.filename or cache_folder()}: {error.strerror or error}", file=sys.stderr)
        return KsmEdgeError.exit_code
    return 0


def _place(key: str) -> Path:
    return cache_folder() / "graphs" / key


def _evict(newest: Path) -> None:
    """Leave `newest`, those beside it that were used last, and those that are held."""
    times = {}
    for path in newest.parent.iterdir():
        with suppress(OSError):  # another process evicts as well
            times[path] = path.stat().st_mtime
    # Not by the clock alone: a board without one may start years before its last run.
    times.setdefault(newest, max(times.values(), default=0.0))  # another process may have evicted even that
    graphs = [path for path in sorted(times, key=times.__getitem__) if not path.name.startswith(".") and path != newest]
    power_cuts = [path for path in times if path.name.startswith(".new-") and times[path] < times[newest] - DAY]
    for path in [*graphs[: max(0, len(graphs) + 1 - KEPT)], *power_cuts]:
        _remove_unless_held(path)


def _runtime() -> str:
    """The text that has ONNX Runtime's version. Importing it would take 20 MiB, beside a child that compiles.

    Packages of several names bring it, so none of them can be asked.
    """
    found = find_spec("onnxruntime")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("No module named 'onnxruntime'", name="onnxruntime")
    return Path(found.origin).read_text()


def _processor() -> str:
    """The processor's features and what it is called: an SD card may be moved to another board."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    told = ("flags", "Features", "model name", "CPU implementer", "CPU part")
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(told)))
