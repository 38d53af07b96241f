"""The model of `ksm_edge.profiler.roofline`, fitted to times that were published or measured."""

from __future__ import annotations

import itertools
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    import numpy as np

    from ksm_edge.profiler.roofline import Kernels, Machine
    from ksm_edge.profiler.work import Work

PUBLISHED = Path(__file__).with_name("published.toml")
SIZE = 224
HOST = "this machine"
GPU = "jetson-nano, GPU"
# Linear layers behind the features of a network with ImageNet's 1000 classes: inputs, then outputs of each.
HEADS = {
    "mobilenet_v2": (1280, 1000),
    "mobilenet_v2_half": (1280, 1000),
    "mobilenet_v3_large": (960, 1280, 1000),
    "resnet50": (2048, 1000),
    "vgg16_bn": (25088, 4096, 4096, 1000),
}


@dataclass(frozen=True)
class Row:
    """One published or measured time."""

    board: str
    kernels: str
    threads: int
    network: str
    ms: float
    half: bool = False
    training: bool = False  # all weights, against the forward pass alone
    source: str = ""


# Published rows


def read_published() -> tuple[list[Row], list[Row]]:
    """Latencies, and training times an image."""
    table = tomllib.loads(PUBLISHED.read_text())
    rows = []
    for entry in table["rows"]:
        for network in HEADS.keys() & entry.keys():
            for threads, ms in zip(entry["threads"], entry[network], strict=True):
                half = entry.get("half", False)
                rows.append(Row(entry["board"], entry["kernels"], threads, network, ms, half, source=entry["source"]))
    training = []
    for entry in table["training"]:
        for network in HEADS.keys() & entry.keys():
            for all_weights, seconds in zip((True, False), entry[network], strict=True):
                ms = 1e3 * seconds / entry["batch"]
                row = Row(entry["board"], entry["kernels"], entry["threads"], network, ms, source=entry["source"])
                training.append(replace(row, training=all_weights))
    order = lambda row: (row.source, row.network, row.threads, not row.training)  # noqa: E731
    return sorted(rows, key=order), sorted(training, key=order)


def read_gpu() -> list[Row]:
    """Latencies of the one GPU that some are published of."""
    entry = _gpu()
    names = sorted(HEADS.keys() & entry.keys())
    return [Row(GPU, "ncnn", 1, name, entry[name], source=entry["source"]) for name in names]


def gpu_machine() -> Machine:
    """All its cores as one, and the bus that it shares."""
    from ksm_edge.profiler.roofline import Machine

    entry = _gpu()
    return Machine(entry["clock_hz"], entry["flop_per_second"], entry["bytes_per_second"])


def _gpu() -> dict[str, Any]:
    return dict(tomllib.loads(PUBLISHED.read_text())["gpu"])


# Work


@cache
def work_of(network: str, eager: bool, with_head: bool) -> tuple[Work, ...]:
    """Of one image through a whole network, from its recipe's weightless graph."""
    import onnx

    from ksm_edge.bundle.recipe import load_recipe
    from ksm_edge.profiler.work import graph_work, linear_work

    model = onnx.load(load_recipe(network.removesuffix("_half")).graph_path)
    if network.endswith("_half"):
        _halve(model)
    works = [work for work in graph_work(model, SIZE, eager=eager) if work.operator != "Gemm"]
    sides = HEADS[network] if with_head else ()
    return (*works, *(linear_work(f"head.{i}", *pair) for i, pair in enumerate(itertools.pairwise(sides))))


def _halve(model: Any) -> None:
    """MobileNetV2 of half the width: channels halved and rounded to 8 as its authors do, the last ones kept.

    A block widens its input six times, so it is the input that is rounded.
    """
    filters = {}
    for value in model.graph.input[1:]:
        sides = value.type.tensor_type.shape.dim
        widened = re.match(r"features\.(?!1\.)\d+\.conv\.([012])\.", value.name)
        for place, side in enumerate(sides[:2]):
            inside = widened is not None and (place == 1) == (widened[1] == "2")
            if side.dim_value not in (1, 3, 1280):
                side.dim_value = 6 * _rounded(side.dim_value / 12) if inside else _rounded(side.dim_value / 2)
        filters[value.name] = sides[0].dim_value
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "group" and attribute.i > 1:
                attribute.i = filters[node.input[1]]


