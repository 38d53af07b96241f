"""Which forms of the computation are the fastest on this machine, measured once and kept.

The usual ones were chosen on a few processors. One with fewer registers, smaller caches or a memory that is slow beside
its arithmetic may be quicker with others: they compute the same but for last bits. Each alternative is a whole gradient
graph, as what an operator takes depends on what its neighbours leave in the cache, and is timed as it would run: with
the plan's threads, and with an update; of images of two sizes, in those of the first epochs. The usual ones stay where
nothing else saves a thirtieth.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ksm_edge import native
from ksm_edge.autodiff.spec import FLOATS, HALVES, STANDARD, GradientSpec
from ksm_edge.bundle.digest import file_sha256
from ksm_edge.bundle.layers import Bundle
from ksm_edge.bundle.load import load_bundle
from ksm_edge.resident import use_compact_heap
from ksm_edge.runtimes import cache
from ksm_edge.runtimes.compile import CompiledGraph, compiled, spec_of, spec_table
from ksm_edge.runtimes.engine import Engine
from ksm_edge.training.settings import Settings
from ksm_edge.training.trainer import Trainer

# By what is said of them, what they change of a `GradientSpec`.
ALTERNATIVES: Mapping[str, Mapping[str, Any]] = {
    "standard operators": {"own": False, "products": STANDARD},
    "standard products": {"products": STANDARD},
    "this project's products": {"products": FLOATS},
    "no 1x1 convs along with depthwise ones": {"widened": False},
    "no convs by tiles": {"tile_bytes": 0},
    "larger convs by tiles": {"tile_bytes": 2**24},
}
USUAL = "the usual forms"
WORTH_IT = 29 / 30  # of the usual time
ROUNDS = 2  # every alternative once in each, so that a slow minute is not held against one of them
RUNS, SECONDS = 3, 0.5  # at least so many of runs and updates, and for so long


@dataclass(frozen=True)
class Tuned:
    """The fastest forms, and the milliseconds of an optimizer step by each that was tried."""

    name: str
    ms: Mapping[str, float]

    @property
    def share(self) -> float:
        """Of the usual forms' time."""
        return self.ms[self.name] / self.ms[USUAL]

    @classmethod
    def of(cls, ms: Mapping[str, float]) -> Tuned:
        """The usual forms, unless others are faster by more than a measurement errs."""
        best = min(ms, key=ms.__getitem__)
        return cls(best if ms[best] <= WORTH_IT * ms[USUAL] else USUAL, ms)


def forms_that_may_differ(usual: CompiledGraph) -> dict[str, Mapping[str, Any]]:
    """The usual ones, and of the alternatives those that are something else for this network and what it learns."""
    spec = usual.spec
    if not (spec.own and spec.trained):
        return {USUAL: {}}
    return {USUAL: {}, **{name: form for name, form in ALTERNATIVES.items() if _may_differ(spec, form)}}


def _may_differ(spec: GradientSpec, form: Mapping[str, Any]) -> bool:
    """A batch's own statistics go without tiles, in one run for all threads; halves were asked for."""
    if spec.products == HALVES and "products" in form:
        return False
    if spec.statistics == "batch" and form.get("products") == FLOATS:
        return False
    if not spec.tile_bytes and "tile_bytes" in form:
        return False
    return any(getattr(spec, part) != value for part, value in form.items())


def measured(bundle: Bundle, settings: Settings, engine: Engine, graphs: Mapping[str, CompiledGraph]) -> Tuned:
    """Of those graphs, the usual one among them, from the cache; measured in a process of its own first if need be.

    Where there is nothing to choose from, because no other may be measured or is another, that is said without.
    """
    digests: dict[str, str] = {}
    for name, graph in graphs.items():
        if (digest := file_sha256(graph.path)) not in digests.values():
            digests[name] = digest
    if USUAL not in graphs or len(digests) == 1:
        return Tuned(USUAL, {USUAL: float("nan")})
    # How long a step takes does not depend on how many classes there are.
    specs = {name: spec_table(graphs[name].spec) | {"classes": 2} for name in digests}
    given = {"specs": specs, "settings": asdict(settings), "engine": asdict(engine)}
    key = {**given, "settings": settings.batch, "operators": native.operators and file_sha256(Path(native.operators))}
    return cache.found_or_made(
        cache.key_of(bundle, json.dumps(key)),
        _read,
        lambda folder: cache.make_in_child(__name__, bundle, folder, json.dumps(given)),
    )


def _read(folder: Path) -> Tuned:
    """ValueError, KeyError or TypeError where that is not what `_main` wrote."""
    table = json.loads((folder / cache.DESCRIPTION).read_text())
    found = Tuned(table["name"], {name: float(ms) for name, ms in table["ms"].items()})
    if not {found.name, USUAL} <= found.ms.keys():
        raise ValueError(f"{folder}: {found.name} was never measured")
    return found


def measure(bundle: Bundle, settings: Settings, engine: Engine, specs: Mapping[str, GradientSpec]) -> Tuned:
    """A few steps by each of them."""
    ms = dict.fromkeys(specs, float("inf"))
    for _ in range(ROUNDS):
        for name, spec in specs.items():
            ms[name] = min(ms[name], _step_ms(bundle, compiled(bundle, spec), settings, engine))
    return Tuned.of(ms)


def _step_ms(bundle: Bundle, graph: CompiledGraph, settings: Settings, engine: Engine) -> float:
    """By a training of its own that is gone behind them: as many runs at once as the plan has, and an update."""
    trainer, spec = Trainer(bundle, graph, settings, steps=10**6, engine=engine), graph.spec
    images = engine.workers * spec.micro_batch
    rng, (_, *shape) = np.random.default_rng(0), graph.inputs["image"]
    seen = rng.standard_normal((images, *shape), np.float32)
    targets = np.full((images, spec.classes), 1 / (spec.classes * images), np.float32)
    runs, update = _fastest(lambda: trainer.accumulate(seen, targets), trainer.update)  # which uses up what is there
    return runs * max(1, settings.batch // images) + update


def _fastest(*calls: Callable[[], object]) -> list[float]:
    """Milliseconds of each, one behind the other; the first ones find nothing in its place yet."""
    times: list[list[float]] = []
    while len(times) <= RUNS or sum(map(sum, times[1:])) < SECONDS:
        times.append([_seconds(call) for call in calls])
    return [min(each) * 1e3 for each in zip(*times[1:], strict=True)]


def _seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _main(bundle_path: str, folder: str) -> int:
    given = json.loads(sys.stdin.read())

    def make() -> None:
        use_compact_heap()  # as a training, whose memory it was planned with
        specs = {name: spec_of(table) for name, table in given["specs"].items()}
        found = measure(load_bundle(bundle_path), Settings(**given["settings"]), Engine(**given["engine"]), specs)
        Path(folder, cache.DESCRIPTION).write_text(json.dumps(asdict(found)))

    return cache.in_child(make)


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
