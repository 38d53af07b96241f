"""Which forms of the computation are the fastest on this machine, measured once and kept.

The usual ones were chosen on a few processors. One with fewer registers, smaller caches or a memory that is slow beside
its arithmetic may be quicker with others: they compute the same but for last bits. Each alternative is a whole gradient
graph, as what an operator takes depends on what its neighbours leave in the cache. The usual ones stay where nothing
else saves a thirtieth; whoever wants the same bits everywhere does not ask.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ksm_edge.autodiff.spec import GradientSpec
from ksm_edge.bundle.layers import Bundle
from ksm_edge.bundle.load import load_bundle
from ksm_edge.runtimes import cache
from ksm_edge.runtimes.compile import CompiledGraph, compiled, spec_table
from ksm_edge.training.settings import Settings
from ksm_edge.training.trainer import Trainer, gradient_spec

# By what is said of them, what they change of a `GradientSpec`.
ALTERNATIVES: Mapping[str, Mapping[str, Any]] = {
    "standard operators": {"own": False},
    "no 1x1 convs along with depthwise ones": {"widened": False},
    "no convs by tiles": {"tile_bytes": 0},
    "larger convs by tiles": {"tile_bytes": 2**24},
}
USUAL = "the usual forms"
WORTH_IT = 29 / 30  # of the usual time
ROUNDS = 2  # every alternative once in each, so that a slow minute is not held against one of them
RUNS, SECONDS = 3, 0.5  # at least so many, and for so long


@dataclass(frozen=True)
class Tuned:
    """The fastest forms, and the milliseconds of a micro-batch by each that was tried."""

    name: str
    ms: Mapping[str, float]

    @property
    def form(self) -> Mapping[str, Any]:
        """What they change of a `GradientSpec`."""
        return ALTERNATIVES.get(self.name, {})

    @property
    def share(self) -> float:
        """Of the usual forms' time."""
        return self.ms[self.name] / self.ms[USUAL]

    @classmethod
    def of(cls, ms: Mapping[str, float]) -> Tuned:
        """The usual forms, unless others are faster by more than a measurement errs."""
        best = min(ms, key=ms.__getitem__)
        return cls(best if ms[best] <= WORTH_IT * ms[USUAL] else USUAL, ms)


def measured(bundle: Bundle, classes: int, settings: Settings, images: int) -> Tuned:
    """From the cache, measured in a process of its own first if need be; `images` go through at once."""
    given = json.dumps({"classes": classes, "images": images, "settings": asdict(settings)})
    usual = json.dumps(spec_table(gradient_spec(bundle, classes, settings, images)))
    return cache.found_or_made(
        cache.key_of(bundle, usual, json.dumps(ALTERNATIVES)),
        _read,
        lambda folder: cache.make_in_child(__name__, bundle, folder, given),
    )


def _read(folder: Path) -> Tuned:
    """ValueError, KeyError or TypeError where that is not what `_main` wrote."""
    table = json.loads((folder / cache.DESCRIPTION).read_text())
    found = Tuned(table["name"], {name: float(ms) for name, ms in table["ms"].items()})
    if not {found.name, USUAL} <= found.ms.keys():
        raise ValueError(f"{folder}: {found.name} was never measured")
    return found


def measure(bundle: Bundle, classes: int, settings: Settings, images: int) -> Tuned:
    """Run a micro-batch by each of the alternatives that differ here."""
    usual = gradient_spec(bundle, classes, settings, images)
    graphs = {USUAL: compiled(bundle, usual)}
    for name, changes in ALTERNATIVES.items():
        if _matters(changes, usual, graphs[USUAL]):
            graphs[name] = compiled(bundle, replace(usual, **changes))
    ms = dict.fromkeys(graphs, float("inf"))
    for _ in range(ROUNDS):
        for name, graph in graphs.items():
            ms[name] = min(ms[name], _run_ms(bundle, graph, settings))
    return Tuned.of(ms)


def _matters(changes: Mapping[str, Any], usual: GradientSpec, graph: CompiledGraph) -> bool:
    """Whether a graph is another with these changes, as far as can be told without making it."""
    forms = {form for name, form in graph.forms.items() if name in usual.trained}
    if any(getattr(usual, name) == value for name, value in changes.items()) or not (usual.own and forms):
        return False
    if "tile_bytes" in changes:
        may = usual.tile_bytes and not usual.per_weight
        return bool(may) and ("winograd" in forms if not changes["tile_bytes"] else "taps" in forms)
    return "channel" in forms if "widened" in changes else True


def _run_ms(bundle: Bundle, graph: CompiledGraph, settings: Settings) -> float:
    """The fastest of a few runs, by a training of its own that is gone behind them."""
    trainer, spec = Trainer(bundle, graph, settings, steps=1000), graph.spec
    images = np.random.default_rng(0).standard_normal(graph.inputs["image"]).astype(np.float32)
    targets = np.full((spec.micro_batch, spec.classes), 1 / (spec.classes * spec.micro_batch), np.float32)
    trainer.accumulate(images, targets)  # finds nothing in its place yet
    times: list[float] = []
    while len(times) < RUNS or sum(times) < SECONDS:
        began = time.perf_counter()
        trainer.accumulate(images, targets)
        times.append(time.perf_counter() - began)
    return min(times) * 1e3


def _main(bundle_path: str, folder: str) -> int:
    given = json.loads(sys.stdin.read())

    def make() -> None:
        settings = Settings(**given.pop("settings"))
        found = measure(load_bundle(bundle_path), settings=settings, **given)
        Path(folder, cache.DESCRIPTION).write_text(json.dumps(asdict(found)))

    return cache.in_child(make)


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