def _rounded(channels: float) -> int:
    whole = max(8, int(channels + 4) // 8 * 8)
    return whole + 8 if whole < 0.9 * channels else whole


# Fitting


@dataclass(frozen=True)
class Prior:
    """What is thought of a number before any row is seen, and by what factor it may well be off."""

    value: float
    factor: float


# In-order cores: a 128-bit load takes the only load pipe two cycles, so that half the peak is what can be hoped for.
PRIORS = {
    "dense": Prior(0.8, 2),
    "pointwise": Prior(0.5, 2),
    "depthwise": Prior(0.2, 2.7),
    "traffic": Prior(1, 2.7),
    "overhead_cycles": Prior(10_000, 1.6),
    "in_order": Prior(0.5, 1.3),
    "onnxruntime": Prior(1, 1.6),  # its shares, all but that of dense convs, as a multiple of ncnn's
    "onnxruntime.dense": Prior(1, 1.6),
}
# torch multiplies matrices with BLAS, which reaches 0.41 of this board's peak in HPL (11.9 of 28.8 GFLOP/s in FP64).
EAGER = {
    "dense": Prior(0.41, 1.5),  # of 1x1 convs too: both are matrix products
    "depthwise": Prior(0.02, 2.7),
    "traffic": Prior(2, 1.65),
    "overhead_cycles": Prior(50_000, 1.65),
    "backward": Prior(1.2, 1.35),
}
# Vulkan's kernels on one GPU.
GRAPHICS = {
    "dense": Prior(0.8, 2),
    "pointwise": Prior(0.5, 2),
    "depthwise": Prior(0.2, 2.7),
    "traffic": Prior(1, 2.7),
    "overhead_cycles": Prior(10_000, 2.7),
}
ROW_FACTOR = 1.28  # that a row may well be off by


class Fitting:
    """The model's numbers by least squares on the logarithms of times, with priors."""

    def __init__(self, machines: dict[str, Machine], priors: dict[str, Prior] = PRIORS) -> None:
        self._machines, self._priors = machines, priors

    def fit(self, rows: Sequence[Row]) -> dict[str, float]:
        """Gauss-Newton with damping."""
        import numpy as np

        start = np.array([math.log(prior.value) for prior in self._priors.values()])
        widths = np.array([math.log(prior.factor) for prior in self._priors.values()])

        def residuals(x: np.ndarray) -> np.ndarray:
            numbers = self._numbers(x)
            off = [math.log(self.predicted(row, numbers) / row.ms) / math.log(ROW_FACTOR) for row in rows]
            return np.array([*off, *((x - start) / widths)])

        x, found, damping = start, residuals(start), 1e-3
        for _ in range(60):
            slopes = np.array([(residuals(x + step) - found) / 1e-4 for step in 1e-4 * np.eye(len(x))]).T
            step = np.linalg.solve(slopes.T @ slopes + damping * np.eye(len(x)), -slopes.T @ found)
            tried = residuals(x + step)
            if tried @ tried < found @ found:
                x, found, damping = x + step, tried, damping / 3
            else:
                damping *= 4
        return self._numbers(x)

    def leave_one_out(
        self, rows: Sequence[Row], group: Callable[[Row], str], keep: str | None = None
    ) -> list[tuple[Row, float]]:
        """Each row with its prediction by a fit without its group; `keep` names a group that is always fitted on."""
        pairs = []
        for name in dict.fromkeys(map(group, rows)):
            if name != keep:
                numbers = self.fit([row for row in rows if group(row) != name])
                pairs += [(row, self.predicted(row, numbers)) for row in rows if group(row) == name]
        return pairs

    def predicted(self, row: Row, numbers: dict[str, float]) -> float:
        """Milliseconds."""
        from ksm_edge.profiler.roofline import seconds

        kernels = as_kernels(numbers, row.kernels)
        machine = self._halved(row)
        works = work_of(row.network, kernels.eager, row.board != HOST)
        forward = 1e3 * sum(seconds(works, machine, kernels, row.threads))
        return forward * (1 + kernels.backward if row.training else 1)

    def machine(self, board: str) -> Machine:
        """Of a board's profile, or measured."""
        from ksm_edge.device import Device
        from ksm_edge.profiler.roofline import Machine

        if board not in self._machines:
            self._machines[board] = Machine.of(Device.load(board))
        return self._machines[board]

    def _halved(self, row: Row) -> Machine:
        machine = self.machine(row.board)
        if not row.half:
            return machine
        # Twice the operations a cycle, and half the bytes.
        rates = {name: 2 * getattr(machine, name) for name in ("flop_per_second", "bytes_per_second")}
        return replace(machine, **rates)

    def _numbers(self, x: np.ndarray) -> dict[str, float]:
        return {name: math.exp(value) for name, value in zip(self._priors, x, strict=True)}


def as_kernels(numbers: dict[str, float], name: str, **more: Any) -> Kernels:
    """The numbers as one engine's."""
    from ksm_edge.profiler.roofline import Kernels

    if "backward" in numbers:
        shares = {"dense": numbers["dense"], "pointwise": numbers["dense"], "depthwise": numbers["depthwise"]}
        more |= {"backward": numbers["backward"], "eager": True}
    else:
        scale = numbers["onnxruntime"] if name == "onnxruntime" else 1.0
        dense = numbers["onnxruntime.dense"] if name == "onnxruntime" else 1.0
        shares = {
            "dense": dense * numbers["dense"],
            "pointwise": scale * numbers["pointwise"],
            "depthwise": scale * numbers["depthwise"],
        }
    rest = {"traffic": numbers["traffic"], "overhead_cycles": numbers["overhead_cycles"]}
    given = {"describes": "", "fitted_on": "", "spread": 1.0, "in_order": numbers.get("in_order", 0.5), **more}
    return Kernels(name, **shares, **rest, **given)
