"""How long a board takes for some work: its peak arithmetic and its memory, and how near to them an engine comes.

For each operator

    seconds = flops / (threads x clock x flop per cycle x share of the peak) + bytes x traffic / bandwidth + overhead

with a share of the peak for each kind of operator, as MobileNetV2 reaches a third of ResNet-50's rate on one and the
same processor. A sum, not the larger of the two: small cores wait for their memory rather than work meanwhile, and so
more threads shorten the first part alone, as published measurements show. Bandwidth is the geometric mean of what a
copy moves over the bus and what filling memory does, since kernels read and write.

The numbers of an engine are in `kernels.toml`, which `benchmarks/prediction.py` fits to measurements and writes.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ksm_edge.child import module_command
from ksm_edge.device import Device
from ksm_edge.errors import UsageError
from ksm_edge.profiler.work import Work

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TENSOR_BYTES = 4 << 20
UNKNOWN_CLOCK_MHZ = 2000
KERNELS = Path(__file__).with_name("kernels.toml")


@dataclass(frozen=True)
class Machine:
    """What the model needs to know of a processor."""

    clock_hz: float
    flop_per_second: float  # FP32, of one core at its peak
    bytes_per_second: float  # between processor and memory
    in_order: bool = False

    @staticmethod
    def of(device: Device) -> Machine:
        """As the profile declares it; UsageError where it lacks a number."""
        needed = ("clock_mhz", "flop_per_cycle", "copy_bytes_per_second", "set_bytes_per_second")
        if missing := [name for name in needed if not getattr(device, name)]:
            raise UsageError(f"{device.name} cannot be predicted: its profile does not say {', '.join(missing)}")
        clock = device.clock_mhz * 1e6
        bandwidth = _bandwidth(device.copy_bytes_per_second, device.set_bytes_per_second)
        return Machine(clock, clock * device.flop_per_cycle, bandwidth, device.in_order)

    @staticmethod
    def here(clock_mhz: int) -> Machine:
        """This one, measured in a process of one thread, which takes about a second."""
        environment = {**os.environ, **{f"{pool}_NUM_THREADS": "1" for pool in ("OMP", "OPENBLAS", "MKL")}}
        command = module_command("ksm_edge.profiler.roofline", str(1e6 * (clock_mhz or UNKNOWN_CLOCK_MHZ)))
        found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        return Machine(**json.loads(found))

    @staticmethod
    def measured(clock_hz: float) -> Machine:
        """This one: the best of a few matrix products, copies and fills.

        Blocks are as large as tensors between layers are, so that a large cache shows; boards have none that holds
        them. By as many threads as numpy was left when it was imported: see `here`.
        """
        side = 1024
        a, b = (np.random.default_rng(0).random((side, side), np.float32) for _ in range(2))
        out = np.empty_like(a)
        block, other = np.ones(TENSOR_BYTES, np.uint8), np.zeros(TENSOR_BYTES, np.uint8)
        flops = 2 * side**3 / _best_seconds(lambda: np.matmul(a, b, out=out))
        copied = block.size / _best_seconds(lambda: np.copyto(other, block))
        filled = block.size / _best_seconds(lambda: block.fill(1))
        return Machine(clock_hz, flops, _bandwidth(copied, filled))


@dataclass(frozen=True)
class Kernels:
    """How well an engine uses a processor."""

    name: str
    describes: str
    fitted_on: str
    dense: float  # share of the peak; above 1 where Winograd's algorithm saves operations
    pointwise: float
    depthwise: float
    traffic: float  # bytes moved for each byte counted
    overhead_cycles: float  # of an operator
    in_order: float  # of those shares, on a core that waits for its loads
    spread: float  # a factor: four of five predictions are within it of what was measured
    backward: float = 0.0  # training: time behind the forward pass, as a multiple of it, where it is not counted
    adaptation: float = 0.0  # what a gradient graph takes, as a multiple of what is counted; 0: none was measured
    adaptation_spread: float = 0.0  # the same as `spread` for that
    eager: bool = False  # nothing is fused

    @staticmethod
    def load(name: str) -> Kernels:
        """Those of that engine; UsageError for one that there are no numbers of."""
        table = tomllib.loads(KERNELS.read_text())
        if name not in table:
            raise UsageError(f"there are no numbers of the kernels of {name!r}: choose from {', '.join(table)}")
        return Kernels(name, **table[name])


def seconds(works: Iterable[Work], machine: Machine, kernels: Kernels, threads: int) -> list[float]:
    """Of each operator."""
    share = {"dense": kernels.dense, "pointwise": kernels.pointwise, "depthwise": kernels.depthwise, "memory": math.inf}
    peak = machine.flop_per_second * threads * (kernels.in_order if machine.in_order else 1)
    overhead = kernels.overhead_cycles / machine.clock_hz
    return [
        work.flops / (peak * share[work.kind]) + work.bytes * kernels.traffic / machine.bytes_per_second + overhead
        for work in works
    ]


def _bandwidth(copied: float, filled: float) -> float:
    return math.sqrt(2 * copied * filled)


def _best_seconds(run: Callable[[], object], times: int = 20) -> float:
    found = []
    for _ in range(times):
        began = time.perf_counter()
        run()
        found.append(time.perf_counter() - began)
    return min(found)


if __name__ == "__main__":
    print(json.dumps(vars(Machine.measured(float(sys.argv[1])))))
